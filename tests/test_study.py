"""The studies: the real command with tiny settings, its statistics, and the backbones that are not ours."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import study
import vsr

V, N, IMAGES = 11, 6, 4
TINY = [
    *("--preset", "smoke", "--seeds", "2", "--device", "cpu", "--dtype", "float32", "--image-size", "16"),
    *("--train-sentences", "64", "--eval-sentences", "24", "--vqgan-steps", "20", "--vqgan-channels", "16"),
    *("--gpt-steps", "10", "--gpt-width", "32", "--refiner-rollouts", "64", "--refiner-steps", "12", "--refiner-width", "32"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All studies, run once by the real command: the folder of results, and the flags."""
    folder = tmp_path_factory.mktemp("study")
    flags = [*TINY, "--out", str(folder / "results"), "--work", str(folder / "work")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["study.py", "all", *flags])
        study.main()
    return folder / "results", flags


def result_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_every_study_writes_a_picture_and_a_table_from_all_its_cells(finished):
    folder, _ = finished
    for name, parts in study.STUDIES.items():
        assert (folder / f"{name}.png").stat().st_size > 5000
        result = result_of(folder, name)
        assert len(result["table"]) > 2
        assert len(result["cells"]) == (0 if name == "positions" else 2 * len(parts.settings))


def test_main_holds_every_method_and_control(finished):
    result = result_of(finished[0], "main")
    for cell in result["cells"]:
        assert cell["scores"].keys() == set(study.MAIN_ROWS)
        for method, errors in cell["by_sentence"].items():
            assert len(errors) == 24
            assert sum(errors) / 24 == pytest.approx(cell["scores"][method]["all"]["cosine_error"], abs=1e-4)
            assert -1 <= cell["scores"][method]["all"]["ssim"] <= 1
    cost = cell["cost"]
    assert cost["no_attention"]["params"] < cost["refined_hidden"]["params"] < cost["refined_context"]["params"]
    assert cost["longer_backbone"]["params"] == cell["backbone_params"]
    low, high = result["intervals"]["ar_greedy - refined_hidden"]["all"][1:]
    assert low <= result["intervals"]["ar_greedy - refined_hidden"]["all"][0] <= high


def test_an_interrupted_study_goes_on_with_the_missing_cells(finished, command, tmp_path, monkeypatch):
    folder, flags = finished
    whole = result_of(folder, "probe")
    kept = {**whole, "cells": whole["cells"][:1]}
    out = tmp_path / "results"
    data.save_json(out / "probe.json", kept)
    ran, run = [], study.run_probe
    monkeypatch.setitem(
        study.STUDIES, "probe", study.STUDIES["probe"]._replace(run=lambda lab, **cell: ran.append(cell) or run(lab, **cell))
    )
    result = command(study, "probe", *flags, "--out", out)
    assert result.status == 0, result.err
    assert ran == [{"seed": 1}]
    assert result_of(out, "probe")["cells"] == whole["cells"], "and the same seed gives the same numbers"
    command(study, "probe", *flags, "--out", out)
    assert len(ran) == 1, "nothing is left to do"


def test_a_cell_that_was_killed_goes_on_within_its_trainings(finished, tmp_path):
    """Killed in the fourth of the five refiners of a cell of `loss`: nothing of the first three is trained again."""
    flags = [*TINY, "--seeds", "1", "--study-steps", "100", "--out", tmp_path / "results"]

    def start(work):
        command = [sys.executable, Path(study.__file__), "loss", *flags, "--work", work]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    run = start(tmp_path / "killed")
    kept = tmp_path / "killed" / "unfinished-loss-0"
    while run.poll() is None and not (kept / "cross-entropy.progress").is_file():
        time.sleep(0.02)
    assert run.poll() is None, run.communicate()
    run.kill()
    run.communicate()
    before = {path.name: path.read_bytes() for path in kept.iterdir() if path.suffix == ".progress"}
    assert before.keys() >= {"cosine.progress", "squared error.progress", "cross-entropy.progress"}
    run = start(tmp_path / "killed")
    while run.poll() is None and not (kept / "cosine + cross-entropy.progress").is_file():
        time.sleep(0.02)
    assert all((kept / name).read_bytes() == before[name] for name in before)
    assert run.wait() == 0
    (resumed,) = result_of(tmp_path / "results", "loss")["cells"]
    (tmp_path / "results" / "loss.json").unlink()
    assert start(tmp_path / "whole").wait() == 0
    (whole,) = result_of(tmp_path / "results", "loss")["cells"]
    assert resumed["by_sentence"] == whole["by_sentence"]
    assert not list(tmp_path.glob("*/unfinished-*"))


