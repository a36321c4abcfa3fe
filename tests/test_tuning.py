"""Tuning: the other ways to spend parameters and steps on a trained backbone."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import train_refiner
from data import DataConfig
from studies import tuning
from studies.runner import Setup, StudyConfig, count
from studies.stages import flops_per_token
from vsr import GPT, GPTConfig, Refiner, RefinerConfig, Rollout

V, N, IMAGES = 11, 6, 4
CODES = 60  # of the backbones that are tuned: a sentence is known by its first token
PEAK = 0.01


@pytest.fixture
def gpt():
    return GPT(GPTConfig(layers=2, heads=2, width=16, dropout=0.0), V, N, IMAGES).eval()


@pytest.fixture
def tokens():
    return torch.randint(V, (2, IMAGES * N))


def test_lora_starts_as_the_model_and_trains_the_adapters_alone(gpt, tokens):
    model = copy.deepcopy(gpt)
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    adapters = tuning.add_lora(model, rank=2)
    assert torch.allclose(model(tokens), gpt(tokens), atol=1e-6)
    assert len(adapters) == 2 * 4 * len(gpt.blocks), "attention's two and the MLP's two layers of each block"
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapters}
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    for _ in range(3):
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    now = {
        name.replace("parametrizations.weight.original", "weight"): p for name, p in model.named_parameters()
    }
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert not torch.allclose(model(tokens), gpt(tokens), atol=1e-3)


def test_a_merged_lora_is_an_ordinary_model_with_the_same_logits(gpt, tokens):
    model = copy.deepcopy(gpt)
    for adapter in tuning.add_lora(model, rank=2):
        torch.nn.init.normal_(adapter, std=0.2)
    before = model(tokens)
    tuning.merge_lora(model)
    assert model.state_dict().keys() == gpt.state_dict().keys()
    assert torch.allclose(model(tokens), before, atol=1e-5)
    change = model.blocks[0].mlp[0].weight - gpt.blocks[0].mlp[0].weight
    assert torch.linalg.matrix_rank(change) == 2
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_works_on_a_backbone_of_another_floating_type(gpt, tokens, dtype, when):
    if when == "before":
        gpt.to(dtype)
    for adapter in tuning.add_lora(gpt, rank=2):
        torch.nn.init.normal_(adapter, std=0.02)
    gpt.to(dtype)
    logits = gpt(tokens)
    tuning.merge_lora(gpt)
    assert torch.allclose(gpt(tokens).float(), logits.float(), atol=0.05)
    assert gpt.generate(tokens[:, :-N], N).tokens.shape == (2, N)


# Tuning


@pytest.fixture
def setup(tmp_path):
    config = {
        "data": DataConfig(),
        "gpt": GPTConfig(learning_rate=PEAK),
        "refiner": RefinerConfig(rollout_batch=7),
        "study": StudyConfig(lora_rank=3),
    }
    return Setup(config, tmp_path, tmp_path / "unfinished", torch.device("cpu"), torch.float32)


class Noting(GPT):
    """A backbone that notes whether it learns, and the sentences it is given, by their first token."""

    def hidden(self, inputs, cache=None, start=0):
        if start == 0:
            self.noted.append((torch.is_grad_enabled(), self.training, inputs[:, 1].tolist()))
        return super().hidden(inputs, cache, start)


@pytest.fixture
def models(monkeypatch):
    """A backbone, sentences 0 to 15 to train on and 16 to 55 to validate; what was written is far from true.

    Copies of the backbone note in the same list.
    """
    monkeypatch.setattr(Noting, "noted", [], raising=False)
    config = GPTConfig(layers=1, heads=2, width=16, head_width=8, dropout=0.0)
    backbone = Noting(config, CODES, N, IMAGES).eval().requires_grad_(False)
    for p in backbone.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.4)
    number = torch.arange(56)[:, None] + 3 * torch.arange(IMAGES * N)
    tokens = number.remainder(CODES).view(-1, IMAGES, N).short()
    trained = SimpleNamespace(backbone=backbone, tokens={"train": tokens[:16], "val": tokens[16:]})
    written = (tokens[:16, -1] + 7).remainder(CODES)
    return SimpleNamespace(trained=trained, codebook=torch.eye(CODES), known=(tokens[:16], written))


def batches(models, size=16):
    def batch_of(generator):
        rows = torch.randint(len(models.known[0]), (size,), generator=generator)
        return models.known[0][rows], models.known[1][rows]

    return batch_of


def logits_behind(backbone, tokens, written) -> torch.Tensor:
    """Of the last image, one position after the other, from the prompt and what was written before it."""
    found = []
    for t in range(N):
        known = torch.cat([tokens[:, :-1].flatten(1), written[:, :t]], dim=1).long()
        found.append(
            backbone.logits(backbone.hidden(F.pad(known, (1, 0), value=backbone.start_token))[:, -1])
        )
    return torch.stack(found, dim=1)


def test_the_loss_on_own_prefixes_is_of_the_true_token_behind_what_was_written(setup, models):
    backbone, (tokens, written) = models.trained.backbone, models.known
    logits = logits_behind(backbone, tokens, written)
    expected = F.cross_entropy(logits.mT, tokens[:, -1].long())
    found = tuning.own_prefix_loss(setup, backbone, tokens, written)
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)
    assert found.item() != pytest.approx(F.cross_entropy(logits.mT, written.long()).item(), abs=0.1)
    sentences = tokens.flatten(1).long()
    expected = F.cross_entropy(backbone(sentences).mT, sentences).item()
    assert tuning.whole_loss(setup, backbone, tokens, written).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", tuning.TUNED)
def test_a_backbone_is_tuned_as_it_is_called(setup, models, monkeypatch, kind):
    """By its loss, at its rates; LoRA changes the layers of the blocks by a low rank, the others all."""
    backbone, losses, rates, step = models.trained.backbone, [], [], train_refiner.optimizer_step
    before = copy.deepcopy(backbone.state_dict())
    for name in ("whole_loss", "own_prefix_loss"):
        real = getattr(tuning, name)
        noting = lambda *args, name=name, real=real: losses.append(name) or real(*args)  # noqa: E731
        monkeypatch.setattr(tuning, name, noting)
    monkeypatch.setattr(train_refiner, "optimizer_step", lambda *args: rates.append(args[-1]) or step(*args))
    made, seconds = tuning.tuned(setup, kind, backbone, 30, 0.5, batches(models), 5)
    assert 0 < seconds < 600
    assert losses == 30 * ["whole_loss" if kind == "pretrained further" else "own_prefix_loss"]
    assert rates == [train_refiner.scheduled_rate(step, 30, 0.5 * PEAK) for step in range(30)]
    layers = {n for n, module in backbone.blocks.named_modules() if isinstance(module, nn.Linear)}
    layers = {f"blocks.{name}.weight" for name in layers}
    after = made.state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        change = after[name] - weight
        assert change.any() == (name in layers or not kind.startswith("LoRA")), name
        if kind.startswith("LoRA") and name in layers:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == 3
        assert torch.equal(backbone.state_dict()[name], weight), "the backbone of the seed is frozen"
    assert not any(p.requires_grad for p in (*made.parameters(), *backbone.parameters()))
    assert not made.training
    assert all(learns == training for learns, training, _ in Noting.noted)
    assert count(made) == count(backbone)


@pytest.mark.parametrize("kind", tuning.TUNED)
def test_tuning_begins_with_the_trained_backbone(setup, models, kind):
    """At a rate of nearly zero it stays what it was."""
    before = models.trained.backbone.state_dict()
    made, _ = tuning.tuned(setup, kind, models.trained.backbone, 3, 1e-7, batches(models), 5)
    for name, weight in made.state_dict().items():
        assert torch.allclose(weight, before[name], atol=1e-5), name


@pytest.mark.parametrize("kind", tuning.TUNED)
def test_tuning_is_on_known_sentences_and_its_rate_is_chosen_on_validation_ones(setup, models, kind):
    models.known = tuple(part[4:] for part in models.known)
    backbone, (tokens, written) = models.trained.backbone, models.known
    made, tried, seconds = tuning.tuned_at_best(setup, kind, models, models.known, 24, 16, 5)
    assert seconds > 0
    learnt = {row for learns, _, rows in Noting.noted if learns for row in rows}
    assert learnt == set(range(4, 16))
    measured = [row for learns, _, rows in Noting.noted if not learns for row in rows]
    assert measured == len(tried) * list(range(16, 56)), "once for each rate"
    loss_of = tuning.whole_loss if kind == "pretrained further" else tuning.own_prefix_loss
    now, before = (loss_of(setup, model, tokens, written).item() for model in (made, backbone))
    assert now < before


@pytest.mark.parametrize("best", [-2, 0, 1, 3])
def test_rates_are_tried_with_all_steps_until_the_best_is_at_no_edge(setup, models, monkeypatch, best):
    """The error on validation sentences grows with the distance from the best rate."""
    tried, val = {}, models.trained.tokens["val"]

    def tuned(setup, kind, backbone, steps, rate, batch_of, seed):
        tokens, y = batch_of(torch.Generator().manual_seed(1))
        assert tokens.shape[0] == y.shape[0] == 9
        assert torch.equal((tokens[:, -1] + 7).remainder(CODES), y), "what was written for these"
        assert (kind, backbone, steps, seed) == (tuning.TUNED[1], models.trained.backbone, 80, 5)
        power = round(math.log(rate / tuning.FIRST_RATE, tuning.FACTOR))
        tried[power] = rate
        return power, 10.0 + power

    def generate(setup, power, tokens):
        assert torch.equal(tokens, val)
        return Rollout((val[:, -1] + (torch.arange(N) < abs(power - best))).remainder(CODES))

    monkeypatch.setattr(tuning, "tuned", tuned)
    monkeypatch.setattr(tuning, "generate_all", generate)
    model, errors, seconds = tuning.tuned_at_best(setup, tuning.TUNED[1], models, models.known, 80, 9, 5)
    assert (model, seconds) == (best, 10 + best)
    assert {best - 1, best + 1} <= tried.keys() == set(range(min(-1, best - 1), max(1, best + 1) + 1))
    assert errors == {rate: pytest.approx(abs(power - best) / N) for power, rate in tried.items()}
    assert tried[best] == pytest.approx(0.1 * 3**best, rel=1e-4)


def test_steps_that_cost_what_a_refiner_does_are_in_proportion_to_its_rollouts_and_training(setup):
    """Numbers by hand: 1,000 rollouts, a third of a training step each, and the refiner's own steps."""
    backbone = GPT(GPTConfig(), 128, 64, 4)
    models = SimpleNamespace(
        trained=SimpleNamespace(backbone=backbone), grid=(8, 8), codebook=torch.eye(128, 16)
    )
    rollouts_alone = tuning.equal_steps(setup, models, 2000, 0, 10).values()
    expected = [round(2000 / 3 / 10), 50, 50]
    assert list(rollouts_alone) == expected, (
        "the last two need rollouts as well: 500 of them, and 50 steps of 10"
    )
    config = setup.config["refiner"]
    refiner = Refiner(config, ("tokens", "query"), (8, 8), 16, 128)
    attention = 12 * config.layers * config.width * 64
    cost = 5000 * config.batch_size * 64 * (6 * count(refiner) + attention)
    step = 10 * 256 * flops_per_token(backbone)
    steps = tuning.equal_steps(setup, models, 2000, 5000, 10)
    assert steps["all weights, own rollouts"] == steps["LoRA, own rollouts"] == round(cost / step) > 200, (
        "200 steps of 10 have used all rollouts"
    )
    assert steps["pretrained further"] == round(cost / step + 2000 / 3 / 10)
