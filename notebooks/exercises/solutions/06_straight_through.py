# %% [markdown]
# # 6. The straight-through estimator
#
# **20 minutes. You need:** exercise 3, and how autograd works. **You learn:** how an encoder learns through a
# lookup.
#
# The tokenizer replaces the encoder's output $z$ by its nearest code $e$, and the decoder sees $e$. The
# lookup is an argmax: a small change of $z$ changes nothing, or it jumps to another code. So its gradient is
# zero almost everywhere, and the encoder would never learn. The straight-through estimator cheats: forwards
# it gives the code, backwards it pretends to have done nothing.
#
# $$q = e \quad \text{forwards}, \qquad
# \frac{\partial q}{\partial z} = I, \quad \frac{\partial q}{\partial e} = 0 \quad \text{backwards}$$
#
# **Write** `straight_through(z, e)`.
#
# - `z`: float32 `(..., D)`, what the encoder gave. `e`: the same shape, the nearest code of each vector of
#   `z`. The lookup itself is done already.
# - The result: `(..., D)`, with the values of `e` (up to rounding). The gradient that arrives at it goes to
#   `z` unchanged. No gradient reaches `e`: the codes have losses of their own, in exercise 7.
#
# It is one line of [`Codebook` in `vqgan.py`](../../vqgan.py). Try first, then compare.
#
# <details><summary>Hint</summary>
#
# `x.detach()` has the values of `x`, and no gradient passes through it. Write `e` as `z` plus a difference.
# Which of the two terms may carry a gradient?
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

import vsr


# %%
def straight_through(z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Forwards e, backwards the identity on z: z, e (..., D) -> (..., D)."""
    # BEGIN SOLUTION
    return z + (e - z).detach()
    # END SOLUTION


# %%
from checks import check_straight_through

check_straight_through(straight_through)

# %% [markdown]
# See it at work. One vector $z$ is to be moved so that its code comes near the target. The loss is a function
# of the code alone, and still $z$ moves, until another code is the nearest.

# %%
codebook = torch.tensor([[1.0, 0.0], [0.7, 0.7], [0.0, 1.0], [-0.7, 0.7]])  # (V, D)
target = torch.tensor([-0.2, 1.0])  # (D,)
z = torch.tensor([1.1, 0.2], requires_grad=True)  # (D,)
path, losses = [], []
for _ in range(12):
    e = codebook[vsr.nearest_code(z.detach(), codebook)]  # (D,)
    loss = (straight_through(z, e) - target).square().sum()
    (slope,) = torch.autograd.grad(loss, z)
    path.append(z.detach().clone())
    losses.append(loss.item())
    z = (z - 0.05 * slope).detach().requires_grad_()
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
left.plot(*torch.stack(path).T, "o-", markersize=3, label="z")
left.scatter(*codebook.T, color="black", label="codes")
left.scatter(*target, marker="*", s=120, label="target")
left.set(xlabel="first number", ylabel="second number", title="z moves although only its code counts")
left.legend()
right.plot(losses, "o-")
right.set(xlabel="step", ylabel="loss", title="the loss falls when the code changes")
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# The last lines of `forward` of [`Codebook` in `vqgan.py`](../../vqgan.py). Its gradient is tested in
# [`tests/test_vqgan.py`](../../tests/test_vqgan.py).
#
# **Go further.** The gradient belongs to $e$, but is applied to $z$. When is that a good guess, and when a
# bad one? Think of the distance between the two, and then of exercise 7.
