"""Is the rollout used? What a refiner gains from the image that was written, and from the prompt alone.

The same network and steps, told or not told what was written, and trained on the backbone's own rollouts or
on something else; all are used on its rollouts. Stated before it was run:

    for repair of what was written      `refined_tokens+query` leaves less error, or gets more tokens right,
                                        than `parallel`, which has never seen the written image
    against it                          `parallel` does as well: then a second reader of the prompt is enough
    for learning its own mistakes       training on rollouts is better than on truth corrupted at random, at
                                        the error rate of greedy decoding, and than on teacher-forced output
    against it                          any of these does as well: then any denoiser is enough

`exposure removed` is 1 for `parallel` whatever it does: what ignores the rollout cannot suffer from it. To
get that figure, a refiner that was trained on rollouts is applied to teacher-forced output, which it has
never seen; so each reading is also trained on half of both.
"""

import torch

import train_refiner
from data import TASKS
from evaluate import method_name
from studies import report
from studies.report import GROUPS
from studies.runner import OURS, READINGS, Setup, fit, force_all, models_of, replay, score_refiners

MINUTES = 22
SETTINGS = [{}]

INPUTS = ("random corruption", "teacher-forced output", "half of both")
METHODS = (
    *map(method_name, train_refiner.READINGS),
    *(f"{method_name(reading)}, {name}" for reading in READINGS for name in INPUTS),
)


def corrupt(tokens: torch.Tensor, rate: float, codebook_size: int, generator) -> torch.Tensor:
    """Replace each token with probability `rate` by another code, any with equal probability."""
    other = torch.randint(1, codebook_size, tokens.shape, generator=generator)
    wrong = torch.rand(tokens.shape, generator=generator) < rate
    return torch.where(wrong, (tokens.long() + other) % codebook_size, tokens.long())


def run(setup: Setup, seed: int) -> dict:
    models = models_of(setup, seed, train_refiner.READINGS)
    rollouts, targets = replay(setup, models)
    backbone, generator = models.trained.backbone, torch.Generator().manual_seed(seed)
    rate = (rollouts["train"].tokens != targets["train"]).float().mean().item()
    inputs = {name: {} for name in INPUTS}
    for split, tokens in models.trained.tokens.items():
        written, forced = rollouts[split].tokens, force_all(setup, backbone, tokens).tokens
        half = torch.rand(len(tokens), 1, generator=generator) < 0.5
        changed = (
            corrupt(targets[split], rate, len(models.codebook), generator),
            forced,
            torch.where(half, forced, written.long()),
        )
        for name, value in zip(INPUTS, changed, strict=True):
            inputs[name][split] = rollouts[split]._replace(tokens=value)
    refiners = {method_name(reading): refiner for reading, refiner in models.trained.refiners.items()}
    for reading in READINGS:
        for name, given in inputs.items():
            method = f"{method_name(reading)}, {name}"
            refiners[method], _, _ = fit(setup, models, method, given, targets, seed, reading.split("+"))
    return {**score_refiners(setup, models, refiners, seed), "greedy_error_rate": rate}


def right_alone(cells: list, greedy_right: bool) -> list:
    """Of the test tokens, the shares that ours alone and that `parallel` alone gets right: (a, b) a cell."""
    shares = []
    for cell in cells:
        counts = torch.tensor([cell["agreement"][method_name(OURS)][task] for task in TASKS]).sum(0)
        of_greedy = counts[int(greedy_right)].float() / counts[int(greedy_right)].sum()
        shares.append((of_greedy[1, 0].item(), of_greedy[0, 1].item()))
    return shares


def show(cells: list) -> str:
    lines = [report.measures_table(cells, METHODS, GROUPS), ""]
    lines.append(f"{'of the tokens that greedy decoding gets':46}{'right':>24}{'wrong':>24}")
    both = [right_alone(cells, greedy_right) for greedy_right in (True, False)]
    for i, name in enumerate((method_name(OURS), "parallel")):
        row = [report.estimate([pair[i] for pair in pairs], 3) for pairs in both]
        lines.append(f"{name + ' alone gets right':46}" + "".join(f"{text:>24}" for text in row))
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    report.plot_stacked(path, cells, METHODS)
