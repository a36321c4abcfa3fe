"""The studies: the real command with tiny settings, its statistics, and the backbones that are not ours."""

import functools
import json
import math
import random
import statistics
import types

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import data
import runtime
import train_refiner
import vsr
from studies import __main__ as studies
from studies import (
    backbones,
    choice,
    decoding,
    demos,
    gpt2,
    hues,
    maturity,
    positions,
    probe,
    report,
    rollout,
    runner,
    speed,
    stages,
    window,
)
from studies.textbook import TextbookGPT

V, N, IMAGES = 11, 6, 4
TINY = [
    *("--preset", "smoke", "--seeds", "1", "--device", "cpu", "--dtype", "float32", "--image-size", "16"),
    *("--train-sentences", "64", "--eval-sentences", "24", "--vqgan-steps", "20", "--vqgan-channels", "16"),
    *("--vqgan-batch-size", "16", "--vqgan-revive-every", "4", "--gpt-steps", "8", "--gpt-layers", "1"),
    *("--gpt-width", "32", "--gpt-batch-size", "8", "--refiner-rollouts", "64", "--refiner-steps", "4"),
    *("--refiner-heads", "4", "--refiner-width", "16", "--refiner-batch-size", "16", "--study-steps", "4"),
]


@pytest.fixture(scope="module", autouse=True)
def plain_pictures():
    """To fit the parts of a picture takes most of its time, and nobody looks at these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "Figure", lambda layout, dpi, **options: Figure(dpi=50, **options))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All studies, run once by the real command: folders of results and models, flags, and a `Setup`."""
    folder = tmp_path_factory.mktemp("studies")
    out, work = folder / "results", folder / "work"
    flags = [*TINY, "--out", str(out), "--work", str(work)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demos, "SETTINGS", demos.SETTINGS[:2])
        patch.setattr(maturity, "SETTINGS", [{"steps": 4}])
        patch.setattr(maturity, "TEMPERATURES", (0.5, 1.0))
        patch.setattr(positions, "LARGER", {**positions.LARGER, "vqgan": {"steps": 4, "batch_size": 8}})
        patch.setattr(stages, "PRODUCT", 256)
        for name, few in {"TEMPERATURES": (0.5, 1.0), "TOP_P": (1.0,), "WIDTHS": (2,)}.items():
            patch.setattr(decoding, name, few)
        patch.setattr(window, "RADII", (1, None))
        patch.setattr(window, "NAMES", [window.name_of(r, s) for s in window.STARTS for r in (1, None)])
        small = {name: (make, {"width": 24}) for name, (make, _) in backbones.BACKBONES.items()}
        patch.setattr(backbones, "BACKBONES", {**small, "gpt": backbones.BACKBONES["gpt"]})
        patch.setattr("sys.argv", ["studies", "all", *flags])
        studies.main()
        _, config = studies.parse_arguments()
    setup = runner.Setup(config, work, folder / "unfinished", torch.device("cpu"), torch.float32)
    return types.SimpleNamespace(out=out, work=work, flags=flags, setup=setup)


def result_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


# The command


def test_every_study_writes_a_picture_and_a_table_of_all_its_cells(finished):
    for name, study in studies.STUDIES.items():
        result = result_of(finished.out, name)
        assert (finished.out / f"{name}.png").stat().st_size > 5000
        assert len(result["table"]) > 2
        assert len(result["cells"]) == {"demos": 2, "maturity": 1}.get(name, len(study.SETTINGS))
        assert {cell["device"] for cell in result["cells"]} == {"cpu"}


def test_every_study_says_what_it_asks():
    for name, study in studies.STUDIES.items():
        text = " ".join(study.__doc__.split())
        assert "?" in text[:110], f"{name}: the question comes first"
        assert "First edition: " in text or "before it was run" in text
        assert study.MINUTES > 0


