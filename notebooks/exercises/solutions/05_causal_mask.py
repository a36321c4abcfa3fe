# %% [markdown]
# # 5. The causal mask
#
# **20 minutes. You need:** attention, $\text{softmax}(QK^\top / \sqrt{d})\,V$. **You learn:** what makes a
# Transformer autoregressive.
#
# The backbone is trained on all positions of a sentence at once, and each predicts its token from what comes
# before it. So no position may see a later one, or it would just copy the answer. The causal mask says who
# may see whom, and the softmax then spreads the attention over the allowed positions only. The refiner uses
# no such mask, and that is the point of it: it sees the whole image.
#
# $$w_{t,s} = \frac{\exp(a_{t,s})}{\sum_{r \le t} \exp(a_{t,r})} \text{ for } s \le t, \qquad
# w_{t,s} = 0 \text{ for } s > t$$
#
# **Write** two functions. Positions count from 0.
#
# 1. `causal_mask(T)` gives a `torch.bool` tensor `(T, T)`, T at least 1: entry `[t, s]` is True if the query
#    at position t may see the key at position s. Every position sees itself.
# 2. `causal_softmax(scores)` takes scores $a$, float32 `(B, H, T, T)` (B sentences, H heads, query t, key s)
#    and gives the weights $w$ of the same shape: 0 where the mask is False, and each row sums to 1. Leave
#    `scores` as they are.
#
# It is part of [`attend` in `vsr.py`](../../vsr.py). Try first, then compare.
#
# <details><summary>Hint</summary>
#
# `torch.ones(T, T).tril()` keeps what lies on the diagonal and below it. A key gets the weight 0 if its
# *score* is minus infinity before the softmax: `exp(-inf) = 0`, while `exp(0) = 1`.
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
def causal_mask(T: int) -> torch.Tensor:
    """(T, T) bool: [t, s] is True if the query at position t may see the key at position s."""
    # BEGIN SOLUTION
    return torch.ones(T, T, dtype=torch.bool).tril()
    # END SOLUTION


def causal_softmax(scores: torch.Tensor) -> torch.Tensor:
    """Attention over what each query may see: scores (B, H, T, T) -> weights (B, H, T, T), rows sum to 1."""
    # BEGIN SOLUTION
    mask = causal_mask(scores.shape[-1])  # (T, T)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)
    # END SOLUTION


# %%
from checks import check_causal_mask

check_causal_mask(causal_mask, causal_softmax)

# %%
scores = torch.randn(1, 1, 12, 12, generator=torch.Generator().manual_seed(0)) * 2
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
pictures = {
    "mask (bright: may see)": causal_mask(12),
    "scores": scores[0, 0],
    "weights": causal_softmax(scores)[0, 0],
}
for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
    axis.imshow(picture.numpy())
    axis.set(title=name, xlabel="key s", ylabel="query t", xticks=range(0, 12, 2), yticks=range(0, 12, 2))
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# [`attend` in `vsr.py`](../../vsr.py) has the mask twice: as `is_causal` of PyTorch's own attention, and
# written out for bfloat16 on CPUs. The test `test_a_token_changes_later_logits_only` in
# [`tests/test_vsr.py`](../../tests/test_vsr.py) changes one token and looks at which logits change.
#
# **Go further.** Write a mask for sentences of several images in which every image sees itself whole and all
# images before it. Could a model with that mask still generate token by token?
