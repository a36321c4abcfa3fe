"""Training and generation as a user calls them: files, reuse, repeatability, and one-line errors.

PYTHONPATH=. python tests/test_commands.py     # after new weights/toy.pt: what it scores, in weights/toy.json
"""

import itertools
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SMOKE, without_pictures
from PIL import Image

import data
import evaluate
import generate
import runtime
import train_refiner
import vqgan
import vsr

CPU, FLOAT = torch.device("cpu"), torch.autocast("cpu", enabled=False)
READINGS = train_refiner.READINGS
REFINERS = [f"refiner_{reading}" for reading in READINGS]
REPAIRS = ("expected_embedding", *map(evaluate.method_name, READINGS))
METHODS = {"vqgan_limit", "teacher_forced", "ar_greedy", "ar_sampled", *REPAIRS}
METHODS |= {f"{method}{evaluate.OF_FORCED}" for method in REPAIRS}
PICTURES = ("error_by_position.png", "samples.png", "reconstructions.png", "training.png")
CHECKPOINTS = ("tokenizer.pt", "backbone.pt", "rollouts.pt", *(f"{name}.pt" for name in REFINERS))
TINY = """
    --preset smoke --image-size 16 --train-sentences 64 --eval-sentences 24 --device cpu --dtype float32
    --vqgan-steps 20 --vqgan-channels 16 --gpt-steps 20 --gpt-width 16 --gpt-batch-size 8
    --refiner-rollouts 32 --refiner-steps 10 --refiner-width 16 --refiner-batch-size 8
"""
ALLOWED = {"cosine_error": 0.002, "token_accuracy": 0.005, "psnr": 0.15, "ssim": 0.01}  # of shipped weights
TORCHRUN = "torchrun: only train_refiner.py works in more than one process"
ALL_READINGS = ("tokens", "tokens+states", "tokens+query", "tokens+states+query", "query")


def metrics_of(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def contents(folder) -> dict:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir() if p.name != ".lock"}


# Training: its parts


@pytest.mark.parametrize("reading", ALL_READINGS)
def test_refiner_training_leaves_backbone_and_codebook_alone(reading):
    N, V, reads = 6, 20, reading.split("+")
    torch.manual_seed(1)
    backbone = vsr.GPT(vsr.GPTConfig(layers=1, width=16), V, N, 4).eval().requires_grad_(False)
    codebook = F.normalize(torch.randn(V, 8), dim=-1)
    before = [codebook.clone(), *(p.clone() for p in backbone.parameters())]
    sentences = torch.randint(V, (32, 4, N))
    written, _ = train_refiner.make_rollouts(backbone, sentences, FLOAT)
    replayed = train_refiner.replay_rollouts(backbone, sentences, written, reads, FLOAT)
    rollouts, targets = (
        {"train": replayed, "val": replayed},
        dict.fromkeys(("train", "val"), sentences[:, -1]),
    )
    config = vsr.RefinerConfig(layers=1, width=16, rollouts=32, steps=5, batch_size=8)
    refiner, log = train_refiner.train_refiner(
        config, reads, codebook, (2, 3), rollouts, targets, CPU, torch.float32, 0
    )
    after = [codebook, *backbone.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
    torch.manual_seed(0)  # that of the training: the refiner before its first step
    fresh = vsr.Refiner(config, reads, (2, 3), 8, 0 if reads == ["tokens"] else 16)
    assert not torch.equal(refiner.to_code.weight, fresh.to_code.weight)
    assert log["loss"]
    assert log["val_loss"][0] > 0


def test_replayed_rollouts_hold_the_states_that_are_asked_for():
    torch.manual_seed(1)
    backbone = vsr.GPT(vsr.GPTConfig(layers=1, width=16), 20, 6, 4).eval().requires_grad_(False)
    sentences = torch.randint(20, (130, 4, 6))  # more than one batch
    written = backbone.generate(sentences[:, :-1].flatten(1), 6)
    for reading in ALL_READINGS:
        reads = set(reading.split("+"))
        replayed = train_refiner.replay_rollouts(backbone, sentences, written.tokens, reads, FLOAT)
        assert torch.equal(replayed.tokens, written.tokens)
        for source in ("states", "query"):
            ours, theirs = getattr(replayed, source), getattr(written, source)
            assert ours is not None or source not in reads
            assert ours is None or torch.allclose(ours.float(), theirs, rtol=0.01, atol=0.01)  # in bfloat16


@pytest.mark.parametrize("reading", ALL_READINGS)
def test_optimizers_hold_each_parameter_of_the_model_once(reading):
    refiner = vsr.Refiner(vsr.RefinerConfig(width=16), reading.split("+"), (2, 3), 8, 16)
    optimizers = train_refiner.make_optimizers(refiner, 1e-3)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in refiner.parameters())


# Training: the command