def test_positions_are_those_of_short_and_of_long_images(finished):
    """Twice the side has four times the tokens, and the curves of all methods are that long."""
    cells, lengths = result_of(finished.out, "positions")["cells"], []
    for cell in cells:
        scores = {method: cell["scores"][method]["all"] for method in ("teacher_forced", *positions.ROWS)}
        lengths += {len(score["cosine_error_by_position"]) for score in scores.values()}
        for score in scores.values():
            assert sum(score["cosine_error_by_position"]) == pytest.approx(score["auc"], abs=1e-4)
        assert cell["steps"] >= 1 and len(cell["tried"]) >= 3
    assert [cell["cell"]["scale"] for cell in cells] == [1, 2]
    assert lengths[1] == 4 * lengths[0]


def test_an_interrupted_study_goes_on_with_the_missing_cells(finished, command, tmp_path, monkeypatch):
    whole, ran = result_of(finished.out, "demos"), []
    runtime.save(tmp_path / "demos.json", {**whole, "cells": whole["cells"][:1]})
    run = demos.run
    monkeypatch.setattr(demos, "SETTINGS", demos.SETTINGS[:2])
    monkeypatch.setattr(demos, "run", lambda setup, **cell: ran.append(cell) or run(setup, **cell))
    result = command(studies, "demos", *finished.flags, "--out", tmp_path)
    assert result.status == 0, result.err
    assert ran == [{"seed": 0, "num_demos": 2}]
    assert result_of(tmp_path, "demos")["cells"] == whole["cells"], "the same seed gives the same numbers"
    command(studies, "demos", *finished.flags, "--out", tmp_path)
    assert len(ran) == 1, "nothing is left to do"


class Killed(BaseException):
    """Nothing catches it."""


def test_a_cell_that_was_killed_goes_on_within_its_trainings(finished, command, tmp_path, monkeypatch):
    """Killed in the fourth of ten refiners of 4 steps; what trains is saved every 2 steps here."""
    real, steps = train_refiner.optimizer_step, []

    def step_until(last, *args):
        if len(steps) == last:
            raise Killed
        steps.append(1)
        real(*args)

    saved_often = functools.partial(runtime.training_steps, every=2)
    monkeypatch.setattr(runtime, "training_steps", saved_often)
    monkeypatch.setattr(train_refiner, "optimizer_step", functools.partial(step_until, 15))
    with pytest.raises(Killed):
        command(studies, "size", *finished.flags, "--out", tmp_path)
    unfinished = finished.work / "unfinished-size-0"
    assert (unfinished / "tokens, 3 x 16.progress").is_file()
    assert not (tmp_path / "size.json").exists()
    steps.clear()
    monkeypatch.setattr(train_refiner, "optimizer_step", functools.partial(step_until, 100))
    assert command(studies, "size", *finished.flags, "--out", tmp_path).status == 0
    assert len(steps) == 2 + 6 * 4, "half of the fourth, and the last six; nothing of the first three"
    (resumed,), (whole,) = (result_of(folder, "size")["cells"] for folder in (tmp_path, finished.out))
    assert resumed["scores"] == whole["scores"]
    assert not unfinished.exists()


def test_a_study_alone_trains_what_it_needs(finished, command, tmp_path):
    flags = [*finished.flags, "--out", tmp_path / "results", "--work", tmp_path / "work"]
    result = command(studies, "probe", *flags)
    assert result.status == 0, result.err
    assert (tmp_path / "work" / "base-0" / "refiner_tokens+query.pt").is_file()
    alone, among_all = (
        result_of(folder, "probe")["cells"] for folder in (tmp_path / "results", finished.out)
    )
    assert json.dumps(alone) == json.dumps(among_all)


def test_results_of_another_configuration_are_refused(finished, command):
    before = (finished.out / "rollout.json").read_bytes()
    result = command(studies, "rollout", *finished.flags, "--gpt-steps", "21")
    assert (result.status, len(result.err)) == (2, 1)
    assert "gpt.steps = 8, now 21" in result.err[0]
    assert (finished.out / "rollout.json").read_bytes() == before


