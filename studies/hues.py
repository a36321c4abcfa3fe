"""Scenes with one hue, for the studies in which the written image itself says something.

Both objects of a scene have one hue, the first a dark shade of it and the second a light one; they stand as
far apart as the picture allows. The hue is drawn anew for each scene. All hues have the same grey, so nothing
in the prompt tells it: every hue is a valid answer, as long as both objects have it. One who reads what was
written has to look at one object to know the hue of the other.

The only task is colorization.
"""

import colorsys

import torch

import data

HUES = len(data.SHAPES)
GREYS = (0.35, 0.65)  # of the dark and of the light shade, in [0, 1]


def even_palette() -> torch.Tensor:
    """Two shades of each hue, of one grey each: (HUES, 2, 3) in [-1, 1]."""
    luma, colours = torch.tensor([0.299, 0.587, 0.114]), []
    for hue in range(HUES):
        full = torch.tensor(colorsys.hsv_to_rgb((hue + 0.5) / HUES, 0.85, 0.95))
        grey = (full @ luma).item()
        for wanted in GREYS:  # darker by scaling, lighter by mixing with white
            mixed = (
                full * (wanted / grey) if wanted < grey else full + (1 - full) * (wanted - grey) / (1 - grey)
            )
            colours.append(mixed)
    return torch.stack(colours).view(HUES, 2, 3) * 2 - 1


class OneHue(data.Sentences):
    """Visual sentences of such scenes; what does not depend on the hue is split by the first hue's pixels."""

    def layers(self, split: str, index: int, n: int):
        """Unpainted scenes of n sentences, and the hue of each: `data.Layers` of n(K+1), (n(K+1),) long."""
        generator = self.generator(split, index)
        total, parts = n * (self.config.num_demos + 1), []
        while sum(len(part.background) for part in parts) < total:
            layers = data.draw_layers(self.masks, total, generator, apart=4)
            right = data.split_of(self.paint(layers, torch.zeros(total, dtype=torch.long)))
            rows = (right == data.SPLITS.index(split)).nonzero().flatten()
            parts.append(data.Layers(layers.background[rows], *(part[:, rows] for part in layers[1:])))
        first, *others = zip(*parts, strict=True)
        layers = data.Layers(torch.cat(first)[:total], *(torch.cat(x, dim=1)[:, :total] for x in others))
        return layers, torch.randint(HUES, (total,), generator=generator)

    def paint(self, layers: data.Layers, hue: torch.Tensor) -> torch.Tensor:
        """Scenes (n, 3, S, S) in hues (n,): the first object dark, the second light."""
        return layers.paint(even_palette()[hue].transpose(0, 1))

    def __call__(self, split: str, index: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        layers, hue = self.layers(split, index, n)
        grey = data.grey(self.paint(layers, torch.zeros_like(hue)))  # that of one hue, to the last bit
        pairs = torch.stack([grey, self.paint(layers, hue)], dim=1)  # (n(K+1), 2, 3, S, S)
        return pairs.view(n, -1, *pairs.shape[2:]), torch.zeros(n, dtype=torch.long)

    def valid(self, split: str, total: int) -> torch.Tensor:
        """The query's target in each hue, for the first `total` sentences: (total, HUES, 3, S, S)."""
        found = []
        for index in range(-(-total // 64)):
            layers, hue = self.layers(split, index, 64)
            painted = torch.stack([self.paint(layers, torch.full_like(hue, h)) for h in range(HUES)], dim=1)
            found.append(painted.view(64, -1, *painted.shape[1:])[:, -1])
        return torch.cat(found)[:total]

    def objects(self, split: str, total: int) -> torch.Tensor:
        """Where the query's two objects are seen: (total, 2, S, S) bool, for the first `total` sentences."""
        found = []
        for index in range(-(-total // 64)):
            alpha = self.layers(split, index, 64)[0].alpha[:, :, 0]  # (2, n(K+1), S, S)
            seen = torch.stack([(alpha[0] > 0.9) & (alpha[1] < 0.1), alpha[1] > 0.9], dim=1)
            found.append(seen.view(64, -1, *seen.shape[1:])[:, -1])
        return torch.cat(found)[:total]