def test_smoke_run_writes_checkpoints_pictures_and_a_table(smoke):
    for name in PICTURES:
        with Image.open(smoke.out / name) as picture:
            picture.load()
            assert min(picture.size) > 100
    for name in CHECKPOINTS:
        assert runtime.load_checkpoint(smoke.out / name).keys() >= {"config", "log", "seconds"}
    assert {path.name for path in smoke.out.iterdir()} == {*PICTURES, *CHECKPOINTS, "metrics.json", ".lock"}
    for method in METHODS:
        assert (f"\n{method} " in smoke.stdout) != method.endswith(evaluate.OF_FORCED)


def test_smoke_run_measures_everything(smoke):
    metrics = metrics_of(smoke.out)
    assert {"data", "vqgan", "gpt", "refiner", "seed", "dtype", "device"} <= metrics["config"].keys()
    assert metrics["config"]["gpt"]["steps"] == 40
    stages = {"tokenizer", "sentences", "backbone", "rollouts", "states", *REFINERS, "evaluation"}
    assert metrics["seconds"].keys() == stages
    assert all(seconds > 0 for seconds in metrics["seconds"].values())
    tokenizer, backbone, refiners, _ = evaluate.load_run(smoke.out, CPU)
    models = {"tokenizer": tokenizer, "backbone": backbone}
    models |= {f"refiner_{reading}": refiner for reading, refiner in refiners.items()}
    assert metrics["params"] == {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    assert {"psnr_source", "psnr_target", "codes_used", "perplexity"} <= metrics["tokenizer"].keys()
    assert 1 <= metrics["tokenizer"]["perplexity"] <= metrics["tokenizer"]["codes_used"]
    assert {"loss", "val_loss", "val_target_loss", "val_target_accuracy"} <= metrics["backbone"].keys()
    assert metrics["methods"].keys() == METHODS
    for scores in metrics["methods"].values():
        assert scores.keys() == {"all", *data.TASKS}
        for score in scores.values():
            by_position = score["cosine_error_by_position"]
            assert len(by_position) == 16
            assert score["auc"] == pytest.approx(sum(by_position), rel=1e-4)
            assert score["cosine_error"] == pytest.approx(sum(by_position) / 16, rel=1e-4)
            assert 0 <= score["token_accuracy"] <= 1
            assert score["psnr"] > 0


def test_the_tokenizer_alone_makes_no_token_error_and_the_best_images(smoke):
    methods = metrics_of(smoke.out)["methods"]
    for name, limit in methods["vqgan_limit"].items():
        assert limit["cosine_error"] == limit["auc"] == 0
        assert limit["token_accuracy"] == 1
        assert limit["psnr"] == max(scores[name]["psnr"] for scores in methods.values())


def test_shares_of_the_gap_follow_from_the_scores_and_stand_in_the_table(smoke):
    """Both are of greedy decoding, even where a sample has less error."""
    error = {"vqgan_limit": 0.0, "teacher_forced": 0.2, "ar_greedy": 0.5, "ar_sampled": 0.4}
    repairs = {"expected_embedding": (0.45, 0.2), "refined_tokens": (0.25, 0.1), "parallel": (0.3, 0.3)}
    for method, errors in repairs.items():
        error[method], error[method + evaluate.OF_FORCED] = errors
    others = {"token_accuracy": 0.5, "psnr": 20.0}
    scores = {
        m: {name: {"cosine_error": e, **others} for name in ("all", *data.TASKS)} for m, e in error.items()
    }
    shares = {"expected_embedding": (1 / 6, 1 / 6), "refined_tokens": (5 / 6, 0.5), "parallel": (2 / 3, 1)}
    for method, (gap, exposure) in shares.items():
        assert evaluate.gap_closed(scores, method, "all") == pytest.approx(gap)
        assert evaluate.exposure_removed(scores, method, "all") == pytest.approx(exposure)
    rows = [line.split() for line in evaluate.format_table(scores).splitlines()[2:]]
    shown = {row[0]: row[5:7] if len(row) == 12 else [] for row in rows}  # 4 errors, shares, accuracy, 4 PSNR
    plain = [method for method in error if not method.endswith(evaluate.OF_FORCED)]
    assert shown == {method: [f"{share:.2f}" for share in shares.get(method, [])] for method in plain}
    assert evaluate.format_table(metrics_of(smoke.out)["methods"]) in smoke.stdout


def test_the_frozen_parts_of_a_run_are_the_trained_ones(smoke):
    """What `load_run` gives is what the checkpoints hold, and nothing of it can be trained by accident."""
    tokenizer, backbone, refiners, _ = evaluate.load_run(smoke.out, CPU)
    assert list(refiners) == list(READINGS)
    models = {"tokenizer": tokenizer, "backbone": backbone}
    models |= {f"refiner_{reading}": refiner for reading, refiner in refiners.items()}
    for name, model in models.items():
        for key, weight in runtime.load_checkpoint(smoke.out / f"{name}.pt")["model"].items():
            assert torch.equal(model.state_dict()[key], weight)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    for reading, refiner in refiners.items():
        assert "+".join(refiner.reads) == reading


@pytest.fixture(scope="module")
def again(smoke, command, tmp_path_factory):
    """The same command once more, with --weights: what was there before, and the result."""
    folder = tmp_path_factory.mktemp("again")
    shutil.copytree(smoke.out, folder / "run")
    before, weights = contents(folder / "run"), folder / "weights" / "small.pt"
    with without_pictures():
        result = command(train_refiner, *smoke.flags[:-1], folder / "run", "--weights", weights)
    assert result.status == 0, result.err
    return SimpleNamespace(out=folder / "run", before=before, printed=result.out, weights=weights)


def test_the_same_command_again_reuses_every_stage(again):
    for name in CHECKPOINTS:
        assert f"reusing {again.out / name}" in again.printed
        assert (again.out / name).stat().st_mtime_ns == again.before[name][0]
    assert json.loads(again.before["metrics.json"][1])["methods"] == metrics_of(again.out)["methods"]


def test_weights_in_one_file_are_the_run_in_half_precision(again, command, tmp_path):
    run, small = (evaluate.load_run(path, CPU) for path in (again.out, again.weights))
    for a, b in zip((*run[:2], *run[2].values()), (*small[:2], *small[2].values()), strict=True):
        for name, value in a.state_dict().items():
            assert torch.equal(value.half().float(), b.state_dict()[name].float())
    assert run[2].keys() == small[2].keys()
    sizes = [(again.out / name).stat().st_size for name in CHECKPOINTS if name != "rollouts.pt"]
    assert again.weights.stat().st_size < 0.6 * sum(sizes)
    flags = ["--out", tmp_path / "g.png", "--count", 1, "--device", "cpu"]
    result = command(generate, "--run", again.weights, *flags)
    assert result.status == 0, result.err


@pytest.mark.parametrize(
    ("flags", "field", "stage"),
    [
        (["--gpt-layers", "3"], "gpt.layers", "backbone"),
        (["--seed", "1"], "seed", "tokenizer"),
        (["--vqgan-steps", "41"], "vqgan.steps", "tokenizer"),
        (["--refiner-rollouts", "65"], "rollouts", "rollouts"),
        (["--refiner-steps", "21"], "refiner.steps", "refiner"),
    ],
)
def test_a_changed_field_is_refused_and_nothing_is_overwritten(smoke, command, flags, field, stage):
    before = contents(smoke.out)
    result = command(train_refiner, *smoke.flags, *flags)
    assert result.status == 2
    assert len(result.err) == 1
    assert f"{field} = " in result.err[0]
    assert f"--fresh {stage}" in result.err[0]
    assert contents(smoke.out) == before


def test_fresh_refiner_trains_the_refiners_only(copied, command, no_pictures):
    folder, flags = copied
    before = contents(folder)
    result = command(train_refiner, *flags, "--refiner-steps", "5", "--fresh", "refiner")
    assert result.status == 0, result.err
    for name in CHECKPOINTS:
        changed = (folder / name).read_bytes() != before[name][1]
        assert changed == name.startswith("refiner")
    assert metrics_of(folder)["config"]["refiner"]["steps"] == 5


def test_fresh_removes_what_was_built_on_the_stage(copied, command, no_pictures):
    """Otherwise generate.py would run a refiner on a backbone that it was not trained for."""
    folder, flags = copied
    tokenizer = (folder / "tokenizer.pt").read_bytes()
    result = command(train_refiner, *flags, "--fresh", "backbone", "--gpt-steps", "5", "--reads", "tokens")
    assert result.status == 0, result.err
    assert (folder / "tokenizer.pt").read_bytes() == tokenizer
    assert [path.name for path in folder.glob("refiner_*")] == ["refiner_tokens.pt"]


def test_fresh_leaves_what_is_not_its_own(copied, command, no_pictures):
    folder, flags = copied
    (folder / "rollouts_old").mkdir()
    for name in ("backbone_best.pt", "rollouts.txt"):
        (folder / name).write_text("mine")
    result = command(train_refiner, *flags, "--fresh", "tokenizer")
    assert result.status == 0, result.err
    assert (folder / "rollouts_old").is_dir()
    assert {(folder / name).read_text() for name in ("backbone_best.pt", "rollouts.txt")} == {"mine"}


def test_fresh_loses_nothing_when_an_earlier_stage_refuses(copied, command):
    folder, flags = copied
    before = contents(folder)
    result = command(train_refiner, *flags, "--gpt-layers", "3", "--fresh", "refiner")
    assert result.status == 2
    assert contents(folder) == before


@pytest.mark.parametrize("stage", ["tokenizer", "backbone", REFINERS[-1]])
def test_a_checkpoint_of_another_version_is_named(copied, command, stage):
    folder, flags = copied
    part = {"tokenizer": "vqgan", "backbone": "gpt", REFINERS[-1]: "refiner"}[stage]
    checkpoint = runtime.load_checkpoint(folder / f"{stage}.pt")
    checkpoint["config"][part]["field_of_old"] = 1
    runtime.save(folder / f"{stage}.pt", checkpoint)
    result = command(train_refiner, *flags)
    assert (result.status, len(result.err)) == (2, 1)
    assert f"{stage}.pt: the checkpoint of another model or another version" in result.err[0]


@pytest.fixture(scope="module")
def stranger(command, tmp_path_factory):
    """Another finished run with the sizes of `smoke`, of another seed."""
    out = tmp_path_factory.mktemp("stranger") / "run"
    with without_pictures():
        flags = [*SMOKE.split(), "--device", "cpu", "--dtype", "float32", "--seed", 7, "--out", out]
        result = command(train_refiner, *flags)
    assert result.status == 0, result.err
    return out


@pytest.mark.parametrize("name", ["tokenizer.pt", "backbone.pt", "refiner_tokens.pt", "refiner_query.pt"])
def test_models_that_do_not_belong_together_are_not_used_together(copied, stranger, command, tmp_path, name):
    """What a slower training in the same folder leaves behind."""
    folder, flags = copied
    shutil.copy(stranger / name, folder / name)
    shown = command(generate, "--run", folder, "--out", tmp_path / "g.png", "--device", "cpu")
    assert (shown.status, len(shown.err)) == (2, 1)
    assert "trained with other models than those beside it" in shown.err[0]
    assert f"--out {folder} --fresh" in shown.err[0]
    assert not (tmp_path / "g.png").exists()
    assert command(train_refiner, *flags).status == 2


@pytest.mark.parametrize(("name", "later"), [("tokenizer", "backbone"), ("backbone", "rollouts")])
def test_a_stage_is_not_reused_with_other_weights_of_an_earlier_one(copied, command, name, later):
    """The configurations agree: only the weights tell."""
    folder, flags = copied
    checkpoint = runtime.load_checkpoint(folder / f"{name}.pt")
    weight = next(x for x in checkpoint["model"].values() if x.is_floating_point())
    weight += 0.1
    runtime.save(folder / f"{name}.pt", checkpoint)
    result = command(train_refiner, *flags)
    assert (result.status, len(result.err)) == (2, 1)
    assert f"{later}.pt was made with weights.{name} = " in result.err[0]
    assert f"--fresh {later}" in result.err[0]


def test_a_file_of_weights_of_two_runs_is_not_used(again, stranger, command, tmp_path):
    weights = runtime.load_checkpoint(again.weights)
    other = runtime.load_checkpoint(stranger / "backbone.pt")
    weights["checkpoints"]["backbone.pt"]["model"] = other["model"]
    runtime.save(tmp_path / "mixed.pt", weights)
    shown = command(generate, "--run", tmp_path / "mixed.pt", "--out", tmp_path / "g.png", "--device", "cpu")
    assert (shown.status, len(shown.err)) == (2, 1)
    assert "trained with other models" in shown.err[0]


def test_a_folder_that_another_training_works_in_is_left_alone(copied, command):
    folder, flags = copied
    before = contents(folder)
    with runtime.locked(folder):
        result = command(train_refiner, *flags, "--fresh", "refiner")
    assert (result.status, len(result.err)) == (2, 1)
    assert f"--out {folder}: another process is at work there" in result.err[0]
    assert contents(folder) == before


def test_a_run_goes_on_in_its_own_precision_and_says_so(copied, command, no_pictures, monkeypatch):
    """On a machine where `auto` would be another one."""
    folder, flags = copied
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    flags = [flag for flag in flags if flag not in ("--dtype", "float32")]
    result = command(train_refiner, *flags)
    assert result.status == 0, result.err
    assert f"--dtype float32: {folder} was begun in it; here, --dtype auto would be bfloat16" in result.out
    refused = command(train_refiner, *flags, "--dtype", "bfloat16")
    assert "run.dtype = float32, now bfloat16" in refused.err[0]
    checkpoint = runtime.load_checkpoint(folder / "tokenizer.pt")
    del checkpoint["config"]["run"]  # of another version
    runtime.save(folder / "tokenizer.pt", checkpoint)
    refused = command(train_refiner, *flags)
    assert (refused.status, len(refused.err)) == (2, 1)
    assert "run.seed = None, now 0" in refused.err[0]


def test_compiling_is_tried_before_anything_is_trained(command, tmp_path, monkeypatch):
    def compile(function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n" + "a line\n" * 84)

    monkeypatch.setattr(torch, "compile", compile)
    result = command(train_refiner, *TINY.split(), "--out", tmp_path / "run", "--compile")
    assert (result.status, len(result.err)) == (2, 1)
    assert "--compile: torch.compile does not work here" in result.err[0]
    assert "No working C++ compiler" in result.err[0]
    assert not list((tmp_path / "run").iterdir())  # not even a lock


@pytest.mark.parametrize("stage", ["vqgan", "gpt", "refiner"])
def test_weights_that_the_last_update_spoilt_are_not_kept(command, tmp_path, monkeypatch, stage):
    """No loss is computed after the last update."""
    step, steps = train_refiner.optimizer_step, {"vqgan": 20, "gpt": 20, "refiner": 10}
    kind = {"vqgan": vqgan.VQGAN, "gpt": vsr.GPT, "refiner": vsr.Refiner}[stage]
    counted = []

    def spoil(loss, model, *rest, **options):
        step(loss, model, *rest, **options)
        counted.append(model)
        if isinstance(model, kind) and counted.count(model) == steps[stage]:
            next(model.parameters()).data.fill_(torch.nan)

    monkeypatch.setattr(train_refiner, "optimizer_step", spoil)
    result = command(train_refiner, *TINY.split(), "--out", tmp_path / "run")
    assert (result.status, len(result.err)) == (2, 1)
    assert "the weights are not finite; try a lower learning rate" in result.err[0]
    kept = {"vqgan": "*.pt", "gpt": "backbone.pt", "refiner": "refiner*.pt"}[stage]
    assert not list((tmp_path / "run").glob(kept))


def test_a_checkpoint_whose_weights_are_not_finite_is_named(copied, command, tmp_path):
    folder, flags = copied
    checkpoint = runtime.load_checkpoint(folder / "tokenizer.pt")
    checkpoint["model"]["decoder.0.weight"][0, 0, 0, 0] = torch.inf
    runtime.save(folder / "tokenizer.pt", checkpoint)
    for module, given in ((train_refiner, flags), (generate, ["--run", folder, "--out", tmp_path / "g.png"])):
        result = command(module, *given)
        assert (result.status, len(result.err)) == (2, 1)
        assert f"{folder / 'tokenizer.pt'}: weights that are not finite" in result.err[0]


@pytest.fixture(scope="module")
def folder_run(command, tmp_path_factory):
    """A run with each refiner there is, two demonstrations, a folder of pictures and bfloat16."""
    folder, generator = tmp_path_factory.mktemp("folder"), torch.Generator().manual_seed(0)
    for split in data.SPLITS:
        (folder / "pictures" / split).mkdir(parents=True)
        for number in range(6):
            pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "pictures" / split / f"{number}.png")
    flags = [
        *TINY.split(),
        "--dtype",
        "bfloat16",
        "--num-demos",
        2,
        "--data",
        f"folder:{folder / 'pictures'}",
    ]
    flags += ["--out", folder / "run", "--reads", *ALL_READINGS]
    with without_pictures():
        result = command(train_refiner, *flags)
    assert result.status == 0, result.err
    printed = result.out
    return SimpleNamespace(pictures=folder / "pictures", out=folder / "run", flags=flags, printed=printed)


def test_all_refiners_two_demonstrations_a_folder_and_bfloat16(folder_run):
    refined = {evaluate.method_name(reading) for reading in ALL_READINGS}
    refined |= {f"{method}{evaluate.OF_FORCED}" for method in refined}
    assert len(refined) == 2 * len(ALL_READINGS)
    assert metrics_of(folder_run.out)["methods"].keys() == METHODS | refined
    assert metrics_of(folder_run.out)["config"]["dtype"] == "bfloat16"


def test_before_the_long_part_a_folder_is_told_what_its_tokenizer_reaches(folder_run):
    (line,) = [line for line in folder_run.printed.splitlines() if "rebuilds held-out pictures" in line]
    reached = float(re.search(r"at (-?[\d.]+) dB", line).group(1))
    assert reached == pytest.approx(metrics_of(folder_run.out)["tokenizer"]["psnr_source"], abs=0.06)
    assert str(folder_run.out / "reconstructions.png") in line


def test_one_is_told_when_the_backbone_learns_its_pictures_by_heart(folder_run, command, monkeypatch):
    assert "by heart" not in folder_run.printed
    monkeypatch.setattr(train_refiner, "turned_at", lambda log: 37 if "val_target_loss" in log else None)
    result = command(train_refiner, *folder_run.flags)
    assert result.status == 0, result.err
    assert "since step 37" in result.out and "--gpt-steps 37 --fresh backbone" in result.out


def test_a_folder_is_known_by_its_pictures_and_not_by_its_path(
    folder_run, command, no_pictures, tmp_path, monkeypatch
):
    """Another spelling, another place, another working directory: the same run."""
    moved = tmp_path / "moved"
    shutil.copytree(folder_run.pictures, moved)
    place = folder_run.flags.index("--data") + 1
    monkeypatch.chdir(folder_run.pictures)
    for spelling in ("folder:.", f"folder:{folder_run.pictures}/../pictures", f"folder:{moved}"):
        flags = [*folder_run.flags[:place], spelling, *folder_run.flags[place + 1 :]]
        result = command(train_refiner, *flags)
        assert result.status == 0, result.err
        assert "reusing" in result.out
    monkeypatch.chdir(tmp_path)
    show = ["--run", folder_run.out, "--device", "cpu", "--count", 1, "--out", tmp_path / "g.png"]
    assert command(generate, *show).status == 0


def test_a_folder_that_has_changed_is_not_put_together_with_models_of_the_old_one(
    folder_run, command, tmp_path
):
    """Another picture changes which ones are drawn: the old rollouts would get other sentences' targets."""
    pictures = folder_run.pictures
    Image.new("RGB", (16, 16), "red").save(pictures / "train" / "more.png")
    result = command(train_refiner, *folder_run.flags)
    assert (result.status, len(result.err)) == (2, 1)
    assert "tokenizer.pt was made with pictures = " in result.err[0]

    # It is shown all the same, and said
    show = ["--run", folder_run.out, "--out", tmp_path / "picture.png", "--device", "cpu"]
    assert "holds other pictures than those" in command(generate, *show).out

    # One's own demonstrations need the folder no more
    shutil.rmtree(pictures / "val")
    own = [pictures / "train" / f"{number}.png" for number in range(5)]
    show = ["--run", folder_run.out, "--out", tmp_path / "own.png", "--device", "cpu", "--query", own[0]]
    assert command(generate, *show, "--demos", *own[1:]).status == 0
    assert (tmp_path / "own.png").is_file()
    assert "has no folder for val" in command(generate, *show, "--task", "edges").err[-1]

    # A file of weights goes to people who have the folder elsewhere, or have it not
    evaluate.save_weights(tmp_path / "weights.pt", folder_run.out, ["tokens"])
    show[1] = tmp_path / "weights.pt"
    assert "found_in" not in runtime.load_checkpoint(show[1])["config"]
    assert command(generate, *show, "--demos", *own[1:]).status == 0
    asked = command(generate, *show, "--task", "edges")
    assert (asked.status, len(asked.err)) == (2, 1)
    assert "--data: where are the pictures" in asked.err[0]
    moved = shutil.copytree(pictures, tmp_path / "moved")
    (moved / "val").mkdir()
    for level in range(4):
        Image.new("L", (16, 16), 60 * level).save(moved / "val" / f"{level}.png")
    assert command(generate, *show, "--task", "edges", "--data", f"folder:{moved}").status == 0


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(smoke, command, no_pictures, tmp_path):
    """Against a run in another process."""
    for seed in (0, 1):
        result = command(train_refiner, *smoke.flags[:-1], tmp_path / f"{seed}", "--seed", seed)
        assert result.status == 0, result.err
    first, same, other = (metrics_of(path)["methods"] for path in (smoke.out, tmp_path / "0", tmp_path / "1"))
    assert first == same
    assert all(first[method] != other[method] for method in METHODS)


@pytest.mark.parametrize("preset", ["smoke", "toy", "paper"])
def test_dry_run_prints_sizes_and_writes_nothing(command, tmp_path, monkeypatch, preset):
    monkeypatch.chdir(tmp_path)
    result = command(train_refiner, "--preset", preset, "--dry-run")
    assert result.status == 0
    for name in ("tokenizer", "backbone", *REFINERS):
        assert any(line.split()[0] == name and "parameters" in line for line in result.out.splitlines())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [data, generate])
