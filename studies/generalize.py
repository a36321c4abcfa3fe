"""Has the refiner learnt to correct, or has it learnt the tasks and the data?

Refiners that have not seen one of the tasks, measured on it; and the default refiners on a dataset that none
of the models has seen. Stated before it was run: for a general corrector speaks that both help; against it,
that an unseen task gains nothing or is harmed, and that hedging (`expected_embedding`), which needs no
training, does as well on unseen data.
"""

from dataclasses import replace

import torch

import data
import evaluate
import train_refiner
from data import TASKS
from evaluate import by_method
from studies import report
from studies.report import GROUPS
from studies.runner import READ_BY, Setup, fit, models_of, replay, score_refiners

MINUTES = 12
SETTINGS = [{}]

SEEN = "without none"


def run(setup: Setup, seed: int) -> dict:
    models = models_of(setup, seed)
    rollouts, target_tokens = replay(setup, models)
    batches = data.Sentences(setup.config["data"], seed).batches("train", len(target_tokens["train"]))
    task, refiners = torch.cat([tasks for _, tasks in batches]), {}
    seen = [(task != number).nonzero().flatten() for number in range(len(TASKS))]
    fewest = min(map(len, seen))  # each learns from as many rollouts
    for unseen, rows in zip(("none", *TASKS), (torch.arange(len(task)), *seen), strict=True):
        name = f"without {unseen}"
        options = {"rows": rows[:fewest], "steps": setup.config["study"].steps}
        refiners[name], _ = fit(setup, models, name, rollouts, target_tokens, seed, **options)
    result = score_refiners(setup, models, refiners, seed)

    other = "glyphs" if setup.config["data"].data == "shapes" else "shapes"
    unseen = replace(setup.config["data"], data=other)
    models = models_of(setup, seed, train_refiner.READINGS, test_data=unseen)
    default = by_method(models.trained.refiners)
    return {**result, "other": score_refiners(setup, models, default, seed)}


def show(cells: list) -> str:
    names = [SEEN, *(f"without {task}" for task in TASKS)]
    other = [cell["other"] for cell in cells]
    return "\n".join(
        [
            "refiners trained without a task",
            report.measures_table(cells, names, GROUPS),
            "",
            "on a dataset that no model was trained on",
            report.measures_table(other, ["expected_embedding", *READ_BY], GROUPS),
        ]
    )


def plot(path, cells: list) -> None:
    figure = report.new_figure(2, 4.6)
    tasks, dataset = figure.axes
    names, values = [], []
    for task in TASKS:
        rows = {"trained with it": SEEN, "without it": f"without {task}"}
        names += [f"{task}: {name}" for name in rows]
        values += [report.relative(cells, method, task) for method in rows.values()]
    report.bars(tasks, names, values, ["#1d4e9e", "#66a5e0"] * len(TASKS))
    tasks.set(xlabel="share of greedy decoding's error", title="a task that the refiner has not seen")
    other = [cell["other"] for cell in cells]
    rows = ("teacher_forced", "expected_embedding", *READ_BY)
    errors = [report.relative(other, method, "all") for method in rows]
    report.bars(dataset, rows, errors, [evaluate.COLOURS[method] for method in rows])
    dataset.set(xlabel="share of greedy decoding's error", title="a dataset that no model has seen")
    for axis in figure.axes:
        axis.axvline(1, color="#d1495b", linewidth=1)
    report.save(figure, path)
