# %% [markdown]
# # 13. Open: improve the refinement
#
# **60 minutes. You need:** exercises 3, 10 and 12. **You learn:** what it is like to change a method and measure it honestly.
#
# You have trained models, those of `weights/toy.pt`: a tokenizer, a frozen backbone and its refiners. Plain refinement is one
# pass over what the backbone wrote. Find something better. There is no one right answer. Some ideas:
#
# - **Several passes.** Refine the refined tokens again. `case.backbone.read(prompt, tokens)` gives the hidden states that the
#   backbone has for *any* tokens, in one parallel pass: those of the refined ones fit them better than those of the rollout.
# - **A gate** (exercise 10), with a threshold for each pass, or one that depends on the backbone's own probability.
# - **Another reading.** Average the embeddings of two refiners, or of two passes, before looking up the nearest code.
# - **Several rollouts.** Draw some with a temperature (`case.backbone.generate`), refine them all, and combine.
#
# **Write** `improve(case)`.
#
# - `case` holds, for B validation sentences: `prompt`, long `(B, P)`, all images but the last; `rollout`, what the backbone
#   wrote for the last one: `rollout.tokens`, long `(B, N)`, and its states `rollout.hidden` and `rollout.context`, float32
#   `(B, N, C)`; `codebook`, float32 `(V, D)`, unit norm; `backbone`, a `vsr.GPT`; `refiners`, a dictionary of `vsr.Refiner`,
#   named by what they read, the one that reads most at the end; `task`, long `(B,)`, into `data.TASKS`. Plain refinement is
#   one pass of that last refiner.
# - `case.truth`, long `(B, N)`, is for looking and for choosing settings, **outside** of `improve`. Inside it must not be read:
#   whoever uses a model has no truth. The check finds out.
# - The result: tokens, long `(B, N)`, from 0 to V - 1. The same case must give the same tokens: if you draw, make a
#   `torch.Generator` with a fixed seed inside the function. Leave the case as it is.
#
# The check measures on validation sentences that are not those of `load_case()`, prints the mean cosine error
# beside that of plain refinement, and does not fail if yours is worse. It calls `improve` three times.
#
# You start from [`refine` in `vsr.py`](../../vsr.py), and the numbers are [`cosine_error` in `vsr.py`](../../vsr.py) and
# [`gap_closed` in `vsr.py`](../../vsr.py).
#
# <details><summary>Hint</summary>
#
# Begin with plain refinement and see that the check prints the same numbers twice. Then change one thing at a time, and
# measure each on `load_case()`.
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
    """Better tokens for the last image of each sentence: a Case of B sentences -> tokens (B, N) long, 0 .. V-1."""
    # BEGIN SOLUTION
    *_, refiner = case.refiners.values()
    y, hidden, context = case.rollout
    first, refined = vsr.refine(refiner, case.codebook, y, hidden=hidden, context=context)  # (B, N), (B, N, D)
    # The rollout's states have read its mistakes. Read again, now that many of them are gone.
    _, hidden, context = case.backbone.read(case.prompt, first)  # (B, N, C) each
    tokens, _ = vsr.refine(refiner, case.codebook, embeddings=refined, hidden=hidden, context=context)
    return tokens
    # END SOLUTION


# %% [markdown]
# The check generates 128 sentences first, which takes some seconds.

# %%
from checks import check_open

check_open(improve)

# %% [markdown]
# Where in the image does it help? The mean cosine error by position, on the sentences that are yours to try things on.

# %%
case = load_case()
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, tokens in (("backbone", case.rollout.tokens), ("plain refinement", plain_refinement(case)), ("yours", improve(case))):
    axis.plot(vsr.cosine_error(tokens, case.truth, case.codebook).mean(0), label=name)
axis.set(xlabel="token position t (raster order)", ylabel="mean cosine error")
axis.legend()
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# [`refine` in `vsr.py`](../../vsr.py) is one pass. `decode_methods` in [`train_refiner.py`](../../train_refiner.py) is where all
# methods of the tables are run: add yours there to have it measured beside them.
#
# **Go further.** You tried several things and kept the best: how much of its advantage is luck? Measure the spread over
# sentences, then measure once, at the end, on the test split. What does your method cost, in passes of the backbone and
# of the refiner, and would plain refinement with a larger refiner be cheaper?
