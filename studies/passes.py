"""Does it help to refine again? The default refiner over its own output, up to four times.

It has never seen its own output in training. For more passes speaks a gap that closes further, on
each task; against them, that a second pass changes little, or does harm. The query's states stay
what they are, so a further pass costs one pass of the refiner and nothing of the backbone.

First edition: passes one to four closed 0.94, 1.01, 1.03 and 1.03 of the gap (five seeds, reading
tokens and states, the states read anew by the backbone before each pass).
"""

import evaluate
from studies import report
from studies.report import GROUPS, mean_sd
from studies.runner import OURS, Setup, generate_all, models_of, refine_all, score

MINUTES = 1
SETTINGS = [{}]

PASSES = [f"pass {number}" for number in range(1, 5)]


def run(setup: Setup, seed: int) -> dict:
    models = models_of(setup, seed, (OURS,))
    trained, tokens = models.trained, models.test["tokens"]
    written = evaluate.decode_methods(trained.tokenizer, trained.backbone, {}, tokens, setup.autocast, seed)
    rollout = generate_all(setup, trained.backbone, tokens)
    for name in PASSES:
        written[name] = refine_all(setup, models, trained.refiners[OURS], rollout)
        rollout = rollout._replace(tokens=written[name])
    return score(setup, models, written)


def show(cells: list) -> str:
    lines = [report.gap_table(cells, PASSES, "after each pass"), "", "dB gained over ar_greedy"]
    for name in PASSES:
        gains = [mean_sd(report.psnr_gains(cells, name, group), 2) for group in GROUPS]
        lines.append(f"{name:34}" + "".join(f"{gain:>18}" for gain in gains))
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    figure, x = report.new_figure(1, 4.6), list(range(1, len(PASSES) + 1))
    (axis,) = figure.axes
    for group in GROUPS:
        report.curve(axis, x, [report.gaps(cells, name, group) for name in PASSES], label=group)
    axis.set(xlabel="refining passes", ylabel="gap closed", xticks=x)
    report.legend(axis)
    report.save(figure, path)