@pytest.mark.parametrize("name", ["passes", "probe"])
def test_a_study_alone_trains_what_it_needs(command, tmp_path, name):
    flags = [*TINY, "--seeds", "1", "--out", tmp_path / "results", "--work", tmp_path / "work"]
    assert command(study, name, *flags).status == 0
    assert len(result_of(tmp_path / "results", name)["cells"]) == 1


def test_operations_are_those_that_torch_counts():
    gpt = vsr.GPT(vsr.GPTConfig(layers=2, heads=2, width=16), V, N, IMAGES)
    with FlopCounterMode(display=False) as counter:
        study.textbook(gpt)(torch.randint(V, (3, N * IMAGES))).sum().backward()
    assert counter.get_total_flops() == pytest.approx(3 * N * IMAGES * study.flops_per_token(gpt))


def test_results_of_another_configuration_are_refused(finished, command):
    folder, flags = finished
    before = (folder / "main.json").read_bytes()
    result = command(study, "main", *flags, "--gpt-steps", "21")
    assert (result.status, len(result.err)) == (2, 1)
    assert "gpt.steps = 10, now 21" in result.err[0]
    assert (folder / "main.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["nothing"], "nothing"),
        ([], "STUDY"),
        (["main", "--seeds", "0"], "--seeds 0"),
        (["positions"], "study.py main"),
        (["main", "--preset", "large"], "large"),
        (["main", "--study-lora-rank", "many"], "many"),
    ],
)
def test_a_mistake_gets_one_line(command, tmp_path, flags, named):
    result = command(study, *flags, "--out", tmp_path / "results", "--work", tmp_path / "work")
    assert (result.status, len(result.err)) == (2, 1)
    assert named in result.err[0]


def test_a_file_that_is_no_result_is_named(command, tmp_path):
    (tmp_path / "main.json").write_text("{}")
    result = command(study, "main", "--preset", "smoke", "--out", tmp_path, "--work", tmp_path / "work")
    assert (result.status, len(result.err)) == (2, 1)
    assert "main.json" in result.err[0]


# Statistics


def test_interval_covers_the_true_mean_19_times_in_20():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(200):
        low, high = study.interval(torch.randn(100, generator=generator) + 3)
        inside += low <= 3 <= high
    assert 180 <= inside <= 199
    assert study.interval(torch.zeros(50)) == (0, 0)


def test_interval_narrows_with_the_square_root_of_the_sentences():
    values = torch.randn(6400, generator=torch.Generator().manual_seed(0))
    narrow, wide = study.interval(values), study.interval(values[:400])
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(4, rel=0.25)


def test_mean_sd():
    assert study.mean_sd([1.0, 3.0]) == "2.000 ± 1.414"
    assert study.mean_sd([0.5]) == "0.500 ± 0.000"


def test_attention_share():
    def at(error):
        return {"all": {"cosine_error": error}}

    scores = {"ar_greedy": at(0.5), "ar_sampled": at(0.6), "teacher_forced": at(0.1)}
    cell = {"scores": {**scores, "refined_hidden": at(0.1), "no_attention": at(0.4)}}
    assert study.gap_of(cell, "refined_hidden", "all") == pytest.approx(1)
    assert study.attention_share(cell, "refined_hidden", "no_attention") == pytest.approx(0.75)


# Backbones


def make_backbone(make):
    model = make(vsr.GPTConfig(layers=2, heads=2, width=16), V, N, IMAGES).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("make", [study.Llama, study.Recurrent])
