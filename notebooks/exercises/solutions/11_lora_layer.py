# %% [markdown]
# # 11. A LoRA layer
#
# **35 minutes. You need:** `nn.Module`. **You learn:** a rival of the refiner.
#
# Is a refiner needed, or would a little fine-tuning of the backbone do as well? To ask that fairly the
# backbone is tuned with few new parameters. LoRA leaves the weight $W$ of a linear layer frozen and learns a
# change of low rank $r$, the product of two thin matrices.
#
# $$y = x W^\top + b + x (B A)^\top, \qquad
# W: (\text{out}, \text{in}), \quad A: (r, \text{in}), \quad B: (\text{out}, r)$$
#
# **Write** the class `LoRALinear`.
#
# - `LoRALinear(linear, rank)` wraps an `nn.Linear`, with or without bias, and freezes it.
# - Its only parameters that learn are `self.A`, an `nn.Parameter` of shape `(rank, in)`, random at the start
#   with standard deviation $1/\sqrt{\text{in}}$, and `self.B`, `(out, rank)`, zero at the start. So before
#   training the layer computes just what the linear layer does.
# - `forward(x)`: float32 `(..., in)` -> `(..., out)`, as in the equation. There is no further scale.
# - `merged()` gives an ordinary new `nn.Linear` with the weight $W + BA$ and the bias $b$. It leaves this
#   layer as it is and shares no memory with it.
#
# It is [`LoRA` in `tuning.py`](../../studies/tuning.py). Try first, then compare.
#
# <details><summary>Hint</summary>
#
# `linear.requires_grad_(False)` freezes weight and bias at once. If A and B were both zero, neither would get
# a gradient: that of B is proportional to A, and the other way round. Copy values with
# `with torch.no_grad(): new.weight.copy_(...)`.
#
# </details>

# %%
import sys
from pathlib import Path

root = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "vsr.py").is_file())
sys.path[:0] = [str(root), str(root / "notebooks" / "exercises")]

# %%
import copy

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F


# %%
class LoRALinear(nn.Module):
    """A frozen linear layer with weight W (out, in), plus a low-rank change B A that learns."""

    def __init__(self, linear: nn.Linear, rank: int):
        """Freeze `linear`; make A (rank, in), random, and B (out, rank), zero."""
        super().__init__()
        # BEGIN SOLUTION
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        # END SOLUTION

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)"""
        # BEGIN SOLUTION
        return self.linear(x) + x @ self.A.T @ self.B.T  # (..., in) -> (..., rank) -> (..., out)
        # END SOLUTION

    def merged(self) -> nn.Linear:
        """A new ordinary layer with weight W + B A (out, in) and the same bias."""
        # BEGIN SOLUTION
        linear = copy.deepcopy(self.linear)
        with torch.no_grad():
            linear.weight += self.B @ self.A
        return linear
        # END SOLUTION


# %%
from checks import check_lora_layer

check_lora_layer(LoRALinear)

# %% [markdown]
# How much rank is enough? The target is the layer's own weight plus a change of rank 4. Adapters of rank 4
# and more can learn it, thinner ones cannot.

# %%
torch.manual_seed(0)
start = nn.Linear(32, 32)
change = torch.randn(32, 4) @ torch.randn(4, 32) / 8  # (out, in), rank 4
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for rank in (1, 2, 4, 8):
    layer = LoRALinear(copy.deepcopy(start), rank)
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=2e-2)
    losses = []
    for _ in range(150):
        x = torch.randn(64, 32)
        loss = F.mse_loss(layer(x), start(x).detach() + x @ change.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    learnt = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    axis.semilogy(losses, label=f"rank {rank}: {learnt} parameters of {start.weight.numel()}")
axis.set(xlabel="step", ylabel="squared error")
axis.legend()
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# [`LoRA` in `tuning.py`](../../studies/tuning.py) is the same thing as a parametrization, so that
# `add_lora` can put it on every linear layer of a finished model and `merge_lora` can take it off again.
# It is trained as a rival of the refiner: the backbone could have been improved instead.
#
# **Go further.** At the very first step the gradient of A is zero. Show it. For which rank has the adapter as
# many parameters as W itself?
