"""How little is enough? How small a refiner can be.

Depth and width of the refiner, for the paper's reading and for ours. Stated before it was run: that it is
small beside its backbone is supported by curves that are flat below the default size; against it speak curves
that still rise there.
"""

import functools
import statistics
from dataclasses import replace

import vsr
from studies import report
from studies.runner import READINGS, Setup, fit_each, generate_all, models_of
from studies.timing import median_seconds

MINUTES = 20
SETTINGS = [{}]


def run(setup: Setup, seed: int) -> dict:
    config, settings = setup.config["refiner"], {}
    half, double = config.width // 2, 2 * config.width
    for reading in READINGS:
        for layers, width in ((1, half), (3, half), (1, config.width), (3, config.width), (3, double)):
            name, reads = f"{reading}, {layers} x {width}", tuple(reading.split("+"))
            settings[name] = {"reads": reads, "layers": layers, "width": width}
    return {**fit_each(setup, seed, settings), "share": shares_of_generation(setup, seed, settings)}


def shares_of_generation(setup: Setup, seed: int, settings: dict) -> dict:
    """What one pass over 64 images takes, as a part of their generation: {setting: share}."""
    models, timed = models_of(setup, seed), {}
    backbone, tokens = models.trained.backbone, models.test["tokens"][:64]
    rollout = [values.to(setup.device) for values in generate_all(setup, backbone, tokens)]
    prompt = tokens[:, :-1].flatten(1).long().to(setup.device)
    timed["generation"] = functools.partial(backbone.generate, prompt, tokens.shape[2])
    for name, options in settings.items():
        config = replace(setup.config["refiner"], layers=options["layers"], width=options["width"])
        shape = (models.grid, models.codebook.shape[1], backbone.config.width)
        refiner = vsr.Refiner(config, options["reads"], *shape).to(setup.device).eval()
        timed[name] = functools.partial(vsr.refine, refiner, models.codebook, *rollout)
    with setup.autocast:
        seconds = median_seconds(timed, setup.device, setup.config["study"].rounds)
    return {name: seconds[name] / seconds["generation"] for name in settings}


def show(cells: list) -> str:
    lines = [
        report.settings_table(cells),
        "",
        "one pass as a share of generation, batch 64, median over seeds",
    ]
    for name in cells[0]["share"]:
        lines.append(f"{name:34}{statistics.median(cell['share'][name] for cell in cells):8.1%}")
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    figure = report.new_figure(len(READINGS), 4.6)
    shares = {name: c["params"] / cells[0]["backbone_params"] for name, c in cells[0]["cost"].items()}
    for axis, reading in zip(figure.axes, READINGS, strict=True):
        own = {name: x for name, x in shares.items() if name.startswith(f"{reading},")}
        for name, x in own.items():
            values = report.gaps(cells, name, "all")
            report.curve(axis, [x], [values], color="#1d4e9e")
            place, text = (x, statistics.fmean(values)), name.removeprefix(f"{reading}, ")
            where = {"xytext": (6, -10)} if text.startswith("1") else {"xytext": (-6, 4), "ha": "right"}
            axis.annotate(text, place, textcoords="offset points", fontsize=8, **where)
        axis.axhline(0, color="#888888", linewidth=0.6)
        report.log_x(axis, list(own.values()))
        axis.set(title=f"reads {reading}", ylabel="gap closed", xlabel="refiner's parameters / backbone's")
    report.save(figure, path)