def test_commands_that_do_not_divide_their_work_refuse_torchrun(command, tmp_path, monkeypatch, module):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    result = command(module)
    assert (result.status, result.err) == (2, [f"error: {TORCHRUN}"])
    assert not list(tmp_path.iterdir())


# Generation


@pytest.fixture
def photo(tmp_path):
    Image.linear_gradient("L").resize((50, 40)).convert("RGB").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_generate_shows_sentences_of_the_test_split_and_all_refiners(smoke, command, tmp_path):
    flags = ["--out", tmp_path / "g.png", "--count", 3, "--device", "cpu"]
    result = command(generate, "--run", smoke.out, *flags)
    assert result.status == 0, result.err
    assert "3 sentences" in result.out
    shown = [
        line.split("cosine error")[0].strip() for line in result.out.splitlines() if "cosine error" in line
    ]
    refined = {evaluate.method_name(reading) for reading in READINGS}
    assert shown[0] == "generated"
    assert set(shown[1:]) == refined
    assert Image.open(tmp_path / "g.png").width > 100


def test_generate_takes_a_scene_and_writes_an_animation(smoke, command, tmp_path, photo):
    flags = ["--task", "inpaint", "--query", photo, "--out", tmp_path / "g.png", "--gif", tmp_path / "g.gif"]
    result = command(generate, "--run", smoke.out, *flags, "--device", "cpu")
    assert result.status == 0, result.err
    assert "1 sentences" in result.out
    with Image.open(tmp_path / "g.gif") as animation:
        assert animation.n_frames > 10
        first = animation.convert("RGB").tobytes()
        animation.seek(animation.n_frames - 1)
        assert animation.convert("RGB").tobytes() != first


