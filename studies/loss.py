"""Does it have to be the cosine loss, and does it need the residual?

The same refiner with other losses, and without the residual, for the paper's reading and for ours.
Cross-entropy takes cosines times a learnt scale as logits. Stated before it was run: for the paper's choice
speaks that cosine leaves as little error as the others and gets as many tokens right; against it, that
another one is better in both.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import vsr
from studies.report import plot_settings as plot  # noqa: F401
from studies.report import settings_table as show  # noqa: F401
from studies.runner import READINGS, Setup, fit_each, models_of

MINUTES = 20
SETTINGS = [{}]


class Unnormalised(vsr.Refiner):
    """Its output keeps its length: on unit vectors the squared error would be the cosine loss again."""

    def forward(self, embeddings=None, states=None, query=None):
        embeddings = F.normalize(embeddings.float(), dim=-1)
        return embeddings + self.change(embeddings, states, query)


class Scaled(vsr.Refiner):
    """Its output has a learnt length, 10 at first: products with unit codes are logits of any sharpness."""

    def __init__(self, *args):
        super().__init__(*args)
        self.log_length = nn.Parameter(torch.tensor(math.log(10)))

    def forward(self, embeddings=None, states=None, query=None):
        return self.log_length.exp() * super().forward(embeddings, states, query)


class Absolute(vsr.Refiner):
    """No residual: it says where an embedding should be, not by how much to move it."""

    def __init__(self, *args):
        super().__init__(*args)
        nn.init.normal_(self.to_code.weight, std=0.02)

    def forward(self, embeddings=None, states=None, query=None):
        embeddings = F.normalize(embeddings.float(), dim=-1)
        return F.normalize(self.change(embeddings, states, query), dim=-1)


def run(setup: Setup, seed: int) -> dict:
    codebook = F.normalize(models_of(setup, seed).codebook, dim=-1)

    def cross_entropy(refined, target):
        logits, tokens = refined @ codebook.T, vsr.nearest_code(target, codebook)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def both(refined, target):
        return vsr.cosine_loss(refined, target) + 0.1 * cross_entropy(refined, target)

    settings = {
        "cosine": {},
        "squared error": {"loss_function": F.mse_loss, "make": Unnormalised},
        "cross-entropy": {"loss_function": cross_entropy, "make": Scaled},
        "cosine + cross-entropy": {"loss_function": both, "make": Scaled},
        "cosine, no residual": {"make": Absolute},
    }
    both_readings = {
        f"{reading}, {name}": {"reads": tuple(reading.split("+")), **options}
        for reading in READINGS
        for name, options in settings.items()
    }
    return fit_each(setup, seed, both_readings)