def test_speed_is_of_one_machine(finished, command, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    result = command(studies, "speed", *finished.flags)
    assert (result.status, len(result.err)) == (2, 1)
    assert "machine.threads" in result.err[0]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["nothing"], "nothing"),
        ([], "NAME"),
        (["main"], "main"),
        (["rollout", "--seeds", "0"], "--seeds: invalid choice: 0"),
        (["rollout", "--seeds", "11"], "--seeds: invalid choice: 11"),
        (["rollout", "--preset", "large"], "large"),
        (["rollout", "--study-lora-rank", "many"], "many"),
        (["rollout", "--study-samples", "0"], "--study-samples 0"),
    ],
)
def test_a_mistake_gets_one_line(command, tmp_path, flags, named):
    result = command(studies, *flags, "--out", tmp_path / "results", "--work", tmp_path / "work")
    assert (result.status, len(result.err)) == (2, 1)
    assert named in result.err[0]


def test_scenes_that_are_drawn_are_asked_for_before_a_folder_is_used(command, tmp_path):
    flags = ["--preset", "smoke", "--data", f"folder:{tmp_path / 'pictures'}"]  # which is not even there
    flags += ["--out", tmp_path, "--work", tmp_path / "work"]
    result = command(studies, "all", *flags)
    assert result.status == 2
    assert "choice, window, demos need scenes" in result.err[-1]


def test_a_refiner_that_is_too_narrow_is_named(finished, command, tmp_path):
    flags = [*finished.flags, "--refiner-heads", "16", "--out", tmp_path / "results"]
    result = command(studies, "size", *flags, "--work", tmp_path / "work")
    assert result.status == 2
    assert "tokens, 1 x 8: 16 heads in a width of 8" in result.err[-1]


@pytest.mark.parametrize("text", ["{}", "[]", "not JSON", '{"config": {}}', "\udcff"])
def test_a_file_that_is_no_result_is_named(command, tmp_path, text):
    (tmp_path / "size.json").write_bytes(text.encode(errors="surrogateescape"))
    result = command(studies, "size", "--preset", "smoke", "--out", tmp_path, "--work", tmp_path / "work")
    assert (result.status, len(result.err)) == (2, 1)
    assert "size.json" in result.err[0]


# Backbones


def make_backbone(make):
    model = make(vsr.GPTConfig(layers=2, heads=2, width=16), V, N, IMAGES).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


OTHERS = pytest.mark.parametrize("make", [backbones.Llama, backbones.Recurrent])


@OTHERS
def test_a_token_changes_later_logits_only(make):
    model, tokens = make_backbone(make), torch.randint(V, (2, IMAGES * N))
    before = model(tokens)
    for position in random.Random(0).sample(range(IMAGES * N - 1), 5):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % V
        same = torch.isclose(before, model(changed), atol=1e-5).all(-1).all(0)
        assert same[: position + 1].all()
        assert not same[position + 1 :].all()


@OTHERS
def test_generation_is_what_replaying_its_tokens_predicts(make):
    model, prompt = make_backbone(make), torch.randint(V, (3, (IMAGES - 1) * N))
    rollout = model.generate(prompt, N)
    again, alone = model.replay(prompt, rollout.tokens), model.replay(prompt)
    assert torch.allclose(rollout.states, again.states, atol=1e-4)
    assert torch.allclose(rollout.query, again.query, atol=1e-4)
    assert torch.allclose(rollout.query, alone.query, atol=1e-4), "it does not depend on what is written"
    assert alone.states is None
    assert torch.equal(model.logits(again.states).argmax(-1), rollout.tokens)


