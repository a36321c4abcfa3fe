"""Statistics, tables and figures that the studies share.

A *cell* is what a study's `run` gave for one seed and one setting; cell["cell"] names both. Seeds are
the unit: whatever is compared is compared within a seed, and `estimate` is the mean over seeds with a t
interval. Errors under the codebooks of different seeds are not pooled, shares and differences are.
"""

import math
import statistics

from matplotlib.figure import Figure

import evaluate
import runtime
from data import TASKS
from evaluate import new_figure as new_figure

GROUPS = ("all", *TASKS)  # all test sentences, and those of each task


# Numbers


def sd(values: list) -> float:
    """Standard deviation of a sample; 0 for a single value, NaN if one is NaN."""
    mean = statistics.fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))


# Quantiles of Student's t, 0.975, by degrees of freedom
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def t_interval(values: list) -> tuple[float, float]:
    """95 % interval of the mean of independent values, one a seed (up to 10); NaN for a single one."""
    if len(values) == 1:
        return math.nan, math.nan
    mean, half = statistics.fmean(values), T[len(values) - 2] * sd(values) / len(values) ** 0.5
    return mean - half, mean + half


def estimate(values: list, digits: int = 2) -> str:
    """`0.81 (0.75 to 0.87)`: mean over seeds and its t interval; the value alone for one seed."""
    mean, (low, high) = statistics.fmean(values), t_interval(values)
    text = f"{mean:.{digits}f}"
    return text if math.isnan(low) else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def of_seeds(cells: list) -> str:
    """What the numbers of a table are."""
    return "one seed" if len(cells) == 1 else f"mean over {len(cells)} seeds, with a 95 % t interval"


def values_of(cells: list, method: str, group: str, measure: str) -> list:
    """A measure of `evaluate.score_methods` of one method, in each cell."""
    return [cell["scores"][method][group][measure] for cell in cells]


def gaps(cells: list, method: str, group: str) -> list:
    """The gap that a method closes, in each cell."""
    return [evaluate.gap_closed(cell["scores"], method, group) for cell in cells]


def relative(cells: list, method: str, group: str) -> list:
    """A method's cosine error as a part of greedy decoding's, in each cell."""
    both = zip(*(values_of(cells, row, group, "cosine_error") for row in (method, "ar_greedy")), strict=True)
    return [share(error, greedy) for error, greedy in both]


def exposures(cells: list, method: str, group: str) -> list:
    """The part of the exposure error that a method removes, in each cell."""
    return [evaluate.exposure_removed(cell["scores"], method, group) for cell in cells]


def base_removed(cells: list, method: str, group: str) -> list:
    """The part of the teacher-forced error that a method removes from the teacher-forced output."""
    rows = ("teacher_forced", method + evaluate.OF_FORCED)
    both = zip(*(values_of(cells, row, group, "cosine_error") for row in rows), strict=True)
    return [share(before - after, before) for before, after in both]


def gained(cells: list, method: str, group: str, measure: str) -> list:
    """By how much a measure is higher than under greedy decoding, in each cell."""
    own, greedy = (values_of(cells, name, group, measure) for name in (method, "ar_greedy"))
    return [a - b for a, b in zip(own, greedy, strict=True)]


def by_setting(cells: list, field: str) -> dict:
    """The cells of a study with settings, grouped and sorted: {setting: [cell of each seed]}."""
    grouped = {}
    for cell in sorted(cells, key=lambda cell: cell["cell"][field]):
        grouped.setdefault(cell["cell"][field], []).append(cell)
    return grouped


# Tables


MEASURES = {
    "gap closed": gaps,
    "exposure removed": exposures,
    "base error removed": base_removed,
    "tokens right, gained": lambda *which: gained(*which, "token_accuracy"),
    "dB gained": lambda *which: gained(*which, "psnr"),
}
OF_BOTH = ("exposure removed", "base error removed")  # need a method's output for the teacher-forced one too


