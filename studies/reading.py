"""What does the refiner have to read, and is attention needed whatever it reads?

Five sets of sources, each with and without attention; and heads that start without a place to
look at. That repair needs the written image is supported by sets with tokens that are better than
`query` alone; that it needs context, by what is lost without attention. Against it: `query` alone
does as well, or attention adds nothing.

First edition: tokens closed 0.39 of the gap, tokens+states 0.82, all three sources 1.02; without
attention 0.00, 0.25 and 0.57; heads that start anywhere 0.70 (three seeds; the sets with `query`
alone or beside tokens were not measured).
"""

import torch.nn as nn

import vsr
from studies.report import plot_settings as plot  # noqa: F401
from studies.report import settings_table as show  # noqa: F401
from studies.runner import OURS, Setup, fit_each

MINUTES = 11
SETTINGS = [{}]

READINGS = ("tokens", "tokens+states", "tokens+query", "tokens+states+query", "query")


class Anywhere(vsr.Refiner):
    """A refiner whose heads start without a place to look at: relative biases are learnt from zero."""

    def __init__(self, *args):
        super().__init__(*args)
        for block in self.blocks:
            nn.init.zeros_(block.attention.relative.table)


def run(setup: Setup, seed: int) -> dict:
    settings = {}
    for reading in READINGS:
        reads = tuple(reading.split("+"))
        settings[reading] = {"reads": reads}
        settings[f"{reading}, no attention"] = {"reads": reads, "attention": False}
    settings[f"{OURS}, heads start anywhere"] = {"make": Anywhere}
    return fit_each(setup, seed, settings, needs=vsr.READS)
