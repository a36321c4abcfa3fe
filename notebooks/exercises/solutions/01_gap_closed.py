# %% [markdown]
# # 1. The share of the gap that is closed
#
# **10 minutes. You need:** nothing yet. **You learn:** how this project measures success.
#
# A backbone that writes an image token by token accumulates errors. Two numbers frame what can be repaired: the
# error when it runs on its own (*free-running*), and the error when it sees the true tokens before each position
# (*teacher forcing*). What lies between the two is what accumulation cost. The metric asks which share of that a
# refiner takes back.
#
# $$\text{gap closed} = \frac{E_\text{free-running} - E_\text{refined}}{E_\text{free-running} - E_\text{teacher-forced}}$$
#
# **Write** `gap_closed(free_running, refined, teacher_forced)`.
#
# - The three arguments are mean cosine errors: Python floats, 0 or more, lower is better.
# - The result is a Python float. 0: nothing is repaired. 1: all that accumulation cost is repaired.
# - Above 1 is possible (a refiner sees the whole image, teacher forcing only what came before), and so is below 0.
#   Cut nothing off.
# - Where free-running and teacher-forced error are equal, nothing has accumulated, and no share of it exists: NaN.
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
    """The share of the accumulated error that is repaired: three errors >= 0 -> one number, NaN if nothing accumulated."""
    # BEGIN SOLUTION
    accumulated = free_running - teacher_forced
    return (free_running - refined) / accumulated if accumulated else math.nan
    # END SOLUTION


# %%
from checks import check_gap_closed

check_gap_closed(gap_closed)

# %% [markdown]
# Use it on a finished run: what two refiners close of each task's gap. Free-running is the better of greedy
# decoding and sampling, as in the project.

# %%
scores = json.loads((root / "results" / "toy" / "metrics.json").read_text())["methods"]
error = {method: {name: score["cosine_error"] for name, score in by.items()} for method, by in scores.items()}
names = list(error["teacher_forced"])
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for number, method in enumerate(("refined_tokens", "refined_hidden")):
    shares = []
    for name in names:
        free_running = min(error["ar_greedy"][name], error["ar_sampled"][name])
        shares.append(gap_closed(free_running, error[method][name], error["teacher_forced"][name]))
    axis.bar([x + 0.4 * number for x in range(len(names))], shares, width=0.38, label=method)
axis.axhline(1, color="grey", linewidth=0.8, linestyle="--", label="teacher forcing")
axis.set_xticks([x + 0.2 for x in range(len(names))], names)
axis.set(xlabel="task", ylabel="gap closed")
axis.legend()
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# `gaps_closed` in [`train_refiner.py`](../../train_refiner.py) calls [`gap_closed` in `vsr.py`](../../vsr.py) for each
# refiner and each task.
#
# **Go further.** Is a bar above 1? What does a refiner know that teacher forcing does not? What happens
# to the metric when a backbone hardly accumulates errors, so that the denominator is small and noisy?
