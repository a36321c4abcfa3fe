"""The studies' controls do what they are called, and tables and pictures say whose each number is.

What would take long is replaced: trainings note what they are given, and backbones write the number
of a sentence.
"""

import inspect
import math
import re
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.colors import to_hex

import data
import evaluate
import train_refiner
import vqgan
import vsr
from data import TASKS
from evaluate import OF_FORCED
from studies import __main__ as studies
from studies import (
    adversarial,
    backbones,
    choice,
    decoding,
    demos,
    generalize,
    lora,
    loss,
    main,
    maturity,
    passes,
    positions,
    probe,
    reading,
    report,
    rollout,
    runner,
    size,
    speed,
    timing,
    window,
)
from studies import data as data_study
from studies.report import GROUPS
from studies.runner import OURS, SeedModels
from vsr import GPTConfig, RefinerConfig, Rollout

CPU, FLOAT = torch.device("cpu"), torch.float32
N, GRID, IMAGES, V = 4, (2, 2), 4, 500
SENTENCES = {"train": range(48), "val": range(48, 60), "test": range(60, 72)}
WRITTEN, TRUE, FORCED = 100, 200, 300  # added to the number of a sentence
SIZES = {"layers": 1, "heads": 2, "width": 16}


@pytest.fixture
def setup(tmp_path):
    config = {
        "data": data.DataConfig(image_size=16, train_sentences=48, eval_sentences=24),
        "vqgan": vqgan.VQGANConfig(codebook_size=32, code_dim=8, channels=16, res_blocks=1),
        "gpt": GPTConfig(**SIZES, head_width=8, batch_size=8),
        "refiner": RefinerConfig(**SIZES, rollouts=48, rollout_batch=5, steps=7),
        "study": runner.StudyConfig(lora_rank=2, samples=3, steps=80, rollouts=20, probed=6),
    }
    return runner.Setup(config, tmp_path / "work", tmp_path / "unfinished", CPU, FLOAT)


def numbered(split: str) -> torch.Tensor:
    """Sentences (S, 4, N): their number in all images, but for the last, whose tokens are TRUE + number."""
    number = torch.tensor(SENTENCES[split])[:, None, None].expand(-1, IMAGES, N)
    return number + TRUE * (torch.arange(IMAGES) == IMAGES - 1)[:, None]


class Backbone(nn.Module):
    """Writes WRITTEN + the number of the sentence; states are that number, the query's its negative."""

    def __init__(self, label: float = 0.0):
        super().__init__()
        self.head = nn.Linear(1, 1)
        nn.init.constant_(self.head.weight, label)

    def generate(self, prompt, length, temperature=0.0, top_k=0, top_p=1.0, generator=None):
        states = prompt[:, -length:, None].expand(-1, -1, 2).float()
        return Rollout(prompt[:, -length:] + WRITTEN, states, -states)

    def replay(self, prompt, tokens=None):
        return self.generate(prompt, N)._replace(tokens=tokens)


def models_with(backbone, refiners=(), tokens=None) -> SeedModels:
    """The models of a seed; each refiner is a stub with its reading as its name."""
    tokens = tokens or {split: numbered(split) for split in ("train", "val")}
    stubs = {name: stub(name, name.split("+"), number) for number, name in enumerate(refiners, 1)}
    seconds = {f"refiner_{name}": 1000.0 * number for number, name in enumerate(refiners, 1)}
    tokenizer = SimpleNamespace(codebook=SimpleNamespace(vectors=torch.eye(V)), grid=GRID)
    written = {split: part[:, 0] + WRITTEN for split, part in tokens.items()}
    parts = (tokenizer, backbone, stubs, tokens, written, {}, {**seconds, "rollouts": 100.0})
    test = {"tokens": numbered("test"), "task": torch.arange(12) % 3}
    return SeedModels(train_refiner.Trained(*parts), test)


def stub(name: str, reads, size: int) -> nn.Module:
    refiner = nn.Linear(1, size)
    refiner.name, refiner.reads = name, tuple(reads)
    return refiner


@pytest.fixture
def fitted(monkeypatch):
    """What each training of a refiner was given, by its name, and the stub that it returned."""
    noted, signature = {}, inspect.signature(train_refiner.train_refiner)

    def train(*args, **options):
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        given = SimpleNamespace(**bound.arguments)
        name = given.progress[0].name.removesuffix(".progress")
        number = len(noted) + 1
        given.refiner, noted[name] = stub(name, given.reads, number), given
        log = {"loss": [9.0, 10.0 + number], "val_loss": [8.0, 20.0 + number]}
        return given.refiner, {**log, "earlier_seconds": 1000.0 * number}

    monkeypatch.setattr(train_refiner, "train_refiner", train)
    return noted


@pytest.fixture
def scored(monkeypatch):
    """What is scored: the models and refiners of each call of `score_refiners`."""
    calls = []

    def score(setup, models, refiners, seed, others=None):
        calls.append(SimpleNamespace(models=models, refiners=refiners, seed=seed, others=others))
        return {"scores": len(calls)}

    for module in (runner, generalize, backbones, demos, rollout, decoding, window, maturity):
        monkeypatch.setattr(module, "score_refiners", score)
    return calls


def give(monkeypatch, models, *modules) -> list:
    """Let `models_of` return models; its calls are noted."""
    calls, signature = [], inspect.signature(runner.models_of)

    def models_of(*args, **options):
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        calls.append(SimpleNamespace(**bound.arguments))
        return models

    for module in modules:
        monkeypatch.setattr(module, "models_of", models_of)
    return calls


def numbers_of(rows: torch.Tensor) -> list:
    return rows[:, 0].tolist()


def check_pairs(given) -> None:
    """Rollouts, states and targets of a training belong to the same sentences."""
    for split, part in given.rollouts.items():
        number = given.targets[split] - TRUE
        assert torch.equal(part.tokens, number + WRITTEN)
        for states, sign in ((part.states, 1), (part.query, -1)):
            assert states is None or torch.equal(states[..., 0].float(), sign * number.float())
    assert numbers_of(given.targets["val"] - TRUE) == list(SENTENCES["val"])


# What the studies share


@pytest.mark.parametrize("test_data", [None, data.DataConfig(data="glyphs", image_size=16)])
def test_models_of_a_seed_are_measured_on_test_sentences(setup, monkeypatch, test_data):
    torch.manual_seed(3)
    tokenizer, given = vqgan.VQGAN(setup.config["vqgan"], 16), []
    trained = SimpleNamespace(tokenizer=tokenizer)
    monkeypatch.setattr(train_refiner, "train_models", lambda *args: given.append(args) or trained)
    changes = {"data": {"num_demos": 2}, "gpt": {"layers": 5}}
    models = runner.models_of(setup, 3, (OURS,), "label", changes, test_data)
    ((folder, config, readings, sentences, *run),) = given
    assert folder == setup.work / "label-3"
    assert config["data"] == sentences.config == replace(setup.config["data"], num_demos=2)
    assert config["gpt"].layers == 5
    assert (readings, sentences.seed, run) == ((OURS,), 3, [CPU, FLOAT, 3])
    images, task = data.Sentences(test_data or config["data"], 3)("test", 0, 64)
    assert torch.equal(models.test["images"], images[:24, -1])
    assert torch.equal(models.test["task"], task[:24])
    tokens = tokenizer.encode(images[:24, -1])
    assert len(tokens.unique()) > 3
    assert torch.equal(models.test["tokens"][:, -1].long(), tokens)


@pytest.mark.parametrize("rows", [slice(None), slice(7), torch.tensor([5, 2, 40])])
def test_a_refiner_of_a_study_sees_the_rollouts_it_may_see(setup, fitted, rows):
    models = models_with(Backbone())
    rollouts, targets = runner.replay(setup, models, vsr.READS)
    refiner, log, seconds = runner.fit(
        setup, models, "name", rollouts, targets, 5, ("tokens",), rows, F.mse_loss, loss.Absolute, steps=3
    )
    given = fitted["name"]
    check_pairs(given)
    assert numbers_of(given.targets["train"] - TRUE) == torch.arange(48)[rows].tolist()
    assert given.config == replace(setup.config["refiner"], steps=3)
    assert (given.reads, given.seed) == (("tokens",), 5)
    assert (given.loss_function, given.make) == (F.mse_loss, loss.Absolute)
    assert refiner is given.refiner
    assert log["val_loss"][-1] == 21
    assert 1000 <= seconds < 1010, "with what an earlier attempt took"


def test_each_setting_has_its_own_refiner_and_cost(setup, fitted, scored, monkeypatch):
    models = models_with(Backbone())
    give(monkeypatch, models, runner)
    cell = runner.fit_each(setup, 5, {"a": {"steps": 3}, "b": {"rows": slice(9)}, "c": {"layers": 2}})
    assert [given.config.steps for given in fitted.values()] == [3, 80, 80]
    assert [given.config.layers for given in fitted.values()] == [1, 1, 2]
    assert [len(given.targets["train"]) for given in fitted.values()] == [48, 9, 48]
    assert scored[0].refiners == {name: given.refiner for name, given in fitted.items()}
    assert (scored[0].models, scored[0].seed) == (models, 5)
    for number, name in enumerate("abc", 1):
        cost = cell["cost"][name]
        assert cost["params"] == 2 * number
        assert (cost["train_loss"], cost["val_loss"]) == (10 + number, 20 + number)
        assert int(cost["seconds"]) // 1000 == number
    assert cell["backbone_params"] == 2


