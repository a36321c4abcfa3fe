"""Do more demonstrations help the backbone, and is there still something to refine? The paper's Figure 3.

Each sentence has a palette of its own, which only its K demonstrations tell, so that they are needed.
Backbones and refiners are trained for less long than elsewhere. Each K has a tokenizer and test sentences of
its own, so a small difference between two K says nothing. Stated before it was run: for the claim speaks that
more tokens are right with more demonstrations on colorization, which needs the palette, and that a gap is
closed at each K; against it, curves that are flat.
"""

import evaluate
import train_refiner
from evaluate import by_method
from studies import report
from studies.report import GROUPS, estimate, values_of
from studies.runner import READ_BY, Setup, at_most, models_of, score_refiners

MINUTES = 35
SETTINGS = [{"num_demos": K} for K in (1, 2, 3)]

SIZES = {"gpt": {"steps": 1000}, "refiner": {"rollouts": 8192, "steps": 1000}}


def run(setup: Setup, seed: int, num_demos: int) -> dict:
    changes = at_most(SIZES, setup.config)
    changes["data"] = {"num_demos": num_demos, "palette": "sentence"}
    models = models_of(setup, seed, train_refiner.READINGS, f"demos{num_demos}", changes)
    refiners = by_method(models.trained.refiners)
    return score_refiners(setup, models, refiners, seed)


def show(cells: list) -> str:
    """Of the backbone the tokens that are right, of the refiners what they change."""
    lines = ["sentences with a palette of their own"]
    for K, group in report.by_setting(cells, "num_demos").items():
        lines += ["", f"{f'K = {K}':24}" + "".join(f"{name:>26}" for name in GROUPS)]
        for method in ("teacher_forced", "ar_greedy"):
            row = [estimate(values_of(group, method, name, "token_accuracy"), 3) for name in GROUPS]
            lines.append(f"{f'{method}, right':24}" + "".join(f"{text:>26}" for text in row))
        lines += report.measures_table(group, tuple(READ_BY)).splitlines()
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    groups = report.by_setting(cells, "num_demos")
    figure = report.new_figure(len(GROUPS))
    for axis, name in zip(figure.axes, GROUPS, strict=True):
        for method in ("teacher_forced", "ar_greedy", *READ_BY):
            values = [values_of(group, method, name, "token_accuracy") for group in groups.values()]
            report.curve(axis, list(groups), values, color=evaluate.COLOURS[method], label=method)
        axis.set(title=name, xlabel="K, demonstration pairs", xticks=list(groups))
    figure.axes[0].set_ylabel("tokens right")
    report.legend(figure.axes[0])
    report.save(figure, path)
