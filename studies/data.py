"""How little is enough? How many rollouts, and how many steps, a refiner needs.

Fewer rollouts for the same number of steps, and fewer steps on all rollouts, for the paper's reading and for
ours. Stated before it was run: that refinement is cheap is supported by curves that are flat well before the
largest number; against it speak curves that still rise there.
"""

from studies import report
from studies.report import settings_table as show  # noqa: F401
from studies.runner import READINGS, Setup, fit_each

MINUTES = 20
SETTINGS = [{}]


def run(setup: Setup, seed: int) -> dict:
    most, steps, settings = setup.config["refiner"].rollouts, setup.config["study"].steps, {}
    for reading in READINGS:
        reads = tuple(reading.split("+"))
        for n in (256, 1024, 4096, most):
            if n <= most:
                settings[f"{reading}, {n:,} rollouts"] = {"reads": reads, "rows": slice(n)}
        for part in (8, 4, 2):
            if steps >= part:
                settings[f"{reading}, {steps // part:,} steps"] = {"reads": reads, "steps": steps // part}
    return fit_each(setup, seed, settings)


def plot(path, cells: list) -> None:
    figure = report.new_figure(2, 4.2)
    by_rollouts, by_steps = figure.axes
    for reading, colour in zip(READINGS, ("#66a5e0", "#1d4e9e"), strict=True):
        own = {name: name.split()[1:] for name in cells[0]["cost"] if name.startswith(f"{reading},")}
        amount = {name: int(number.replace(",", "")) for name, (number, _) in own.items()}
        rollouts = {name: amount[name] for name, (_, what) in own.items() if what == "rollouts"}
        steps = {name: amount[name] for name, (_, what) in own.items() if what == "steps"}
        steps[max(rollouts, key=rollouts.get)] = cells[0]["steps"]  # all rollouts, all steps
        for axis, places in ((by_rollouts, rollouts), (by_steps, steps)):
            values = [report.gaps(cells, name, "all") for name in places]
            report.curve(axis, list(places.values()), values, color=colour, label=f"reads {reading}")
    for axis in figure.axes:
        axis.axhline(0, color="#888888", linewidth=0.6)
        axis.set_ylabel("gap closed")
    by_rollouts.set_xscale("log")
    by_rollouts.set_xlabel("rollouts to train on (the same number of steps)")
    by_steps.set_xlabel("steps of training, all rollouts")
    report.legend(by_rollouts)
    report.save(figure, path)
