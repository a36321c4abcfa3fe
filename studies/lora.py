"""Which setting of LoRA is a fair control? The paper's own baseline, and longer pretraining, live
here.

A control that was tuned badly proves nothing. 18 settings of rank, learning rate and loss train
in a tenth of the steps, and the validation loss decides. For the default that `main` uses speaks
that it is among the best of them; against it, that another is clearly better, or that the best
lies at an edge of the grid.

First edition: (one seed) all 18 stayed close to the loss before, 0.249; the default (rank 64,
rate 0.001, whole sentences) had 0.245, fifth best and at two edges of the grid, the best had
0.244.
"""

import copy
import statistics
import time
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

import runtime
import train_refiner
from studies import report
from studies.runner import SeedModels, Setup, count, models_of

MINUTES = 8
SETTINGS = [{}]


class LoRA(nn.Module):
    """Low-rank adaptation of a frozen weight (out, in): W + B A, A (rank, in), B (out, rank) zero at first.

    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models* (2021). Their scale alpha / rank is left
    out: with B at zero and a learning rate chosen on validation data it says nothing new.
    """

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        inner = weight.shape[1]
        self.A = nn.Parameter(torch.randn(rank, inner, device=weight.device) / inner**0.5)  # in float32
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.B @ self.A).to(weight.dtype)


