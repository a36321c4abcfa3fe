# %% [markdown]
# # 15. A residual refiner
#
# **50 minutes. You need:** exercises 2, 3 and 5. **You learn:** the heart of the method.
#
# The backbone wrote $N$ tokens one after the other, with its mistakes. The refiner reads the embeddings of
# **all** of them at once, those that come later as well, and says by how much each has to move. It is
# residual: it adds to what it was given. Its last layer starts at zero, so untrained it changes nothing and
# cannot make things worse.
#
# $$\bar e = \frac{e_\text{seq}}{\|e_\text{seq}\|}, \qquad
# e'_\text{seq} = \frac{\bar e + g_\phi(\bar e)}{\|\bar e + g_\phi(\bar e)\|}, \qquad
# g_\phi = 0 \text{ before training}$$
#
# The norms are those of the single vectors, one a position.
#
# **Write** the class `TinyRefiner`.
#
# - `TinyRefiner(grid, code_dim, width=32, heads=4)`: `grid` is `(h, w)`, the N = h * w tokens of an image in
#   raster order. `code_dim` is D. `width` is the size of a hidden state and a multiple of `heads`.
# - Inside, $g_\phi$: a linear layer D -> width, two Transformer blocks in which every position sees all
#   positions, and a linear layer width -> D, whose weight and bias start at zero.
#   `vsr.Block(width, heads, dropout, grid)` is such a block; given a grid it is bidirectional and knows where
#   each position lies. Use dropout 0.
# - `forward(embeddings)`: float32 `(B, N, D)` of any norm -> $e'_\text{seq}$, float32 `(B, N, D)`, unit norm.
#
# The check trains it for 60 steps, which takes a second. It is [`Refiner` in `vsr.py`](../../vsr.py). Try
# first, then compare.
#
# <details><summary>Hint</summary>
#
# `F.normalize(x, dim=-1)`, twice. `nn.init.zeros_(layer.weight)`. Layers in a plain Python list are found by
# no optimizer: use `nn.ModuleList` or `nn.Sequential`. Without `grid` a `vsr.Block` is causal.
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
import torch.nn as nn
import torch.nn.functional as F

import vsr


# %%
class TinyRefiner(nn.Module):
    """Moves all N embeddings of an image at once, and starts at the identity."""

    def __init__(self, grid: tuple[int, int], code_dim: int, width: int = 32, heads: int = 4):
        """grid (h, w), N = h * w; code_dim D"""
        super().__init__()
        # BEGIN SOLUTION
        self.read = nn.Linear(code_dim, width)
        self.blocks = nn.Sequential(*[vsr.Block(width, heads, 0.0, grid) for _ in range(2)])
        self.move = nn.Linear(width, code_dim)
        nn.init.zeros_(self.move.weight)
        nn.init.zeros_(self.move.bias)
        # END SOLUTION

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """embeddings (B, N, D) of any norm -> refined (B, N, D), unit norm"""
        # BEGIN SOLUTION
        embeddings = F.normalize(embeddings, dim=-1)
        moves = self.move(self.blocks(self.read(embeddings)))  # (B, N, D)
        return F.normalize(embeddings + moves, dim=-1)
        # END SOLUTION


# %%
from checks import check_residual_refiner

check_residual_refiner(TinyRefiner)

# %% [markdown]
# Train yours on a small world: in the truth every row of the image has one code, and in what was generated
# about a quarter of the tokens is wrong. Which ones are wrong can only be told from the rest of their row.

# %%
torch.manual_seed(0)
h, w, V, D = 4, 4, 8, 8
codebook = F.normalize(torch.randn(V, D), dim=-1)


def make_rollouts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated tokens and true tokens, (count, N) each."""
    truth = torch.randint(V, (count, h, 1)).expand(count, h, w).flatten(1)  # (count, N)
    wrong = torch.rand(count, h * w) < 0.3
    return torch.where(wrong, torch.randint(V, (count, h * w)), truth), truth


refiner = TinyRefiner((h, w), D)
optimizer = torch.optim.AdamW(refiner.parameters(), lr=5e-3)
losses = []
for _ in range(120):
    tokens, truth = make_rollouts(32)
    loss = vsr.cosine_loss(refiner(codebook[tokens]), codebook[truth])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

tokens, truth = make_rollouts(256)
with torch.no_grad():
    refined = vsr.nearest_code(refiner(codebook[tokens]), codebook)  # (256, N)
print(
    f"tokens right before {(tokens == truth).float().mean():.3f}, after "
    f"{(refined == truth).float().mean():.3f}"
)
figure, axes = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained")
axes[0].plot(losses)
axes[0].set(xlabel="step", ylabel="cosine loss")
for axis, name, picture in zip(
    axes[1:], ("generated", "refined", "truth"), (tokens, refined, truth), strict=True
):
    axis.imshow(picture[0].view(h, w).numpy(), cmap="tab10", vmin=0, vmax=9)
    axis.set(title=name, xlabel="column of tokens", ylabel="row of tokens")
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# [`Refiner` in `vsr.py`](../../vsr.py) has a norm before its last layer, embeddings of row and column, and
# reads the backbone's hidden states as well if it is told to: those over the query, or those that wrote the
# tokens. Its loss is [`cosine_loss` in `vsr.py`](../../vsr.py), and `train_refiner` in
# [`train_refiner.py`](../../train_refiner.py) trains it on rollouts of the frozen backbone.
#
# **Go further.** Make the blocks causal (leave out `grid`, and add an embedding of the place instead) and
# train again: which positions of a row suffer? Leave out the residual: how many more steps does it take to be
# as good as doing nothing?
