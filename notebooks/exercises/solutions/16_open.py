# %% [markdown]
# # 16. Open: improve the refinement
#
# **60 minutes. You need:** exercises 3, 12 and 15. **You learn:** what it is like to change a method and
# measure it honestly.
#
# You have trained models, those of `weights/toy.pt`: a tokenizer, a frozen backbone and three refiners. They
# are named by what they read: `"tokens"`, what was written; `"tokens+query"`, that and the backbone's states
# over the query; `"query"`, the states alone, nothing of what was written. Plain refinement is one pass of
# `"tokens+query"`. Find something better. There is no one right answer. Some ideas:
#
# - **Several passes.** Refine the refined tokens again, or the refined embeddings. The states over the query
#   stay the same.
# - **A gate** (exercise 12), with a threshold for each pass, or one that depends on the backbone's own
#   probability, which `case.backbone.logits(case.rollout.states)` has.
# - **Several readers.** Average the embeddings of two refiners, or of two passes, before looking up the
#   nearest code.
# - **Several rollouts.** Draw some with a temperature (`case.backbone.generate`), refine them all, and
#   combine.
#
# **Write** `improve(case)`.
#
# - `case` holds, for B validation sentences: `prompt`, long `(B, P)`, all images but the last; `rollout`,
#   what the backbone wrote for the last one: `rollout.tokens`, long `(B, N)`, the states that predicted them,
#   `rollout.states`, and those over the query, `rollout.query`, float32 `(B, N, C)`; `codebook`, float32
#   `(V, D)`, unit norm; `backbone`, a `vsr.GPT`; `refiners`, a dictionary of `vsr.Refiner`; `task`, long
#   `(B,)`, into `data.TASKS`.
# - `case.truth`, long `(B, N)`, is for looking and for choosing settings, **outside** of `improve`. Inside it
#   must not be read: whoever uses a model has no truth. The check finds out.
# - The result: tokens, long `(B, N)`, from 0 to V - 1. The same case must give the same tokens: if you draw,
#   make a `torch.Generator` with a fixed seed inside the function. Leave the case as it is.
#
# The check measures on validation sentences that are not those of `load_case()`, prints the mean cosine error
# and the share of tokens that are right beside those of plain refinement and of the control (`"query"` alone,
# exercise 13), and does not fail if yours is worse. It calls `improve` three times.
#
# You start from [`refine` in `vsr.py`](../../vsr.py), and the numbers are
# [`cosine_error` in `vsr.py`](../../vsr.py) and [`gap_closed` in `vsr.py`](../../vsr.py).
#
# <details><summary>Hint</summary>
#
# Begin with plain refinement and see that the check prints the same numbers twice. Then change one thing at a
# time, and measure each on `load_case()`.
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
from checks import load_case, plain_refinement

import vsr


# %%
@torch.no_grad()
def improve(case) -> torch.Tensor:
    """Better tokens for the last image of each sentence: a Case of B sentences -> tokens (B, N) long."""
    # BEGIN SOLUTION
    # Two networks that were trained apart make different mistakes, which a mean evens out. The one that has
    # not seen what was written counts half: it gives up more right tokens.
    _, ours = vsr.refine(case.refiners["tokens+query"], case.codebook, *case.rollout)  # (B, N, D)
    _, other = vsr.refine(case.refiners["query"], case.codebook, *case.rollout)  # (B, N, D)
    return vsr.nearest_code(ours + 0.5 * other, case.codebook)
    # END SOLUTION


# %% [markdown]
# The check generates 128 sentences first, which takes some seconds.

# %%
from checks import check_open

check_open(improve)

# %% [markdown]
# Where in the image does it help? The mean cosine error by position, on the sentences that are yours to try
# things on.

# %%
case = load_case()
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, tokens in (
    ("backbone", case.rollout.tokens),
    ("plain refinement", plain_refinement(case)),
    ("yours", improve(case)),
):
    axis.plot(vsr.cosine_error(tokens, case.truth, case.codebook).mean(0), label=name)
axis.set(xlabel="token position t (raster order)", ylabel="mean cosine error")
axis.legend()
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# [`refine` in `vsr.py`](../../vsr.py) is one pass. [`decode_methods` in `evaluate.py`](../../evaluate.py) is
# where all methods of the tables are run: add yours there to have it measured beside them.
#
# **Go further.** A smaller error with fewer right tokens is hedging: does yours repair? If it reads the query
# again, how much of what it gains has the control as well? You tried several
# things and kept the best: how much of its advantage is luck? Measure the spread over sentences, then measure
# once, at the end, on `load_case("test")`. What does your method cost, in passes of the backbone and of the
# refiners, and would plain refinement with a larger refiner be cheaper?
