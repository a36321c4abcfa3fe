# %% [markdown]
# # 12. Confidence-gated refinement
#
# **40 minutes. You need:** exercises 2 and 3. **You learn:** how to change only what the refiner is sure of.
#
# The refiner repairs some tokens, and it spoils others that were right. A gate lets it change a token only if
# it is sure. How sure it is, the *margin* tells: by how much its embedding $e'_t$ is nearer to the best code
# than to the backbone's own token $y_t$.
#
# $$m_t = \max_v \cos(e'_t, \text{codebook}_v) - \cos(e'_t, \text{codebook}_{y_t}) \;\in [0, 2]$$
#
# $$\hat y_t = \arg\max_v \cos(e'_t, \text{codebook}_v) \text{ if } m_t > \tau, \qquad
# \hat y_t = y_t \text{ otherwise}$$
#
# With the threshold $\tau = 0$ this is plain refinement, with $\tau = 2$ nothing changes.
#
# **Write** two functions.
#
# 1. `gated_refine(tokens, refined, codebook, threshold)` gives $\hat y$, long `(B, N)`. `tokens`: the
#    backbone's $y_q$, long `(B, N)`. `refined`: $e'_\text{seq}$, float32 `(B, N, D)`, unit norm. `codebook`:
#    float32 `(V, D)`, unit norm. `threshold`: a float. Each position is judged on its own. Leave the
#    arguments as they are.
# 2. `choose_threshold(thresholds, tokens, refined, truth, codebook)` gives the threshold, one float of the
#    list `thresholds`, with which `gated_refine` has the smallest **mean cosine error** against the true
#    tokens `truth`, long `(B, N)`. If several are equally good, any will do. Use
#    `vsr.cosine_error(tokens, truth, codebook)`, which gives the error of each position, `(B, N)`. It is
#    meant for validation sentences: a threshold chosen on the test sentences makes the test too kind.
#
# The lookup is [`nearest_code` in `vsr.py`](../../vsr.py), the error
# [`cosine_error` in `vsr.py`](../../vsr.py). The project itself has no gate: this exercise goes beyond it.
#
# <details><summary>Hint</summary>
#
# `refined @ codebook.T` has all cosines, `(B, N, V)`. `.max(-1)` gives values and indices at once. The cosine
# to the backbone's own token is `.gather(-1, tokens[..., None])`, or the sum of `refined * codebook[tokens]`.
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
def gated_refine(
    tokens: torch.Tensor, refined: torch.Tensor, codebook: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Replace the tokens whose margin is above the threshold.

    tokens (B, N) long; refined (B, N, D) and codebook (V, D), unit norm; threshold 0 .. 2 -> tokens (B, N).
    """
    # BEGIN SOLUTION
    best, nearest = (refined @ codebook.T).max(-1)  # (B, N) each
    own = (refined * codebook[tokens]).sum(-1)  # (B, N)
    return torch.where(best - own > threshold, nearest, tokens)
    # END SOLUTION


def choose_threshold(
    thresholds: list[float],
    tokens: torch.Tensor,
    refined: torch.Tensor,
    truth: torch.Tensor,
    codebook: torch.Tensor,
) -> float:
    """The threshold with the smallest mean cosine error; tokens, truth (B, N), the others as above."""

    # BEGIN SOLUTION
    def error(threshold):
        return (
            vsr.cosine_error(gated_refine(tokens, refined, codebook, threshold), truth, codebook)
            .mean()
            .item()
        )

    return min(thresholds, key=error)
    # END SOLUTION


# %%
from checks import check_gated_refinement

check_gated_refinement(gated_refine, choose_threshold)

# %% [markdown]
# A simulated backbone and refiner: the backbone gets about a quarter of the tokens wrong, and the refiner's
# embeddings point to the truth, with much noise. The threshold is chosen on one set of sentences and used on
# another.

# %%
from checks import simulated_refinement

thresholds = [0.05 * i for i in range(21)]
chosen = choose_threshold(thresholds, *simulated_refinement(seed=10))
tokens, refined, truth, codebook = simulated_refinement(seed=11)
errors, kept = [], []
for threshold in thresholds:
    y = gated_refine(tokens, refined, codebook, threshold)
    errors.append(vsr.cosine_error(y, truth, codebook).mean())
    kept.append((y == truth)[tokens == truth].float().mean())
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
left.plot(thresholds, errors)
left.axvline(chosen, color="grey", linestyle="--", label="chosen on other sentences")
left.set(xlabel="threshold", ylabel="mean cosine error")
left.legend()
right.plot(thresholds, kept)
right.set(xlabel="threshold", ylabel="share of right tokens that stay right")
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# [`refine` in `vsr.py`](../../vsr.py) replaces every token by the code nearest to its refined embedding:
# threshold 0.
#
# **Go further.** The simulation is kind to the gate. Try it on real weights in exercise 16, and do not be
# surprised if threshold 0 has the smallest error there: a trained refiner was trained on that very error.
# What else could a gate be good for? Other measures of confidence: the cosine to the nearest code alone, or
# the backbone's own probability.