def test_rotary_attention_sees_distances_not_positions():
    """Further on in the sentence, the same tokens give the same."""
    model = make_backbone(backbones.Llama)
    turn = torch.polar(torch.ones(()), torch.arange(8.0)[:, None] * 10000 ** (-torch.arange(16) / 16))
    x = torch.randn(1, 8, 16)
    block = model.blocks[0]
    shifted = turn * turn[3]  # all positions 3 further on
    assert torch.allclose(block(x, turn, None, 0), block(x, shifted, None, 0), atol=1e-5)


# Controls and variants


def test_the_likeliest_of_more_samples_is_no_less_likely(finished):
    models = runner.models_of(finished.setup, 0)
    backbone, tokens = models.trained.backbone, models.test["tokens"]

    def likelihood(n):
        samples = decoding.samples_of(finished.setup, backbone, tokens, n, 1.0, 0)
        states = backbone.replay(tokens[:, :-1].flatten(1).long(), decoding.likeliest(*samples)).states
        chosen = decoding.likeliest(*samples)[..., None]
        return backbone.logits(states).log_softmax(-1).gather(-1, chosen)[..., 0].sum(1)

    few, more = likelihood(1), likelihood(6)
    assert (more >= few - 1e-3).all()
    assert (more > few + 1e-3).any()


@pytest.mark.parametrize("reads", [("tokens",), ("tokens", "query"), ("query",)])
def test_a_scaled_refiner_refines_as_any_other_and_its_output_has_a_length(reads):
    config = vsr.RefinerConfig(layers=1, heads=2, width=16, dropout=0.0)
    refiner, scaled = (make(config, reads, (2, 3), 5, 4).eval() for make in (vsr.Refiner, rollout.Scaled))
    torch.nn.init.normal_(refiner.to_code.weight)
    scaled.load_state_dict(refiner.state_dict(), strict=False)  # it has its length besides
    given = F.normalize(torch.randn(2, 6, 5), dim=-1), None, torch.randn(2, 6, 4)
    refined, codebook = refiner(*given), F.normalize(torch.randn(30, 5), dim=-1)
    for length in (10.0, 0.5):
        assert torch.allclose(scaled(*given), length * refined, atol=1e-4)
        found, expected = (vsr.nearest_code(e, codebook) for e in (scaled(*given), refined))
        assert torch.equal(found, expected)
        torch.nn.init.constant_(scaled.log_length, math.log(0.5))


def test_a_forced_token_is_another_one_that_stands_there_elsewhere():
    tokens = torch.tensor([[1, 4, 7], [2, 4, 7], [2, 5, 7]])
    forced, wrong = probe.forced_at(0, tokens)
    assert wrong.all()
    assert forced[:, 0].tolist() == [2, 1, 1]
    assert torch.equal(forced[:, 1:], tokens[:, 1:])
    assert probe.forced_at(2, tokens)[1].tolist() == [False, False, False]


def test_damage_is_summed_behind_the_wrong_token():
    forced = {"backbone": [[9.0, 1.0, 2.0, 3.0], [0.0, 0.0, 9.0, 5.0]]}
    cell = {"positions": [0, 2], "wrong tokens": {"forced": forced}}
    assert probe.summed_after(cell, "wrong tokens", "backbone") == [6, 5]


def test_the_first_wrong_token_is_where_the_truth_is_left():
    truth = torch.tensor([[3, 1, 2]] * 4)
    tokens = torch.tensor([[3, 1, 2], [3, 0, 0], [0, 1, 2], [3, 1, 0]])
    assert probe.first_wrong(tokens, truth).tolist() == [3, 1, 0, 2]


def test_what_is_taken_back_is_the_part_of_the_backbones_damage_that_is_gone():
    cells = [{"backbone": 4.0, "x": 1.0}, {"backbone": 2.0, "x": 3.0}, {"backbone": 2.0, "x": 0.0}]
    assert probe.taken_back(cells, "x", lambda cell, name: cell[name]) == [0.75, -0.5, 1]


# Speed