def measures_table(cells: list, methods, groups=("all",), differences=()) -> str:
    """All measures of what repairs, for each method and group: means over seeds, with t intervals.

    differences: pairs of methods; for all tasks, what the first has more than the second within a seed.
    """
    width = max(len(" - ".join(row)) for row in [*((method,) for method in methods), *differences]) + 2
    heads = "".join(f"{name:>26}" for name in MEASURES)

    def row(*compared: str, group: str = "all") -> str:
        """Of a method; or of two, the first minus the second."""
        refined = all(method + evaluate.OF_FORCED in cells[0]["scores"] for method in compared)
        text = f"{' - '.join(compared):{width}}"
        for name, measure in MEASURES.items():
            if name in OF_BOTH and not refined:
                text += " " * 26
                continue
            by_method = [measure(cells, method, group) for method in compared]
            values = [first - sum(second) for first, *second in zip(*by_method, strict=True)]
            text += f"{estimate(values, 3 if name.startswith('tokens') else 2):>26}"
        return text.rstrip()

    lines = [f"{of_seeds(cells)}; what is gained is over greedy decoding"]
    for group in groups:
        lines += ["", f"{group:{width}}{heads}", *(row(method, group=group) for method in methods)]
    if differences:
        lines += ["", f"{'differences, all':{width}}{heads}", *(row(*pair) for pair in differences)]
    return "\n".join(lines)


def backbone_line(cells: list) -> str:
    """How good the backbone is by itself, over all tasks: errors by seed, and tokens right."""
    texts, rows = [], {"teacher-forced": "teacher_forced", "greedy": "ar_greedy"}
    for what, method in rows.items():
        errors = ", ".join(f"{error:.4f}" for error in values_of(cells, method, "all", "cosine_error"))
        right = estimate(values_of(cells, method, "all", "token_accuracy"), 3)
        texts.append(f"{what} error {errors}, tokens right {right}")
    return "; ".join(texts)


def settings_table(cells: list) -> str:
    """Measures, parameters, seconds and losses of the settings of a study that uses `runner.fit_each`.

    Seconds are medians over the seeds: a machine that was busy during one seed does not spoil them.
    """
    lines = [measures_table(cells, cells[0]["cost"]), ""]
    heads = (("parameters", 12), ("of backbone", 12), ("seconds", 9), ("train loss", 12), ("val loss", 10))
    lines.append(f"{'':34}" + "".join(f"{head:>{width}}" for head, width in heads))
    for name, first in cells[0]["cost"].items():
        costs = [cell["cost"][name] for cell in cells]
        share = first["params"] / cells[0]["backbone_params"]
        row = f"{name:34}{first['params']:12,}{share:12.0%}"
        row += f"{statistics.median(cost['seconds'] for cost in costs):9.0f}"
        row += f"{statistics.fmean(cost['train_loss'] for cost in costs):12.4f}"
        row += f"{statistics.fmean(cost['val_loss'] for cost in costs):10.4f}"
        lines.append(row)
    return "\n".join(lines)


# Figures


def save(figure: Figure, path) -> None:
    runtime.write_whole(path, figure.savefig)


def bars(axis, names, values: list, colours="#66a5e0") -> None:
    """Horizontal bars: the mean over seeds, a whisker of one standard deviation, the seeds as dots."""
    place = list(range(len(names)))[::-1]
    means, spread = [statistics.fmean(v) for v in values], [sd(v) for v in values]
    whisker = {"ecolor": "#444444", "error_kw": {"linewidth": 1}}
    axis.barh(place, means, xerr=spread, color=colours, height=0.7, **whisker)
    for y, seeds in zip(place, values, strict=True):
        axis.plot(seeds, [y] * len(seeds), ".", color="#222222", markersize=3)
    axis.set_yticks(place, names, fontsize=8)


def curve(axis, x: list, values: list, **options) -> None:
    """A line through the means over seeds, with whiskers of one standard deviation."""
    options = {"marker": "o", "capsize": 3, **options}
    axis.errorbar(x, [statistics.fmean(v) for v in values], [sd(v) for v in values], **options)


def log_x(axis, x: list) -> None:
    """A logarithmic axis that has room for all of x, whatever is drawn over it."""
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlim(0.7 * min(x), 1.4 * max(x))


def legend(axis) -> None:
    axis.legend(fontsize=8, frameon=False)


def legend_outside(figure: Figure, where: str, **options) -> None:
    """One legend for all panels, that of the first."""
    lines = figure.axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc=f"outside {where}", frameon=False, **options)


def share(part: float, whole: float) -> float:
    """part / whole; NaN of nothing."""
    return part / whole if whole else math.nan
