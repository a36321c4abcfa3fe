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
import runtime
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
    maturity,
    positions,
    probe,
    report,
    rollout,
    runner,
    size,
    speed,
    stages,
    timing,
    tuning,
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
        "study": runner.StudyConfig(samples=3, steps=80, rollouts=20, probed=6),
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
        return given.refiner, {**log, "seconds": 1000.0 * number}

    monkeypatch.setattr(train_refiner, "train_refiner", train)
    return noted


@pytest.fixture
def scored(monkeypatch):
    """What is scored: the models and refiners of each call of `score_refiners`."""
    calls = []

    def score(setup, models, refiners, seed, others=None):
        calls.append(SimpleNamespace(models=models, refiners=refiners, seed=seed, others=others))
        return {"scores": len(calls)}

    for module in (runner, generalize, rollout, decoding, window, maturity, positions):
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
        number = given.target_tokens[split] - TRUE
        assert torch.equal(part.tokens, number + WRITTEN)
        for states, sign in ((part.states, 1), (part.query, -1)):
            assert states is None or torch.equal(states[..., 0].float(), sign * number.float())
    assert numbers_of(given.target_tokens["val"] - TRUE) == list(SENTENCES["val"])


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


def test_a_kept_training_is_of_one_kind_of_data_and_one_precision(setup):
    _, kept = setup.progress("backbone", {"gpt": 1})
    larger = {**setup.config, "data": replace(setup.config["data"], image_size=32)}
    for other in (replace(setup, config=larger), replace(setup, dtype=torch.bfloat16)):
        _, made_with = other.progress("backbone", {"gpt": 1})
        with pytest.raises(runtime.UserError, match="was made with"):
            runtime.check_config("backbone.progress", kept, made_with, "")


def test_sentences_beyond_those_that_were_written_for_are_left_out(setup):
    models = models_with(Backbone())
    models.trained.tokens["train"] = torch.cat([numbered("train")] * 2)
    rollouts, targets = runner.replay(setup, models, ("query",))
    assert len(rollouts["train"].tokens) == len(targets["train"]) == len(SENTENCES["train"])


def test_only_the_first_rollouts_of_each_split_are_replayed(setup):
    models = models_with(Backbone())
    rollouts, targets = runner.replay(setup, models, ("query",), first=20)
    for split, n in (("train", 20), ("val", 12)):
        numbers = torch.tensor(SENTENCES[split][:n])
        assert torch.equal(rollouts[split].tokens[:, 0], numbers + WRITTEN)
        assert torch.equal(rollouts[split].query[:, 0, 0].float(), -numbers.float())
        assert torch.equal(targets[split][:, 0], numbers + TRUE)


@pytest.mark.parametrize("rows", [slice(None), slice(7), torch.tensor([5, 2, 40])])
def test_a_refiner_of_a_study_sees_the_rollouts_it_may_see(setup, fitted, rows):
    models = models_with(Backbone())
    rollouts, targets = runner.replay(setup, models, vsr.SOURCES)
    refiner, log = runner.fit(
        setup, models, "name", rollouts, targets, 5, ("tokens",), rows, F.mse_loss, rollout.Scaled, steps=3
    )
    given = fitted["name"]
    check_pairs(given)
    assert numbers_of(given.target_tokens["train"] - TRUE) == torch.arange(48)[rows].tolist()
    assert given.config == replace(setup.config["refiner"], steps=3)
    assert (given.reads, given.seed) == (("tokens",), 5)
    assert (given.loss_function, given.make) == (F.mse_loss, rollout.Scaled)
    assert refiner is given.refiner
    assert log["val_loss"][-1] == 21


def test_each_setting_has_its_own_refiner_and_cost(setup, fitted, scored, monkeypatch):
    models = models_with(Backbone())
    give(monkeypatch, models, runner)
    cell = runner.fit_each(setup, 5, {"a": {"steps": 3}, "b": {"rows": slice(9)}, "c": {"layers": 2}})
    assert [given.config.steps for given in fitted.values()] == [3, 80, 80]
    assert [given.config.layers for given in fitted.values()] == [1, 1, 2]
    assert [len(given.target_tokens["train"]) for given in fitted.values()] == [48, 9, 48]
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
    models.test["images"] = None
    monkeypatch.setattr(evaluate, "decode_methods", lambda *args: dict(args[2], args=args))
    monkeypatch.setattr(evaluate, "score_methods", lambda *args: seen.update(args[1]) or {})
    monkeypatch.setattr(runner, "agreement", lambda *_: {})
    runner.score_refiners(setup, models, {"x": "one", "y": "two"}, 5, {"z": "other"})
    tokenizer, backbone, _, tokens, _, seed = seen.pop("args")
    assert (tokenizer, backbone) == (models.trained.tokenizer, models.trained.backbone)
    assert (tokens, seed) == (models.test["tokens"], 5)
    assert seen == {"x": "one", "y": "two", "z": "other"}


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
    found = runner.generate_all(setup, backbone, tokens)
    assert (found.tokens == greedy.tokens).float().mean() > 0.99
    assert torch.allclose(found.states, greedy.states, rtol=0.02, atol=0.02)
    assert torch.allclose(found.query, greedy.query, rtol=0.02, atol=0.02)
    assert (runner.force_all(setup, backbone, tokens) == forced.tokens).float().mean() > 0.99


def test_refined_tokens_of_all_rollouts_come_in_their_order(setup):
    models = models_with(Backbone())
    refiner = vsr.Refiner(setup.config["refiner"], vsr.SOURCES, GRID, V, 2)
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


# Studies that train refiners


@pytest.mark.parametrize("study", [data_study, size])
def test_settings_of_a_study_are_what_their_names_say(setup, fitted, scored, monkeypatch, study):
    many = torch.cat([numbered("train")] * 30)[:1300]
    models = models_with(Backbone(), tokens={"train": many, "val": numbered("val")})
    give(monkeypatch, models, runner)
    monkeypatch.setattr(size, "shares_of_generation", lambda *_: {})
    setup.config["refiner"] = replace(setup.config["refiner"], rollouts=1300)
    study.run(setup, 5)
    assert scored[0].refiners == {name: given.refiner for name, given in fitted.items()}
    for name, given in fitted.items():
        check_pairs(given)
        reads, _, setting = name.partition(", ")
        number, what = int((re.findall(r"\d+", setting.replace(",", "")) or [0])[0]), setting.split()[-1]
        assert given.reads == tuple(reads.split("+"))
        assert given.seed == 5
        assert len(given.target_tokens["train"]) == (number if what == "rollouts" else 1300)
        changes = {"steps": number if what == "steps" else 80}
        if study is size:
            changes |= {"layers": number, "width": int(what)}
        assert given.config == replace(setup.config["refiner"], **changes)
    expected = {
        data_study: {"256 rollouts", "1,024 rollouts", "1,300 rollouts", "10 steps", "20 steps", "40 steps"},
        size: {"1 x 8", "3 x 8", "1 x 16", "3 x 16", "3 x 32"},
    }  # fmt: skip
    names = {f"{reading}, {name}" for reading in runner.READINGS for name in expected[study]}
    assert fitted.keys() == names