def test_generate_takes_demonstrations_and_one_refiner(smoke, command, tmp_path, photo):
    flags = ["--demos", photo, photo, "--query", photo, "--out", tmp_path / "g.png", "--reads", "tokens"]
    result = command(generate, "--run", smoke.out, *flags, "--gif", tmp_path / "g.gif", "--device", "cpu")
    assert result.status == 0, result.err
    assert f"{tmp_path / 'g.gif'}, with refined_tokens\n" in result.out
    assert "cosine error" not in result.out, "there is no truth to compare with"
    assert (tmp_path / "g.png").is_file()
    assert (tmp_path / "g.gif").is_file()


def test_sampled_generation_repeats_with_its_seed(smoke, command, no_pictures, tmp_path):
    outputs = []
    flags = ["--temperature", 1, "--top-k", 50, "--top-p", 0.9, "--count", 4, "--device", "cpu", "--seed"]
    for number, seed in enumerate((1, 1, 2)):
        result = command(generate, "--run", smoke.out, "--out", tmp_path / f"{number}.png", *flags, seed)
        assert result.status == 0, result.err
        outputs.append(result.out.split("\n", 1)[1])
    assert outputs[0] == outputs[1] != outputs[2]


# What the user can put right gets one line

MISTAKES = {
    train_refiner: [
        ("--data pictures", "--data pictures"),
        ("--data folder:{tmp}/nowhere", "nowhere"),
        ("--data folder:{tmp}/file", "file"),
        ("--num-demos 4", "--num-demos 4: expected a number of at least 1 and at most 3"),
        ("--num-demos 0", "--num-demos 0"),
        ("--image-size 20", "--image-size 20"),
        ("--image-size 24 --vqgan-factor 16", "--vqgan-factor"),
        ("--vqgan-factor 3", "--vqgan-factor"),
        ("--vqgan-codebook-size 0", "--vqgan-codebook-size 0"),
        ("--refiner-heads 57", "--refiner-heads 57"),
        ("--refiner-width 30 --refiner-heads 40", "--refiner-heads 40"),
        ("--gpt-layers 0", "--gpt-layers 0: expected a number of at least 1"),
        (f"--gpt-steps 1{400 * '0'}", "--gpt-steps 1000"),
        ("--gpt-width 1000000000", "backbone: its sizes are too large"),
        ("--gpt-head-width 0", "--gpt-head-width 0"),
        ("--gpt-steps 0", "--gpt-steps 0"),
        ("--gpt-dropout 1", "--gpt-dropout 1"),
        ("--refiner-dropout 1.0", "--refiner-dropout 1.0"),
        ("--refiner-rollouts 0", "--refiner-rollouts 0"),
        ("--refiner-rollouts 9999999", "--refiner-rollouts"),
        ("--gpt-layers many", "--gpt-layers"),
        ("--gpt-layerz 3", "--gpt-layerz"),
        ("--preset huge", "--preset"),
        ("--reads pixels", "--reads: pixels: expected one or more of tokens, states, query, joined by +"),
        ("--reads tokens+pixels", "--reads"),
        ("--reads", "--reads"),
        ("--reads=", "--reads"),
        ("--fresh everything", "--fresh"),
        ("--eval-sentences 3", "--eval-sentences"),
        ("--eval-sentences 16 --image-size 16 --seed 137", "--eval-sentences 16"),  # without inpainting
        ("--seed 99999999999999999999999", "--seed"),
        ("--seed -1", "--seed: -1: expected a whole number from 0 to 2^63 - 1"),
        ("--gpt-learning-rate -1", "--gpt-learning-rate"),
        ("--refiner-learning-rate inf", "--refiner-learning-rate inf"),
        ("--vqgan-learning-rate 0", "--vqgan-learning-rate 0"),
        ("--vqgan-beta -1", "--vqgan-beta"),
        ("--vqgan-beta inf", "--vqgan-beta"),
        ("--vqgan-gan-weight 0.5 --vqgan-gan-start nan", "--vqgan-gan-start"),
        ("--device meta", "--device meta"),
        ("--device abacus", "--device abacus"),
        ("--dtype int3", "--dtype"),
        ("--out {tmp}/file/below", "--out"),
        ("--palette rainbow", "--palette rainbow"),
        ("--weights {tmp}/weights.bin", "--weights"),
        ("--weights {tmp}/file/below.pt", "--weights"),
        ("--out {tmp} --weights {tmp}/backbone.pt", "--weights"),
    ],
    data: [
        ("--data pictures", "--data pictures"),
        ("--image-size 20", "--image-size 20"),
        ("--num-demos 4", "--num-demos 4"),
        ("--palette rainbow", "--palette rainbow"),
        ("--out {tmp}/file/below", "--out"),
    ],
    generate: [
        ("--run {tmp}/nowhere", "nowhere"),
        ("--run {tmp}", "tokenizer.pt"),
        ("--run {run}/backbone.pt", "backbone.pt: a single stage; give its folder"),
        ("--run {run} --query {tmp}/photo.png", "--query"),
        ("--run {run} --demos {tmp}/photo.png", "--demos"),
        ("--run {run} --query {tmp}/photo.png --demos {tmp}/photo.png", "--demos"),
        (
            "--run {run} --task edges --query {tmp}/photo.png --demos {tmp}/photo.png {tmp}/photo.png",
            "--demos",
        ),
        ("--run {run} --task edges --query {tmp}/file", "file"),
        ("--run {run} --task edges --query {tmp}/nowhere.png", "nowhere.png"),
        ("--run {run} --reads states", "--reads states"),
        ("--run {run} --reads pixels", "--reads"),
        ("--run {run} --data folder:{tmp}", "was not trained on a folder"),
        ("--run {run} --count 0", "--count"),
        ("--run {run} --gif {tmp}/film.mp4", "--gif"),
        ("--run {run} --out {tmp}/picture.doc", "--out"),
        ("--run {run} --scale 3", "--scale 3: enlarges the image of --save"),
        ("--run {run} --out {tmp}/file/below.png", "--out"),
        ("--run {run} --top-p 1.5", "--top-p"),
        ("--run {run} --top-k 5", "--top-k"),
        ("--run {run} --temperature hot", "--temperature"),
        ("--run {run} --temperature 1e-40", "--temperature"),
        ("--run {run} --out=", "--out"),
        ("--run {run} --task cook", "--task"),
        ("--run {run} --device abacus", "--device abacus"),
    ],
}