def test_operations_are_those_that_torch_counts():
    gpt = vsr.GPT(vsr.GPTConfig(layers=2, heads=2, width=16), V, N, IMAGES)
    with FlopCounterMode(display=False) as counter:
        TextbookGPT(gpt)(torch.randint(V, (3, N * IMAGES))).sum().backward()
    assert counter.get_total_flops() == pytest.approx(3 * N * IMAGES * stages.flops_per_token(gpt))


def test_speed_compares_with_transformers_or_says_why_not(finished, monkeypatch):
    result = result_of(finished.out, "speed")
    (cell,), lines = result["cells"], [line for line in result["table"] if line.startswith("GPT-2:")]
    reason = cell["transformers"]["skipped"]
    assert len(lines) == 1
    assert reason is None or reason in lines[0]
    assert ("GPT-2" in cell["generation"]["1"]) == (reason is None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install transformers" in gpt2.why_not(vsr.GPTConfig())


def test_ratios_are_of_the_same_round():
    assert speed.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == "2.00 (2.00 to 3.00)"


def test_seconds_without_a_cache_stand_for_all_steps(monkeypatch):
    """Of 16 steps two are timed, each with all that was written before it."""
    gpt, lengths = vsr.GPT(vsr.GPTConfig(layers=1, heads=2, width=16), V, 16, 2), []
    hidden = gpt.hidden
    monkeypatch.setattr(gpt, "hidden", lambda inputs: lengths.append(inputs.shape[1]) or hidden(inputs))
    monkeypatch.setattr(
        stages, "median_seconds", lambda steps, *_: {t: f() is None or 1.0 for t, f in steps.items()}
    )
    assert stages.uncached(gpt, torch.randint(V, (1, 32)), 16, torch.device("cpu")) == 16
    assert lengths == [17, 25]


def test_gpt2_of_transformers_writes_what_it_predicts():
    pytest.importorskip("transformers")
    gpt = vsr.GPT(vsr.GPTConfig(layers=2, heads=2, width=16), V, N, IMAGES)
    model, prompt = gpt2.GPT2(gpt).eval(), torch.randint(V, (3, (IMAGES - 1) * N))
    written = model.generate(prompt, N)
    assert written.shape == (3, N)
    logits = model(torch.cat([prompt, written], dim=1))
    assert logits.shape == (3, IMAGES * N, V + 1)
    assert torch.equal(logits[:, -N:].argmax(-1), written)


def test_tables_of_a_study_are_of_all_its_seeds():
    """Seeds that differ: means and spreads in the table, not those of the first cell."""
    cells = [{side: {"psnr": value} for side in ("without", "with")} for value in (1.0, 2.0, 4.0)]
    cells[2]["with"]["psnr"] = 8.0
    text = studies.STUDIES["adversarial"].show(cells)
    assert f"{statistics.median([1, 2, 4]):.3f} (1.000 to 4.000)" in text
    assert "2.000 (1.000 to 8.000)" in text


# Seeds as the unit


def test_the_t_interval_is_students():
    low, high = report.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low, high) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-3)
    assert report.t_interval([2.0, 2.0, 2.0]) == (2, 2)
    assert report.estimate([0.5, 0.7]) == "0.60 (-0.67 to 1.87)"
    assert report.estimate([0.5]) == "0.50"


def test_sd():
    assert report.sd([1.0, 3.0]) == pytest.approx(2**0.5)
    assert report.sd([0.5]) == 0
    assert math.isnan(report.sd([math.nan, 1.0]))


def test_the_t_interval_covers_the_true_mean_19_times_in_20():
    generator = random.Random(0)
    for seeds in (2, 3, 5, 10):
        covered = 0
        for _ in range(2000):
            low, high = report.t_interval([generator.gauss(1, 3) for _ in range(seeds)])
            covered += low <= 1 <= high
        assert 0.935 < covered / 2000 < 0.965


