"""Does the error build up along the raster, and does refinement take that back? The paper's Figure
2.

Cosine error by token position, from the cells of `main`. For the claim speaks a greedy curve that
rises away from the teacher-forced one, and a refined curve that does not; against it, a refined
curve that is lower by the same amount everywhere: then it is not the accumulated part that is
repaired.

First edition: greedy's area under the curve was 1.29 in the first half of the raster and 2.24 in
the second, that of the refiner that reads tokens and states 0.65 and 0.84, the teacher-forced one
0.62 and 0.72 (five seeds).
"""

import torch
import torch.nn.functional as F

import evaluate
from studies import report
from studies.report import GROUPS, mean_sd

CELLS_OF = "main"
MINUTES = 0
SETTINGS = [{}]

ROWS = ("teacher_forced", "ar_greedy", "lora", "refined_tokens", "refined_tokens+query")


def curves(cells: list, method: str, group: str) -> torch.Tensor:
    """Cosine error by position: (seeds, N)."""
    return torch.tensor(report.values_of(cells, method, group, "cosine_error_by_position"))


def numbers(cells: list) -> dict:
    """The curves, as means over seeds."""
    return {"curves": {method: curves(cells, method, "all").mean(0).tolist() for method in ROWS}}


def show(cells: list) -> str:
    """AUC of each curve, over the raster and over its halves."""
    lines = [
        f"AUC of the cosine error by position, mean ± standard deviation over {len(cells)} seeds",
        f"{'':24}{'all positions':>16}{'first half':>16}{'second half':>16}",
    ]
    for method in ROWS:
        by_seed = curves(cells, method, "all")
        half = by_seed.shape[1] // 2
        areas = [part.sum(1).tolist() for part in (by_seed, by_seed[:, :half], by_seed[:, half:])]
        lines.append(f"{method:24}" + "".join(f"{mean_sd(area):>16}" for area in areas))
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    figure = report.new_figure(len(GROUPS))
    for axis, group in zip(figure.axes, GROUPS, strict=True):
        for method in ROWS:
            by_seed = curves(cells, method, group)
            smooth = F.avg_pool1d(F.pad(by_seed[:, None], (3, 3), mode="replicate"), 7, 1)[:, 0]
            mean, spread = smooth.mean(0), smooth.std(0) if len(cells) > 1 else 0 * smooth[0]
            colour = evaluate.COLOURS.get(method, "#9b5de5")
            axis.plot(mean, color=colour, label=f"{method}  AUC {by_seed.sum(1).mean():.2f}")
            low, high = mean - spread, mean + spread
            axis.fill_between(range(len(mean)), low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set(title=group, xlabel="token position t (raster order)")
        axis.set_ylim(0, 1.4 * axis.get_ylim()[1])  # room for the legend
        axis.legend(fontsize=6.5, edgecolor="none", framealpha=0.85)
    figure.axes[0].set_ylabel(f"cosine error, mean ± sd of {len(cells)} seeds")
    report.save(figure, path)