def test_shares_of_generation_are_of_the_pass_and_the_generation_they_are_called_by(setup, monkeypatch):
    backbone, called, settings = small_gpt(), {}, {}
    models = models_with(backbone)
    models.trained.tokenizer.codebook.vectors = torch.eye(30)
    models = models._replace(test={"tokens": torch.randint(30, (70, IMAGES, N))})
    give(monkeypatch, models, size)
    tokens, now, generate, refine = models.test["tokens"], [], backbone.generate, vsr.refine
    monkeypatch.setattr(backbone, "generate", lambda *args: now.append(args) or generate(*args))
    monkeypatch.setattr(vsr, "refine", lambda *args: now.append(args) or refine(*args))

    def seconds(functions, device, rounds):
        assert rounds == setup.config["study"].rounds
        for name, function in functions.items():
            now.clear()
            function()
            (called[name],) = now
        return {name: 0.5 if name == "generation" else float(i) for i, name in enumerate(functions)}

    monkeypatch.setattr(size, "median_seconds", seconds)
    for reading, layers, width in (("tokens", 1, 8), ("tokens+query", 3, 32)):
        options = {"reads": tuple(reading.split("+")), "layers": layers, "width": width}
        settings[f"{reading}, {layers} x {width}"] = options
    shares = size.shares_of_generation(setup, 5, settings)
    prompt, length = called.pop("generation")[:2]
    assert torch.equal(prompt, tokens[:64, :-1].flatten(1))
    assert length == N
    written = generate(prompt, N)
    assert shares == dict(zip(settings, (2.0, 4.0), strict=True))
    for name, (refiner, codebook, y, _, query) in called.items():
        options = settings[name]
        assert (refiner.reads, len(refiner.blocks)) == (options["reads"], options["layers"])
        assert refiner.to_code.in_features == options["width"]
        assert not refiner.training
        assert codebook is models.codebook
        assert (y == written.tokens).float().mean() > 0.99
        assert torch.allclose(query, written.query, atol=1e-2)


def test_the_length_of_a_scaled_refiner_is_trained(setup):
    """It starts at 10."""
    models = models_with(Backbone())
    setup.config["refiner"].batch_size = 8
    known = (setup, models, "x", *runner.replay(setup, models), 5, ("tokens", "query"))
    refiner, _ = runner.fit(*known, make=rollout.Scaled, loss_function=F.mse_loss, steps=2)
    assert 1e-4 < abs(refiner.log_length.exp() - 10) < 1


def test_a_refiner_without_a_task_has_not_seen_it(setup, fitted, scored, monkeypatch):
    """Each has learnt from as many. The last are the default ones, on a dataset that none was trained on."""
    calls = give(monkeypatch, models_with(Backbone(), train_refiner.READINGS), generalize)
    result = generalize.run(setup, 5)
    _, task = data.joined(data.Sentences(setup.config["data"], 5).batches("train", 48))
    assert list(fitted) == ["without none", *(f"without {name}" for name in TASKS)]
    fewest = 48 - task.bincount().max()
    for name, given in fitted.items():
        check_pairs(given)
        rows = [i for i in range(48) if name != f"without {TASKS[task[i]]}"]
        assert numbers_of(given.target_tokens["train"] - TRUE) == rows[:fewest]
        assert given.config.steps == 80
    assert [call.test_data and call.test_data.data for call in calls] == [None, "glyphs"]
    assert all((call.seed, call.changes) == (5, None) for call in calls)
    assert calls[1].readings == train_refiner.READINGS
    assert scored[0].refiners == {name: given.refiner for name, given in fitted.items()}
    assert {name: refiner.name for name, refiner in scored[1].refiners.items()} == {
        evaluate.method_name(reading): reading for reading in train_refiner.READINGS
    }
    assert result == {"scores": 1, "other": {"scores": 2}}


def test_a_refiner_is_trained_on_the_inputs_it_is_called_by(setup, fitted, scored, monkeypatch):
    """Greedy decoding is wrong at one place of four."""
    models = models_with(Backbone(), train_refiner.READINGS)
    for split, y in models.trained.generated.items():
        y[:, 1:] = numbered(split)[:, -1, 1:]
    calls = give(monkeypatch, models, rollout)
    monkeypatch.setattr(rollout, "force_all", lambda s, b, tokens: tokens[:, 0] + FORCED)
    result = rollout.run(setup, 5)
    assert (calls[0].seed, calls[0].readings) == (5, train_refiner.READINGS)
    assert result["greedy_error_rate"] == pytest.approx(0.25)
    pairs = [(sources, name) for sources in rollout.READINGS for name in rollout.INPUTS]
    names = {f"{evaluate.method_name(sources)}, {name}": (sources, name) for sources, name in pairs}
    losses = {f"{evaluate.method_name(reads)}, cross-entropy": reads for reads in train_refiner.READINGS}
    assert fitted.keys() == {*names, *losses}
    target, refined = torch.eye(V)[:2, None].expand(2, N, V), torch.rand(2, N, V)
    right = (refined.log_softmax(-1) * target).sum(-1)
    for method, reads in losses.items():
        given = fitted[method]
        assert ("+".join(given.reads), given.make) == (reads, rollout.Scaled)
        for split, part in given.rollouts.items():
            assert torch.equal(part.tokens, models.trained.generated[split])
        assert given.loss_function(refined, target).item() == pytest.approx(-right.mean().item(), rel=1e-4)
    for method, (reads, name) in names.items():
        given = fitted[method]
        assert "+".join(given.reads) == reads
        assert (given.config, given.make) == (setup.config["refiner"], vsr.Refiner)
        assert given.loss_function is vsr.cosine_loss
        for split, part in given.rollouts.items():
            number = torch.tensor(SENTENCES[split])[:, None].expand(-1, N)
            written = models.trained.generated[split]
            assert torch.equal(given.target_tokens[split], number + TRUE)
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
                if name == "random corruption":
                    assert 0.1 < wrong.float().mean() < 0.4
                elif split == "train":  # by what the backbone writes, at any place
                    assert 0.05 < wrong.float().mean() < 0.35
                    assert torch.equal(part.tokens[wrong], (number + WRITTEN)[wrong])
                    assert wrong[:, 1:].any()
                else:
                    assert not wrong.any(), "codes of which no one knows what is written for them"
    refiners = {name: given.refiner for name, given in fitted.items()}
    refiners |= {evaluate.method_name(r): stub for r, stub in models.trained.refiners.items()}
    assert scored[0].refiners == refiners


@pytest.mark.parametrize("kind", window.KINDS)
def test_a_window_is_as_wide_as_it_is_called(setup, fitted, scored, monkeypatch, kind):
    models, written, tests = models_with(Backbone()), {}, {"sampled": Rollout(torch.arange(3))}
    calls = give(monkeypatch, models, window)
    rollouts, truth = runner.replay(setup, models, vsr.SOURCES)
    targets = {"true hue": {}, "nearest valid": truth}
    prepared = choice.Choice(models, None, rollouts, targets, tests, {}, None)
    monkeypatch.setattr(choice, "prepare", lambda *_: prepared)
    monkeypatch.setattr(choice, "score", lambda s, m, given, valid, objects: written.update(given))
    monkeypatch.setattr(window, "refine_all", lambda setup, models, refiner, rollout: (refiner.name, rollout))
    window.run(setup, 5, kind)
    assert list(fitted) == window.NAMES
    study = setup.config["study"]
    steps = study.window_steps if kind == "default" else study.steps
    for name, given in fitted.items():
        check_pairs(given)
        radius, start = re.fullmatch(r"(?:radius (\d)|all), from (\w+)", name).groups()
        assert given.make.keywords == {"radius": radius and int(radius), "start": start}
        assert given.config == replace(setup.config["refiner"], steps=steps)
        assert given.reads == (("tokens", "query") if kind == "default" else ("tokens",))
    if kind == "default":
        assert [(call.seed, call.label) for call in calls] == [(5, "base")]
        assert scored[0].refiners == {name: given.refiner for name, given in fitted.items()}
    else:
        assert written.pop("sampled") is tests["sampled"].tokens
        assert written == {f"{name}, of sampled": (name, tests["sampled"]) for name in window.NAMES}


