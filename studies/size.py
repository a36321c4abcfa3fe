"""How little is enough? How small a refiner can be.

Depth and width of the refiner. That it is small beside its backbone is supported by a curve that
is flat below the default size; against it speaks one that still rises there.

First edition: with 9 % of the backbone's parameters it closed 0.41 of the gap, with 61 % (the
default) 0.82, with 232 % 0.93 (three seeds, 1,000 steps, reading tokens and states).
"""

import statistics

from studies import report
from studies.report import settings_table as show  # noqa: F401
from studies.runner import Setup, fit_each

MINUTES = 8
SETTINGS = [{}]


def run(setup: Setup, seed: int) -> dict:
    full = setup.config["refiner"].width
    shapes = [(1, full // 2), (2, full // 2), (1, full), (2, full), (3, full), (2, 2 * full)]
    settings = {f"{layers} x {width}": {"layers": layers, "width": width} for layers, width in shapes}
    return fit_each(setup, seed, settings)


def plot(path, cells: list) -> None:
    figure = report.new_figure(1, 5.0)
    (axis,) = figure.axes
    shares = {name: c["params"] / cells[0]["backbone_params"] for name, c in cells[0]["cost"].items()}
    for name, x in shares.items():
        values = report.gaps(cells, name, "all")
        report.curve(axis, [x], [values], color="#1d4e9e")
        place = (x, statistics.fmean(values))
        axis.annotate(name, place, xytext=(6, -10), textcoords="offset points", fontsize=8)
    axis.axhline(0, color="#888888", linewidth=0.6)
    report.log_x(axis, list(shares.values()))
    axis.set(ylabel="gap closed", xlabel="refiner's parameters / backbone's (layers x width)")
    report.save(figure, path)
