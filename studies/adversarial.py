"""Does the tokenizer need the adversarial loss of a VQGAN?

Two tokenizers of one seed, without and with it. For it speak sharper edge maps at no lower PSNR;
against it, a lower PSNR and more seconds for edges that are no sharper. Off by default.

First edition: medians without against with it, of three seeds: PSNR 28.7 against 28.4 dB on
sources, 28.1 against 27.9 dB on edge maps, edge sharpness 1.01 against 1.01, 96 against 112
seconds.
"""

import statistics
from dataclasses import asdict, replace

import data
import train_refiner
import vqgan
from studies import report
from studies.runner import Setup

MINUTES = 4
SETTINGS = [{}]

SIDES = ("without", "with")


def run(setup: Setup, seed: int) -> dict:
    """`vqgan.score_tokenizer`, and seconds, of both."""
    sentences, result = data.Sentences(setup.config["data"], seed), {}
    weight = setup.config["vqgan"].gan_weight or 0.5
    for side, gan_weight in zip(SIDES, (0.0, weight), strict=True):
        config = replace(setup.config["vqgan"], gan_weight=gan_weight)
        tokenizer, log = train_refiner.train_tokenizer(
            config, sentences, setup.device, setup.dtype, seed, setup.progress(side, asdict(config))
        )
        scores = vqgan.score_tokenizer(tokenizer, sentences, "val", setup.autocast)
        result[side] = {"seconds": log["seconds"], **scores}
    return result


def measured(cells: list) -> dict:
    """{measure: [values without, values with it]}; a measure that a cell lacks (no edge maps) is left out."""
    found = {}
    for measure in cells[0]["without"]:
        sides = [[cell[side][measure] for cell in cells] for side in SIDES]
        if not any(value is None for side in sides for value in side):
            found[measure] = sides
    return found


def show(cells: list) -> str:
    lines = [
        f"median (range) of {len(cells)} seeds, without and with the adversarial loss",
        f"{'':16}" + "".join(f"{side:>32}" for side in SIDES),
    ]
    for measure, sides in measured(cells).items():
        texts = [f"{statistics.median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in sides]
        lines.append(f"{measure:16}" + "".join(f"{text:>32}" for text in texts))
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    found = measured(cells)
    figure = report.new_figure(len(found), 2.6, 2.2)
    for axis, (measure, sides) in zip(figure.axes, found.items(), strict=True):
        report.bars(axis, SIDES, sides, ["#8d99ae", "#66a5e0"])
        axis.set_xlabel(measure)
    report.save(figure, path)