def test_refiners_of_a_study_are_scored_on_greedy_and_on_teacher_forced_output(setup, monkeypatch):
    models, seen = models_with(Backbone()), {}
    monkeypatch.setattr(evaluate, "decode_methods", lambda *args: {"ar_greedy": args[-1]})
    kinds = {"generate_all": "greedy", "force_all": "forced"}
    for name, kind in kinds.items():
        monkeypatch.setattr(runner, name, lambda setup, backbone, tokens, kind=kind: (kind, tokens))
    monkeypatch.setattr(runner, "refine_all", lambda setup, models, refiner, given: (refiner, *given))
    monkeypatch.setattr(runner, "score", lambda setup, models, written: seen.update(written) or {})
    monkeypatch.setattr(runner, "agreement", lambda *_: {})
    runner.score_refiners(setup, models, {"x": "one", "y": "two"}, 5)
    tokens = models.test["tokens"]
    assert seen.pop("ar_greedy") == 5
    assert seen == {
        "x": ("one", "greedy", tokens), f"x{OF_FORCED}": ("one", "forced", tokens),
        "y": ("two", "greedy", tokens), f"y{OF_FORCED}": ("two", "forced", tokens),
    }  # fmt: skip


def small_gpt(codes: int = 30, make=vsr.GPT):
    model = make(GPTConfig(**SIZES, head_width=8), codes, N, IMAGES).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.4)
    return model


def test_outputs_of_all_sentences_come_in_their_order(setup):
    backbone, tokens = small_gpt(), torch.randint(30, (70, IMAGES, N)).short()
    prompt, truth = tokens[:, :-1].flatten(1).long(), tokens[:, -1].long()
    greedy, forced = backbone.generate(prompt, N), backbone.replay(prompt, truth)
    forced = forced._replace(tokens=backbone.logits(forced.states).argmax(-1))
    assert not torch.equal(greedy.tokens, forced.tokens)
    for expected, made in ((greedy, runner.generate_all), (forced, runner.force_all)):
        found = made(setup, backbone, tokens)
        assert (found.tokens == expected.tokens).float().mean() > 0.99
        assert torch.allclose(found.states.float(), expected.states, rtol=0.02, atol=0.02)
        assert torch.allclose(found.query.float(), expected.query, rtol=0.02, atol=0.02)


def test_refined_tokens_of_all_rollouts_come_in_their_order(setup):
    models = models_with(Backbone())
    refiner = vsr.Refiner(setup.config["refiner"], vsr.READS, GRID, V, 2)
    nn.init.normal_(refiner.to_code.weight)
    rows = Rollout(torch.randint(V, (150, N)), torch.randn(150, N, 2), torch.randn(150, N, 2))
    expected, _ = vsr.refine(refiner, torch.eye(V), *rows)
    assert not torch.equal(expected, rows.tokens)
    assert torch.equal(runner.refine_all(setup, models, refiner, rows), expected)


def test_agreement_counts_the_tokens_that_each_gets_right():
    truth = torch.zeros(3, 4, dtype=torch.long)
    test = {"tokens": truth[:, None], "task": torch.tensor([2, 0, 2])}
    right = {
        "ar_greedy": [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]],
        "refined_tokens": [[1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 0, 1]],
        "parallel": [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0]],
    }
    written = {name: 1 - torch.tensor(rows) for name, rows in right.items()}
    counts = runner.agreement({**written, f"refined_tokens{OF_FORCED}": truth}, test)
    assert counts.keys() == {"refined_tokens", "parallel"}
    for number, task in enumerate(TASKS):
        expected = [[[0, 0], [0, 0]], [[0, 0], [0, 0]]]
        for i in (test["task"] == number).nonzero().flatten().tolist():
            for greedy, method, parallel in zip(*(right[name][i] for name in right), strict=True):
                expected[greedy][method][parallel] += 1
        assert counts["refined_tokens"][task] == expected
    assert runner.agreement({"refined_tokens": truth, "ar_greedy": truth}, test) == {}


# Controls of `main`


def test_best_of_n_is_the_sample_that_the_backbone_finds_likeliest(setup):
    """Sentence i likes its sample i % 3 best, by the sum over its tokens; each is drawn at temperature 1."""
    temperatures = []

    class Sampler(Backbone):
        def generate(self, prompt, length, temperature=0.0, top_k=0, top_p=1.0, generator=None):
            temperatures.append((temperature, generator.initial_seed()))
            number = prompt[:, 0] - SENTENCES["test"][0]
            sample = (len(temperatures) - 1) // 3  # 12 sentences, 5 at once
            states = torch.zeros(len(prompt), length, 3)
            states[number % 3 == sample, :, sample] = 5.0
            states[:, 0, sample] = 8.0 - sample  # the first token alone would choose another
            return Rollout(torch.full((len(prompt), length), sample), states, states)

        def logits(self, states):
            return states

    models = models_with(Sampler())
    best = main.best_of_n(setup, models, 3, seed=8)
    assert best.tolist() == [[i % 3] * N for i in range(12)]
    assert temperatures == 9 * [(1.0, 8)]


def test_main_compares_what_its_rows_are_called(setup, fitted, monkeypatch):
    """Who writes each row, and what it cost."""
    backbone, result = Backbone(), {}
    models = models_with(backbone, main.READINGS)
    calls = give(monkeypatch, models, main)
    decoded = {**dict.fromkeys(main.BASELINES, "decoded"), **dict.fromkeys(main.REFINED, "decoded")}
    decoded |= {"parallel": "decoded", "expected_embedding": "decoded"}

    def decode(tokenizer, backbone, refiners, tokens, autocast, seed):
        assert (refiners, seed) == (models.trained.refiners, 5)
        assert torch.equal(tokens, models.test["tokens"])
        return dict(decoded)

    def generate(setup, backbone, tokens):
        assert torch.equal(tokens, models.test["tokens"])
        return backbone.generate(tokens[:, :-1].flatten(1), N)._replace(tokens=(backbone.head.weight.item()))

    def tuned(label):
        return lambda setup, models, seed: lora.Tuned(Backbone(label), 10 * label, 0.0, 100.0 * label)

    def refine(setup, models, refiner, rollout):
        return refiner.name, rollout.tokens

    seconds = {"generation": 10.0, **{name: i + 1.0 for i, name in enumerate(main.READINGS)}}
    monkeypatch.setattr(evaluate, "decode_methods", decode)
    monkeypatch.setattr(main, "generate_all", generate)
    monkeypatch.setattr(main, "part_of", lambda rollout, rows: (torch.zeros(1),) * 3)
    monkeypatch.setattr(main, "refine_all", refine)
    monkeypatch.setattr(main, "tuned_by_lora", tuned(1))
    monkeypatch.setattr(main, "tuned_for_longer", tuned(2))
    monkeypatch.setattr(main, "best_of_n", lambda setup, models, n, seed: f"best of {n}, seed {seed}")
    monkeypatch.setattr(main, "median_seconds", lambda timed, *_: {name: seconds[name] for name in timed})
    monkeypatch.setattr(main, "score", lambda setup, models, written: result.update(written) or {})
    cost = main.run(setup, 5)["cost"]
    assert (calls[0].seed, calls[0].readings) == (5, main.READINGS)
    alone = {"no_attention": tuple(OURS.split("+")), "no_attention_tokens": ("tokens",)}
    assert fitted.keys() == alone.keys()
    for method, reads in alone.items():
        given = fitted[method]
        assert tuple(given.reads) == reads
        assert given.config == replace(setup.config["refiner"], attention=False)
        assert len(given.targets["train"]) == 48
        check_pairs(given)
    expected = {"lora": 1.0, "longer_backbone": 2.0, "best_of_n": "best of 3, seed 5"}
    expected |= {method: (method, 0.0) for method in alone}
    assert result.keys() == set(main.ROWS)
    assert {method: result[method] for method in expected} == expected

    costs = {method: (round(c["seconds"], -2), c["params"]) for method, c in cost.items()}
    assert costs == {
        "refined_tokens": (1100, 2), "refined_tokens+states": (2100, 4), "refined_tokens+query": (3100, 6),
        "parallel": (4000, 8), "no_attention": (1100, 2), "no_attention_tokens": (2100, 4),
        "lora": (100, 10), "longer_backbone": (200, 20), "best_of_n": (0, 0),
    }  # fmt: skip
    overheads = {method: c["overhead"] for method, c in cost.items() if "overhead" in c}
    passes_of = dict(zip(map(evaluate.method_name, main.READINGS), (0.1, 0.2, 0.3, 0.4), strict=True))
    assert overheads == {**passes_of, "best_of_n": 2.0}


