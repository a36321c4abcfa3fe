"""The backbone itself, tuned further: rivals of a refiner, for `maturity` and `positions`."""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

import runtime
import train_refiner
import vsr
from studies.runner import READS, SeedModels, Setup, count, generate_all
from studies.stages import flops_per_token
from vsr import GPT

TUNED = ("pretrained further", "LoRA, own rollouts", "all weights, own rollouts")
FIRST_RATE, FACTOR = 0.1, 3.0  # of the pretraining's peak, and between one rate that is tried and the next


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


def whole_loss(setup: Setup, backbone: GPT, tokens: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy on whole sentences (B, 2K+2, N), as in pretraining."""
    tokens = tokens.flatten(1).long().to(setup.device)
    with setup.autocast:
        logits = backbone(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def own_prefix_loss(setup: Setup, backbone: GPT, tokens: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the true last image (B, N), behind what the backbone wrote before each position."""
    tokens, y = tokens.long().to(setup.device), written.long().to(setup.device)
    prompt = tokens[:, :-1].flatten(1)  # (B, P)
    inputs = F.pad(torch.cat([prompt, y[:, :-1]], dim=1), (1, 0), value=backbone.start_token)
    with setup.autocast:
        logits = backbone.head(backbone.hidden(inputs)[:, prompt.shape[1] :])  # (B, N, V)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, -1].flatten())


def tuned(setup: Setup, kind: str, backbone: GPT, steps: int, rate: float, batch_of, seed: int):
    """Tune a copy of the backbone for some steps of one cycle -> (backbone, seconds)."""
    torch.manual_seed(seed)
    log, backbone = {}, copy.deepcopy(backbone).requires_grad_(True)
    peak = setup.config["gpt"].learning_rate * rate
    if kind.startswith("LoRA"):
        adapters = add_lora(backbone, setup.config["study"].lora_rank)
        optimizers = [torch.optim.AdamW(adapters, betas=(0.9, 0.98), weight_decay=0.0)]
    else:
        optimizers = train_refiner.make_optimizers(backbone, peak, setup.dtype)
    loss_of = whole_loss if kind == TUNED[0] else own_prefix_loss
    generator, name = torch.Generator().manual_seed(seed), f"{kind}, rate {rate}, {steps} steps"
    parts = {"model": backbone, "generator": generator}
    parts |= {f"optimizer {number}": optimizer for number, optimizer in enumerate(optimizers)}
    made_with = {"steps": steps, "rate": rate, "backbone": runtime.fingerprint(backbone.state_dict())}
    progress = setup.progress(name, made_with)
    for step in runtime.training_steps(name, steps, log, parts, progress):
        loss = loss_of(setup, backbone.train(), *batch_of(generator))
        train_refiner.optimizer_step(
            loss, backbone, optimizers, train_refiner.scheduled_rate(step, steps, peak)
        )
    merge_lora(backbone)
    return backbone.eval(), log["seconds"]


def equal_steps(setup: Setup, models: SeedModels, rollouts: int, steps: int, batch_size: int) -> dict:
    """{kind: steps of `tuned`} that take as many operations as a refiner's rollouts and training.

    Those that learn from rollouts have to make them, too: one for each sentence of a batch, a third of a
    training step, until all are there.
    """
    config, backbone = setup.config["refiner"], models.trained.backbone
    N, sizes = backbone.tokens_per_image, (models.grid, models.codebook.shape[1], backbone.config.width)
    of_backbone = flops_per_token(backbone) * backbone.max_tokens  # of a training step, a sentence
    generation = rollouts * of_backbone / 3  # forward alone, each token once
    of_refiner = 6 * count(vsr.Refiner(config, READS, *sizes)) + 12 * config.layers * config.width * N
    training = steps * config.batch_size * N * of_refiner
    whole = training + generation
    operations = {kind: whole if kind == TUNED[0] else max(0.75 * whole, training) for kind in TUNED}
    return {kind: max(1, round(value / (of_backbone * batch_size))) for kind, value in operations.items()}


def tuned_at_best(
    setup: Setup, kind: str, models: SeedModels, known: tuple, steps: int, batch_size: int, seed: int
):
    """Tune a seed's backbone at the rate with the least error on validation sentences.

    kind: of `TUNED`. known: true sentences (n, 2K+2, N), and what the backbone wrote for them (n, N).
    Each rate has all the steps. They are tried until the next larger and the next smaller one are both worse
    than the best. Returns (backbone, {rate: error}, seconds of the best).
    """
    val, tried = models.trained.tokens["val"], {}  # {power of FACTOR: (error, rate, seconds, backbone)}

    def batch_of(generator: torch.Generator):
        rows = torch.randint(len(known[0]), (batch_size,), generator=generator)
        return known[0][rows], known[1][rows]

    best = 0
    while todo := {best - 1, best, best + 1} - tried.keys():
        for power in sorted(todo):
            rate = float(f"{FIRST_RATE * FACTOR**power:.5g}")
            model, seconds = tuned(setup, kind, models.trained.backbone, steps, rate, batch_of, seed)
            y = generate_all(setup, model, val).tokens.long()
            error = vsr.cosine_error(y, val[:, -1].long(), models.codebook.cpu()).mean().item()
            tried[power] = error, rate, seconds, model
        best = min(tried, key=lambda power: tried[power][0])
    errors = {rate: error for error, rate, *_ in tried.values()}
    return tried[best][3], errors, tried[best][2]