def add_lora(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Freeze a model, put adapters on every Linear layer of its blocks, return the parameters to train.

    The model computes the same until they are trained.
    """
    model.requires_grad_(False)
    adapters = []
    for layer in [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]:
        adapter = LoRA(layer.weight, rank)
        parametrize.register_parametrization(layer, "weight", adapter)
        adapters += [adapter.A, adapter.B]
    return adapters


def merge_lora(model: nn.Module) -> None:
    """Write trained adapters into the weights they adapt: an ordinary frozen model again."""
    for layer in [layer for layer in model.modules() if parametrize.is_parametrized(layer, "weight")]:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    model.requires_grad_(False)


# Tuning a backbone that is already trained


class Tuned(NamedTuple):
    """A backbone that was tuned further."""

    backbone: nn.Module
    params: int  # how many were trained
    val_loss: float  # cross-entropy on the last image of validation sentences
    seconds: float


def next_token_loss(setup: Setup, backbone, sentences: torch.Tensor, last: int) -> torch.Tensor:
    """Cross-entropy on the last `last` tokens (0: on all) of sentences (B, 2K+2, N)."""
    tokens = sentences.flatten(1).long().to(setup.device)  # (B, T)
    with setup.autocast:
        logits = backbone(tokens)[:, -last:]  # (B, last or T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, -last:].flatten())


@torch.no_grad()
def target_loss(setup: Setup, backbone, sentences: torch.Tensor) -> float:
    """Cross-entropy on the last image of held-out sentences."""
    total, N = 0.0, sentences.shape[2]
    for part in sentences.split(32):
        total += next_token_loss(setup, backbone, part, N).item() * len(part)
    return total / len(sentences)


def tune(setup, name, backbone, tokens: dict, optimizers, steps, rate, seed, last_image=False):
    """Go on training a backbone, or its adapters, on true sentences -> (validation loss, seconds).

    name: of the setting; an interrupted training goes on where it was. last_image: the loss is on the
    image that is generated alone; otherwise on whole sentences, as in pretraining.
    """
    began, N = time.perf_counter(), tokens["train"].shape[-1]
    generator, log = torch.Generator().manual_seed(seed), {}
    parts = {"model": backbone, "generator": generator}
    parts |= {f"optimizer {number}": optimizer for number, optimizer in enumerate(optimizers)}
    progress = setup.progress(name, {"steps": steps, "rate": rate, "last_image": last_image})
    backbone.train()
    for step in runtime.training_steps(name, steps, log, parts, progress):
        rows = torch.randint(len(tokens["train"]), (setup.config["gpt"].batch_size,), generator=generator)
        loss = next_token_loss(setup, backbone, tokens["train"][rows], N if last_image else 0)
        now = train_refiner.scheduled_rate(step, steps, rate)
        train_refiner.optimizer_step(loss, backbone, optimizers, now)
    seconds = log["earlier_seconds"] + time.perf_counter() - began
    return target_loss(setup, backbone.eval(), tokens["val"]), seconds


def tuned_by_lora(setup: Setup, models: SeedModels, seed: int, last_image=False, **changes) -> Tuned:
    """LoRA on a copy of the frozen backbone; changes: fields of `StudyConfig`."""
    config = replace(setup.config["study"], **changes)
    torch.manual_seed(seed)
    backbone = copy.deepcopy(models.trained.backbone)
    adapters = add_lora(backbone, config.lora_rank)
    steps, rate = config.lora_steps, config.lora_learning_rate
    optimizers = [torch.optim.AdamW(adapters, betas=(0.9, 0.98), weight_decay=0.0)]
    name = f"lora, {setting_name(config.lora_rank, rate, last_image)}"
    val_loss, seconds = tune(
        setup, name, backbone, models.trained.tokens, optimizers, steps, rate, seed, last_image
    )
    merge_lora(backbone)
    return Tuned(backbone, sum(p.numel() for p in adapters), val_loss, seconds)


def tuned_for_longer(setup: Setup, models: SeedModels, seed: int) -> Tuned:
    """Pretraining goes on, with a new cycle of its schedule: was the backbone undertrained?"""
    steps, rate = setup.config["study"].longer_steps, setup.config["gpt"].learning_rate
    backbone = copy.deepcopy(models.trained.backbone).requires_grad_(True)
    optimizers = train_refiner.make_optimizers(backbone, rate, setup.dtype)
    val_loss, seconds = tune(
        setup, "longer_backbone", backbone, models.trained.tokens, optimizers, steps, rate, seed
    )
    return Tuned(backbone.requires_grad_(False), count(backbone), val_loss, seconds)


# The study


def setting_name(rank: int, rate: float, last_image: bool) -> str:
    return f"rank {rank}, rate {rate:g}, {'last image' if last_image else 'whole sentences'}"


def run(setup: Setup, seed: int) -> dict:
    models = models_of(setup, seed)
    steps, val_loss = max(1, setup.config["study"].lora_steps // 10), {}
    for rank in (4, 16, 64):
        for rate in (1e-3, 3e-3, 1e-2):
            for last_image in (True, False):
                changes = {"lora_rank": rank, "lora_learning_rate": rate, "lora_steps": steps}
                tuned = tuned_by_lora(setup, models, seed, last_image, **changes)
                val_loss[setting_name(rank, rate, last_image)] = tuned.val_loss
    before = target_loss(setup, models.trained.backbone, models.trained.tokens["val"])
    return {"val_loss": val_loss, "before": before}


def show(cells: list) -> str:
    """Validation loss on the last image after a tenth of the steps, the best setting first."""
    losses = {name: [cell["val_loss"][name] for cell in cells] for name in cells[0]["val_loss"]}
    lines = [f"{'before':44}{report.mean_sd([cell['before'] for cell in cells], 4)}"]
    for name in sorted(losses, key=lambda name: statistics.fmean(losses[name])):
        lines.append(f"{name:44}{report.mean_sd(losses[name], 4)}")
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    figure = report.new_figure(1, 6.5, 4.5)
    (axis,) = figure.axes
    names = list(cells[0]["val_loss"])
    report.bars(axis, names, [[cell["val_loss"][name] for cell in cells] for name in names])
    before = statistics.fmean(cell["before"] for cell in cells)
    axis.axvline(before, color="#d1495b", linewidth=1, label="before")
    axis.set_xlabel("validation cross-entropy on the last image")
    report.legend(axis)
    report.save(figure, path)
