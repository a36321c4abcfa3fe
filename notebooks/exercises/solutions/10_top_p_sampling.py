# %% [markdown]
# # 10. Top-p sampling
#
# **30 minutes. You need:** softmax, sorting. **You learn:** how tokens are drawn without the long tail.
#
# Drawing each token from the model's own distribution now and then gives one that the model itself thinks
# very unlikely, and that mistake becomes the context of all later tokens. Top-p sampling (nucleus sampling)
# draws from the likeliest tokens only: the fewest that together reach the probability $p$.
#
# Let $v_1, v_2, \dots$ be the tokens in falling order of probability. Token $v_i$ is kept if what comes
# before it has not reached $p$ yet, and what is kept is scaled to sum to 1:
#
# $$v_i \text{ is kept} \iff \sum_{j < i} P(v_j) < p$$
#
# **Write** `top_p_probabilities(logits, top_p)`.
#
# - `logits`: float32 `(B, V)`, one row a sentence, V tokens. Some may be minus infinity. Leave them as they
#   are.
# - `top_p`: a float above 0, at most 1. With 1 all are kept. The likeliest token is kept always.
# - The result: float32 `(B, V)`, the probabilities to draw from, in the order of the vocabulary: 0 for tokens
#   that are not kept, the others in their old proportions, each row summing to 1. Of equally likely tokens
#   any may be kept, but no more of them than needed.
#
# It is part of [`sample` in `vsr.py`](../../vsr.py). Try first, then compare.
#
# <details><summary>Hint</summary>
#
# Sort the probabilities of each row, `ordered, order = p.sort(descending=True)`. The sum of all that come
# before is `ordered.cumsum(-1) - ordered`. `scatter` with `order` brings sorted values back to their own
# places.
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
def top_p_probabilities(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """What to draw from: logits (B, V), 0 < top_p <= 1 -> probabilities (B, V), 0 where not kept."""
    # BEGIN SOLUTION
    ordered, order = logits.softmax(-1).sort(descending=True)  # (B, V), likeliest first
    before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens
    before[:, 0] = 0  # exactly, whatever the rounding: the likeliest is always kept
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    kept = torch.zeros_like(ordered).scatter(-1, order, ordered)  # back in the order of the vocabulary
    return kept / kept.sum(-1, keepdim=True)
    # END SOLUTION


# %%
from checks import check_top_p

check_top_p(top_p_probabilities)

# %% [markdown]
# Draw with it. The bars are the probabilities to draw from, the dots are how often a token came up in 2000
# draws.

# %%
generator = torch.Generator().manual_seed(0)
logits = torch.randn(1, 16, generator=generator).sort(descending=True).values * 1.5  # (1, V)
figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True, layout="constrained")
for axis, top_p in zip(axes, (1.0, 0.9, 0.5), strict=True):
    probabilities = top_p_probabilities(logits, top_p)[0]  # (V,)
    drawn = torch.multinomial(probabilities, 2000, replacement=True, generator=generator)  # (2000,)
    axis.bar(range(16), probabilities.tolist(), alpha=0.5, label="probability")
    axis.plot(torch.bincount(drawn, minlength=16) / 2000, "k.", label="share of the draws")
    axis.set(xlabel="token", title=f"top_p = {top_p}")
axes[0].set_ylabel("probability")
axes[0].legend()
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# [`sample` in `vsr.py`](../../vsr.py) does it on logits, after temperature and top-k.
# `python generate.py --help` names its flags.
#
# **Go further.** Temperature comes first there, then top-p. What would change if it came last? How many
# tokens does top-p keep where the model is sure, and where it is not, compared with top-k?