class Tuner(vsr.GPT):
    """A backbone that notes the sentences it is given, by their first token."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = []

    def forward(self, tokens):
        self.calls.append((torch.is_grad_enabled(), self.training, tokens[:, 0].tolist()))
        return super().forward(tokens)


@pytest.fixture
def tunable(setup):
    """A backbone with sentences: 16 to train on, 40 held out; a number of steps that reaches all."""
    number = torch.arange(56)
    tokens = (number[:, None] + 3 * torch.arange(IMAGES * N)).remainder(60).view(-1, IMAGES, N)
    models = models_with(small_gpt(60, Tuner), tokens={"train": tokens[:16], "val": tokens[16:]})
    study = replace(setup.config["study"], lora_steps=30, longer_steps=30, lora_learning_rate=0.02)
    config = {**setup.config, "study": study, "gpt": replace(setup.config["gpt"], learning_rate=0.01)}
    return replace(setup, config=config), models


def losses_of(backbone, sentences) -> torch.Tensor:
    tokens = sentences.flatten(1)
    return F.cross_entropy(backbone(tokens).mT, tokens, reduction="none")


@torch.no_grad()
def test_tuning_is_on_training_sentences_and_measured_on_held_out_ones(tunable, monkeypatch):
    setup, models = tunable
    steps, real = [], train_refiner.optimizer_step

    def step(loss, model, optimizers, rate):
        steps.append(rate)
        real(loss, model, optimizers, rate)

    monkeypatch.setattr(train_refiner, "optimizer_step", step)
    for tuning, peak in ((lora.tuned_by_lora, 0.02), (lora.tuned_for_longer, 0.01)):
        steps.clear()
        models.trained.backbone.calls.clear()
        with torch.enable_grad():
            tuned = tuning(setup, models, 5)
        calls = tuned.backbone.calls
        assert all(learns == training for learns, training, _ in calls)
        assert {row for learns, _, rows in calls if learns for row in rows} == set(range(16))
        assert [row for learns, _, rows in calls if not learns for row in rows] == list(range(16, 56))
        assert steps == [train_refiner.scheduled_rate(step, 30, peak) for step in range(30)]
        val = models.trained.tokens["val"]
        now, before = (losses_of(model, val)[:, -N:].mean() for model in (tuned.backbone, models[0].backbone))
        assert tuned.val_loss == pytest.approx(now.item(), abs=1e-4)
        assert abs(now - before) > 0.01
        train = models.trained.tokens["train"]
        assert losses_of(tuned.backbone, train).mean() < losses_of(models[0].backbone, train).mean() - 0.1
        assert tuned.seconds > 0


def test_tuning_begins_with_the_trained_backbone(tunable):
    """At a rate of nearly zero it stays what it was."""
    setup, models = tunable
    study = replace(setup.config["study"], lora_learning_rate=1e-9)
    setup = replace(setup, config={**setup.config, "study": study, "gpt": replace(setup.config["gpt"])})
    setup.config["gpt"].learning_rate = 1e-9
    for tuning in (lora.tuned_by_lora, lora.tuned_for_longer):
        for name, weight in tuning(setup, models, 5).backbone.state_dict().items():
            assert torch.allclose(weight, models.trained.backbone.state_dict()[name], atol=1e-5), name


def test_lora_changes_the_layers_of_the_blocks_by_a_low_rank_and_a_longer_training_all(tunable):
    setup, models = tunable
    layers = {n for n, m in models.trained.backbone.blocks.named_modules() if isinstance(m, nn.Linear)}
    layers = {f"blocks.{name}.weight" for name in layers}
    low, full = lora.tuned_by_lora(setup, models, 5, lora_rank=3), lora.tuned_for_longer(setup, models, 5)
    before, params = models.trained.backbone.state_dict(), 0
    for name, weight in before.items():
        change, free = (tuned.backbone.state_dict()[name] - weight for tuned in (low, full))
        assert free.any(), name
        assert change.any() == (name in layers), name
        if name in layers:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == 3
            params += 3 * sum(weight.shape)
    assert low.params == params
    assert full.params == sum(weight.numel() for weight in before.values())


def test_loss_of_tuning_is_on_the_last_image_or_on_all_tokens(tunable, monkeypatch):
    setup, models = tunable
    sentences, backbone = models.trained.tokens["train"], models.trained.backbone
    by_token = losses_of(backbone, sentences)
    for last, expected in ((0, by_token), (N, by_token[:, -N:])):
        found = lora.next_token_loss(setup, backbone, sentences, last)
        assert found.item() == pytest.approx(expected.mean().item(), abs=1e-5)
    found = lora.target_loss(setup, backbone, models.trained.tokens["val"])
    expected = losses_of(backbone, models.trained.tokens["val"])[:, -N:].mean()
    assert found == pytest.approx(expected.item(), abs=1e-5)

    asked, real = [], lora.next_token_loss
    noting = lambda setup, model, part, last: asked.append(last) or real(setup, model, part, last)  # noqa: E731
    monkeypatch.setattr(lora, "next_token_loss", noting)
    for last_image, last in ((True, N), (False, 0)):
        asked.clear()
        lora.tuned_by_lora(setup, models, 5, last_image, lora_steps=2)
        assert asked == [last, last, N, N], "two steps, and two parts of the validation sentences"


def test_settings_of_lora_are_tried_as_they_are_called(setup, monkeypatch):
    models = models_with("backbone")
    calls = give(monkeypatch, models, lora)

    def tuned(setup, models, seed, last_image, lora_rank, lora_learning_rate, lora_steps):
        assert (seed, lora_steps) == (5, 200)
        return lora.Tuned(None, 0, (lora_rank, lora_learning_rate, last_image), 0.0)

    monkeypatch.setattr(lora, "tuned_by_lora", tuned)
    monkeypatch.setattr(lora, "target_loss", lambda setup, backbone, part: (backbone, len(part)))
    result = lora.run(setup, 5)
    assert calls[0].seed == 5
    assert result["before"] == ("backbone", 12)
    assert len(result["val_loss"]) == 18
    for name, (rank, rate, last_image) in result["val_loss"].items():
        assert name == f"rank {rank}, rate {rate:g}, {'last image' if last_image else 'whole sentences'}"


# Studies that train refiners


@pytest.mark.parametrize("study", [data_study, size, reading, loss])
def test_settings_of_a_study_are_what_their_names_say(setup, fitted, scored, monkeypatch, study):
    many = torch.cat([numbered("train")] * 7)[:300]
    models = models_with(Backbone(), tokens={"train": many, "val": numbered("val")})
    for module in (runner, loss):
        give(monkeypatch, models, module)
    setup.config["refiner"] = replace(setup.config["refiner"], rollouts=300)
    study.run(setup, 5)
    assert scored[0].refiners == {name: given.refiner for name, given in fitted.items()}
    for name, given in fitted.items():
        check_pairs(given)
        number, changes = int((re.findall(r"\d+", name) or [0])[0]), {"steps": 80}
        assert given.seed == 5
        assert len(given.targets["train"]) == (number if name.endswith("rollouts") else 300)
        if study is data_study and name.endswith("steps"):
            changes = {"steps": number}
        elif study is size:
            changes |= {"layers": number, "width": int(name.split(" x ")[1])}
        elif study is reading:
            sources, _, how = name.partition(", ")
            assert tuple(given.reads) == tuple(sources.split("+"))
            assert all(getattr(given.rollouts["train"], source) is not None for source in given.reads)
            changes |= {"attention": how != "no attention"}
            assert given.make is (reading.Anywhere if how == "heads start anywhere" else vsr.Refiner)
        assert given.config == replace(setup.config["refiner"], **changes)
    expected = {
        data_study: {"64 rollouts", "256 rollouts", "10 steps", "20 steps", "40 steps", "80 steps"},
        size: {"1 x 8", "2 x 8", "1 x 16", "2 x 16", "3 x 16", "2 x 32"},
        loss: {
            "cosine", "squared error", "cross-entropy", "cosine + cross-entropy", "cosine, no residual",
        },
        reading: {
            *reading.READINGS, *(f"{name}, no attention" for name in reading.READINGS),
            f"{OURS}, heads start anywhere",
        },
    }  # fmt: skip
    assert fitted.keys() == expected[study]


def test_losses_of_a_study_are_those_of_their_names(setup, fitted, scored, monkeypatch):
    for module in (runner, loss):
        give(monkeypatch, models_with(Backbone()), module)
    loss.run(setup, 5)
    target, refined = torch.eye(V)[:2, None].expand(2, N, V), F.normalize(torch.rand(2, N, V), dim=-1)
    cosine = 1 - (refined * target).sum(-1).mean()
    right = ((10 * refined).log_softmax(-1) * target).sum(-1)
    expected = {"cosine": cosine, "cosine, no residual": cosine, "cross-entropy": -right.mean()}
    expected |= {"squared error": (refined - target).square().mean()}
    expected |= {"cosine + cross-entropy": cosine - 0.1 * right.mean()}
    for name, given in fitted.items():
        assert given.loss_function(refined, target).item() == pytest.approx(expected[name].item(), rel=1e-4)
        makes = {"squared error": loss.Unnormalised, "cosine, no residual": loss.Absolute}
        assert given.make is makes.get(name, vsr.Refiner)


def test_heads_that_start_anywhere_have_no_place_to_look_at():
    made = reading.Anywhere(RefinerConfig(**SIZES), ("tokens",), GRID, 5, 0)
    assert not any(block.attention.relative.table.any() for block in made.blocks)
    plain = vsr.Refiner(RefinerConfig(**SIZES), ("tokens",), GRID, 5, 0)
    assert all(block.attention.relative.table.any() for block in plain.blocks)


def test_a_refiner_without_a_task_has_not_seen_it(setup, fitted, scored, monkeypatch):
    """The last refiner is the default one, on a dataset that is not that of the training."""
    calls = give(monkeypatch, models_with(Backbone(), (OURS,)), generalize)
    result = generalize.run(setup, 5)
    _, task = data.joined(data.Sentences(setup.config["data"], 5).batches("train", 48))
    assert list(fitted) == ["without none", *(f"without {name}" for name in TASKS)]
    for name, given in fitted.items():
        check_pairs(given)
        rows = [i for i in range(48) if name != f"without {TASKS[task[i]]}"]
        assert numbers_of(given.targets["train"] - TRUE) == rows
        assert given.config.steps == 80
    assert [call.test_data and call.test_data.data for call in calls] == [None, "glyphs"]
    assert all((call.seed, call.changes) == (5, None) for call in calls)
    assert scored[0].refiners == {name: given.refiner for name, given in fitted.items()}
    assert [(name, refiner.name) for name, refiner in scored[1].refiners.items()] == [(generalize.BEST, OURS)]
    assert result == {"scores": 1, "other": {"scores": 2}}


def test_a_refiner_is_trained_on_the_inputs_it_is_called_by(setup, fitted, scored, monkeypatch):
    """Greedy decoding is wrong at one place of four."""
    models = models_with(Backbone(), train_refiner.READINGS)
    for split, y in models.trained.generated.items():
        y[:, 1:] = numbered(split)[:, -1, 1:]
    calls = give(monkeypatch, models, rollout)
    monkeypatch.setattr(rollout, "force_all", lambda s, b, tokens: Rollout(tokens[:, 0] + FORCED))
    result = rollout.run(setup, 5)
    assert (calls[0].seed, calls[0].readings) == (5, train_refiner.READINGS)
    assert result["greedy_error_rate"] == pytest.approx(0.25)
    pairs = [(sources, name) for sources in rollout.READINGS for name in rollout.INPUTS]
    names = {f"{evaluate.method_name(sources)}, {name}": (sources, name) for sources, name in pairs}
    assert fitted.keys() == names.keys()
    for method, (reads, name) in names.items():
        given = fitted[method]
        assert "+".join(given.reads) == reads
        assert given.config == setup.config["refiner"]
        for split, part in given.rollouts.items():
            number = torch.tensor(SENTENCES[split])[:, None].expand(-1, N)
            written = models.trained.generated[split]
            assert torch.equal(given.targets[split], number + TRUE)
            assert torch.equal(part.query[..., 0].float(), -number.float())
            forced = (part.tokens == number + FORCED).all(1)
            if name == "half of both":
                assert torch.equal(part.tokens[~forced], written[~forced])
                assert 0 < forced.sum() < len(forced)
            elif name == "teacher-forced output":
                assert forced.all()
            else:
                wrong = part.tokens != number + TRUE
                assert not torch.equal(part.tokens, written)
                assert 0.1 < wrong.float().mean() < 0.4
    refiners = {name: given.refiner for name, given in fitted.items()}
    refiners |= {evaluate.method_name(r): stub for r, stub in models.trained.refiners.items()}
    assert scored[0].refiners == refiners


@pytest.mark.parametrize("kind", window.KINDS)
def test_a_window_is_as_wide_as_it_is_called(setup, fitted, scored, monkeypatch, kind):
    calls = give(monkeypatch, models_with(Backbone()), window)
    window.run(setup, 5, kind)
    assert (calls[0].seed, calls[0].label) == (5, {"default": "base", "told": "told"}[kind])
    assert list(fitted) == window.NAMES
    for name, given in fitted.items():
        check_pairs(given)
        radius, start = re.fullmatch(r"(?:radius (\d)|all), from (\w+)", name).groups()
        assert given.make.keywords == {"radius": radius and int(radius), "start": start}
        assert given.config == replace(setup.config["refiner"], steps=setup.config["study"].window_steps)
        assert given.reads == (("tokens", "query") if kind == "default" else ("tokens",))
    assert scored[0].refiners == {name: given.refiner for name, given in fitted.items()}


def test_targets_are_the_drawn_answer_or_the_one_nearest_to_what_was_written(setup, fitted, monkeypatch):
    """Each sentence has six valid answers; the one nearest to what was written is that of its number."""
    written, hues = {}, choice.HUES

    class Scenes:
        def __init__(self, config, seed, told):
            assert (seed, told) == (5, False)

        def valid(self, split, total):
            number = torch.tensor(SENTENCES[split])[:total, None] + 1000 * torch.arange(hues)
            return number[:, :, None, None, None].expand(-1, -1, 3, 2, 2).float()

        def objects(self, split, total):
            return split, total

    def nearest(tokens, valid, codebook):
        return (tokens[:, 0] - WRITTEN) % hues

    def generate(setup, backbone, part, temperature, generator):
        drawn.append((temperature, numbers_of(part[:, 0])))
        return backbone.generate(part[:, :-1].flatten(1), N)

    models, drawn = models_with(Backbone()), []
    models.trained.tokenizer.encode = lambda images: images[:, 0, 0, :1].long().expand(-1, N)
    calls = give(monkeypatch, models, choice)
    monkeypatch.setattr(choice, "OneHue", Scenes)
    monkeypatch.setattr(choice, "nearest_valid", nearest)
    monkeypatch.setattr(choice, "generate_all", generate)
    monkeypatch.setattr(choice, "refine_all", lambda setup, models, refiner, rollout: (refiner.name, rollout))
    monkeypatch.setattr(choice, "score", lambda s, m, given, valid, objects: written.update(given))
    choice.run(setup, 5)
    assert calls[0].changes == choice.smaller(setup.config)
    pairs = [(method, target) for method in choice.READINGS for target in choice.TARGETS]
    names = {f"{method}, {target}": (method, target) for method, target in pairs}
    assert fitted.keys() == names.keys()
    for name, (method, target) in names.items():
        given = fitted[name]
        assert given.reads == choice.READINGS[method]
        for split, rows in SENTENCES.items():
            if split != "test":
                number = torch.tensor(rows)[:, None].expand(-1, N)
                truth = number + (TRUE if target == "drawn" else 1000 * (number % hues))
                assert torch.equal(given.targets[split], truth)
                assert torch.equal(given.rollouts[split].tokens, number + WRITTEN)
                assert torch.equal(given.rollouts[split].query[..., 0].float(), -number.float())
        for of in ("greedy", "sampled"):
            refined = written[f"{name}, of {of}"]
            assert refined[0] == name
            assert refined[1].tokens is written[of]
    train, val, test = map(list, SENTENCES.values())
    halves = [(0.0, train[:24]), (1.0, train[24:]), (0.0, val[:6]), (1.0, val[6:])]
    assert drawn == [*halves, (0.0, test), (1.0, test)]


def test_ways_of_decoding_are_chosen_on_validation_and_used_on_test_sentences(setup, scored, monkeypatch):
    """Of three settings the second has the fewest wrong tokens on validation, the first on test sentences."""
    models, asked = models_with(Backbone(), train_refiner.READINGS), []
    give(monkeypatch, models, decoding)

    def ways(setup, models, tokens, n, seed, chosen=None):
        asked.append((numbers_of(tokens[:, 0])[0], n, seed, chosen))
        right, found = tokens[:, -1], {}
        for name, wrong in zip("abc", (2, 1, 3) if chosen is None else (0, 3, 3), strict=True):
            found[name] = right + (torch.arange(N) < wrong)
        return {"sampled": found, "beam search": {"c": found["c"], "b": found["b"], "a": found["a"]}}

    monkeypatch.setattr(decoding, "ways", ways)
    result = decoding.run(setup, 5)
    assert result["chosen"] == {"sampled": "b", "beam search": "b"}
    assert result["validation"]["sampled"] == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.75})
    assert asked == [(48, 3, 5, None), (60, 3, 5, result["chosen"])]
    for written in scored[0].others.values():
        assert torch.equal(written, models.test["tokens"][:, -1] + (torch.arange(N) < 3))
    assert {name: stub.name for name, stub in scored[0].refiners.items()} == {
        evaluate.method_name(name): name for name in train_refiner.READINGS
    }


@torch.no_grad()
def test_every_way_of_decoding_is_what_it_is_called(setup):
    backbone, tokens = small_gpt(), torch.randint(30, (6, IMAGES, N))
    codebook = F.normalize(torch.randn(30, 5), dim=-1)
    models = models_with(backbone)
    models.trained.tokenizer.codebook.vectors = codebook
    found = decoding.ways(setup, models, tokens, 3, 5)
    prompt = tokens[:, :-1].flatten(1)

    def likelihood(y):
        logits = backbone.logits(backbone.replay(prompt, y).states).log_softmax(-1)
        return logits.gather(-1, y[..., None])[..., 0].sum(1)

    for name in found["sampled"]:
        temperature, top_p = map(float, re.findall(r"\d\.\d", name))
        generator = torch.Generator().manual_seed(5)
        options, parts = (N, temperature, 0, top_p, generator), prompt.split(5)
        drawn = [backbone.generate(part, *options).tokens for _ in range(3) for part in parts]
        samples = torch.cat(drawn).view(3, 6, N)
        assert torch.equal(found["sampled"][name], samples[0])
        best = torch.stack([likelihood(sample) for sample in samples]).max(0).values
        assert torch.allclose(likelihood(found["likeliest of n"][name]), best, atol=1e-4)
        mean = codebook[samples].mean(0)
        assert torch.equal(found["consensus of n"][name], (mean @ codebook.T).argmax(-1))
    assert len(found["sampled"]) == len(decoding.TEMPERATURES) * len(decoding.TOP_P)
    greedy = backbone.generate(prompt, N).tokens
    assert torch.equal(decoding.beam_search(backbone, prompt, N, 1), greedy)
    beams = [likelihood(y).sum().item() for y in (greedy, *found["beam search"].values())]
    assert len(beams) == 1 + len(decoding.WIDTHS)
    assert beams == sorted(beams), "wider beams find likelier images"
    assert beams[-1] > beams[0] + 1
    # A beam as wide as there are codes finds the likeliest of all pairs
    pairs = torch.cartesian_prod(torch.arange(30), torch.arange(30))
    logits = backbone(torch.cat([prompt[:1].expand(900, -1), pairs], dim=1))[:, -2:].log_softmax(-1)
    best = logits.gather(-1, pairs[..., None])[..., 0].sum(1).argmax()
    assert torch.equal(decoding.beam_search(backbone, prompt[:1], 2, 30)[0], pairs[best])


@pytest.mark.parametrize("name", backbones.BACKBONES)
def test_a_refiner_is_trained_for_the_backbone_of_its_cell(setup, fitted, scored, monkeypatch, name):
    models, made, asked = models_with(Backbone(1.0)), Backbone(2.0), []
    give(monkeypatch, models, backbones)

    def train(config, train, val, codes, device, dtype, seed, make, progress):
        expected, changes = backbones.BACKBONES[name]
        assert (config, make) == (replace(setup.config["gpt"], **changes), expected)
        assert (codes, seed) == (V, 5)
        assert torch.equal(train, numbered("train"))
        assert torch.equal(val, numbered("val"))
        return made, {}

    def write(backbone, tokens, autocast, batch):
        asked.append(backbone)
        return tokens[:, 0] + WRITTEN, {}

    monkeypatch.setattr(train_refiner, "train_backbone", train)
    monkeypatch.setattr(train_refiner, "make_rollouts", write)
    backbones.run(setup, 5, backbone=name)
    used = models.trained.backbone if name == "gpt" else made
    assert asked == ([] if name == "gpt" else [made, made])
    given, (call,) = fitted["refiner"], scored
    check_pairs(given)
    assert numbers_of(given.targets["train"] - TRUE) == list(range(20)), "the rollouts of this study"
    assert call.models.trained.backbone is used
    assert call.refiners == {backbones.BEST: given.refiner}
    assert given.config == setup.config["refiner"]


def test_fresh_sentences_are_those_of_no_other_training(setup):
    """Their numbers are beyond those of the sentences that are kept, and apart by what they are for."""
    asked, models = [], models_with(Backbone())

    def sentences(split, index, n):
        asked.append((split, index))
        return torch.full((n, IMAGES, 3, 2, 2), float(len(asked))), None

    models.trained.tokenizer.encode = lambda images: images[:, 0, 0, :1].long().expand(-1, N)
    rows = torch.tensor([7, 3, 9])
    for first in (0, 2**50):
        fresh = maturity.Fresh(setup, models, sentences, first)
        assert fresh.shape[1:] == (IMAGES, N)
        for number, part in enumerate((rows, rows + 1, torch.tensor([len(fresh) - 1])), len(asked) + 1):
            assert torch.equal(fresh[part], torch.full((len(part), IMAGES, N), number))
    assert {split for split, _ in asked} == {"train"}
    assert len({index for _, index in asked}) == len(asked)
    assert min(index for _, index in asked) > 10**9


def test_tuning_on_own_rollouts_is_towards_the_truth_behind_what_was_written(setup):
    backbone, tokens = small_gpt(), torch.randint(30, (5, IMAGES, N))
    written = torch.randint(30, (5, N)).short()
    logits = backbone(torch.cat([tokens[:, :-1].flatten(1), written.long()], dim=1))[:, -N:]
    expected = F.cross_entropy(logits.mT, tokens[:, -1])
    found = maturity.own_prefix_loss(setup, backbone, tokens.short(), written)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    expected = losses_of(backbone, tokens).mean().item()
    assert maturity.whole_loss(setup, backbone, tokens, written).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", maturity.TUNED)
def test_a_rival_is_tuned_as_it_is_called(setup, monkeypatch, kind):
    backbone, losses = small_gpt(), []
    tokens, written = torch.randint(30, (12, IMAGES, N)), torch.randint(30, (12, N))
    for name in ("whole_loss", "own_prefix_loss"):
        real = getattr(maturity, name)
        monkeypatch.setattr(
            maturity, name, lambda *args, name=name, real=real: losses.append(name) or real(*args)
        )
    made, params = maturity.tuned(setup, kind, backbone, 3, 1.0, lambda generator: (tokens, written), 5)
    assert losses == 3 * ["own_prefix_loss" if kind.endswith("own rollouts") else "whole_loss"]
    before, after = backbone.state_dict(), made.state_dict()
    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    layers = {n for n, module in backbone.named_modules() if isinstance(module, nn.Linear) and n != "head"}
    layers = {f"{name}.weight" for name in layers}
    assert changed == (layers if kind.startswith("LoRA") else before.keys())
    low_rank = sum(2 * sum(before[name].shape) for name in layers)
    assert params == (low_rank if kind.startswith("LoRA") else runner.count(backbone))
    assert not made.training


def test_rivals_of_a_mature_backbone_are_chosen_on_validation_and_used_on_test_sentences(
    setup, fitted, scored, monkeypatch
):
    """Of the rates and temperatures, the second has the fewest wrong tokens on validation sentences."""
    models, pretrainings, asked = models_with(Backbone()), [], []
    give(monkeypatch, models, maturity)

    class Fresh:
        def __init__(self, setup, models, sentences, first=0):
            self.first = first

        def __getitem__(self, rows):
            assert self.first == 2**50, "not those of the pretraining"
            return numbered("train")[rows % 48]

    def pretrain(setup, name, config, fresh, val, codes, seed):
        assert (fresh.first, codes, seed) == (0, V, 5)
        assert torch.equal(val, numbered("val"))
        pretrainings.append((name, config))
        log = {
            "val_step": [0, 9],
            "val_loss": [3.0, 2.0],
            "val_target_loss": [1.0],
            "val_target_accuracy": [0.5],
        }
        return Backbone({"pretraining": 50.0, "wider": 60.0}[name]), log

    def tune(setup, kind, backbone, budget, rate, batch_of, seed):
        assert (backbone.head.weight.item(), budget, seed) == (50, 11, 5)
        tokens, y = batch_of(torch.Generator().manual_seed(0))
        assert torch.equal(tokens[:, 0] + WRITTEN, y)
        return Backbone(10.0 * maturity.TUNED.index(kind) + maturity.RATES.index(rate)), 0

    def written(tokens, label, number):
        """On validation sentences as many wrong tokens as belong to a setting, on test ones its label."""
        if tokens[0, 0, 0] == SENTENCES["val"][0]:
            return tokens[:, -1] + (torch.arange(N) < (2, 1, 3, 3)[number])
        return torch.full((len(tokens), N), int(label))

    def generate(setup, backbone, tokens):
        rollout = backbone.generate(tokens[:, :-1].flatten(1), N)
        label = backbone.head.weight.item()
        return rollout if label == 50 else rollout._replace(tokens=written(tokens, label, int(label) % 10))

    def sample(setup, backbone, tokens, n, temperature, seed):
        asked.append((backbone.head.weight.item(), n, seed))
        number = decoding.TEMPERATURES.index(temperature)
        return written(tokens, 80 + number, number), None

    monkeypatch.setattr(maturity, "Fresh", Fresh)
    monkeypatch.setattr(maturity, "pretrained", pretrain)
    monkeypatch.setattr(maturity, "tuned", tune)
    monkeypatch.setattr(maturity, "generate_all", generate)
    monkeypatch.setattr(maturity, "samples_of", sample)
    monkeypatch.setattr(maturity, "equal_steps", lambda *_: 11)
    monkeypatch.setattr(maturity, "likeliest", lambda samples, likelihoods: samples)
    monkeypatch.setattr(maturity, "consensus", lambda samples, codebook: samples + 100 * (samples < 100))
    result = maturity.run(setup, 5, steps=700)
    (first, config), (second, wider) = pretrainings
    assert (first, second) == ("pretraining", "wider")
    assert config == replace(setup.config["gpt"], steps=700, batch_size=maturity.BATCH)
    assert wider == replace(config, width=result["width"], steps=711)
    assert wider.width > config.width
    assert set(fitted) == set(maturity.READINGS)
    for name, given in fitted.items():
        assert given.reads == maturity.READINGS[name]
        check_pairs(given)
    (call,) = scored
    assert call.models.trained.backbone.head.weight.item() == 50
    assert call.refiners == {name: given.refiner for name, given in fitted.items()}
    labels = {name: y.unique().tolist() for name, y in call.others.items()}
    rivals = {kind: [10 * number + 1] for number, kind in enumerate(maturity.TUNED)}
    assert labels == {**rivals, "wider backbone": [60], "likeliest of n": [81], "consensus of n": [181]}
    assert {result["chosen"][kind] for kind in maturity.TUNED} == {0.3}
    assert set(asked) == {(50.0, 3, 5)}


# Studies that measure


def test_demonstrations_are_as_many_as_the_cell_says(setup, scored, monkeypatch):
    models = models_with(Backbone(), (OURS,))
    calls = give(monkeypatch, models, demos)
    for setting in demos.SETTINGS:
        demos.run(setup, 5, **setting)
    assert [call.changes["data"] for call in calls] == [
        {"num_demos": K, "palette": "sentence"} for K in (1, 2, 3)
    ]
    assert len({call.label for call in calls}) == 3
    assert all(call.refiners == {demos.BEST: models.trained.refiners[OURS]} for call in scored)


def test_each_pass_refines_what_the_one_before_has_written(setup, monkeypatch):
    models, written = models_with(Backbone(), (OURS,)), {}
    give(monkeypatch, models, passes)

    def refine(setup, models, refiner, rollout):
        assert refiner.name == OURS
        assert torch.equal(rollout.query[..., 0], -models.test["tokens"][:, 0].float())
        return rollout.tokens + 1

    monkeypatch.setattr(evaluate, "decode_methods", lambda *_: {})
    monkeypatch.setattr(passes, "refine_all", refine)
    monkeypatch.setattr(passes, "score", lambda setup, models, made: written.update(made))
    passes.run(setup, 5)
    greedy = models.test["tokens"][:, 0] + WRITTEN
    assert list(written) == passes.PASSES
    for number, tokens in enumerate(written.values(), 1):
        assert torch.equal(tokens, greedy + number)


def test_damage_is_behind_the_forced_token_and_before_and_after_refining(setup, monkeypatch):
    """A backbone that repeats the last token it has read, and a refiner that repairs all but two places."""
    places, started = 16, []

    class Repeater(Backbone):
        def generate(self, prompt, length, *_):
            started.append(prompt)
            states = torch.zeros(len(prompt), length, 2)
            return Rollout(prompt[:, -1:].expand(-1, length), states, states)

    models = models_with(Repeater(), (OURS,))
    number = torch.arange(8)[:, None, None].repeat(1, IMAGES, places)
    number[:, -1, 1] += 20  # all images are alike, but for a place where greedy decoding is wrong anyway
    models = models._replace(test={"tokens": number})
    give(monkeypatch, models, probe)

    def refine(setup, models, refiner, rollout):
        assert refiner.name == OURS
        repaired = number[:6, 0].clone()
        repaired[:, 13:15] = rollout.tokens[:, 13:15]
        return repaired

    monkeypatch.setattr(probe, "refine_all", refine)
    result = probe.run(setup, 5)
    assert result["positions"] == [4, 12]
    for t, damaged, left in zip((4, 12), *(result["damage"][name] for name in probe.COLOURS), strict=True):
        assert damaged == [float(s >= t) for s in range(places)]
        assert left == [float(s in (13, 14)) for s in range(places)]
    assert [prompt.shape[1] for prompt in started[-2:]] == [3 * places + 5, 3 * places + 13]
    assert all(len(prompt) == 6 for prompt in started[-2:]), "as many as the configuration says"
    last = started[-1]
    assert torch.equal(last[:, : 3 * places + 12], number[:6, 0, :1].expand(-1, 3 * places + 12))
    assert not (last[:, -1] == number[:6, 0, 0]).any(), "the forced token is the last one that is read"


def test_seconds_are_those_of_each_round_without_the_one_that_warms_up(monkeypatch):
    clock, called = [0.0], []

    def function(name, *seconds):
        def call():
            called.append(name)
            clock[0] += seconds[called.count(name) - 1]

        return call

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    for measure, expected in ((timing.side_by_side, [3.0, 1.0, 2.0]), (timing.median_seconds, 2.0)):
        called.clear()
        functions = {"a": function("a", 99.0, 3.0, 1.0, 2.0), "b": function("b", *4 * [5.0])}
        assert measure(functions, CPU, 3)["a"] == expected
        assert called == 4 * ["a", "b"], "they alternate"


def test_cells_are_missing_for_each_seed_and_setting_that_is_not_finished():
    kept = [{"cell": {"seed": 0, "num_demos": 2}}, {"cell": {"seed": 1, "num_demos": 1}}]
    missing = [(cell["seed"], cell["num_demos"]) for cell in studies.missing_cells("demos", kept, 2)]
    assert missing == [(0, 1), (0, 3), (1, 2), (1, 3)]
    assert studies.missing_cells("positions", [], 2) == [], "it shows the cells of main"


def test_tokenizers_are_trained_without_and_with_the_adversarial_loss(setup, monkeypatch):
    monkeypatch.setattr(
        train_refiner,
        "train_tokenizer",
        lambda config, sentences, *_: (config.gan_weight, {"earlier_seconds": 1000.0 * config.gan_weight}),
    )
    monkeypatch.setattr(vqgan, "score_tokenizer", lambda model, sentences, split, _: {"made": (model, split)})
    result = adversarial.run(setup, 5)
    assert [result[side]["made"] for side in ("without", "with")] == [(0.0, "val"), (0.5, "val")]
    assert [round(result[side]["seconds"], -2) for side in ("without", "with")] == [0, 500]


# Numbers


def test_an_interval_holds_95_percent_and_leaves_as_much_on_either_side():
    x = torch.randn(400, generator=torch.Generator().manual_seed(1)) ** 2
    low, high = report.interval(x)
    half = 1.96 * x.std().item() / 20
    assert x.mean() - low == pytest.approx(half, rel=0.12)
    assert high - x.mean() == pytest.approx(half, rel=0.12)
    mirrored = report.interval(-x)
    assert mirrored == (pytest.approx(-high), pytest.approx(-low)), "neither side is favoured"


@pytest.mark.parametrize("seeds", range(2, 11))
def test_a_t_interval_holds_95_percent_of_students_distribution(seeds):
    values, df = [float(i * i) for i in range(seeds)], seeds - 1
    low, high = report.t_interval(values)
    mean = statistics.fmean(values)
    assert high - mean == pytest.approx(mean - low)
    quantile = (high - mean) / (statistics.stdev(values) / seeds**0.5)
    t = torch.linspace(0, quantile, 100_001, dtype=torch.float64)
    logs = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    density = math.exp(logs) * (1 + t * t / df) ** (-(df + 1) / 2)
    assert 2 * torch.trapezoid(density, t).item() == pytest.approx(0.95, abs=1e-4)
    assert report.estimate(values, 1) == f"{mean:.1f} ({low:.1f} to {high:.1f})"


def test_an_estimate_of_one_seed_has_no_interval():
    assert report.estimate([0.123]) == "0.12"


def test_differences_are_paired_sentence_by_sentence_within_a_seed():
    """Not sorted, not of another seed, and a minus b."""
    first = {"by_sentence": {"a": [3.0, 5.0, 7.0], "b": [1.0, 5.0, 2.0]}, "task": [0, 1, 0]}
    second = {"by_sentence": {"a": [1.0, 2.0, 3.0], "b": [9.0, 7.0, 8.0]}, "task": [1, 1, 0]}
    cells = [first, second]
    assert main.differences(cells, "a", "b", "all").tolist() == [2, 0, 5, -8, -5, -5]
    assert main.differences(cells, "b", "a", TASKS[1]).tolist() == [0, 8, 5]


METHODS = tuple(dict.fromkeys([*main.ROWS, *rollout.METHODS, *passes.PASSES, *generalize.METHODS]))
METHODS += tuple(f"without {name}" for name in ("none", *TASKS))
FORCED_METHODS = tuple(method + OF_FORCED for method in METHODS)


def make_cells(seed: int = 0, count: int = 3, **more) -> list:
    """Cells in which every number is another one, and greedy decoding has a gap that can be closed."""
    generator, cells = torch.Generator().manual_seed(seed), []

    def some(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    for number in range(count):
        scores = {}
        for method in (*METHODS, *FORCED_METHODS):
            for group in GROUPS:
                low = {"teacher_forced": 0.1, "ar_greedy": 0.5, "ar_sampled": 0.5}.get(method, 0.2)
                score = {"cosine_error": some(low, low + 0.1), "token_accuracy": some(0, 1)}
                score |= {"psnr": some(10, 30), "ssim": some(0, 1)}
                score["cosine_error_by_position"] = [some(0, 1) for _ in range(N)]
                scores.setdefault(method, {})[group] = score
        by_sentence = {method: [some(0, 1) for _ in range(12)] for method in METHODS}
        cell = {"cell": {"seed": number}, "scores": scores, "by_sentence": by_sentence}
        cells.append({**cell, "task": [i % 3 for i in range(12)], **more})
    return cells


def gap_of(cell, method, group) -> float:
    def error(name):
        return cell["scores"][name][group]["cosine_error"]

    free = min(error("ar_greedy"), error("ar_sampled"))
    return (free - error(method)) / (free - error("teacher_forced"))


def exposure_of(cell, method, group) -> float:
    def error(name):
        return cell["scores"][name][group]["cosine_error"]

    left = error(method) - error(method + OF_FORCED)
    return 1 - left / (error("ar_greedy") - error("teacher_forced"))


def base_of(cell, method, group) -> float:
    before, after = (
        cell["scores"][name][group]["cosine_error"] for name in ("teacher_forced", method + OF_FORCED)
    )
    return (before - after) / before


def gain_of(cell, method, group, measure="psnr") -> float:
    return cell["scores"][method][group][measure] - cell["scores"]["ar_greedy"][group][measure]


def error_of(cell, method, group, measure="cosine_error") -> float:
    return cell["scores"][method][group][measure]


def over(cells, measure, *which) -> list:
    return [measure(cell, *which) for cell in cells]


def mean_and_sd(cells, measure, *which) -> list:
    values = over(cells, measure, *which)
    return [statistics.fmean(values), statistics.stdev(values)]


def mean(cells, measure, *which) -> float:
    return statistics.fmean(over(cells, measure, *which))


def row_of(text: str, name: str, number: int = 0) -> list:
    """The numbers in the number-th line of a table that begins with a name."""
    found = [line[len(name) :] for line in text.splitlines() if re.match(re.escape(name) + r"(\s|$)", line)]
    return [float(x.replace(",", "")) for x in re.findall(r"-?\d[\d,]*\.?\d*", found[number])]


def test_gaps_and_gains_are_of_their_own_method_task_and_seed():
    cells = make_cells()
    for group in GROUPS:
        for method in ("lora", "parallel"):
            which = (cells, method, group)
            assert report.gaps(*which) == pytest.approx(over(cells, gap_of, method, group))
            assert report.exposures(*which) == pytest.approx(over(cells, exposure_of, method, group))
            assert report.base_removed(*which) == pytest.approx(over(cells, base_of, method, group))
            assert report.psnr_gains(*which) == pytest.approx(over(cells, gain_of, method, group))


def test_numbers_of_main_are_differences_with_their_intervals():
    cells = make_cells()
    numbers = main.numbers(cells)
    assert numbers["intervals"].keys() == {f"{a} - {b}" for a, b in main.PAIRS}
    for a, b in main.PAIRS:
        for number, group in enumerate(GROUPS):
            found = torch.tensor(
                [
                    cell["by_sentence"][a][i] - cell["by_sentence"][b][i]
                    for cell in cells
                    for i in range(12)
                    if group == "all" or cell["task"][i] == number - 1
                ]
            )
            expected = [found.mean().item(), *report.interval(found)]
            assert numbers["intervals"][f"{a} - {b}"][group] == pytest.approx(expected, abs=1e-6)
    for method, control in ((main.BEST, "no_attention"), ("refined_tokens", "no_attention_tokens")):
        gaps = [over(cells, gap_of, name, "all") for name in (method, control)]
        share = [1 - alone / full for full, alone in zip(*gaps, strict=True)]
        assert numbers["attention_share"][method] == pytest.approx(share)


# Tables


def test_rows_of_main_are_of_the_method_in_front_of_them():
    cost = {method: {"params": 1e6 * i, "seconds": 10.0 * i} for i, method in enumerate(METHODS, 1)}
    cells = make_cells(cost={**cost, "lora": {**cost["lora"], "overhead": 0.5}})
    cells[0]["cost"] = {**cells[0]["cost"], "lora": {"params": 1e6, "seconds": 9e6, "overhead": 9.0}}
    text = main.show(cells)
    for method in main.ROWS:
        row = mean_and_sd(cells, error_of, method, "all") + [mean(cells, error_of, method, t) for t in TASKS]
        row += [] if method in main.BASELINES else mean_and_sd(cells, gap_of, method, "all")
        row += [mean(cells, error_of, method, "all", m) for m in ("token_accuracy", "psnr", "ssim")]
        paid = cells[1]["cost"][method] if method != "lora" else {"params": 1e6, **cells[1]["cost"]["lora"]}
        row += [paid["params"] / 1e6 if method != "lora" else 1.0, paid["seconds"]]
        row += [50.0] if method == "lora" else []
        assert row_of(text, method) == pytest.approx(row, abs=0.006), method
        if method not in main.BASELINES:
            gains = [x for group in GROUPS for x in mean_and_sd(cells, gain_of, method, group)]
            assert row_of(text, method, 1) == pytest.approx(gains, abs=0.006), method
    intervals = main.numbers(cells)["intervals"]
    for pair, by_group in intervals.items():
        expected = [x for group in GROUPS for x in by_group[group]]
        assert row_of(text, pair) == pytest.approx(expected, abs=1e-4)


def test_rows_of_a_table_of_gaps_are_of_the_method_in_front_of_them():
    cells = make_cells()
    methods = ("lora", "parallel", "best_of_n")
    text = report.gap_table(cells, methods, "title")
    for method in methods:
        row = [x for group in GROUPS for x in mean_and_sd(cells, gap_of, method, group)]
        row += mean_and_sd(cells, error_of, method, "all", "token_accuracy")
        row += mean_and_sd(cells, gain_of, method, "all")
        assert row_of(text, method) == pytest.approx(row, abs=0.006)


def test_rows_of_a_table_of_measures_are_of_the_method_and_the_group():
    cells = make_cells()
    methods = (main.BEST, "parallel")
    text = report.measures_table(cells, methods, GROUPS)
    for number, group in enumerate(GROUPS):
        for method in methods:
            row = []
            for measure in (gap_of, exposure_of, base_of):
                values = over(cells, measure, method, group)
                row += [statistics.fmean(values), *report.t_interval(values)]
            for measure in ("token_accuracy", "psnr"):
                gains = over(cells, gain_of, method, group, measure)
                row += [statistics.fmean(gains), *report.t_interval(gains)]
            assert row_of(text, method, number) == pytest.approx(row, abs=0.006)


def make_cost(cells) -> list:
    """Cells with the costs of three settings."""
    for number, cell in enumerate(cells):
        values = {"seconds": [5.0, 70.0, 9.0][number], "train_loss": 0.1 + number, "val_loss": 0.5 + number}
        cell["cost"] = {
            name: {"params": 1000 * i, **{key: i * value for key, value in values.items()}}
            for i, name in enumerate(("lora", "parallel", "best_of_n"), 1)
        }
        cell["backbone_params"] = 10_000
    return cells


def test_costs_of_settings_are_medians_and_means_of_the_setting_in_front_of_them():
    cells = make_cost(make_cells())
    text = report.settings_table(cells)
    for i, name in enumerate(cells[0]["cost"], 1):
        assert row_of(text, name)[:2] == pytest.approx(mean_and_sd(cells, gap_of, name, "all"), abs=6e-4)
        assert row_of(text, name, 1) == pytest.approx([1000 * i, 10 * i, 9 * i, 1.1 * i, 1.5 * i])


def settings_cells(field: str, settings) -> dict:
    """Cells of three seeds for each setting: {setting: cells}."""
    made = {}
    for number, setting in enumerate(settings):
        sizes = {"backbone_params": 1e6 * (number + 1), "refiner_params": 1e5 * (number + 1)}
        made[setting] = make_cells(number, **sizes)
        for cell in made[setting]:
            cell["cell"] = {**cell["cell"], field: setting}
    return made


def mixed(groups: dict) -> list:
    """All cells, by seed: as the file of a study holds them."""
    return [cell for of_seed in zip(*groups.values(), strict=True) for cell in of_seed]


def test_rows_by_setting_are_of_the_cells_of_that_setting():
    groups = settings_cells("num_demos", (1, 2, 3))
    text = demos.show(mixed(groups))
    for K, cells in groups.items():
        for method in demos.METHODS:
            row = [x for group in GROUPS for x in mean_and_sd(cells, error_of, method, group)]
            row += mean_and_sd(cells, gap_of, method, "all") if method == demos.BEST else []
            row += mean_and_sd(cells, error_of, method, "all", "token_accuracy")
            row += mean_and_sd(cells, error_of, method, "all", "psnr")
            assert row_of(text, f"K = {K}  {method}") == pytest.approx(row, abs=0.006)
    groups = settings_cells("backbone", ("gpt", "gru"))
    text = backbones.show(mixed(groups))
    for number, (name, cells) in enumerate(groups.items(), 1):
        row = [number, 0.1 * number]
        row += [x for method in backbones.METHODS for x in mean_and_sd(cells, error_of, method, "all")]
        row += mean_and_sd(cells, gap_of, backbones.BEST, "all")
        row += [mean(cells, error_of, m, "all", "token_accuracy") for m in ("ar_greedy", backbones.BEST)]
        row += mean_and_sd(cells, gain_of, backbones.BEST, "all")
        assert row_of(text, name) == pytest.approx(row, abs=0.006)


def test_other_tables_name_whose_each_number_is():
    cells = make_cells(other=make_cells(9, 1)[0])
    for number, cell in enumerate(cells):
        cell["other"] = make_cells(10 + number, 1)[0]
    text, other = generalize.show(cells), [cell["other"] for cell in cells]
    for name in ("without none", *(f"without {task}" for task in TASKS)):
        assert row_of(text, name)[:2] == pytest.approx(mean_and_sd(cells, gap_of, name, "all"), abs=6e-4)
    gap, error = (mean_and_sd(other, measure, generalize.BEST, "all") for measure in (gap_of, error_of))
    assert row_of(text, generalize.BEST)[:2] == pytest.approx(gap, abs=6e-4)
    assert row_of(text, generalize.BEST, 1) == pytest.approx(error, abs=6e-5)

    text = passes.show(cells)
    for name in passes.PASSES:
        gains = [x for group in GROUPS for x in mean_and_sd(cells, gain_of, name, group)]
        assert row_of(text, name, 1) == pytest.approx(gains, abs=0.006)

    text, by_seed = positions.show(cells), {}
    for method in positions.ROWS:
        by_seed[method] = [c["scores"][method]["all"]["cosine_error_by_position"] for c in cells]
        parts = (slice(4), slice(2), slice(2, 4))
        areas = [[sum(curve[part]) for curve in by_seed[method]] for part in parts]
        row = [f(area) for area in areas for f in (statistics.fmean, statistics.stdev)]
        assert row_of(text, method) == pytest.approx(row, abs=6e-4)
    curves = positions.numbers(cells)["curves"]
    for method, found in curves.items():
        means = [statistics.fmean(values) for values in zip(*by_seed[method], strict=True)]
        assert found == pytest.approx(means, abs=1e-5)

    losses = {"rank 4": [3.0, 4.0], "rank 16": [1.0, 1.5], "rank 64": [2.0, 2.5]}
    cells = [{"before": 7.0 + i, "val_loss": {name: v[i] for name, v in losses.items()}} for i in range(2)]
    found = [(line.split("  ")[0], float(line.split()[-3])) for line in lora.show(cells).splitlines()]
    assert found == [("before", 7.5), ("rank 16", 1.25), ("rank 64", 2.25), ("rank 4", 3.5)]


def test_what_is_right_alone_is_counted_among_what_greedy_decoding_gets_right_or_wrong():
    counts = {"colorize": [[[1, 2], [4, 3]], [[5, 6], [9, 10]]]}
    counts |= {"inpaint": [[[0, 1], [1, 0]], [[0, 0], [0, 0]]], "edges": [[[8, 0], [0, 0]], [[0, 4], [6, 0]]]}
    cells = make_cells(agreement={evaluate.method_name(OURS): counts})
    for cell in cells[1:]:
        cell["agreement"] = {evaluate.method_name(OURS): {t: [[[1, 1], [1, 1]]] * 2 for t in TASKS}}
    assert rollout.right_alone(cells, False)[0] == pytest.approx((5 / 20, 3 / 20))
    assert rollout.right_alone(cells, True)[0] == pytest.approx((15 / 40, 10 / 40))
    text = rollout.show(cells)
    for name, right, wrong in ((evaluate.method_name(OURS), 15 / 40, 5 / 20), ("parallel", 10 / 40, 3 / 20)):
        numbers = row_of(text, f"{name} alone gets right")
        assert (numbers[0], numbers[3]) == pytest.approx(((right + 0.5) / 3, (wrong + 0.5) / 3), abs=6e-4)


def test_what_is_taken_back_is_the_part_of_the_damage_that_refining_removes():
    damage = {"backbone": [[0.0, 1.0, 3.0, 2.0], [0.0, 0.0, 1.0, 4.0]]}
    damage["refined"] = [[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.1, 3.0]]
    halved = {who: [[0.5 * x for x in row] for row in rows] for who, rows in damage.items()}
    cells = [{"positions": [1, 2], "damage": part} for part in (damage, halved)]
    text = probe.show(cells)
    assert row_of(text, "     1") == pytest.approx([3.75, 1.768, 0.375, 0.177, 90], abs=1e-3)
    assert row_of(text, "     2") == pytest.approx([3.0, 1.414, 2.25, 1.061, 25], abs=1e-3)
    assert "at t itself: backbone 0.750 ± 0.354, refined 0.225 ± 0.106" in text


def test_tables_of_speed_compare_seconds_of_the_same_round():
    training = {"ours": [1.0, 2.0, 9.0], "textbook": [3.0, 8.0, 18.0], "product": [0.5, 1.0, 9.0]}
    cell = {
        "training": {"tokens": 600, "flops": 2.0, "product_flops": 4.0, "seconds": {"float32": training}},
        "transformers": {"skipped": "none"},
        "tokens_per_image": 51,
        "reading": {"weights": 0.001, "cache": 0.002},
        "generation": {
            "4": {
                "cached": [2.0, 4.0, 8.0], "prompt": [1.0, 2.0, 4.0], "uncached": [40.0],
                "refine tokens": [0.2, 1.2, 0.8], "refine tokens+query": [1.0, 1.0, 4.0],
            }
        },
        "tokenizer": {"encode": [2.0], "decode": [4.0]},
        "tokenizer_images": 64,
        "loops": {"backbone": {"loop": [0.2, 0.4], "model": [0.1, 0.4]}},
        "growth": [
            {"tokens": 16, "num_demos": 2,
             "seconds_per_sentence": {"train": [0.001], "generate": [0.002], "refine": [0.003]}}
        ],
    }  # fmt: skip
    text = speed.show([cell])
    assert row_of(text, "ours, float32") == pytest.approx([300, 25, 3, 2, 4])
    assert row_of(text, "textbook, float32") == pytest.approx([75, 8, 1, 1, 1])
    assert row_of(text, "       4") == pytest.approx([51, 5, 10, 40, 9, 10, 10, 30, 50, 25, 50])
    assert row_of(text, "backbone") == pytest.approx([300, 250, 1.5, 1, 2])
    assert row_of(text, "        N = 16") == pytest.approx([2, 1, 2, 3])
    assert "32 images/s encoded" in text
    assert "16 images/s decoded" in text


# Pictures


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in place of files."""
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, path: drawn.append(figure))
    return drawn


