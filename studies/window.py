"""Is it global? How far a refiner has to see.

Attention is masked to keys at most `radius` places away, across or down; parameters, data and steps stay the
same. Heads start by looking at a neighbour, as in `vsr.RelativeBias`, or anywhere (biases from zero).

On the default data, reading tokens and query, with three blocks, so that a position hears of what is at most
three times the radius away: with radius 1 of 47 % of all pairs of places, with 2 of 94 %, with 3 of all.
Stated before it was run:

    for global context      radius 1 is clearly worse than all
    against it              radius 1 does as well as all: then it is a local smoothing

(The query's states have read the prompt, so even radius 0 has some context. Radius 2 and 3 only limit how
much of it comes in one step.)

And reading the written image alone, where the hue of one object is told by the other, at some distance, and
by nothing else (`studies/choice.py`, what was sampled, towards the nearest valid answer; three blocks and the
steps of that study, for one block had learnt next to nothing in 600). About 14, 44, 77 and 99 % of an
object's tokens have one of the other object within 1, 2, 3 and 4 places. Stated before it was run: a refiner
that uses the written image as a whole makes more images coherent the farther it sees; against that speaks
that radius 1, with which three blocks hear of what is three places away, does as well as all.
"""

import functools

import torch

import vsr
from studies import choice, report
from studies.runner import READS, Setup, fit, models_of, refine_all, replay, score_refiners

MINUTES = 50
KINDS = ("default", "choice")
SETTINGS = [{"kind": kind} for kind in KINDS]
RADII = (0, 1, 2, 3, None)  # None: all
STARTS = ("neighbours", "anywhere")


class WindowBias(vsr.RelativeBias):
    """A relative bias that hides keys further than `radius` rows or columns away."""

    def __init__(self, heads: int, grid: tuple[int, int], radius: int | None, start: str):
        super().__init__(heads, grid)
        self.radius = radius
        if start == "anywhere":
            torch.nn.init.zeros_(self.table)

    def forward(self) -> torch.Tensor:
        bias, (h, w) = super().forward(), self.grid
        if self.radius is None:
            return bias
        place = torch.arange(h * w, device=bias.device)
        row, column = place // w, place % w
        across, down = (row - row[:, None]).abs(), (column - column[:, None]).abs()
        return bias.masked_fill(torch.maximum(across, down) > self.radius, -torch.inf)


class Windowed(vsr.Refiner):
    """`vsr.Refiner` whose attention sees a window."""

    def __init__(self, config, reads, grid, code_dim, state_dim=0, *, radius: int | None, start: str):
        super().__init__(config, reads, grid, code_dim, state_dim)
        for block in self.blocks:
            block.attention.relative = WindowBias(config.heads, grid, radius, start)


def name_of(radius: int | None, start: str) -> str:
    return f"{'all' if radius is None else f'radius {radius}'}, from {start}"


NAMES = [name_of(radius, start) for start in STARTS for radius in RADII]
COMPARED = [(name_of(None, start), name_of(1, start)) for start in STARTS]
COMPARED.append((name_of(1, STARTS[0]), name_of(1, STARTS[1])))


def run(setup: Setup, seed: int, kind: str) -> dict:
    if kind == "default":
        models, options = models_of(setup, seed), {"reads": READS}
        rollouts, target_tokens = replay(setup, models, first=10240)  # as many as in the choice
    else:
        models, _, rollouts, targets, tests, valid, objects = choice.prepare(setup, seed)
        target_tokens, options = targets[choice.TARGETS[1]], {"reads": ("tokens",)}
    study, refiners = setup.config["study"], {}
    options["steps"] = study.window_steps if kind == "default" else study.steps
    options["attention"] = True  # it is what is asked about
    for start in STARTS:
        for radius in RADII:
            make, name = functools.partial(Windowed, radius=radius, start=start), name_of(radius, start)
            refiners[name], _ = fit(setup, models, name, rollouts, target_tokens, seed, make=make, **options)
    if kind == "default":
        return score_refiners(setup, models, refiners, seed)
    written = {"sampled": tests["sampled"].tokens}
    for name, refiner in refiners.items():
        written[f"{name}, of sampled"] = refine_all(setup, models, refiner, tests["sampled"])
    return {"scores": choice.score(setup, models, written, valid, objects)}


def show(cells: list) -> str:
    lines = []
    for kind, group in report.by_setting(cells, "kind").items():
        if kind == "default":
            table = report.measures_table(group, NAMES, differences=COMPARED)
        else:
            table = choice.show(group)
        lines += [f"{kind} data", table, ""]
    return "\n".join(lines[:-1])


def plot(path, cells: list) -> None:
    groups = report.by_setting(cells, "kind")
    figure = report.new_figure(2 * len(groups), 3.4)
    for i, (kind, group) in enumerate(groups.items()):

        def values_of(measure: str, name: str, kind=kind, group=group) -> list:
            if kind == "default":
                return report.MEASURES[measure](group, name, "all")
            return [cell["scores"][f"{name}, of sampled"][measure] for cell in group]

        measures = {"default": ("gap closed", "tokens right, gained"), "choice": ("coherent", "tokens right")}
        for axis, measure in zip(figure.axes[2 * i :], measures[kind], strict=False):
            for start, colour in zip(STARTS, ("#1d4e9e", "#edae49"), strict=True):
                values = [values_of(measure, name_of(radius, start)) for radius in RADII]
                report.curve(axis, list(range(len(RADII))), values, color=colour, label=f"from {start}")
            axis.set_xticks(range(len(RADII)), ["all" if r is None else r for r in RADII])
            axis.set(title=f"{kind} data", xlabel="radius of the window", ylabel=measure)
    report.legend(figure.axes[0])
    report.save(figure, path)
