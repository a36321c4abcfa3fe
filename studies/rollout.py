"""Is the rollout used? What a refiner gains from the image that was written, and from the prompt alone.

The same network and steps, told or not told what was written, and trained on the backbone's own rollouts or
on something else; all are used on its rollouts. Stated before it was run:

    for repair of what was written      `refined_tokens+query` leaves less error, or gets more tokens right,
                                        than `parallel`, which has never seen the written image
    against it                          `parallel` does as well: then a second reader of the prompt is enough
    for learning its own mistakes       training on rollouts is better than on truth corrupted at random, at
                                        the error rate of greedy decoding, and than on teacher-forced output
    against it                          any of these does as well: then any denoiser is enough

`parallel` answers with a direction that lies between codes, and so may miss the very token: if that is all
that it lacks, it gets as many tokens right with cross-entropy over the codes as its loss. Random confusion
replaces each true token as often, and by what, as the backbone does, but at each place for itself: what a
refiner trained on it lacks is how mistakes hang together.

`exposure removed` is 1 for `parallel` whatever it does: what ignores the rollout cannot suffer from it. To
get that figure, a refiner that was trained on rollouts is applied to teacher-forced output, which it has
never seen; so each reading is also trained on half of both.
"""

import math
import statistics

import torch
import torch.nn as nn
import torch.nn.functional as F

import evaluate
import train_refiner
import vsr
from data import TASKS
from evaluate import by_method, method_name
from studies import report
from studies.report import GROUPS
from studies.runner import OURS, READ_BY, READINGS, Setup, fit, force_all, models_of, replay, score_refiners

MINUTES = 35
SETTINGS = [{}]

INPUTS = ("random corruption", "random confusion", "teacher-forced output", "half of both")
WITH_CROSS_ENTROPY = {f"{method}, cross-entropy": reads for method, reads in READ_BY.items()}
METHODS = (
    *READ_BY,
    *WITH_CROSS_ENTROPY,
    *(f"{method_name(reading)}, {name}" for reading in READINGS for name in INPUTS),
)
COMPARED = [(method_name(OURS) + loss, "parallel" + loss) for loss in ("", ", cross-entropy")]
COMPARED += [(name, f"{name}, {given}") for name in map(method_name, READINGS) for given in INPUTS[:3]]


class Scaled(vsr.Refiner):
    """Its output has a learnt length, 10 at first: products with unit codes are logits of any sharpness."""

    def __init__(self, *args):
        super().__init__(*args)
        self.log_length = nn.Parameter(torch.tensor(math.log(10)))

    def forward(self, embeddings=None, states=None, query=None):
        return self.log_length.exp() * super().forward(embeddings, states, query)


def corrupt(tokens: torch.Tensor, rate: float, codebook_size: int, generator) -> torch.Tensor:
    """Replace each token with probability `rate` by another code, any with equal probability."""
    other = torch.randint(1, codebook_size, tokens.shape, generator=generator)
    wrong = torch.rand(tokens.shape, generator=generator) < rate
    return torch.where(wrong, (tokens.long() + other) % codebook_size, tokens.long())


def confuse(tokens: torch.Tensor, counts: torch.Tensor, generator) -> torch.Tensor:
    """Replace each token v by a code drawn in proportion to counts[v], (V, V)."""
    drawn = tokens.long().clone()
    for code in tokens.unique().tolist():
        here = tokens == code
        drawn[here] = torch.multinomial(counts[code], int(here.sum()), True, generator=generator)
    return drawn