def test_targets_are_the_true_answer_or_the_one_nearest_to_what_was_written(setup, fitted, monkeypatch):
    """Each sentence has six valid answers; the one nearest to what was written is that of its number."""
    written, hues = {}, choice.HUES
    sampled = 100 * hues  # what sampling adds to the number of what is written

    class Scenes:
        def __init__(self, config, seed):
            assert seed == 5

        def valid(self, split, total):
            number = torch.tensor(SENTENCES[split])[:total, None] + 1000 * torch.arange(hues)
            return number[:, :, None, None, None].expand(-1, -1, 3, 2, 2).float()

        def objects(self, split, total):
            return split, total

    def nearest(tokens, valid, codebook):
        return (tokens[:, 0] - WRITTEN) % hues

    def generate(setup, backbone, part, temperature, generator):
        drawn.append((temperature, numbers_of(part[:, 0])))
        rollout = backbone.generate(part[:, :-1].flatten(1), N)
        return rollout._replace(tokens=rollout.tokens + (sampled if temperature else 0))

    models, drawn = models_with(Backbone()), []
    models.trained.tokenizer.encode = lambda images: images[:, 0, 0, :1].long().expand(-1, N)
    calls = give(monkeypatch, models, choice)
    monkeypatch.setattr(choice, "OneHue", Scenes)
    monkeypatch.setattr(choice, "nearest_valid", nearest)
    monkeypatch.setattr(choice, "generate_all", generate)
    monkeypatch.setattr(choice, "refine_all", lambda setup, models, refiner, rollout: (refiner.name, rollout))
    monkeypatch.setattr(choice, "score", lambda s, m, given, valid, objects: written.update(given))
    choice.run(setup, 5)
    assert calls[0].changes == runner.at_most(choice.SIZES, setup.config)
    pairs = [(method, target) for method in runner.READ_BY for target in choice.TARGETS]
    names = {f"{method}, {target}": (method, target) for method, target in pairs}
    assert fitted.keys() == names.keys()
    for name, (method, target) in names.items():
        given = fitted[name]
        assert given.reads == runner.READ_BY[method]
        for split, rows in SENTENCES.items():
            if split != "test":
                number = torch.tensor(rows)[:, None].expand(-1, N)
                truth = number + (TRUE if target == "true hue" else 1000 * (number % hues))
                assert torch.equal(given.target_tokens[split], truth)
                second_half = (torch.arange(len(rows)) >= len(rows) // 2)[:, None]
                assert torch.equal(given.rollouts[split].tokens, number + WRITTEN + sampled * second_half)
                assert torch.equal(given.rollouts[split].query[..., 0].float(), -number.float())
        for of in ("greedy", "sampled"):
            refined = written[f"{name}, of {of}"]
            assert refined[0] == name
            assert refined[1].tokens is written[of]
    train, val, test = map(list, SENTENCES.values())
    assert drawn == [(1.0, train[24:]), (1.0, val[6:]), (0.0, test), (1.0, test)]


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
def test_refiners_are_trained_for_the_backbone_of_their_cell(setup, fitted, scored, monkeypatch, name):
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
    (call,) = scored
    assert call.models.trained.backbone is used
    assert call.refiners == {method: given.refiner for method, given in fitted.items()}
    assert fitted.keys() == {evaluate.method_name(reading) for reading in train_refiner.READINGS}
    for method, given in fitted.items():
        check_pairs(given)
        assert evaluate.method_name("+".join(given.reads)) == method
        assert numbers_of(given.target_tokens["train"] - TRUE) == list(range(20)), (
            "the rollouts of this study"
        )
        assert given.config == replace(setup.config["refiner"], steps=80)


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


@pytest.mark.parametrize("steps", [700, 11200])
def test_rivals_of_a_mature_backbone_are_chosen_on_validation_and_used_on_test_sentences(
    setup, fitted, scored, monkeypatch, steps
):
    """Of the temperatures, the second has the fewest wrong tokens on validation sentences."""
    models, pretrainings, asked = models_with(Backbone()), [], []
    budgets = dict(zip(maturity.TUNED, (11, 5, 6), strict=True))
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
            "seconds": 90.0,
        }
        return Backbone({"pretraining": 50.0, "wider": 60.0}[name]), log

    def tune(setup, kind, models, known, budget, batch_size, seed):
        assert models.trained.backbone.head.weight.item() == 50
        assert (budget, batch_size, seed) == (budgets[kind], maturity.BATCH, 5)
        tokens, y = known
        assert numbers_of(tokens[:, 0]) == list(range(20)), "as many as the configuration says"
        assert torch.equal(tokens[:, 0] + WRITTEN, y)
        return Backbone(10.0 * maturity.TUNED.index(kind)), {0.3: 0.1}, 7.0

    def written(tokens, label, number):
        """On validation sentences as many wrong tokens as belong to a setting, on test ones its label."""
        if tokens[0, 0, 0] == SENTENCES["val"][0]:
            return tokens[:, -1] + (torch.arange(N) < (2, 1, 3, 3)[number])
        return torch.full((len(tokens), N), int(label))

    def generate(setup, backbone, tokens):
        rollout = backbone.generate(tokens[:, :-1].flatten(1), N)
        label = backbone.head.weight.item()
        return rollout if label == 50 else rollout._replace(tokens=written(tokens, label, 0))

    def sample(setup, backbone, tokens, n, temperature, seed):
        asked.append((backbone.head.weight.item(), n, seed))
        number = decoding.TEMPERATURES.index(temperature)
        return written(tokens, 80 + number, number), None

    monkeypatch.setattr(maturity, "Fresh", Fresh)
    monkeypatch.setattr(maturity, "pretrained", pretrain)
    monkeypatch.setattr(maturity, "tuned_at_best", tune)
    monkeypatch.setattr(maturity, "generate_all", generate)
    monkeypatch.setattr(maturity, "samples_of", sample)
    monkeypatch.setattr(maturity, "equal_steps", lambda *_: budgets)
    monkeypatch.setattr(maturity, "force_all", lambda *a: 1000 + generate(*a).tokens)
    monkeypatch.setattr(maturity, "wider_config", lambda *given: given)
    monkeypatch.setattr(maturity, "likeliest", lambda samples, likelihoods: samples)
    monkeypatch.setattr(maturity, "consensus", lambda samples, codebook: samples + 100 * (samples < 100))
    result = maturity.run(setup, 5, steps=steps)
    configs = dict(pretrainings)
    config = replace(setup.config["gpt"], steps=steps, batch_size=maturity.BATCH)
    assert configs.pop("pretraining") == config
    assert set(fitted) == set(runner.READ_BY)
    for name, given in fitted.items():
        assert given.reads == runner.READ_BY[name]
        assert given.config.steps == 80
        check_pairs(given)
    (call,) = scored
    assert call.models.trained.backbone.head.weight.item() == 50
    assert call.refiners == {name: given.refiner for name, given in fitted.items()}
    labels = {name: y.unique().tolist() for name, y in call.others.items()}
    if steps == 700:
        backbone, refiner, total, shape = configs.pop("wider")
        assert (backbone.head.weight.item(), refiner) == (50, fitted[f"refined_{OURS}"].refiner)
        assert (total, shape) == (steps + 11, (V, N, IMAGES))
        assert labels.pop("wider backbone") == [60]
        assert labels.pop(f"wider backbone{OF_FORCED}") == [1060]
    assert not configs, "the longest training has no wider rival"
    rivals = {kind: [10 * number] for number, kind in enumerate(maturity.TUNED)}
    rivals |= {kind + OF_FORCED: [1000 + label] for kind, (label,) in rivals.items()}
    assert labels == {**rivals, "likeliest of n": [81], "consensus of n": [181]}
    assert all(result["tried"][kind] == {0.3: 0.1} for kind in maturity.TUNED)
    for way in maturity.SAMPLED:
        assert min(result["tried"][way], key=result["tried"][way].get) == decoding.TEMPERATURES[1]
    assert result["budget"] == budgets
    seconds = {"pretraining": 90, **dict.fromkeys(maturity.TUNED, 7), "wider backbone": 90}
    assert seconds.items() - result["seconds"].items() == ({("wider backbone", 90)} if steps > 700 else set())
    errors = {"train": 1.0, "val": 1.0}  # of the rollouts: nothing that it writes is right
    assert result["rollout_error"] == errors
    assert set(asked) == {(50.0, 3, 5)}


