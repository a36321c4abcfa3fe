# %% [markdown]
# # 7. Codebook loss and commitment loss
#
# **20 minutes. You need:** exercise 6. **You learn:** how codes and encoder meet.
#
# With the straight-through estimator nothing moves the codes, and nothing keeps the encoder near them. Two
# losses do that. They have the same value; what differs is who moves. $\text{sg}$ is the stop-gradient.
#
# $$\mathcal{L}_\text{codebook} = \frac{1}{M} \sum_m \big\| \text{sg}[z_m] - e_m \big\|^2, \qquad
# \mathcal{L}_\text{commitment} = \frac{1}{M} \sum_m \big\| z_m - \text{sg}[e_m] \big\|^2$$
#
# The tokenizer adds both to its loss, the second with a smaller weight $\beta$: codes follow the encoder
# faster than the encoder follows the codes.
#
# **Write** `vq_losses(z, e)`, which returns the pair `codebook_loss, commitment_loss`.
#
# - `z`, `e`: float32 `(..., D)`, encoder outputs and their codes. M is the number of vectors, all leading
#   dimensions together.
# - Each result: a float32 tensor of shape `()`, the mean over the M vectors of the squared distance,
#   **summed** over the D numbers of a vector. No weights: $\beta$ belongs to the training loop.
# - The gradient of the codebook loss reaches `e` only, that of the commitment loss `z` only.
#
# It is in [`Codebook` in `vqgan.py`](../../vqgan.py). Try first, then compare.
#
# <details><summary>Hint</summary>
#
# `F.mse_loss` takes the mean over everything, the D numbers of a vector included. That is D times too small
# here.
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
def vq_losses(z: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared distance, twice: z, e (..., D) -> codebook loss () and commitment loss ()."""
    # BEGIN SOLUTION
    codebook_loss = (z.detach() - e).square().sum(-1).mean()
    commitment_loss = (z - e.detach()).square().sum(-1).mean()
    return codebook_loss, commitment_loss
    # END SOLUTION


# %%
from checks import check_commitment_loss

check_commitment_loss(vq_losses)

# %% [markdown]
# An encoder output and its code, 20 steps of gradient descent on `codebook_loss + beta * commitment_loss`.
# With `beta = 0` the encoder stays where it is; with `beta = 1` they meet half way.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True, layout="constrained")
for axis, beta in zip(axes, (0.0, 0.25, 1.0), strict=True):
    z, e = torch.tensor([0.0]), torch.tensor([1.0])  # (D,) with D = 1
    places = []
    for _ in range(20):
        places.append((z.item(), e.item()))
        z.requires_grad_()
        e.requires_grad_()
        codebook_loss, commitment_loss = vq_losses(z, e)
        z_slope, e_slope = torch.autograd.grad(codebook_loss + beta * commitment_loss, (z, e))
        z, e = (z - 0.1 * z_slope).detach(), (e - 0.1 * e_slope).detach()
    axis.plot(places, label=["encoder output z", "code e"])
    axis.set(xlabel="step", title=f"beta = {beta}")
axes[0].set_ylabel("place on a line")
axes[0].legend()
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# `forward` of [`Codebook` in `vqgan.py`](../../vqgan.py). The flag `--vqgan-beta` sets $\beta$, 0.25 unless
# you say otherwise, and `train_tokenizer` adds both losses to that of the pixels.
#
# **Go further.** Without the commitment loss an encoder of unbounded outputs can run away from its codes. Why
# can it not here, where all vectors have unit norm? What does $\beta$ still do?