def places_of(axis) -> dict:
    """{label: its place on the vertical axis}."""
    labels = [text.get_text() for text in axis.get_yticklabels()]
    return {label: round(y) for label, y in zip(labels, axis.get_yticks(), strict=True)}


def bars_of(axis) -> dict:
    """{label: right end} of horizontal bars; without labels, numbered from above."""
    ends = {round(bar.get_y() + bar.get_height() / 2): bar.get_x() + bar.get_width() for bar in axis.patches}
    places = places_of(axis)
    if not any(places):
        return {i: ends[y] for i, y in enumerate(sorted(ends, reverse=True))}
    return {label: ends[y] for label, y in places.items()}


def curves_of(axis) -> dict:
    """{label: (x, y)} of lines with whiskers."""
    return {
        c.get_label(): tuple(map(list, c.lines[0].get_data())) for c in axis.containers if hasattr(c, "lines")
    }


def test_a_bar_is_the_mean_of_the_name_beside_it_and_dots_are_its_seeds():
    axis = report.new_figure(1).axes[0]
    values = {"a": [1.0, 3.0], "b": [10.0, 11.0], "c": [5.0, 5.0]}
    report.bars(axis, list(values), list(values.values()), ["#ff0000", "#00ff00", "#0000ff"])
    assert bars_of(axis) == {"a": 2, "b": 10.5, "c": 5}
    place = places_of(axis)
    assert place["a"] > place["b"] > place["c"], "in their order, from above"
    colours = {round(bar.get_y() + bar.get_height() / 2): to_hex(bar.get_facecolor()) for bar in axis.patches}
    assert [colours[place[name]] for name in "abc"] == ["#ff0000", "#00ff00", "#0000ff"]
    dots = {line.get_ydata()[0]: list(line.get_xdata()) for line in axis.lines if line.get_marker() == "."}
    assert {name: dots[y] for name, y in place.items()} == values
    (whiskers,) = (c for c in axis.collections)
    ends = {segment[0][1]: segment[:, 0].tolist() for segment in whiskers.get_segments()}
    assert ends[place["a"]] == pytest.approx([2 - 2**0.5, 2 + 2**0.5])