def test_a_wider_backbone_is_as_large_as_backbone_and_refiner_and_costs_as_much(setup):
    backbone, refiner, shape = small_gpt(), nn.Linear(99, 10), (30, N, IMAGES)
    config = maturity.wider_config(backbone, refiner, 1000, shape)
    larger, narrower = (vsr.GPT(replace(config, width=config.width - less), *shape) for less in (0, 1))
    assert runner.count(narrower) < runner.count(backbone) + 1000 <= runner.count(larger)
    costs = [stages.flops_per_token(model) for model in (backbone, larger)]
    assert config.steps == round(1000 * costs[0] / costs[1]) < 1000
    assert config == replace(backbone.config, width=config.width, steps=config.steps)


@pytest.mark.parametrize("scale", [1, 2])
def test_positions_are_of_the_models_of_their_scale(setup, scored, monkeypatch, scale):
    """Twice the side, on no more than elsewhere; LoRA costs as much as a refiner."""
    models, tuned = models_with(Backbone(), train_refiner.READINGS), []
    models.trained.tokens["train"] = torch.cat([numbered("train")] * 2)  # more than have been written for
    calls = give(monkeypatch, models, positions)
    setup.config["gpt"] = replace(setup.config["gpt"], steps=40, batch_size=12)

    def tune(setup, kind, given, known, steps, batch_size, seed):
        assert (kind, given, seed) == (positions.LORA, models, 5)
        assert torch.equal(known[0][:, 0] + WRITTEN, known[1])
        tuned.append((steps, batch_size))
        return Backbone(70.0), {0.3: 0.1}, 1.0

    def generate(setup, backbone, tokens):
        assert torch.equal(tokens, models.test["tokens"])
        return Rollout(torch.full((12, N), int(backbone.head.weight.item())))

    def equal(setup, given, rollouts, steps, batch_size):
        assert (rollouts, steps, given) == (48, 7, models)
        return {positions.LORA: batch_size - 2}

    monkeypatch.setattr(positions, "tuned_at_best", tune)
    monkeypatch.setattr(positions, "generate_all", generate)
    monkeypatch.setattr(positions, "force_all", lambda *a: 1 + generate(*a).tokens)
    monkeypatch.setattr(positions, "equal_steps", equal)
    result = positions.run(setup, 5, scale=scale)
    (call,), (of,) = scored, calls
    assert (of.seed, of.readings) == (5, train_refiner.READINGS)
    others = {name: y.unique().item() for name, y in call.others.items()}
    assert others == {positions.LORA: 70, positions.LORA + OF_FORCED: 71}
    assert call.refiners == dict(zip(tuple(runner.READ_BY), models.trained.refiners.values(), strict=True))
    assert result["tried"] == {0.3: 0.1}
    if scale == 1:
        assert (of.label, of.changes, tuned) == ("base", None, [(10, 12)])
        assert result["steps"] == 10
    else:
        sizes = {"train_sentences": 48, "eval_sentences": 24, "image_size": 32}
        assert of.label != "base"
        assert of.changes["data"] == sizes, "twice 16"
        assert of.changes["gpt"] == {"batch_size": 8}
        assert of.changes["refiner"]["steps"] == 7
        assert tuned == [(6, 8)]
        assert result["steps"] == 6


# Studies that measure


def test_demonstrations_are_as_many_as_the_cell_says(setup, fitted, scored, monkeypatch):
    """Fewer are the last ones before the query, whose target stays the same."""
    models, sizes = models_with(Backbone()), []
    calls = give(monkeypatch, models, demos)

    def train(config, train, val, codes, device, dtype, seed, make, progress):
        assert config == replace(setup.config["gpt"], **calls[-1].changes["gpt"])
        sizes.append((train.shape[1], val.shape[1]))
        assert torch.equal(train, numbered("train")[:, -train.shape[1] :])
        return Backbone(2.0), {}

    monkeypatch.setattr(train_refiner, "train_backbone", train)
    monkeypatch.setattr(demos, "MOST", 1)
    demos.run(setup, 5, num_demos=1)
    assert not sizes, "the seed's own backbone"
    monkeypatch.setattr(demos, "MOST", 3)
    demos.run(setup, 5, num_demos=0)
    assert sizes == [(2, 2)]
    assert [call.changes["data"] for call in calls] == [
        {"num_demos": K, "palette": "sentence"} for K in (1, 3)
    ]
    assert {call.label for call in calls} == {"demos"}
    assert [call.models.test["tokens"].shape[1] for call in scored] == [4, 2]
    assert all(torch.equal(call.models.test["tokens"][:, -1], numbered("test")[:, -1]) for call in scored)
    assert fitted.keys() == runner.READ_BY.keys()


PLACES = 16


class Repeater(Backbone):
    """Repeats the last token that it has read, and notes what it has read."""

    def __init__(self):
        super().__init__()
        self.started = []

    def generate(self, prompt, length, *_):
        self.started.append(prompt)
        states = torch.zeros(len(prompt), length, 2)
        return Rollout(prompt[:, -1:].expand(-1, length), states, states)


def probed(setup, monkeypatch, tokens, repaired):
    """The result of `probe` for a Repeater; repaired: what (reading, written tokens) is made into."""
    backbone = Repeater()
    models = models_with(backbone, runner.READINGS)._replace(test={"tokens": tokens})
    give(monkeypatch, models, probe)
    refine = lambda setup, models, refiner, rollout: repaired(refiner.name, rollout.tokens)  # noqa: E731
    monkeypatch.setattr(probe, "refine_all", refine)
    return probe.run(setup, 5), backbone.started


def test_a_token_is_forced_into_the_shortest_of_images_too(setup, monkeypatch):
    same = lambda reading, tokens: tokens  # noqa: E731
    result, _ = probed(setup, monkeypatch, torch.arange(8)[:, None, None].repeat(1, IMAGES, 4), same)
    assert result["positions"] == [2]
    with pytest.raises(runtime.UserError, match="--vqgan-factor: 2 tokens an image"):
        probed(setup, monkeypatch, torch.arange(8)[:, None, None].repeat(1, IMAGES, 2), same)