def test_a_token_changes_later_logits_only(make):
    model, tokens = make_backbone(make), torch.randint(V, (2, IMAGES * N))
    before = model(tokens)
    for position in random.Random(0).sample(range(IMAGES * N - 1), 5):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % V
        same = torch.isclose(before, model(changed), atol=1e-5).all(-1).all(0)
        assert same[: position + 1].all()
        assert not same[position + 1 :].all()


@pytest.mark.parametrize("make", [study.Llama, study.Recurrent])
def test_generation_is_what_reading_its_tokens_predicts(make):
    model, prompt = make_backbone(make), torch.randint(V, (3, (IMAGES - 1) * N))
    rollout = model.generate(prompt, N)
    again = model.read(prompt, rollout.tokens)
    for name in ("hidden", "context"):
        assert torch.allclose(getattr(rollout, name), getattr(again, name), atol=1e-4)
    assert torch.equal(model.logits(again.hidden).argmax(-1), rollout.tokens)


def test_rotary_attention_sees_distances_not_positions():
    """With the same tokens over and over, every position of a LLaMA without other marks sees the same past."""
    model = make_backbone(study.Llama)
    turn = torch.polar(torch.ones(()), torch.arange(8.0)[:, None] * 10000 ** (-torch.arange(16) / 16))
    x = torch.randn(1, 8, 16)
    block = model.blocks[0]
    shifted = turn * turn[3]  # all positions 3 further on
    assert torch.allclose(block(x, turn, None, 0), block(x, shifted, None, 0), atol=1e-5)


# Controls


def test_best_of_n_is_the_likeliest_sample(finished, tmp_path):
    """With one more sample the chosen one can only become likelier."""
    lab, bench = tiny_bench(tmp_path)
    prompt = bench.test["tokens"][:, :-1].flatten(1).long()

    def likelihood(tokens):
        states = bench.trained.backbone.read(prompt, tokens.long()).hidden
        return bench.trained.backbone.logits(states).log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(1)

    few, more = (likelihood(study.best_of_n(lab, bench, n, seed=0)) for n in (1, 6))
    assert (more >= few - 1e-3).all()
    assert (more > few + 1e-3).any()


def tiny_bench(tmp_path):
    config = {
        "data": data.DataConfig(train_sentences=64, eval_sentences=16),
        "vqgan": study.vqgan.VQGANConfig(channels=16, steps=5),
        "gpt": vsr.GPTConfig(layers=1, width=16, steps=5),
        "refiner": vsr.RefinerConfig(layers=1, heads=2, width=16, rollouts=64, steps=3),
        "study": study.StudyConfig(**study.SMOKE),
    }
    lab = study.Lab(config, tmp_path, tmp_path, torch.device("cpu"), torch.float32)
    return lab, study.bench(lab, 0)


def test_lora_and_a_longer_backbone_leave_the_frozen_one_alone(tmp_path):
    lab, bench = tiny_bench(tmp_path)
    before = {name: value.clone() for name, value in bench.trained.backbone.state_dict().items()}
    for tune in (study.lora, study.longer_backbone):
        tuned, params, val_loss, seconds = tune(lab, bench, 0)
        assert params > 0
        assert val_loss > 0
        assert seconds > 0
        assert tuned.state_dict().keys() == before.keys()
        assert any(not torch.equal(tuned.state_dict()[name], value) for name, value in before.items())
        assert not any(p.requires_grad for p in tuned.parameters())
    for name, value in bench.trained.backbone.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("make", [study.Absolute, study.Unnormalised])
def test_variants_of_the_refiner(make):
    refiner = make(vsr.RefinerConfig(layers=1, heads=2, width=16, dropout=0.0), "tokens", (2, 3), 5).eval()
    embeddings = torch.nn.functional.normalize(torch.randn(2, 6, 5), dim=-1)
    refined = refiner(embeddings)
    if make is study.Unnormalised:  # the residual, and the length that it gets
        assert torch.allclose(refined, embeddings)
    else:
        assert not torch.allclose(refined, embeddings, atol=0.1)
        assert torch.allclose(refined.norm(dim=-1), torch.ones(2, 6), atol=1e-5)
