# %% [markdown]
# # 4. The accumulated error that is removed
#
# **15 minutes. You need:** exercise 1. **You learn:** to tell repair of accumulated error from other gains.
#
# `gap_closed` of exercise 1 counts two things as one. A refiner may take away error that *accumulated*: the
# backbone went on from its own mistakes. It may also take away error that the backbone makes even after true
# tokens, its *base error*. To tell them apart, refine two images of each sentence: the one that the backbone
# wrote on its own, and the one that it writes with the true tokens before each position. In the second
# nothing has accumulated. That gives four mean cosine errors:
#
# | | as the backbone wrote it | refined |
# | --- | --- | --- |
# | free running | $F$ | $F'$ |
# | teacher-forced | $T$ | $T'$ |
#
# $F - T$ is what had accumulated, $F' - T'$ is what is left of it after refining. (It is called *exposure*
# after *exposure bias*: in training the backbone is never exposed to its own mistakes.)
#
# $$\text{exposure removed} = 1 - \frac{F' - T'}{F - T}, \qquad
# \text{base error removed} = \frac{T - T'}{T}$$
#
# **Write** two functions. All arguments are Python floats, 0 or more. Each result is a Python float that may
# be below 0, above 1, or NaN.
#
# 1. `exposure_removed(free_running, refined, teacher_forced, refined_forced)`, that is $F$, $F'$, $T$, $T'$
#    in this order. Cut nothing off. Where nothing has accumulated,
#    $F \le T$, no part of it exists: NaN.
# 2. `base_error_removed(teacher_forced, refined_forced)`. Where $T = 0$ there is nothing to remove: NaN.
#
# Three cases to try in your head first. What is removed by a refiner that changes nothing? By one that
# returns the truth? And by a method that ignores what was written, so that it gives the same answer for both
# images?
#
# The first is [`exposure_removed` in `vsr.py`](../../vsr.py). Try first, then compare.
#
# <details><summary>Hint</summary>
#
# The three cases are $F' = F$ and $T' = T$; $F' = T' = 0$; and $F' = T'$, however large. Look at each
# denominator before you divide.
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

import vsr


# %%
def exposure_removed(
    free_running: float, refined: float, teacher_forced: float, refined_forced: float
) -> float:
    """The part of the accumulated error that is gone: F, F', T, T', each >= 0 -> one number, or NaN."""
    # BEGIN SOLUTION
    accumulated = free_running - teacher_forced
    return 1 - (refined - refined_forced) / accumulated if accumulated > 0 else math.nan
    # END SOLUTION


def base_error_removed(teacher_forced: float, refined_forced: float) -> float:
    """The part of the error after true tokens that is gone: T, T', each >= 0 -> one number, or NaN."""
    # BEGIN SOLUTION
    return (teacher_forced - refined_forced) / teacher_forced if teacher_forced > 0 else math.nan
    # END SOLUTION


# %%
from checks import check_exposure_removed

check_exposure_removed(exposure_removed, base_error_removed)

# %% [markdown]
# Use both on the finished run that is shipped. For each method it has a row of what the method makes of the
# free-running image, and one of what it makes of the teacher-forced image. Free-running is greedy decoding
# here, since that is the image that was refined.

# %%
scores = json.loads((root / "results" / "toy" / "metrics.json").read_text())["methods"]
methods = [name for name in scores if f"{name} of teacher_forced" in scores]


def errors_of(method: str, name: str) -> tuple:
    """F, F', T, T' of a method, over all sentences or a task."""
    rows = ("ar_greedy", method, "teacher_forced", f"{method} of teacher_forced")
    return tuple(scores[row][name]["cosine_error"] for row in rows)


print(f"{'':22}{'gap closed':>12}{'exposure removed':>18}{'base error removed':>20}{'tokens right':>14}")
for method in methods:
    free, after, forced, after_forced = errors_of(method, "all")
    shares = f"{vsr.gap_closed(free, after, forced):12.2f}"
    shares += f"{exposure_removed(free, after, forced, after_forced):18.2f}"
    shares += f"{base_error_removed(forced, after_forced):20.2f}"
    print(f"{method:22}{shares}{scores[method]['all']['token_accuracy']:14.1%}")

names = list(scores["ar_greedy"])
figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
for number, method in enumerate(methods):
    by_name = [errors_of(method, name) for name in names]
    removed = [exposure_removed(*errors) for errors in by_name]
    base = [base_error_removed(*errors[2:]) for errors in by_name]
    for axis, values in zip(axes, (removed, base), strict=True):
        places = [x + 0.2 * number for x in range(len(names))]
        axis.bar(places, values, width=0.18, color=f"C{number}", label=method)
for axis, title in zip(axes, ("exposure removed", "base error removed"), strict=True):
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_xticks([x + 0.3 for x in range(len(names))], names)
    axis.set(title=title)
axes[0].set_ylabel("part of the error that is gone")
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# `expected_embedding` is hedging without training. The three readings: `refined_tokens` sees what was
# written, `refined_tokens+query` sees that and the prompt, `parallel` sees the prompt alone. Which of them
# removes accumulated error, which base error, which both?
#
# `parallel` removes all of the accumulated error, to the last digit. **Why is that no praise?** Think of a
# method that writes token 0 everywhere. How much of the accumulated error does it remove, and how much of the
# base error?
#
# ## Where this is in the project
#
# [`exposure_removed` in `evaluate.py`](../../evaluate.py) calls
# [`exposure_removed` in `vsr.py`](../../vsr.py) for each method; the README's table has it. Base error
# removed is in section 3 of [notebook 4](../04_evidence.ipynb).
#
# **Go further.** When is exposure removed above 1? Write $F - F'$ as a sum of two terms, one with each
# measure. Which of the two would you report for a refiner if you could report one only, and what could it
# hide?