def test_damage_is_behind_the_forced_token_and_before_and_after_refining(setup, monkeypatch):
    """The paper's reading repairs all but two places, ours repairs nothing."""
    number = torch.arange(8)[:, None, None].repeat(1, IMAGES, PLACES)
    number[:, -1, 1] += 20  # all images are alike, but for a place where greedy decoding is wrong anyway

    def repaired(reading, written):
        if reading == OURS:
            return written
        image = number[:6, 0].clone()
        image[:, 13:15] = written[:, 13:15]
        return image

    result, started = probed(setup, monkeypatch, number, repaired)
    assert result["positions"] == [4, 12]
    for i, t in enumerate((4, 12)):
        behind = [float(s >= t) for s in range(PLACES)]
        left = [float(s in (13, 14)) for s in range(PLACES)]
        expected = dict(zip(probe.COLOURS, (behind, left, behind), strict=True))
        for measure in probe.MEASURES:  # all codes are at right angles
            assert {name: rows[i] for name, rows in result[measure]["forced"].items()} == expected
    by_length = {prompt.shape[1] - 3 * PLACES: prompt for prompt in started}
    assert by_length.keys() == {0, 2, 5, 13}, "greedy, behind the natural mistake, behind the forced ones"
    assert all(len(prompt) == 6 for length, prompt in by_length.items() if length > 0), "as configured"
    last = by_length[13]
    assert torch.equal(last[:, : 3 * PLACES + 12], number[:6, 0, :1].expand(-1, 3 * PLACES + 12))
    assert not (last[:, -1] == number[:6, 0, 0]).any(), "the forced token is the last one that is read"