def test_bars_of_main_are_of_the_method_beside_them_for_each_task(figures):
    cells = make_cells()
    main.plot("path", cells)
    rows = [method for method in main.ROWS if method != "vqgan_limit"]
    for axis, group in zip(figures[0].axes, GROUPS, strict=True):
        expected = {method: mean(cells, error_of, method, group) for method in rows}
        if group != "all":
            expected = dict(enumerate(expected.values()))
        assert axis.get_title() == group
        assert bars_of(axis) == pytest.approx(expected)
    colours = {bar.get_width(): to_hex(bar.get_facecolor()) for bar in figures[0].axes[0].patches}
    assert colours[mean(cells, error_of, main.BEST, "all")] == evaluate.COLOURS[main.BEST]


def test_bars_of_the_other_studies_are_of_what_is_written_beside_them(figures):
    cells = make_cost(make_cells())
    report.plot_settings("path", cells)
    expected = {name: mean(cells, gap_of, name, "all") for name in cells[0]["cost"]}
    assert bars_of(figures[-1].axes[0]) == pytest.approx(expected)

    groups = settings_cells("backbone", ("gpt", "gru"))
    backbones.plot("path", mixed(groups))
    errors, closed = figures[-1].axes
    expected = {
        f"{name}: {method}": mean(part, error_of, method, "all")
        for name, part in groups.items()
        for method in backbones.METHODS
    }
    assert bars_of(errors) == pytest.approx(expected)
    expected = {name: mean(part, gap_of, backbones.BEST, "all") for name, part in groups.items()}
    assert bars_of(closed) == pytest.approx(expected)

    for number, cell in enumerate(cells):
        cell["other"] = make_cells(20 + number, 1)[0]
    generalize.plot("path", cells)
    tasks, dataset = figures[-1].axes
    expected = {}
    for task in TASKS:
        expected[f"{task}: backbone"] = mean(cells, error_of, "ar_greedy", task)
        expected[f"{task}: trained with it"] = mean(cells, error_of, "without none", task)
        expected[f"{task}: without it"] = mean(cells, error_of, f"without {task}", task)
    assert bars_of(tasks) == pytest.approx(expected)
    other = [cell["other"] for cell in cells]
    expected = {method: mean(other, error_of, method, "all") for method in generalize.METHODS}
    assert bars_of(dataset) == pytest.approx(expected)

    cells = [{"before": 7.0 + i, "val_loss": {"rank 4": 3.0 + i, "rank 16": 1.0 + i}} for i in range(2)]
    lora.plot("path", cells)
    (axis,) = figures[-1].axes
    assert bars_of(axis) == {"rank 4": 3.5, "rank 16": 1.5}
    handles, labels = axis.get_legend_handles_labels()
    assert (labels, handles[0].get_xdata()[0]) == (["before"], 7.5)

    cells = [{side: {"psnr": 10.0 * i, "seconds": i} for i, side in enumerate(("without", "with"), 1)}]
    adversarial.plot("path", cells)
    found = {axis.get_xlabel(): bars_of(axis) for axis in figures[-1].axes}
    assert found == {"psnr": {"without": 10, "with": 20}, "seconds": {"without": 1, "with": 2}}


