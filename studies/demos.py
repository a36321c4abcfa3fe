"""Do more demonstrations help the backbone, and is there still something to refine? The paper's Figure 3.

Each sentence has a palette of its own, which only its K demonstrations tell, so that they are needed. All K
have one tokenizer, the same queries and the same true targets: for smaller K the first demonstrations of each
sentence are left out. Backbones are trained for less long than elsewhere. Stated before it was run: for the
claim speaks that more tokens are right with more demonstrations on colorization, which needs the palette, and
that a gap is closed at each K; against it, curves that are flat.
"""

from dataclasses import replace

import evaluate
from studies import report
from studies.report import GROUPS, estimate, values_of
from studies.runner import READ_BY, Setup, at_most, fit_readings, models_of, with_backbone

MINUTES = 35
MOST = 3
SETTINGS = [{"num_demos": K} for K in range(1, MOST + 1)]

SIZES = {"gpt": {"steps": 1000}, "refiner": {"rollouts": 8192}}


def run(setup: Setup, seed: int, num_demos: int) -> dict:
    changes = at_most(SIZES, setup.config)
    changes["data"] = {"num_demos": MOST, "palette": "sentence"}
    models = models_of(setup, seed, label="demos", changes=changes)
    if num_demos < MOST:
        images = 2 * num_demos + 2  # the last ones
        tokens = {split: part[:, -images:] for split, part in models.trained.tokens.items()}
        test = {**models.test, "tokens": models.test["tokens"][:, -images:]}
        models = models._replace(trained=models.trained._replace(tokens=tokens), test=test)
        models = with_backbone(setup, models, replace(setup.config["gpt"], **changes["gpt"]), seed)
    return fit_readings(setup, models, seed)


def show(cells: list) -> str:
    """Of the backbone the tokens that are right, of the refiners what they change."""
    lines = ["sentences with a palette of their own"]
    for K, group in report.by_setting(cells, "num_demos").items():
        lines += ["", f"{f'K = {K}':24}" + "".join(f"{name:>26}" for name in GROUPS)]
        for method in ("teacher_forced", "ar_greedy"):
            row = [estimate(values_of(group, method, name, "token_accuracy"), 3) for name in GROUPS]
            lines.append(f"{f'{method}, right':24}" + "".join(f"{text:>26}" for text in row))
        lines += report.measures_table(group, tuple(READ_BY), GROUPS[:2]).splitlines()
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