@pytest.mark.parametrize(
    ("module", "flags", "named"),
    [
        pytest.param(module, *case, id=f"{module.__name__} {case[0]}")
        for module in MISTAKES
        for case in MISTAKES[module]
    ],
)
def test_a_mistake_gets_one_line_and_exit_status_2(
    smoke, command, tmp_path, photo, monkeypatch, module, flags, named
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder, and not a picture")
    given = flags.format(tmp=tmp_path, run=smoke.out).split()
    defaults = ["--preset", "smoke"] if module is train_refiner and "--preset" not in given else []
    result = command(module, *defaults, *given)
    assert result.status == 2
    assert len(result.err) == 1
    assert named in result.err[0]
    assert not list(itertools.chain(tmp_path.rglob("*.pt"), tmp_path.rglob("generated.png")))


@pytest.mark.parametrize("name", ["tokenizer.pt", "backbone.pt", f"{REFINERS[-1]}.pt"])
def test_a_damaged_checkpoint_is_named(copied, command, tmp_path, name):
    folder, flags = copied
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    for module, given in ((train_refiner, flags), (generate, ["--run", folder, "--out", tmp_path / "g.png"])):
        result = command(module, *given)
        assert result.status == 2
        assert len(result.err) == 1
        assert str(folder / name) in result.err[0]


def shipped_scores(count: int) -> dict:
    """{method: {task: scores}} of the shipped weights, on the first test sentences."""
    tokenizer, backbone, refiners, _ = evaluate.load_run(generate.SHIPPED, CPU)
    sentences = data.Sentences(data.DataConfig(), seed=0)
    images, task = data.joined(sentences.batches("test", count))
    tokens = evaluate.encode_sentences(tokenizer, sentences, "test", count, CPU, FLOAT)
    written = evaluate.decode_methods(tokenizer, backbone, evaluate.by_method(refiners), tokens, FLOAT)
    scores = evaluate.score_methods(tokenizer, written, images[:, -1], task, FLOAT)
    return {
        m: {name: {k: round(s[k], 5) for k in ALLOWED} for name, s in by.items()} for m, by in scores.items()
    }


def test_the_shipped_weights_score_what_they_did():
    """Half precision, another machine, other threads: the numbers may move a little, not more."""
    committed = json.loads(generate.SHIPPED.with_suffix(".json").read_text())
    assert generate.SHIPPED.stat().st_size <= 8 * 2**20
    scores = shipped_scores(committed["sentences"])
    assert scores.keys() == committed["scores"].keys() == METHODS
    for method, by_task in committed["scores"].items():
        if method != "ar_sampled":  # a sample follows the smallest rounding
            for task, score in by_task.items():
                for name, difference in ALLOWED.items():
                    assert scores[method][task][name] == pytest.approx(score[name], abs=difference)
    ours = evaluate.method_name(READINGS[1])
    assert evaluate.gap_closed(scores, ours, "all") > 0.5


def test_generate_needs_no_training(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command(generate, "--device", "cpu", "--count", 2, "--task", "edges", "--gif", "edges.gif")
    assert result.status == 0, result.err
    assert "toy.pt" in result.out
    assert Image.open("generated.png").size[0] > 300
    assert Image.open("edges.gif").n_frames > 60


if __name__ == "__main__":  # after new weights: PYTHONPATH=. python tests/test_commands.py
    runtime.save(generate.SHIPPED.with_suffix(".json"), {"sentences": 96, "scores": shipped_scores(96)})
