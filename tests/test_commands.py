"""Training and generation as a user calls them: files, reuse, repeatability, and one-line errors."""

import itertools
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import generate
import study
import train_refiner
import vqgan
import vsr

METHODS = {
    *("vqgan_limit", "teacher_forced", "ar_greedy", "ar_sampled", "expected_embedding"),
    *("refined_tokens", "refined_hidden"),
}
PICTURES = ("error_by_position.png", "samples.png", "reconstructions.png", "training.png")
CHECKPOINTS = ("tokenizer.pt", "backbone.pt", "rollouts.pt", "refiner_tokens.pt", "refiner_hidden.pt")
TINY = [
    *("--preset", "smoke", "--image-size", "16", "--train-sentences", "64", "--eval-sentences", "24"),
    *("--vqgan-steps", "20", "--vqgan-channels", "16", "--gpt-steps", "20", "--gpt-width", "16", "--gpt-batch-size", "8"),
    *("--refiner-rollouts", "32", "--refiner-steps", "10", "--refiner-width", "16", "--refiner-batch-size", "8"),
    *("--device", "cpu", "--dtype", "float32"),
]


def metrics_of(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def contents(folder) -> dict:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


# Training: its parts


def test_refiner_training_leaves_backbone_and_codebook_alone():
    N, V = 6, 20
    torch.manual_seed(1)
    backbone = vsr.GPT(vsr.GPTConfig(layers=1, width=16), V, N, 4).eval().requires_grad_(False)
    codebook = F.normalize(torch.randn(V, 8), dim=-1)
    before = [codebook.clone(), *(p.clone() for p in backbone.parameters())]
    sentences = torch.randint(V, (32, 4, N))
    generated, _ = train_refiner.make_rollouts(backbone, sentences, torch.autocast("cpu", enabled=False))
    read = train_refiner.read_states(backbone, sentences, generated, torch.autocast("cpu", enabled=False))
    rollouts, targets = {"train": read, "val": read}, {"train": sentences[:, -1], "val": sentences[:, -1]}
    config = vsr.RefinerConfig(layers=1, width=16, rollouts=32, steps=5, batch_size=8)
    refiner, log = train_refiner.train_refiner(
        *(config, "context", codebook, (2, 3), rollouts, targets),
        *(torch.device("cpu"), torch.float32, 0),
    )
    after = [codebook, *backbone.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
    fresh = vsr.Refiner(config, "context", (2, 3), 8, 16)
    assert not torch.equal(refiner.move.weight, fresh.move.weight)
    assert log["loss"]
    assert log["val_loss"][0] > 0


@pytest.mark.parametrize("inputs", vsr.INPUTS)
def test_optimizers_hold_each_parameter_of_the_model_once(inputs):
    refiner = vsr.Refiner(vsr.RefinerConfig(width=16), inputs, (2, 3), 8, 16)
    optimizers = train_refiner.make_optimizers(refiner, 1e-3)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in refiner.parameters())


def test_first_difference_names_the_nested_field():
    old = {"gpt": {"layers": 2, "width": 64}, "seed": 0}
    assert data.first_difference(old, {"gpt": {"layers": 2, "width": 64}, "seed": 0}) is None
    for changed in ({"gpt": {"layers": 3, "width": 64}}, {"seed": 1}, {"gpt": {"heads": 2}}, {"vqgan": {"factor": 4}}):
        ((group, value),) = changed.items()
        name = f"{group}.{next(iter(value))}" if isinstance(value, dict) else group
        assert data.first_difference(old, {**old, **changed}).startswith(f"{name} = ")


# Training: the command


def test_smoke_run_writes_checkpoints_pictures_and_a_table(smoke):
    for name in PICTURES:
        with Image.open(smoke.out / name) as picture:
            picture.load()
            assert min(picture.size) > 100
    for name in CHECKPOINTS:
        data.load_checkpoint(smoke.out / name)
    assert {path.name for path in smoke.out.iterdir()} == {*PICTURES, *CHECKPOINTS, "metrics.json"}
    for method in METHODS:
        assert f"\n{method} " in smoke.stdout


def test_smoke_run_measures_everything(smoke):
    metrics = metrics_of(smoke.out)
    assert {"data", "vqgan", "gpt", "refiner", "seed", "dtype", "device"} <= metrics["config"].keys()
    assert metrics["config"]["gpt"]["steps"] == 40
    stages = {"tokenizer", "backbone", "rollouts", "refiner_tokens", "refiner_hidden", "evaluation"}
    assert stages <= metrics["seconds"].keys()
    assert all(seconds > 0 for seconds in metrics["seconds"].values())
    assert {"tokenizer", "backbone", "refiner_tokens", "refiner_hidden"} <= metrics["params"].keys()
    assert {"psnr_source", "psnr_target", "codes_used", "perplexity"} <= metrics["tokenizer"].keys()
    assert 1 <= metrics["tokenizer"]["perplexity"] <= metrics["tokenizer"]["codes_used"]
    for name in ("generate_tokens_per_s", "cached_speedup", "refine_images_per_s", "refine_share_of_generation_time"):
        assert metrics["throughput"][name] > 0
    assert 0.1 < metrics["peak_memory_gib"] < 8
    assert metrics["gap_closed"].keys() == {"expected_embedding", "refined_tokens", "refined_hidden"}
    assert metrics["methods"].keys() == METHODS
    for scores in metrics["methods"].values():
        assert scores.keys() == {"all", *data.TASKS}
        for score in scores.values():
            by_position = score["cosine_error_by_position"]
            assert len(by_position) == 64
            assert score["auc"] == pytest.approx(sum(by_position), rel=1e-4)
            assert score["cosine_error"] == pytest.approx(sum(by_position) / 64, rel=1e-4)
            assert 0 <= score["token_accuracy"] <= 1
            assert score["psnr"] > 0


def test_the_tokenizer_alone_makes_no_token_error_and_the_best_images(smoke):
    methods = metrics_of(smoke.out)["methods"]
    for name, limit in methods["vqgan_limit"].items():
        assert limit["cosine_error"] == limit["auc"] == 0
        assert limit["token_accuracy"] == 1
        assert limit["psnr"] == max(scores[name]["psnr"] for scores in methods.values())


def test_gap_closed_follows_from_the_scores(smoke):
    metrics = metrics_of(smoke.out)
    error = {method: scores["all"]["cosine_error"] for method, scores in metrics["methods"].items()}
    free = min(error["ar_greedy"], error["ar_sampled"])
    expected = (free - error["refined_hidden"]) / (free - error["teacher_forced"])
    assert metrics["gap_closed"]["refined_hidden"]["all"] == pytest.approx(expected)


def test_the_frozen_parts_of_a_run_are_the_trained_ones(smoke):
    """What `load_run` gives is what the checkpoints hold, and nothing of it can be trained by accident."""
    tokenizer, backbone, refiners, _ = train_refiner.load_run(smoke.out, torch.device("cpu"))
    for name, model in {"tokenizer": tokenizer, "backbone": backbone, "refiner_hidden": refiners["hidden"]}.items():
        for key, weight in data.load_checkpoint(smoke.out / f"{name}.pt")["model"].items():
            assert torch.equal(model.state_dict()[key], weight)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert list(refiners) == ["tokens", "hidden"]


def test_the_same_command_again_reuses_every_stage(copied, command):
    folder, flags = copied
    before = contents(folder)
    result = command(train_refiner, *flags)
    assert result.status == 0, result.err
    for name in CHECKPOINTS:
        assert f"reusing {folder / name}" in result.out
        assert (folder / name).stat().st_mtime_ns == before[name][0]
    assert json.loads(before["metrics.json"][1])["methods"] == metrics_of(folder)["methods"]


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


def test_fresh_refiner_trains_the_refiners_only(copied, command):
    folder, flags = copied
    before = contents(folder)
    result = command(train_refiner, *flags, "--refiner-steps", "5", "--fresh", "refiner")
    assert result.status == 0, result.err
    for name in CHECKPOINTS:
        changed = (folder / name).read_bytes() != before[name][1]
        assert changed == name.startswith("refiner")
    assert metrics_of(folder)["config"]["refiner"]["steps"] == 5


def test_fresh_removes_what_was_built_on_the_stage(copied, command):
    """Otherwise generate.py would run a refiner on a backbone that it was not trained for."""
    folder, flags = copied
    tokenizer = (folder / "tokenizer.pt").read_bytes()
    result = command(train_refiner, *flags, "--fresh", "backbone", "--gpt-steps", "5", "--inputs", "tokens")
    assert result.status == 0, result.err
    assert (folder / "tokenizer.pt").read_bytes() == tokenizer
    assert not (folder / "refiner_hidden.pt").exists()


def test_fresh_loses_nothing_when_an_earlier_stage_refuses(copied, command):
    folder, flags = copied
    before = contents(folder)
    result = command(train_refiner, *flags, "--gpt-layers", "3", "--fresh", "refiner")
    assert result.status == 2
    assert contents(folder) == before


@pytest.mark.parametrize("stage", ["tokenizer", "backbone", "refiner_hidden"])
def test_a_checkpoint_of_another_version_is_named(copied, command, stage):
    folder, flags = copied
    part = {"tokenizer": "vqgan", "backbone": "gpt", "refiner_hidden": "refiner"}[stage]
    checkpoint = data.load_checkpoint(folder / f"{stage}.pt")
    checkpoint["config"][part]["field_of_old"] = 1
    data.save_checkpoint(folder / f"{stage}.pt", checkpoint)
    result = command(train_refiner, *flags)
    assert (result.status, len(result.err)) == (2, 1)
    assert f"{stage}.pt: the checkpoint of another model or another version" in result.err[0]


def test_a_folder_that_has_changed_is_not_put_together_with_models_of_the_old_one(command, tmp_path):
    """Another picture changes which ones are drawn: the old rollouts would be paired with other sentences' targets."""
    generator = torch.Generator().manual_seed(0)
    for split in data.SPLITS:
        for number in range(4):
            pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
            path = tmp_path / "pictures" / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path)
    flags = [*TINY, "--data", f"folder:{tmp_path / 'pictures'}", "--out", tmp_path / "run", "--inputs", "tokens"]
    assert command(train_refiner, *flags).status == 0
    Image.new("RGB", (16, 16), "red").save(tmp_path / "pictures" / "train" / "more.png")
    result = command(train_refiner, *flags, "hidden")
    assert (result.status, len(result.err)) == (2, 1)
    assert "tokenizer.pt was made with pictures = " in result.err[0]

    # One's own demonstrations need the folder no more
    shutil.rmtree(tmp_path / "pictures" / "val")
    own = [tmp_path / "pictures" / "train" / f"{number}.png" for number in range(3)]
    show = ["--run", tmp_path / "run", "--out", tmp_path / "picture.png", "--query", own[0]]
    assert command(generate, *show, "--demos", *own[1:]).status == 0
    assert (tmp_path / "picture.png").is_file()
    assert "too few images" in command(generate, *show, "--task", "edges").err[-1]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(command, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = command(train_refiner, *TINY, "--seed", seed, "--inputs", "tokens", "--out", tmp_path / name)
        assert result.status == 0, result.err
    a, b, c = (metrics_of(tmp_path / name)["methods"] for name in "abc")
    assert a == b
    assert a != c


def test_all_three_refiners_two_demonstrations_a_folder_and_bfloat16(command, tmp_path):
    for i in range(100):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    flags = [*TINY, "--data", f"folder:{tmp_path}", "--num-demos", "2", "--dtype", "bfloat16", "--out", tmp_path / "run"]
    result = command(train_refiner, *flags, "--inputs", "tokens", "hidden", "context")
    assert result.status == 0, result.err
    assert metrics_of(tmp_path / "run")["methods"].keys() == {*METHODS, "refined_context"}


@pytest.mark.parametrize("preset", ["smoke", "toy", "paper"])
def test_dry_run_prints_sizes_and_writes_nothing(command, tmp_path, monkeypatch, preset):
    monkeypatch.chdir(tmp_path)
    result = command(train_refiner, "--preset", preset, "--dry-run")
    assert result.status == 0
    for name in ("tokenizer", "backbone", "refiner_tokens", "refiner_hidden"):
        assert any(line.split()[0] == name and "parameters" in line for line in result.out.splitlines())
    assert not list(tmp_path.iterdir())


def test_adversarial_comparison(command, tmp_path):
    flags = "--compare --image-size 16 --vqgan-steps 3 --vqgan-channels 16 --vqgan-batch-size 4 --eval-sentences 24 --device cpu"
    result = command(vqgan, *flags.split(), "--out", tmp_path)
    assert result.status == 0, result.err
    results = json.loads((tmp_path / "adversarial.json").read_text())
    assert len(results["without"]) == len(results["with"]) == 3
    assert results["without"][0]["psnr_target"] != results["with"][0]["psnr_target"]
    assert (tmp_path / "adversarial.png").is_file()


# Generation


@pytest.fixture
def photo(tmp_path):
    Image.linear_gradient("L").resize((50, 40)).convert("RGB").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_generate_shows_sentences_of_the_test_split(smoke, command, tmp_path):
    result = command(generate, "--run", smoke.out, "--out", tmp_path / "g.png", "--count", 3, "--device", "cpu")
    assert result.status == 0, result.err
    assert "3 sentences" in result.out
    assert "cosine error" in result.out
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


def test_generate_takes_demonstrations(smoke, command, tmp_path, photo):
    flags = ["--demos", photo, photo, "--query", photo, "--out", tmp_path / "g.png", "--inputs", "tokens"]
    result = command(generate, "--run", smoke.out, *flags, "--gif", tmp_path / "g.gif", "--device", "cpu")
    assert result.status == 0, result.err
    assert "refiner 'tokens'" in result.out
    assert "cosine error" not in result.out, "there is no truth to compare with"
    assert (tmp_path / "g.png").is_file()
    assert (tmp_path / "g.gif").is_file()


def test_weights_in_one_file_are_the_run_in_half_precision(smoke, copied, command, tmp_path):
    folder, flags = copied
    path = tmp_path / "weights" / "small.pt"
    result = command(train_refiner, *flags, "--weights", path)
    assert result.status == 0, result.err
    run, small = (train_refiner.load_run(p, torch.device("cpu")) for p in (folder, path))
    for a, b in zip((*run[:2], *run[2].values()), (*small[:2], *small[2].values()), strict=True):
        for name, value in a.state_dict().items():
            assert torch.equal(value.half().float(), b.state_dict()[name].float())
    assert run[2].keys() == small[2].keys()
    assert path.stat().st_size < 0.6 * sum((folder / name).stat().st_size for name in CHECKPOINTS if name != "rollouts.pt")
    scores = json.loads(path.with_suffix(".json").read_text())["scores"]
    for method, score in scores.items():  # half of the sentences, so not the same numbers
        assert score["all"]["psnr"] == pytest.approx(metrics_of(folder)["methods"][method]["all"]["psnr"], abs=3)
    result = command(generate, "--run", path, "--out", tmp_path / "g.png", "--device", "cpu")
    assert result.status == 0, result.err


def test_sampled_generation_repeats_with_its_seed(smoke, command, tmp_path):
    outputs = []
    for number, seed in enumerate((1, 1, 2)):
        flags = ["--temperature", 1, "--top-k", 50, "--top-p", 0.9, "--seed", seed, "--out", tmp_path / f"{number}.png"]
        result = command(generate, "--run", smoke.out, *flags, "--device", "cpu")
        outputs.append(result.out.split("\n", 1)[1])
    assert outputs[0] == outputs[1] != outputs[2]


# What the user can put right gets one line

MISTAKES = {
    train_refiner: [
        ("--data pictures", "--data pictures"),
        ("--data folder:{tmp}/nowhere", "nowhere"),
        ("--data folder:{tmp}/file", "file"),
        ("--num-demos 4", "--num-demos 4"),
        ("--image-size 20", "--image-size 20"),
        ("--image-size 24 --vqgan-factor 16", "--vqgan-factor"),
        ("--vqgan-factor 3", "--vqgan-factor 3"),
        ("--refiner-heads 7", "--refiner-heads 7"),
        ("--gpt-head-width 0", "--gpt-head-width 0"),
        ("--gpt-steps 0", "--gpt-steps 0"),
        ("--refiner-rollouts 9999999", "--refiner-rollouts"),
        ("--gpt-layers many", "--gpt-layers"),
        ("--gpt-layerz 3", "--gpt-layerz"),
        ("--preset huge", "--preset"),
        ("--inputs pixels", "--inputs"),
        ("--fresh everything", "--fresh"),
        ("--eval-sentences 3", "--eval-sentences"),
        ("--eval-sentences 16 --image-size 16 --seed 137", "--eval-sentences 16"),  # no inpainting among the 16
        ("--seed 99999999999999999999999", "--seed"),
        ("--seed -1", "--seed"),
        ("--gpt-learning-rate -1", "--gpt-learning-rate"),
        ("--vqgan-beta -1", "--vqgan-beta"),
        ("--vqgan-beta inf", "--vqgan-beta"),
        ("--vqgan-gan-weight 0.5 --vqgan-gan-start nan", "--vqgan-gan-start"),
        ("--device meta", "--device meta"),
        ("--device abacus", "--device abacus"),
        ("--dtype int3", "--dtype int3"),
        ("--out {tmp}/file/below", "--out"),
        ("--palette rainbow", "--palette rainbow"),
        ("--weights {tmp}/weights.bin", "--weights"),
        ("--weights {tmp}/file/below.pt", "--weights"),
        ("--out {tmp} --weights {tmp}/backbone.pt", "--weights"),
    ],
    vqgan: [("--vqgan-codebook-size 0", "--vqgan-codebook-size 0"), ("--out {tmp}/file/below", "--out")],
    data: [
        ("--data pictures", "--data pictures"),
        ("--image-size 20", "--image-size 20"),
        ("--palette rainbow", "--palette rainbow"),
        ("--out {tmp}/file/below", "--out"),
    ],
    study: [
        ("pictures", "pictures"),
        ("", "STUDY"),
        ("main --seeds 0", "--seeds 0"),
        ("main --seeds several", "--seeds"),
        ("main --study-samples 0", "--study-samples 0"),
        ("main --study-lora-learning-rate -1", "--study-lora-learning-rate -1"),
        ("main --gpt-steps 0", "--gpt-steps 0"),
        ("main --preset paper", "--preset"),
        ("main --device abacus", "--device abacus"),
        ("main --out {tmp}/file/below", "--out"),
        ("main --work {tmp}/file/below", "--work"),
        ("positions --out {tmp}/results", "positions"),
    ],
    generate: [
        ("--run {tmp}/nowhere", "nowhere"),
        ("--run {tmp}", "tokenizer.pt"),
        ("--run {run} --query {tmp}/photo.png", "--query"),
        ("--run {run} --demos {tmp}/photo.png", "--demos"),
        ("--run {run} --query {tmp}/photo.png --demos {tmp}/photo.png", "--demos"),
        ("--run {run} --task edges --query {tmp}/photo.png --demos {tmp}/photo.png {tmp}/photo.png", "--demos"),
        ("--run {run} --task edges --query {tmp}/file", "file"),
        ("--run {run} --task edges --query {tmp}/nowhere.png", "nowhere.png"),
        ("--run {run} --inputs context", "--inputs context"),
        ("--run {run} --count 0", "--count 0"),
        ("--run {run} --gif {tmp}/film.mp4", "--gif"),
        ("--run {run} --out {tmp}/picture.doc", "--out"),
        ("--run {run} --out {tmp}/file/below.png", "--out"),
        ("--run {run} --top-p 1.5", "--top-p"),
        ("--run {run} --temperature hot", "--temperature"),
        ("--run {run} --temperature 1e-40", "--temperature"),
        ("--run {run} --out=", "--out"),
        ("--run {run} --task cook", "--task"),
        ("--run {run} --device abacus", "--device abacus"),
    ],
}


@pytest.mark.parametrize(
    ("module", "flags", "named"),
    [pytest.param(module, *case, id=f"{module.__name__} {case[0]}") for module in MISTAKES for case in MISTAKES[module]],
)
def test_a_mistake_gets_one_line_and_exit_status_2(smoke, command, tmp_path, photo, monkeypatch, module, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder, and not a picture")
    given = flags.format(tmp=tmp_path, run=smoke.out).split()
    defaults = ["--preset", "smoke"] if module in (train_refiner, study) and "--preset" not in given else []
    result = command(module, *defaults, *given)
    assert result.status == 2
    assert len(result.err) == 1
    assert named in result.err[0]
    assert not list(itertools.chain(tmp_path.rglob("*.pt"), tmp_path.rglob("generated.png")))


@pytest.mark.parametrize("name", ["tokenizer.pt", "backbone.pt", "refiner_hidden.pt"])
def test_a_damaged_checkpoint_is_named(copied, command, tmp_path, name):
    folder, flags = copied
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    for module, given in ((train_refiner, flags), (generate, ["--run", folder, "--out", tmp_path / "g.png"])):
        result = command(module, *given)
        assert result.status == 2
        assert len(result.err) == 1
        assert str(folder / name) in result.err[0]


def test_the_shipped_weights_score_what_they_did():
    """Half precision, another machine, another number of threads: the numbers may move a little, not more."""
    committed = json.loads(generate.SHIPPED.with_suffix(".json").read_text())
    assert generate.SHIPPED.stat().st_size <= 8 * 2**20
    sentences = data.Sentences(data.DataConfig(), seed=0)
    scores = train_refiner.score_weights(generate.SHIPPED, sentences, torch.device("cpu"), committed["sentences"])
    assert scores.keys() == committed["scores"].keys() == METHODS
    for method, by_task in committed["scores"].items():
        if method != "ar_sampled":  # a sample follows the smallest rounding
            for task, score in by_task.items():
                assert scores[method][task]["cosine_error"] == pytest.approx(score["cosine_error"], abs=0.002)
                assert scores[method][task]["token_accuracy"] == pytest.approx(score["token_accuracy"], abs=0.005)
                assert scores[method][task]["psnr"] == pytest.approx(score["psnr"], abs=0.15)
                assert scores[method][task]["ssim"] == pytest.approx(score["ssim"], abs=0.01)
    assert vsr.gap_closed(*[scores[m]["all"]["cosine_error"] for m in ("ar_greedy", "refined_hidden", "teacher_forced")]) > 0.75


def test_generate_needs_no_training(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command(generate, "--device", "cpu", "--count", 2, "--task", "edges", "--gif", "edges.gif")
    assert result.status == 0, result.err
    assert "toy.pt" in result.out
    assert Image.open("generated.png").size[0] > 300
    assert Image.open("edges.gif").n_frames > 60