def run(setup: Setup, seed: int) -> dict:
    models = models_of(setup, seed, train_refiner.READINGS)
    rollouts, target_tokens = replay(setup, models)
    backbone, generator = models.trained.backbone, torch.Generator().manual_seed(seed)
    y, y_true, V = rollouts["train"].tokens, target_tokens["train"], len(models.codebook)
    rate = (y != y_true).float().mean().item()
    counts = torch.bincount((y_true.long() * V + y.long()).flatten(), minlength=V * V).view(V, V)
    counts = counts + torch.eye(V)  # a code that is in no rollout stays what it is
    inputs = {name: {} for name in INPUTS}
    for split, rollout in rollouts.items():
        y = rollout.tokens
        forced = force_all(setup, backbone, models.trained.written_for(split))
        half = torch.rand(len(y), 1, generator=generator) < 0.5
        changed = {
            "random corruption": corrupt(target_tokens[split], rate, V, generator),
            "random confusion": confuse(target_tokens[split], counts, generator),
            "teacher-forced output": forced,
            "half of both": torch.where(half, forced, y.long()),
        }
        for name in INPUTS:
            inputs[name][split] = rollout._replace(tokens=changed[name])

    codebook = F.normalize(models.codebook, dim=-1)

    def cross_entropy(refined, target):
        logits, tokens = refined @ codebook.T, vsr.nearest_code(target, codebook)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    refiners = by_method(models.trained.refiners)
    for method, reads in WITH_CROSS_ENTROPY.items():
        options = {"loss_function": cross_entropy, "make": Scaled}
        refiners[method], _ = fit(setup, models, method, rollouts, target_tokens, seed, reads, **options)
    for reading in READINGS:
        for name, given in inputs.items():
            method = f"{method_name(reading)}, {name}"
            refiners[method], _ = fit(setup, models, method, given, target_tokens, seed, reading.split("+"))
    return {**score_refiners(setup, models, refiners, seed), "greedy_error_rate": rate}


def counts_of(cell: dict, method: str) -> torch.Tensor:
    """Test tokens, (2, 2, 2) by whether greedy decoding, the method and `parallel` are right."""
    return torch.tensor([cell["agreement"][method][task] for task in TASKS]).sum(0).float()


def right_of(cell: dict, method: str, greedy_right: bool) -> float:
    """Of the test tokens that greedy decoding has right, or wrong, the share that a method has right."""
    counts = counts_of(cell, method)[int(greedy_right)]
    return (counts[1].sum() / counts.sum()).item()


def right_alone(cell: dict, greedy_right: bool) -> tuple[float, float]:
    """Of the same tokens, the shares that ours has right and `parallel` has not, and the other way round."""
    counts = counts_of(cell, method_name(OURS))[int(greedy_right)]
    return (counts[1, 0] / counts.sum()).item(), (counts[0, 1] / counts.sum()).item()


def show(cells: list) -> str:
    lines = [report.measures_table(cells, METHODS, GROUPS, COMPARED), ""]
    heads = [f"of those it gets {what}" for what in ("right", "wrong")]
    lines.append(f"{'tokens, beside greedy decoding':46}" + "".join(f"{head:>26}" for head in heads))

    def add(label: str, share_of) -> None:
        row = [report.estimate([share_of(cell, right) for cell in cells], 3) for right in (True, False)]
        lines.append(f"{label:46}" + "".join(f"{text:>26}" for text in row))

    for method in (*READ_BY, *WITH_CROSS_ENTROPY):
        add(f"{method}: right", lambda cell, right, method=method: right_of(cell, method, right))
    for i, method in enumerate((method_name(OURS), "parallel")):
        others = ("parallel", method_name(OURS))[i]
        add(f"{method}: right, and {others} wrong", lambda cell, right, i=i: right_alone(cell, right)[i])
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    """What remains of greedy decoding's error: made after true tokens too, or only after own mistakes."""
    rows = {"ar_greedy": "teacher_forced", **{method: method + evaluate.OF_FORCED for method in METHODS}}
    figure = report.new_figure(len(GROUPS), 3.6, 0.8 + 0.35 * len(rows))
    for axis, group in zip(figure.axes, GROUPS, strict=True):
        place = list(range(len(rows)))[::-1]
        base = [statistics.fmean(report.relative(cells, row, group)) for row in rows.values()]
        total = [statistics.fmean(report.relative(cells, row, group)) for row in rows]
        accumulated = [a - b for a, b in zip(total, base, strict=True)]
        axis.barh(place, base, color="#8d99ae", height=0.7, label="after true tokens too")
        axis.barh(place, accumulated, left=base, color="#d1495b", height=0.7, label="accumulated")
        for y, row in zip(place, rows, strict=True):
            seeds = report.relative(cells, row, group)
            axis.plot(seeds, [y] * len(seeds), ".", color="#222222", markersize=3)
        axis.set_yticks(place, rows if axis is figure.axes[0] else [""] * len(rows), fontsize=8)
        axis.set(title=group, xlabel="share of greedy decoding's error", xlim=(0, None))
    report.legend_outside(figure, "upper left", ncols=2)
    report.save(figure, path)