def test_measures_are_differences_and_shares_within_a_seed():
    def cell(scale):
        errors = {
            "ar_greedy": 0.5,
            "ar_sampled": 0.9,
            "teacher_forced": 0.2,
            "x": 0.3,
            "x of teacher_forced": 0.1,
        }
        both = {"token_accuracy": 0.8, "psnr": 20.0}
        return {"scores": {m: {"all": {"cosine_error": scale * e, **both}} for m, e in errors.items()}}

    cells = [cell(1), cell(0.1)]
    expected = {"gap closed": 2 / 3, "exposure removed": 1 / 3, "base error removed": 0.5}
    for name, values in report.MEASURES.items():
        assert values(cells, "x", "all") == pytest.approx([expected.get(name, 0)] * 2)
    assert report.relative(cells, "x", "all") == pytest.approx([0.6, 0.6]), "of greedy decoding's error"


# The window, and what a corruption and a hue are


@pytest.mark.parametrize("radius", [0, 1, 2, None])
def test_a_window_hides_what_lies_further_away(radius):
    grid, layers = (5, 5), 2
    config = vsr.RefinerConfig(layers=layers, heads=2, width=16)
    refiner = window.Windowed(config, ("tokens",), grid, 8, radius=radius, start="anywhere").eval()
    torch.nn.init.normal_(refiner.to_code.weight)
    embeddings = torch.randn(1, 25, 8)
    before, middle = refiner(embeddings), 12
    changed = embeddings.clone()
    changed[0, middle] += 1
    seen = ((refiner(changed) - before).abs().amax(-1)[0] > 1e-7).view(5, 5)
    reach = 2 if radius is None else min(2, radius * layers)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[2 - reach : 3 + reach, 2 - reach : 3 + reach] = True
    assert torch.equal(seen, expected)
    plain = vsr.Refiner(config, ("tokens",), grid, 8)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in refiner.parameters())


def test_corruption_has_its_rate_and_never_leaves_a_token_as_it_was():
    tokens = torch.randint(9, (400, 64))
    changed = rollout.corrupt(tokens, 0.3, 9, torch.Generator().manual_seed(0))
    assert (changed != tokens).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert changed.min() >= 0 and changed.max() < 9
    assert torch.equal(rollout.corrupt(tokens, 0.0, 9, torch.Generator()), tokens)
    assert (rollout.corrupt(tokens, 1.0, 9, torch.Generator()) != tokens).all()


def test_scenes_with_one_hue_do_not_tell_it_by_their_grey():
    sentences = hues.OneHue(data.DataConfig(image_size=16), 0)
    images, task = data.joined(sentences.batches("train", 96))
    valid, objects = sentences.valid("train", 96), sentences.objects("train", 96)
    assert not task.any()
    differs = (valid - images[:, -1:]).abs().flatten(2).amax(2)  # (96, HUES)
    assert (differs.min(1).values == 0).all(), "the truth is one of the valid answers"
    assert (differs == 0).sum(1).eq(1).all()
    for hue in range(hues.HUES):
        assert (data.grey(valid[:, hue]) - images[:, -2]).abs().max() < 1e-5
    shares, colour = choice.hues_of(images[:, -1], objects)
    chosen = differs.argmin(1)
    for i, hue in enumerate(chosen.tolist()):
        assert shares[i, :, hue].min() == 1, "both objects have the hue of the answer, all over"
    assert (colour - 1).abs().max() < 0.25
    used = torch.bincount(chosen, minlength=hues.HUES)
    assert used.min() >= 6, "of 16 expected"
    dark = sentences.layers("train", 0, 64)[0].kind[0, 1::2]  # of the queries, the second of two scenes
    assert (chosen[:64] == dark).float().mean() < 0.4, "its shape does not tell"
    train, test = (data.split_of(sentences.valid(split, 64)[:, 0]) for split in ("train", "test"))
    assert (train == 0).all() and (test == 2).all()