def test_damage_of_a_natural_mistake_is_against_going_on_from_the_true_token(setup, monkeypatch):
    """The truth changes once, and the backbone does not; in the last place it is wrong in any case.

    The paper's reading repairs what stands behind place 7, ours everything.
    """
    changes = torch.tensor([3, 3, 7, 15, 16, 0])  # one of them at the last place, one nowhere
    tokens = torch.arange(6)[:, None, None].repeat(1, IMAGES, PLACES)
    tokens[:, -1] += 20 * (torch.arange(PLACES) >= changes[:, None])
    tokens[changes < 15, -1, 15] += 40
    truth = tokens[:, -1]

    def repaired(reading, written):
        return truth if reading == OURS else torch.where(torch.arange(PLACES) > 7, truth, written)

    result, started = probed(setup, monkeypatch, tokens, repaired)
    assert result["with_a_mistake"] == pytest.approx(5 / 6)
    natural = {name: [] for name in probe.COLOURS}
    for d in range(PLACES // 2):
        there = [t for t in changes.tolist() if t + d < PLACES]
        there = there if d else [t for t in there if t < 16]
        natural["backbone"].append(statistics.fmean(float(t + d < 15 or t == 15) for t in there))
        natural["refined_tokens"].append(statistics.fmean(float(t + d <= 7) for t in there))
        natural[f"refined_{OURS}"].append(0.0)
    behind = {"backbone": (11 + 11 + 7 + 0 + 14) / 5, "refined_tokens": (4 + 4 + 0 + 0 + 7) / 5}
    for measure in probe.MEASURES:
        assert {name: pytest.approx(row) for name, row in natural.items()} == result[measure]["natural"]
        assert result[measure]["natural_behind"] == pytest.approx({**behind, f"refined_{OURS}": 0.0})
    mended = [prompt for prompt in started if prompt.shape[1] == 3 * PLACES + 4 and len(prompt) == 2]
    assert torch.equal(mended[0], tokens[:2].flatten(1)[:, : 3 * PLACES + 4]), "true up to the mistake"


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


def test_tokenizers_are_trained_without_and_with_the_adversarial_loss(setup, monkeypatch):
    monkeypatch.setattr(
        train_refiner,
        "train_tokenizer",
        lambda config, sentences, *_: (config.gan_weight, {"seconds": 1000.0 * config.gan_weight}),
    )
    monkeypatch.setattr(vqgan, "score_tokenizer", lambda model, sentences, split, _: {"made": (model, split)})
    result = adversarial.run(setup, 5)
    assert [result[side]["made"] for side in ("without", "with")] == [(0.0, "val"), (0.5, "val")]
    assert [round(result[side]["seconds"], -2) for side in ("without", "with")] == [0, 500]


# Numbers


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


PLAIN = ("vqgan_limit", "teacher_forced", "ar_greedy", "ar_sampled", "expected_embedding")
RIVALS = (*tuning.TUNED, "wider backbone", *maturity.SAMPLED)
METHODS = tuple(dict.fromkeys([*PLAIN, *rollout.METHODS, *RIVALS]))
METHODS += tuple(f"without {name}" for name in ("none", *TASKS))
FORCED_METHODS = tuple(method + OF_FORCED for method in METHODS if method not in maturity.SAMPLED)
SOME = ("expected_embedding", "parallel", "refined_tokens")
BY_PLACE = "cosine_error_by_position"


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
        cells.append({"cell": {"seed": number}, "device": "cpu", "scores": scores, **more})
    return cells


def gap_of(cell, method, group) -> float:
    def error(name):
        return cell["scores"][name][group]["cosine_error"]

    free = error("ar_greedy")
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


def relative_of(cell, method, group) -> float:
    return error_of(cell, method, group) / error_of(cell, "ar_greedy", group)


def over(cells, measure, *which) -> list:
    return [measure(cell, *which) for cell in cells]


def mean(cells, measure, *which) -> float:
    return statistics.fmean(over(cells, measure, *which))


def row_of(text: str, name: str, number: int = 0) -> list:
    """The numbers in the number-th line of a table that begins with a name."""
    found = [
        line[len(name) :] for line in text.splitlines() if re.match(re.escape(name) + r"(?! - )(\s|$)", line)
    ]
    return [float(x.replace(",", "")) for x in re.findall(r"-?\d[\d,]*\.?\d*", found[number])]


def test_gaps_and_gains_are_of_their_own_method_task_and_seed():
    cells = make_cells()
    for group in GROUPS:
        for method in SOME:
            which = (cells, method, group)
            assert report.gaps(*which) == pytest.approx(over(cells, gap_of, method, group))
            assert report.exposures(*which) == pytest.approx(over(cells, exposure_of, method, group))
            assert report.base_removed(*which) == pytest.approx(over(cells, base_of, method, group))
            gains = over(cells, gain_of, method, group)
            assert report.gained(*which, "psnr") == pytest.approx(gains)
            assert report.relative(*which) == pytest.approx(over(cells, relative_of, method, group))


def accumulating(scale: int, more: dict) -> list:
    """Two cells of 16 places; more: by how much a method is above its error after the true prefix at each."""
    cells = []
    for seed in range(2):
        curves = {}
        for number, (method, part) in enumerate(more.items()):
            forced = torch.linspace(0.1, 0.2 + 0.1 * number, 16)
            curves["teacher_forced" if method == "ar_greedy" else method + OF_FORCED] = forced
            curves[method] = forced + part
        scores = {m: {"all": {"cosine_error_by_position": c.tolist()}} for m, c in curves.items()}
        cells.append({"cell": {"seed": seed, "scale": scale}, "scores": scores})
    return cells


def test_what_accumulates_is_the_error_beyond_that_after_the_true_prefix(monkeypatch):
    rising = 0.01 * torch.arange(16)
    more = {"ar_greedy": rising, "refined_tokens": 0 * rising, "parallel": -rising}
    more |= {f"refined_{OURS}": rising * (torch.arange(16) < 10), positions.LORA: 0.5 * rising}
    cells = accumulating(1, more)
    for method, part in more.items():
        found = positions.accumulated(cells, method, "all")
        assert torch.allclose(found, part.expand(2, 16), atol=1e-6), method
    thirds = [sum(range(5)), sum(range(5, 10)), sum(range(10, 16)), sum(range(10, 16))]
    shares = [1.0, *(part / 120 for part in thirds)]

    def measures(cells, rows, differences):
        return f"measures of scale {cells[0]['cell']['scale']}: {' '.join(rows)}"

    monkeypatch.setattr(report, "measures_table", measures)
    monkeypatch.setattr(
        report, "backbone_line", lambda cells: f"backbone of scale {cells[0]['cell']['scale']}"
    )
    text = positions.show([*accumulating(2, {**more, "ar_greedy": 2 * rising}), *cells])
    expected = {"ar_greedy": shares, positions.LORA: [x / 2 for x in shares], "refined_tokens": [0.0] * 5}
    expected |= {f"refined_{OURS}": [45 / 120, 10 / 120, 35 / 120, 0.0, 0.0]}
    for method, row in expected.items():
        assert row_of(text, method)[::3] == pytest.approx(row, abs=0.006), method
        halved = row if method == "ar_greedy" else [x / 2 for x in row]
        assert row_of(text, method, 1)[::3] == pytest.approx(halved, abs=0.006), "of its own scale"
    assert "from 10 on" in text
    for scale in (1, 2):
        measured = f"measures of scale {scale}: {' '.join(positions.ROWS[1:])}"
        assert f"16 tokens: backbone of scale {scale}\n{measured}\n" in f"{text}\n"


# Tables


def measures_of(cells, method, group) -> list:
    """The numbers of a row of a table of measures: means with their intervals."""
    columns = [over(cells, gap_of, method, group)]
    if method + OF_FORCED in cells[0]["scores"]:
        columns += [over(cells, measure, method, group) for measure in (exposure_of, base_of)]
    columns += [over(cells, gain_of, method, group, measure) for measure in ("token_accuracy", "psnr")]
    return [x for values in columns for x in (statistics.fmean(values), *report.t_interval(values))]


def interval_of(cells, measure, *which) -> list:
    values = over(cells, measure, *which)
    return [statistics.fmean(values), *report.t_interval(values)]


def test_rows_of_a_table_of_measures_are_of_the_method_and_the_group():
    cells, methods = make_cells(), (*SOME, *RIVALS)
    text = report.measures_table(cells, methods, GROUPS)
    for number, group in enumerate(GROUPS):
        for method in methods:
            row = measures_of(cells, method, group)
            assert row_of(text, method, number) == pytest.approx(row, abs=0.006), method


def test_what_needs_a_teacher_forced_row_is_blank_without_one():
    cells, text = make_cells(), report.measures_table(make_cells(), ("parallel", "likeliest of n"))
    head, parallel, rival = text.splitlines()[-3:]
    ends = [head.index(name) + len(name) for name in report.MEASURES]
    known = {name: [line[:end][-26:].strip() for end in ends] for name, line in ((0, parallel), (1, rival))}
    assert all(known[0])
    assert known[1][1:3] == ["", ""]
    assert known[1][0] == report.estimate(report.gaps(cells, "likeliest of n", "all"))
    assert known[1][4] == report.estimate(over(cells, gain_of, "likeliest of n", "all"))


def test_a_difference_is_taken_within_a_seed():
    """Its interval is that of the seeds' differences: here the same one in each, whatever the seeds are."""
    cells = make_cells()
    for cell in cells:
        for name in ("", OF_FORCED):
            greedy, forced = (
                cell["scores"][row]["all"]["cosine_error"] for row in ("ar_greedy", "teacher_forced")
            )
            for method, part in (("refined_tokens", 0.25), ("parallel", 0.75)):
                cell["scores"][method + name]["all"]["cosine_error"] = greedy - part * (greedy - forced)
    pairs = [("parallel", "refined_tokens"), ("refined_tokens", "parallel"), ("parallel", "likeliest of n")]
    text = report.measures_table(cells, ("parallel",), GROUPS, pairs)
    assert row_of(text, "parallel - refined_tokens")[:6] == [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]
    assert row_of(text, "refined_tokens - parallel")[:3] == [-0.5, -0.5, -0.5]
    gains = [over(cells, gain_of, method, "all", "psnr") for method in pairs[0]]
    apart = [a - b for a, b in zip(*gains, strict=True)]
    expected = [statistics.fmean(apart), *report.t_interval(apart)]
    assert row_of(text, "parallel - refined_tokens")[-3:] == pytest.approx(expected, abs=0.006)
    assert len(row_of(text, "parallel - likeliest of n")) == 9, "no exposure of what writes no second image"


def test_the_line_of_a_backbone_is_of_its_own_decoding():
    cells = make_cells()
    numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", report.backbone_line(cells))]
    expected = []
    for method in ("teacher_forced", "ar_greedy"):
        expected += [cell["scores"][method]["all"]["cosine_error"] for cell in cells]
        expected += interval_of(cells, error_of, method, "all", "token_accuracy")
    assert numbers == pytest.approx(expected, abs=6e-4)


def make_cost(cells, names=SOME) -> list:
    """Cells with the costs of some settings."""
    for number, cell in enumerate(cells):
        values = {"seconds": [5.0, 70.0, 9.0][number], "train_loss": 0.1 + number, "val_loss": 0.5 + number}
        cell["cost"] = {
            name: {"params": 1000 * i, **{key: i * value for key, value in values.items()}}
            for i, name in enumerate(names, 1)
        }
        cell["backbone_params"] = 10_000
    return cells


def test_costs_of_settings_are_medians_and_means_of_the_setting_in_front_of_them():
    cells = make_cost(make_cells())
    text = report.settings_table(cells)
    for i, name in enumerate(cells[0]["cost"], 1):
        assert row_of(text, name) == pytest.approx(measures_of(cells, name, "all"), abs=0.006)
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
    for number, cells in enumerate(groups.values()):
        for method in ("teacher_forced", "ar_greedy"):
            measure = "token_accuracy"
            row = [x for group in GROUPS for x in interval_of(cells, error_of, method, group, measure)]
            assert row_of(text, f"{method}, right", number) == pytest.approx(row, abs=6e-4)
        for method in runner.READ_BY:
            for place, group in enumerate(("all", "colorize")):  # the task that needs the palette
                row = measures_of(cells, method, group)
                assert row_of(text, method, 2 * number + place) == pytest.approx(row, abs=0.006)
    assert [line[:5] for line in text.splitlines() if line.startswith("K = ")] == ["K = 1", "K = 2", "K = 3"]

    groups = settings_cells("backbone", ("gpt", "gru"))
    text = backbones.show(mixed(groups))
    for number, (name, cells) in enumerate(groups.items()):
        assert f"{name}, {number + 1}.00 M parameters: {report.backbone_line(cells)}\n" in text
        for method in runner.READ_BY:
            row = measures_of(cells, method, "all")
            assert row_of(text, method, number) == pytest.approx(row, abs=0.006)

    groups = settings_cells("steps", (700, 11200))
    for number, (steps, cells) in enumerate(groups.items()):
        for cell in cells:
            cell |= {
                "budget": {"a": number + 5, "b": 3},
                "tried": {"LoRA": {"0.1": 0.5 + number, "0.033333": 0.7}},
                "seconds": {"pretraining": 1000.0 * (number + 1), "a": 2.0},
                "device": "cpu",
                "rollout_error": {"train": 0.5 + number, "val": 0.25},
            }
            if cell is cells[-1]:  # on another device, with a rate that the others did not need
                cell |= {"device": "cuda", "seconds": {"pretraining": 9.0, "a": 1.0}}
                cell["tried"] = {"LoRA": {**cell["tried"]["LoRA"], "0.9": 0.4}}
            if steps == 11200:
                cell["scores"] = {m: s for m, s in cell["scores"].items() if m != "wider backbone"}
    text = maturity.show(mixed(groups))
    for number, (steps, cells) in enumerate(groups.items()):
        assert f"{steps:,} steps: {report.backbone_line(cells)}\n" in text
        errors = (
            rf"error of .* from {', '.join(len(cells) * [f'{0.5 + number:.4f}'])}; of validation 0.2500, "
        )
        steps_of = rf"steps of rivals: a {number + 5}, b 3\n"
        steps_of += rf"seconds, cpu: pretraining {number + 1},000, a 2\nseconds, cuda: pretraining 9, a 1\n"
        found = ["0.033: 0.7000, 0.7000, 0.7000", f"0.1: {', '.join(3 * [f'{0.5 + number:.4f}'])}"]
        found.append("0.9: -, -, 0.4000")
        assert re.search(rf"{errors}.*\nvalidation errors, LoRA: {'; '.join(found)}\n{steps_of}", text)
        for method in maturity.METHODS:
            if method != "wider backbone" or steps == 700:
                row = measures_of(cells, method, "all")
                assert row_of(text, method, number) == pytest.approx(row, abs=0.006)
    assert len(re.findall("^wider backbone", text, re.MULTILINE)) == 1, "there is none that is so mature"


def test_other_tables_name_whose_each_number_is():
    cells = make_cells()
    for number, cell in enumerate(cells):
        cell["other"] = make_cells(10 + number, 1)[0]
    text, other = generalize.show(cells), [cell["other"] for cell in cells]
    for name in ("without none", *(f"without {task}" for task in TASKS)):
        for number, group in enumerate(GROUPS):
            row = measures_of(cells, name, group)
            assert row_of(text, name, number) == pytest.approx(row, abs=0.006)
    for name in ("expected_embedding", *runner.READ_BY):
        assert row_of(text, name) == pytest.approx(measures_of(other, name, "all"), abs=0.006)

    cells = make_cost(make_cells())
    for number, cell in enumerate(cells):
        cell["share"] = {name: 0.01 * i * (1, 50, 3)[number] for i, name in enumerate(SOME, 1)}
    text = size.show(cells)
    for i, name in enumerate(SOME, 1):
        assert row_of(text, name, 1)[0] == 1000 * i
        assert row_of(text, name, 2) == [3.0 * i], "the median over the seeds, in percent"


def test_what_is_right_is_counted_among_what_greedy_decoding_gets_right_or_wrong():
    ours = evaluate.method_name(OURS)
    counts = {"colorize": [[[1, 2], [4, 3]], [[5, 6], [9, 10]]]}
    counts |= {"inpaint": [[[0, 1], [1, 0]], [[0, 0], [0, 0]]], "edges": [[[8, 0], [0, 0]], [[0, 4], [6, 0]]]}
    even = {t: [[[1, 1], [1, 1]]] * 2 for t in TASKS}
    methods = (*runner.READ_BY, *rollout.WITH_CROSS_ENTROPY)
    cells = make_cells(agreement={**dict.fromkeys(methods, even), ours: counts})
    for cell in cells[1:]:
        cell["agreement"] = dict.fromkeys(methods, even)
    assert rollout.right_alone(cells[0], False) == pytest.approx((5 / 20, 3 / 20))
    assert rollout.right_alone(cells[0], True) == pytest.approx((15 / 40, 10 / 40))
    assert rollout.right_of(cells[0], ours, False) == pytest.approx(8 / 20)
    assert rollout.right_of(cells[0], ours, True) == pytest.approx(25 / 40)
    text = rollout.show(cells)
    expected = {
        f"{ours}: right, and parallel wrong": (15 / 40, 5 / 20, 0.25),
        f"parallel: right, and {ours} wrong": (10 / 40, 3 / 20, 0.25),
        f"{ours}: right": (25 / 40, 8 / 20, 0.5),
        f"{methods[-1]}: right": (0.5, 0.5, 0.5),
    }
    for name, (right, wrong, other) in expected.items():
        numbers = row_of(text, name)
        means = (right + 2 * other) / 3, (wrong + 2 * other) / 3
        assert (numbers[0], numbers[3]) == pytest.approx(means, abs=6e-4)


def test_rows_of_a_probe_are_of_its_kind_of_mistake_and_its_refiner():
    damage = {"backbone": [[0.0, 1.0, 3.0, 2.0], [0.0, 0.0, 1.0, 4.0]]}
    damage["refined_tokens"] = [[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.1, 3.0]]
    damage[f"refined_{OURS}"] = [[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0]]
    halved = {who: [[0.5 * x for x in row] for row in rows] for who, rows in damage.items()}
    natural = {"backbone": 2.0, "refined_tokens": 1.0, f"refined_{OURS}": 0.5}
    tenth = {who: [[0.1 * x for x in row] for row in rows] for who, rows in damage.items()}
    cells = [
        {
            "positions": [1, 2], "with_a_mistake": x,
            "cosine error": {"forced": part, "natural_behind": natural},
            "wrong tokens": {"forced": tenth, "natural_behind": {who: 7 * y for who, y in natural.items()}},
        }
        for part, x in ((damage, 0.5), (halved, 0.7))
    ]  # fmt: skip
    text = probe.show(cells)
    assert row_of(text, "natural, the first one", 1)[::3] == pytest.approx([14.0, 0.5, 0.75], abs=0.006)
    assert row_of(text, "forced at 1", 1)[:3] == pytest.approx(
        [0.5, *report.t_interval([0.5, 0.5])], abs=0.006
    )
    rows = {"natural, the first one": [2.0, 2.0, 0.5, 0.75]}
    rows |= {"forced at 1": [5.0, 2.5, 0.9, 0.2], "forced at 2": [4.0, 2.0, 0.25, 0.75]}
    for name, row in rows.items():
        found = row_of(text, name)
        assert [*found[:2], *found[2::3]] == pytest.approx(row, abs=0.006), name
    assert "sentences with a mistake: 0.60 (" in text


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


def test_bars_are_of_what_is_written_beside_them(figures):
    groups = settings_cells("backbone", ("gpt", "gru"))
    backbones.plot("path", mixed(groups))
    axes = figures[-1].axes
    for axis, (measure, *more) in zip(
        axes, ((gap_of,), (gain_of, "token_accuracy"), (gain_of,)), strict=True
    ):
        expected = {
            f"{name}: {method}": mean(part, measure, method, "all", *more)
            for name, part in groups.items()
            for method in runner.READ_BY
        }
        found = bars_of(axis)
        assert list(found.values()) == pytest.approx(list(expected.values()))
        if axis is axes[0]:
            assert found == pytest.approx(expected)

    cells = make_cells()
    for number, cell in enumerate(cells):
        cell["other"] = make_cells(20 + number, 1)[0]
    generalize.plot("path", cells)
    tasks, dataset = figures[-1].axes
    expected = {}
    for task in TASKS:
        expected[f"{task}: trained with it"] = mean(cells, relative_of, "without none", task)
        expected[f"{task}: without it"] = mean(cells, relative_of, f"without {task}", task)
    assert bars_of(tasks) == pytest.approx(expected)
    other = [cell["other"] for cell in cells]
    rows = ("teacher_forced", "expected_embedding", *runner.READ_BY)
    expected = {method: mean(other, relative_of, method, "all") for method in rows}
    assert bars_of(dataset) == pytest.approx(expected)

    cells = [{side: {"psnr": 10.0 * i, "seconds": i} for i, side in enumerate(("without", "with"), 1)}]
    adversarial.plot("path", cells)
    found = {axis.get_xlabel(): bars_of(axis) for axis in figures[-1].axes}
    assert found == {"psnr": {"without": 10, "with": 20}, "seconds": {"without": 1, "with": 2}}


def test_samples_have_the_labels_of_their_rows(figures, monkeypatch, tmp_path):
    """Two that were coherent and one that was not; a seed without samples has no picture of them."""
    drawn, size = [], 4
    monkeypatch.setattr(data, "save_picture", lambda path, rows, labels, titles: drawn.append((rows, labels)))
    cells = [{"scores": {name: dict.fromkeys(choice.MEASURES, 0.5) for name in ("sampled", "truth")}}]
    choice.plot(tmp_path / "choice.png", cells)
    assert not drawn
    picture = choice.png_text(torch.rand(3, 3 * size, size * (len(choice.SHOWN) + 2)))
    choice.plot(tmp_path / "choice.png", [{**cells[0], "samples": picture, "coherent_samples": 2}])
    ((rows, labels),) = drawn
    assert labels == ["coherent", "coherent", "incoherent"]
    assert [len(row) for row in rows] == 3 * [len(choice.SHOWN) + 2]


def test_stacked_bars_are_the_base_and_what_is_left_of_exposure(figures, monkeypatch):
    cells = make_cells()
    monkeypatch.setattr(rollout, "METHODS", SOME[:2])
    rollout.plot("path", cells)
    rows = {"ar_greedy": "teacher_forced", **{method: method + OF_FORCED for method in SOME[:2]}}
    for axis, group in zip(figures[0].axes, GROUPS, strict=True):

        def part(name, group=group):
            return mean(cells, relative_of, name, group)

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
            assert y == pytest.approx(
                [mean(cells, error_of, method, group, "token_accuracy") for cells in groups.values()]
            )
        assert curves_of(axis).keys() == {"teacher_forced", "ar_greedy", *runner.READ_BY}

    groups = settings_cells("steps", (700, 2800))
    for cell in groups[2800]:
        cell["scores"] = {m: s for m, s in cell["scores"].items() if m != "wider backbone"}
    maturity.plot("path", mixed(groups))
    measures = ((gap_of,), (gain_of, "token_accuracy"), (gain_of,))
    for axis, (measure, *more) in zip(figures[-1].axes, measures, strict=True):
        curves = curves_of(axis)
        assert curves.keys() == {*runner.READ_BY, *maturity.TUNED, "wider backbone", "likeliest of n"}
        assert curves.pop("wider backbone")[0] == [700]
        for method, (x, y) in curves.items():
            assert x == [700, 2800]
            means = [mean(cells, measure, method, "all", *more) for cells in groups.values()]
            assert y == pytest.approx(means), method

    settings = {
        "tokens, 256 rollouts": "refined_tokens", "tokens, 1,300 rollouts": "parallel",
        "tokens, 10 steps": "expected_embedding", "tokens, 20 steps": "without none",
        "tokens+query, 256 rollouts": "without edges", "tokens+query, 1,300 rollouts": "without inpaint",
        "tokens+query, 10 steps": "likeliest of n", "tokens+query, 20 steps": "wider backbone",
    }  # fmt: skip
    cells = make_cells()
    for cell in cells:
        cell["scores"] |= {name: cell["scores"][method] for name, method in settings.items()}
        cell |= {"cost": {name: {"params": 100} for name in settings}, "steps": 41}
    data_study.plot("path", cells)
    names, axes = list(settings), figures[-1].axes
    for number, reading in enumerate(runner.READINGS):
        few, many, short, long = names[4 * number : 4 * number + 4]
        places = {few: 256, many: 1300}, {short: 10, long: 20, many: 41}
        for axis, expected in zip(axes, places, strict=True):
            x, y = curves_of(axis)[f"reads {reading}"]
            assert dict(zip(x, y, strict=True)) == pytest.approx(
                {place: mean(cells, gap_of, name, "all") for name, place in expected.items()}
            )

    settings = dict(zip(("tokens, 1 x 8", "tokens, 3 x 8", "tokens+query, 1 x 8"), SOME, strict=True))
    cells = make_cells()
    for cell in cells:
        cell["scores"] |= {name: cell["scores"][method] for name, method in settings.items()}
    size.plot("path", make_cost(cells, settings))
    for axis, reading in zip(figures[-1].axes, runner.READINGS, strict=True):
        expected = {}
        for i, name in enumerate(settings, 1):
            if name.startswith(f"{reading}, "):
                expected[name.split(", ")[1]] = (i / 10, mean(cells, gap_of, name, "all"))
        found = {text.get_text(): text.xy for text in axis.texts}
        assert found == {name: pytest.approx(place) for name, place in expected.items()}
        places = [(c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in axis.containers]
        assert places == [pytest.approx(place) for place in expected.values()]

    groups = settings_cells("scale", (1, 2))
    positions.plot("path", mixed(groups))
    axes = iter(figures[-1].axes)
    for cells in groups.values():
        for beyond, group in ((False, "all"), *((True, group) for group in GROUPS)):
            lines = {
                line.get_label(): line.get_ydata() for line in next(axes).lines if line.get_label()[0] != "_"
            }
            assert lines.keys() == {*positions.ROWS, *(() if beyond else ("teacher_forced",))}
            for method, y in lines.items():
                by_place = zip(*(error_of(c, method, group, BY_PLACE) for c in cells), strict=True)
                expected = torch.tensor([statistics.fmean(values) for values in by_place])
                if beyond:
                    name = "teacher_forced" if method == "ar_greedy" else method + OF_FORCED
                    forced = [error_of(c, name, group, BY_PLACE) for c in cells]
                    expected = expected - torch.tensor(forced).mean(0)
                assert torch.allclose(torch.as_tensor(y).float(), expected, atol=1e-5)

    forced = {name: [[0.0, 1.0, 3.0 + i, 2.0]] for i, name in enumerate(probe.COLOURS)}
    natural = {name: [1.0, 0.5 * i] for i, name in enumerate(probe.COLOURS)}
    few = {"forced": {name: [[0.0, 0.0, 0.5, 0.0]] for name in probe.COLOURS}, "natural": natural}
    measures = {"cosine error": {"forced": forced, "natural": natural}, "wrong tokens": few}
    probe.plot("path", [{"positions": [1], **measures}])
    drawn = [
        {line.get_label(): list(line.get_ydata()) for line in axis.lines if line.get_label()[0] != "_"}
        for axis in figures[-1].axes
    ]
    sums = {name: [5 + i] for i, name in enumerate(probe.COLOURS)}
    assert drawn == [sums, natural, {name: [0.5] for name in probe.COLOURS}, natural]
