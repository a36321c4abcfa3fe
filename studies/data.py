"""How little is enough? How many rollouts, and how many steps, a refiner needs.

Fewer rollouts for the same number of steps, and fewer steps on all rollouts. That refinement is
cheap is supported by a curve that is flat well before the default; against it speaks one that
still rises there.

First edition: 64 rollouts did a little harm (-0.02 of the gap), 1,024 closed 0.20, 4,096 0.58,
16,384 0.81; 125 of the 1,000 steps closed 0.10, 500 closed 0.67, all 0.82 (three seeds, reading
tokens and states).
"""

import statistics

from studies import report
from studies.report import settings_table as show  # noqa: F401
from studies.runner import Setup, fit_each

MINUTES = 9
SETTINGS = [{}]


def run(setup: Setup, seed: int) -> dict:
    most, steps = setup.config["refiner"].rollouts, setup.config["study"].steps
    settings = {f"{n} rollouts": {"rows": slice(n)} for n in (64, 256, 1024, 4096, 16384) if n <= most}
    settings |= {f"{steps // part} steps": {"steps": steps // part} for part in (8, 4, 2, 1) if steps >= part}
    return fit_each(setup, seed, settings)


def plot(path, cells: list) -> None:
    figure = report.new_figure(2, 4.2)
    by_rollouts, by_time = figure.axes
    x, names = {}, list(cells[0]["cost"])
    x[by_rollouts] = {name: int(name.split()[0]) for name in names if name.endswith("rollouts")}
    x[by_time] = {
        name: statistics.median(cell["cost"][name]["seconds"] for cell in cells)
        for name in names
        if name.endswith("steps")
    }
    for axis, places in x.items():
        report.curve(axis, list(places.values()), [report.gaps(cells, name, "all") for name in places])
        axis.axhline(0, color="#888888", linewidth=0.6)
        axis.set_ylabel("gap closed")
    report.log_x(by_rollouts, list(x[by_rollouts].values()))
    by_rollouts.set(xlabel="rollouts to train on (the same number of steps)")
    by_time.set_xlabel("seconds of training, all rollouts")
    report.save(figure, path)
