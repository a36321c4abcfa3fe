# %% [markdown]
# # 3. Nearest-neighbour lookup
#
# **15 minutes. You need:** exercise 2. **You learn:** how embeddings become tokens again.
#
# The refiner's embeddings lie anywhere between the codes. To decode them, each is replaced by the code that
# points in the most similar direction. The tokenizer finds the token of a patch in the same way.
#
# $$y'_t = \arg\max_v \, \cos(e'_t,\, \text{codebook}_v)$$
#
# **Write** `nearest_code(embeddings, codebook)`.
#
# - `embeddings`: float32 `(..., D)`, any number of leading dimensions, also none. Of any norm.
# - `codebook`: float32 `(V, D)`, V codes. **Not** of unit norm here.
# - The result: tokens of shape `(...)`, type `torch.int64` (long), from 0 to V - 1. If two codes are equally
#   near, either will do.
#
# It is [`nearest_code` in `vsr.py`](../../vsr.py). Try first, then compare.
#
# <details><summary>Hint</summary>
#
# `embeddings @ something.T` gives all dot products at once, `(..., V)`. A long code wins a dot product
# against a short one that is nearer in direction. Does the length of the embedding matter for the winner,
# too?
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


# %%
def nearest_code(embeddings: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The code of largest cosine: embeddings (..., D), codebook (V, D) of any norm -> tokens (...) long."""
    # BEGIN SOLUTION
    cosine = embeddings @ F.normalize(codebook, dim=-1).T  # (..., V), times the embedding's length
    return cosine.argmax(-1)
    # END SOLUTION


# %%
from checks import check_nearest_code

check_nearest_code(nearest_code)

# %% [markdown]
# A codebook of seven codes in the plane (D = 2). Each point has the colour of its nearest code: under the
# cosine the regions are wedges, however long the codes are.

# %%
codebook = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))  # (V, D)
axis_points = torch.linspace(-3, 3, 120)
x, y = torch.meshgrid(axis_points, axis_points, indexing="xy")
tokens = nearest_code(torch.stack([x, y], dim=-1), codebook)  # (120, 120)
figure, axis = plt.subplots(figsize=(4, 4), layout="constrained")
axis.imshow(tokens.numpy(), extent=(-3, 3, -3, 3), origin="lower", cmap="tab10", vmin=0, vmax=9, alpha=0.5)
axis.scatter(*codebook.T, c=range(7), cmap="tab10", vmin=0, vmax=9, edgecolors="black")
axis.set(
    xlabel="first number of the embedding", ylabel="second number", title="nearest code under the cosine"
)
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# [`nearest_code` in `vsr.py`](../../vsr.py) decodes refined embeddings, always in float32: in bfloat16 near
# codes are one and the same number. [`Codebook` in `vqgan.py`](../../vqgan.py) has the tokenizer's lookup,
# `nearest`.
#
# **Go further.** Draw the same picture for the dot product and for the distance. For which codebooks are the
# three pictures equal?
