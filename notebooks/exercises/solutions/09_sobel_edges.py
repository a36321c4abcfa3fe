# %% [markdown]
# # 9. Sobel edges
#
# **25 minutes. You need:** convolutions, or slices. **You learn:** how one of the three tasks is made,
# exactly.
#
# One task of the visual sentences is edge detection: the target image is the edge map of the source. The map
# is computed with Sobel's two filters, so the true target of any picture is known exactly and costs nothing.
#
# $$g_x = I * \tfrac14 \begin{pmatrix} 1 & 0 & -1 \\ 2 & 0 & -2 \\ 1 & 0 & -1 \end{pmatrix}, \qquad
# g_y = I * \tfrac14 \begin{pmatrix} 1 & 2 & 1 \\ 0 & 0 & 0 \\ -1 & -2 & -1 \end{pmatrix}, \qquad
# s = \min\!\Big(1,\; \max_\text{channels} \sqrt{g_x^2 + g_y^2}\Big)$$
#
# **Write** `sobel_edges(images)`.
#
# - `images`: float32 `(B, 3, H, W)` in [-1, 1], RGB. Leave them as they are.
# - Outside the image its border pixels are repeated, so that the border of a flat image is no edge.
# - The filters run over each channel on its own; their signs make no difference. The length is taken channel
#   by channel, then the largest of the three.
# - The result: the map $2s - 1$, black (-1) where nothing changes and white (1) where the strength $s$
#   reaches 1, as three equal channels: float32 `(B, 3, H, W)`. With the factor 1/4 a straight step of height
#   $h$ has the strength $h$.
#
# It is [`edges` in `data.py`](../../data.py). Try first, then compare.
#
# <details><summary>Hint</summary>
#
# `F.pad(images, (1, 1, 1, 1), mode="replicate")` repeats the border. Then either `F.conv2d` with `groups=3`,
# or sums of shifted slices: `padded[..., :, 2:] - padded[..., :, :-2]` is the difference of a pixel's two
# neighbours in its row.
#
# </details>

# %%
import sys
from pathlib import Path

root = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "vsr.py").is_file())
sys.path[:0] = [str(root), str(root / "notebooks" / "exercises")]

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import data


# %%
def sobel_edges(images: torch.Tensor) -> torch.Tensor:
    """The edge map of RGB images: (B, 3, H, W) in [-1, 1] -> the same, three equal channels."""
    # BEGIN SOLUTION
    across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]) / 4
    kernels = torch.stack([across, across.T])[:, None].repeat(
        3, 1, 1, 1
    )  # (6, 1, 3, 3): g_x and g_y of each channel
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")  # (B, 3, H+2, W+2)
    gradients = F.conv2d(padded, kernels, groups=3).unflatten(1, (3, 2))  # (B, 3, 2, H, W)
    strength = gradients.norm(dim=2).amax(1, keepdim=True).clamp(max=1)  # (B, 1, H, W)
    return (2 * strength - 1).repeat(1, 3, 1, 1)
    # END SOLUTION


# %%
from checks import check_sobel_edges

check_sobel_edges(sobel_edges)

# %%
sentences = data.Sentences(data.DataConfig())
scenes = sentences.scenes("val", 2, torch.Generator().manual_seed(0)).flatten(0, 1)  # (4, 3, 32, 32)
figure, axes = plt.subplots(2, 4, figsize=(8, 4.2), layout="constrained")
for column, (scene, edge_map) in enumerate(zip(scenes, sobel_edges(scenes), strict=True)):
    for row, picture in enumerate((scene, edge_map)):
        axes[row, column].imshow(data.to_uint8(picture).permute(1, 2, 0).numpy())
        axes[row, column].set_xlabel("column in pixels")
axes[0, 0].set_ylabel("scene, row in pixels")
axes[1, 0].set_ylabel("edges, row in pixels")
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# [`edges` in `data.py`](../../data.py) has no convolution: it adds shifted slices, because a convolution may
# add in another order on another machine, and the data is to be the same everywhere.
#
# **Go further.** The strength is cut off at 1. How many pixels of the scenes above does that concern? What
# would an edge map of the grey image miss?
