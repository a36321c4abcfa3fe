# %% [markdown]
# # 2. The cosine loss
#
# **10 minutes. You need:** nothing yet. **You learn:** what the refiner is trained on.
#
# The refiner gives one embedding $e'_t$ for each of the $N$ positions of an image. The target $e^*_t$ is the
# codebook's embedding of the true token. Codes are compared by their direction, so the loss looks only at the
# angle between the two.
#
# $$\mathcal{L} = \frac{1}{BN} \sum_{b,t} \big(1 - \cos(e'_{b,t},\, e^*_{b,t})\big), \qquad
# \cos(a, b) = \frac{\langle a, b \rangle}{\|a\| \, \|b\|}$$
#
# **Write** `cosine_loss(refined, target)`.
#
# - `refined`, `target`: float32 `(B, N, D)`, B images, N positions, D numbers a vector. Of any norm, not
#   unit norm.
# - The result: a float32 tensor of shape `()`, from 0 (all directions equal) to 2 (all opposite), the mean
#   over all positions of all images. Gradients must reach `refined`.
# - A vector of length zero has no direction. Count its cosine as 0; the loss must not become NaN.
#
# It is [`cosine_loss` in `vsr.py`](../../vsr.py). Try first, then compare.
#
# <details><summary>Hint</summary>
#
# `F.normalize` and `F.cosine_similarity` both divide by at least a tiny number, so zero vectors are safe.
# Both work along `dim=1` unless you say otherwise. Which dimension holds the D numbers of a vector?
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
def cosine_loss(refined: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over all positions of 1 - cos: refined, target (B, N, D) -> () in [0, 2]."""
    # BEGIN SOLUTION
    return (1 - F.cosine_similarity(refined, target, dim=-1)).mean()
    # END SOLUTION


# %%
from checks import check_cosine_loss

check_cosine_loss(cosine_loss)

# %% [markdown]
# What the loss and the squared distance say of a vector that is turned away from its target. Solid lines: it
# is as long as the target. Dashed lines: it is twice as long. The distance minds, the cosine does not.

# %%
angle = torch.linspace(0, torch.pi, 60)
target = torch.tensor([[[1.0, 0.0]]])  # (1, 1, 2)
turned = torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None, None]  # (60, 1, 1, 2)
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for length, style, width in ((1, "-", 4), (2, "--", 1.5)):
    cosine = [cosine_loss(length * v, target) for v in turned]
    axis.plot(
        angle.rad2deg(),
        cosine,
        style,
        color="C0",
        linewidth=width,
        alpha=0.6,
        label=f"cosine loss, length {length}",
    )
    squared = (length * turned - target).square().sum(-1).flatten()
    axis.plot(angle.rad2deg(), squared, style, color="C1", label=f"squared distance, length {length}")
axis.set(xlabel="angle to the target in degrees", ylabel="loss")
axis.legend()
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# [`cosine_loss` in `vsr.py`](../../vsr.py) is the loss of `train_refiner` in
# [`train_refiner.py`](../../train_refiner.py). [`cosine_error` in `vsr.py`](../../vsr.py) is the same measure
# between two codes; the tables report it.
#
# **Go further.** For unit vectors the squared distance is $2(1 - \cos)$. Show it on paper, then with code.
# What is the angle between the gradient of the loss and $e'_t$ itself, and why is it always the same?
