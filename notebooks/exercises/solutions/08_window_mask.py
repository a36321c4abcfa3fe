# %% [markdown]
# # 8. Attention in a window
#
# **25 minutes. You need:** exercise 5. **You learn:** how to ask how far a refiner has to see.
#
# The refiner's attention has no causal mask: every position sees the whole image. Does it need to? To find
# out, hide all keys that are far away, train again, and compare. Near and far are meant on the grid of
# tokens, which is written row by row: position $t$ lies in row $\lfloor t / w \rfloor$ and column
# $t \bmod w$. The mask is added to the scores before the softmax, so 0 changes nothing and minus infinity
# hides a key.
#
# $$m_{t,s} = 0 \text{ if } |\text{row}_t - \text{row}_s| \le r \text{ and }
# |\text{column}_t - \text{column}_s| \le r, \qquad m_{t,s} = -\infty \text{ otherwise}$$
#
# **Write** `window_mask(grid, radius)`.
#
# - `grid`: `(h, w)`, two ints, rows and columns of tokens. They need not be equal. N = h * w.
# - `radius`: $r$, an int, 0 or more. With 0 a position sees itself alone.
# - The result: float32 `(N, N)`, entry `[t, s]` for the query at position t and the key at position s: 0.0
#   where it may look, `-torch.inf` elsewhere. Nothing goes on beyond the borders.
#
# It is part of [`WindowBias` in `window.py`](../../studies/window.py). Try first, then compare.
#
# <details><summary>Hint</summary>
#
# `place = torch.arange(h * w)` has all positions, `place // w` their rows and `place % w` their columns. The
# difference of all pairs is `row[:, None] - row`, `(N, N)`.
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


# %%
def window_mask(grid: tuple[int, int], radius: int) -> torch.Tensor:
    """grid (h, w), N = h * w -> (N, N): 0 for keys at most `radius` rows and columns away, else -inf."""
    # BEGIN SOLUTION
    h, w = grid
    place = torch.arange(h * w)
    row, column = place // w, place % w  # (N,) each
    down, across = (row[:, None] - row).abs(), (column[:, None] - column).abs()  # (N, N) each
    return torch.zeros(h * w, h * w).masked_fill(torch.maximum(down, across) > radius, -torch.inf)
    # END SOLUTION


# %%
from checks import check_window_mask

check_window_mask(window_mask)

# %% [markdown]
# One block looks `radius` far. But a Transformer has several. What a position's neighbour has read in the
# first block, the position reads from its neighbour in the second. So after k blocks it has heard of places
# that lie k * `radius` away. Below, from how many paths the framed position hears of each place.

# %%
h, w, radius = 8, 8, 1
sees = (window_mask((h, w), radius) == 0).float()  # (N, N)
figure, axes = plt.subplots(2, 3, figsize=(7, 4.8), layout="constrained")
for row, t in zip(axes, (27, 7), strict=True):  # one in the middle, one in a corner
    heard = torch.eye(h * w)
    for blocks, axis in enumerate(row, 1):
        heard = heard @ sees  # (N, N): [t, s] counts the paths from s to t
        axis.imshow(heard[t].view(h, w).numpy())
        axis.add_patch(plt.Rectangle((t % w - 0.5, t // w - 0.5), 1, 1, fill=False, edgecolor="red"))
        axis.set(xlabel="column of tokens", xticks=range(0, w, 2), yticks=range(0, h, 2))
        axis.set_title(f"{blocks} block{'s' * (blocks > 1)}: {(heard[t] > 0).sum()} of {h * w}")
    row[0].set_ylabel("row of tokens")
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# [`WindowBias` in `window.py`](../../studies/window.py) adds this mask to the learnt bias of
# [`RelativeBias` in `vsr.py`](../../vsr.py), and the study trains refiners with windows of several sizes. The
# shipped refiners have three blocks on a grid of 8 x 8.
#
# **Go further.** With three blocks, which radius is the smallest with which every position hears of every
# other? The pictures count paths: far places have fewer. What does that mean for how much of them arrives?
# Suppose a refiner with radius 1 does nearly as well as one that sees all: name two explanations, and an
# experiment that tells them apart. Then look at *Is it global?* in
# [the evidence](../../results/README.md).
