# %% [markdown]
# # 1. The share of the gap that is closed
#
# **10 minutes. You need:** nothing yet. **You learn:** how this project measures success.
#
# A backbone that writes an image token by token accumulates errors. Two numbers frame what can be repaired:
# the error when it runs on its own (*free-running*), and the error when it sees the true tokens before each
# position (*teacher forcing*). What lies between the two is what accumulation cost. The metric takes this
# distance as its unit, and asks how much a *refiner* gains, a small network that corrects what was written.
#
# $$\text{gap closed} =
# \frac{E_\text{free-running} - E_\text{refined}}{E_\text{free-running} - E_\text{teacher-forced}}$$
#
# **Write** `gap_closed(free_running, refined, teacher_forced)`.
#
# - The three arguments are means of 1 - cos(written code, true code): Python floats, 0 or more; lower is
#   better.
# - The result is a Python float. 0: nothing is gained. 1: as much is gained as the true tokens before each
#   position would give.
# - Above 1 is possible, and so is below 0. Cut nothing off.
# - Where free-running and teacher-forced error are equal, nothing has accumulated, and no share of it exists:
#   NaN. (The free-running error is never the smaller one here.)
#
# It is [`gap_closed` in `vsr.py`](../../vsr.py). Try first, then compare.
#
# <details><summary>Hint</summary>
#
# In Python `0.0 / 0.0` raises `ZeroDivisionError`. Look at the denominator before you divide.
#
# </details>

# %%
import sys
from pathlib import Path

root = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "vsr.py").is_file())
sys.path[:0] = [str(root), str(root / "notebooks" / "exercises")]

# %%
import json
import math

import matplotlib.pyplot as plt


# %%
def gap_closed(free_running: float, refined: float, teacher_forced: float) -> float:
    """What is gained, measured by what accumulated: three errors >= 0 -> one number, or NaN."""
    # BEGIN SOLUTION
    accumulated = free_running - teacher_forced
    return (free_running - refined) / accumulated if accumulated else math.nan
    # END SOLUTION


# %%
from checks import check_gap_closed

check_gap_closed(gap_closed)

# %% [markdown]
# Use it on a finished run: what each refiner closes of each task's gap. Free-running is greedy decoding, as
# in the project. The right picture has the tokens that are right, of the same methods: the two pictures need
# not tell the same story.

# %%
scores = json.loads((root / "results" / "toy" / "metrics.json").read_text())["methods"]
error = {method: {name: score["cosine_error"] for name, score in by.items()} for method, by in scores.items()}
names = list(error["teacher_forced"])
refined = [name for name in scores if name.startswith("refined_") and " of " not in name]
figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for number, method in enumerate(("ar_greedy", *refined)):
    shares, right = [], [scores[method][name]["token_accuracy"] for name in names]
    for name in names:
        errors = (error[row][name] for row in ("ar_greedy", method, "teacher_forced"))
        shares.append(gap_closed(*errors))
    places = [x + 0.2 * number for x in range(len(names))]
    for axis, values in zip(axes, (shares, right), strict=True):
        axis.bar(places, values, width=0.18, color=f"C{number}", label=method)
axes[0].axhline(1, color="grey", linewidth=0.8, linestyle="--")
axes[0].set(ylabel="gap closed")
axes[1].set(ylabel="tokens right", ylim=(0.5, 1))
for axis in axes:
    axis.set_xticks([x + 0.3 for x in range(len(names))], names)
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# [`gap_closed` in `evaluate.py`](../../evaluate.py) calls [`gap_closed` in `vsr.py`](../../vsr.py) for each
# refiner and each task.
#
# **Go further.** The metric counts two things as one: what had accumulated, and what the backbone gets wrong
# after true tokens too. Which two more errors would you measure to tell them apart (exercise 4 does it)? Does
# a refiner with a high bar on the left also have more tokens right than `ar_greedy`? What happens to the
# metric when a backbone hardly accumulates errors, so that the denominator is small and noisy?