def test_the_nearest_valid_answer_is_the_one_with_the_least_error():
    codebook = F.normalize(torch.randn(20, 8), dim=-1)
    valid = torch.randint(20, (7, 5, 16))
    chosen = torch.randint(5, (7,))
    written = valid[torch.arange(7), chosen].clone()
    written[:, :3] = torch.randint(20, (7, 3))
    assert torch.equal(choice.nearest_valid(written, valid, codebook), chosen)


def test_a_hue_is_kept_if_the_nearest_answer_is_still_that_of_what_was_written(monkeypatch):
    """The codebook is made of unit vectors: of two answers the one with more equal tokens is nearer."""
    answers = torch.arange(6)[:, None].expand(6, 4)  # token h everywhere, in hue h
    valid = {"tokens": answers.expand(5, 6, 4), "images": torch.zeros(5, 6, 3, 8, 8)}
    hue = {"sampled": [0, 1, 2, 3, 4], "greedy": [5, 5, 5, 5, 5]}
    hue |= {"x, of sampled": [0, 1, 2, 0, 0], "x, of greedy": [5, 5, 5, 5, 4], "truth": [1, 1, 1, 1, 1]}
    written = {method: torch.tensor(hues)[:, None].expand(5, 4).clone() for method, hues in hue.items()}
    written["x, of sampled"][:, 3] = 5  # a quarter of its tokens is wrong
    objects = torch.zeros(5, 2, 8, 8, dtype=torch.bool)
    objects[:, 0, :4], objects[:, 1, 4:] = True, True
    palette = choice.even_palette()  # (HUES, 2, 3)

    def decode(tokenizer, y, autocast):
        """The dark object in the hue of the first token, the light one in that of the second."""
        images = palette[y[:, :2], torch.tensor([0, 1])].transpose(1, 2)  # (S, 3, 2)
        return images.repeat_interleave(4, dim=2)[..., None].expand(-1, -1, -1, 8)

    written["x, of greedy"][0, 1] = 2  # two hues
    monkeypatch.setattr(choice.evaluate, "decode_images", decode)
    trained, setup = types.SimpleNamespace(tokenizer=None), types.SimpleNamespace(autocast=None)
    models = types.SimpleNamespace(trained=trained, codebook=torch.eye(6))
    scores = choice.score(setup, models, written, valid, objects)
    assert {m: score["hue kept"] for m, score in scores.items()} == pytest.approx(
        {"sampled": 1, "greedy": 1, "truth": 1, "x, of sampled": 0.6, "x, of greedy": 0.8}
    )
    assert {m: score["coherent"] for m, score in scores.items()} == pytest.approx(
        {"sampled": 1, "greedy": 1, "truth": 1, "x, of sampled": 1, "x, of greedy": 0.8}
    )
    assert scores["x, of sampled"]["tokens right"] == pytest.approx(0.75)
    assert scores["x, of sampled"]["cosine error"] == pytest.approx(0.25)
    assert all(score["colour"] == pytest.approx(1, abs=1e-4) for score in scores.values())
    assert scores["greedy"]["hues used"] == pytest.approx(1)
    assert scores["sampled"]["hues used"] == pytest.approx(5)


def test_two_commands_share_the_cells_of_a_study(finished, command, tmp_path, monkeypatch):
    """What another process works on is left to it."""
    monkeypatch.setattr(demos, "SETTINGS", demos.SETTINGS[:2])
    whole = result_of(finished.out, "demos")
    runtime.save(tmp_path / "demos.json", {**whole, "cells": []})
    busy = finished.work / "unfinished-demos-0-1"
    with runtime.locked(busy):
        result = command(studies, "demos", *finished.flags, "--out", tmp_path)
    assert result.status == 0, result.err
    assert [cell["cell"]["num_demos"] for cell in result_of(tmp_path, "demos")["cells"]] == [2]
    assert command(studies, "demos", *finished.flags, "--out", tmp_path).status == 0
    assert result_of(tmp_path, "demos")["cells"] == whole["cells"]