def test_stacked_bars_are_the_base_and_what_is_left_of_exposure(figures):
    cells = make_cells()
    report.plot_stacked("path", cells, ("lora", "parallel"))
    rows = {"ar_greedy": "teacher_forced", "lora": f"lora{OF_FORCED}", "parallel": f"parallel{OF_FORCED}"}
    for axis, group in zip(figures[0].axes, GROUPS, strict=True):

        def part(name, group=group):
            return mean(cells, lambda c: error_of(c, name, group) / error_of(c, "ar_greedy", group))

        assert [bar.get_x() for bar in axis.patches[:3]] == [0, 0, 0]
        base = [bar.get_width() for bar in axis.patches[:3]]
        assert base == pytest.approx([part(name) for name in rows.values()])
        assert [bar.get_x() for bar in axis.patches[3:]] == pytest.approx(base)
        ends = bars_of(axis)
        assert list(ends.values()) == pytest.approx([part(name) for name in rows])
        if group == "all":
            assert list(ends) == list(rows)


def test_curves_are_of_the_method_in_the_legend(figures):
    groups = settings_cells("num_demos", (1, 2, 3))
    demos.plot("path", mixed(groups))
    for axis, group in zip(figures[-1].axes, GROUPS, strict=True):
        assert axis.get_title() == group
        for method, (x, y) in curves_of(axis).items():
            assert x == [1, 2, 3]
            assert y == pytest.approx([mean(cells, error_of, method, group) for cells in groups.values()])
        assert curves_of(axis).keys() == set(demos.METHODS)

    cells = make_cells()
    passes.plot("path", cells)
    curves = curves_of(figures[-1].axes[0])
    assert curves.keys() == set(GROUPS)
    for group, (x, y) in curves.items():
        assert x == [1, 2, 3, 4]
        assert y == pytest.approx([mean(cells, gap_of, name, group) for name in passes.PASSES])

    settings = {"64 rollouts": "lora", "256 rollouts": "parallel"}
    settings |= {"10 steps": "best_of_n", "20 steps": "lora"}
    for number, cell in enumerate(cells):
        for name, method in settings.items():
            cell["scores"][name] = cell["scores"][method]
        seconds = ((1.0, 2.0, 90.0)[number] * (2 if name == "20 steps" else 1) for name in settings)
        sizes = {"params": 100, "train_loss": 0.0, "val_loss": 0.0}
        cell["cost"] = {name: {**sizes, "seconds": s} for name, s in zip(settings, seconds, strict=True)}
    data_study.plot("path", cells)
    for axis, x, names in zip(
        figures[-1].axes, ([64, 256], [2, 4]), (list(settings)[:2], list(settings)[2:]), strict=True
    ):
        ((found, y),) = curves_of(axis).values()
        assert found == x
        assert y == pytest.approx([mean(cells, gap_of, name, "all") for name in names])

    cells = make_cost(make_cells())
    size.plot("path", cells)
    (axis,) = figures[-1].axes
    values = {name: mean(cells, gap_of, name, "all") for name in cells[0]["cost"]}
    expected = {name: (i / 10, value) for i, (name, value) in enumerate(values.items(), 1)}
    assert {text.get_text(): text.xy for text in axis.texts} == {
        name: pytest.approx(place) for name, place in expected.items()
    }
    places = [(c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in axis.containers]
    assert places == [pytest.approx(place) for place in expected.values()]

    damage = {"backbone": [[0.0, 1.0, 3.0, 2.0]], "refined": [[0.0, 0.5, 0.5, 0.0]]}
    probe.plot("path", [{"positions": [1], "damage": damage}])
    by_position, behind = figures[-1].axes
    assert {line.get_label(): list(line.get_ydata()) for line in behind.lines} == {
        "backbone": [3, 2], "refined": [0.5, 0]
    }  # fmt: skip
    assert {line.get_label(): list(line.get_ydata()) for line in by_position.lines} == {
        "backbone": [5], "refined": [0.5]
    }  # fmt: skip
