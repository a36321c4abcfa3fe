"""What `generate.py` shows and says: pictures, error maps and numbers by name, and the animation."""

import itertools
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import data
import evaluate
import generate
import runtime
from vqgan import VQGANConfig
from vsr import GPTConfig, RefinerConfig

CPU = torch.device("cpu")
READINGS = ("tokens", "tokens+query", "query")
REFINED = ("refined_tokens", "refined_tokens+query", "parallel")
CONFIG = {
    "data": {"data": "shapes", "image_size": 16, "num_demos": 1, "palette": "fixed"},
    "vqgan": asdict(VQGANConfig(codebook_size=24, code_dim=6, channels=16, res_blocks=1)),
    "gpt": asdict(GPTConfig(layers=1, heads=2, width=16, head_width=8)),
    "refiner": asdict(RefinerConfig(layers=1, heads=2, width=16)),
    "run": {"seed": 5, "dtype": "float32"},  # not the seed of any flag below
}


def make_run(folder, seed: int = 0, readings=READINGS):
    """A run as a training leaves it, but for its weights: random, and so large that no two models agree."""
    torch.manual_seed(seed)
    made_of, folder = {}, folder / "run"
    for name in ("tokenizer", "backbone", *(f"refiner_{reading}" for reading in readings)):
        kind, _, reading = name.partition("_")
        config = {**CONFIG, "reads": reading, "weights": dict(made_of)}
        model = evaluate.make_model(kind, config).requires_grad_(False)
        if kind == "tokenizer":  # its codes lie on what the encoder makes of scenes, and use all colours
            images = data.Sentences(data.DataConfig(**CONFIG["data"]))("train", 0, 32)[0].flatten(0, 1)
            model.encoder[-1].bias -= model.encoder(images).mean((0, 2, 3))
            latents = model.latents(images).flatten(0, 1)
            chosen = latents[torch.randperm(len(latents))[:24]]
            model.codebook.weight.copy_(chosen * (0.5 + torch.rand(24, 1)))  # of any norm
            model.decoder[-1].bias.zero_()
            model.decoder[-1].weight *= 1 / model.decode_embeddings(model.embed(model.encode(images))).std()
        elif kind == "backbone":
            for parameter in model.parameters():
                parameter.normal_() if parameter.ndim == 2 else None
        else:
            model.to_code.weight.normal_(std=0.15 if "tokens" in reading else 0.5)
        runtime.save(folder / f"{name}.pt", {"config": config, "model": model.state_dict()})
        if kind != "refiner":
            made_of[kind] = runtime.fingerprint(model.state_dict())
    return folder


def cosine_errors(tokens, target_tokens, codebook) -> torch.Tensor:
    return 1 - F.cosine_similarity(codebook[tokens], codebook[target_tokens], dim=-1)


def psnr(images, truth) -> float:
    """The mean over images of the PSNR in dB, for a range of 2."""
    return (10 * torch.log10(4 / (images - truth).square().mean((1, 2, 3)))).mean().item()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, its models, and the sentences that its evaluation takes."""
    folder = make_run(tmp_path_factory.mktemp("generate"))
    tokenizer, backbone, refiners, _ = evaluate.load_run(folder, CPU)
    images, task = data.Sentences(data.DataConfig(**CONFIG["data"]), seed=5)("test", 0, 64)
    models = {"tokenizer": tokenizer, "backbone": backbone, "refiners": refiners}
    return SimpleNamespace(folder=folder, images=images, task=task, **models)


@torch.no_grad()
def expected(run, images, sampling=(), sample_seed: int = 0) -> SimpleNamespace:
    """What the models make of sentences: tokens and images by name, the true tokens, errors by name."""
    tokens = run.tokenizer.encode(images.flatten(0, 1)).view(*images.shape[:2], -1)
    generator = torch.Generator().manual_seed(sample_seed)
    rollout = run.backbone.generate(tokens[:, :-1].flatten(1), 16, *sampling, generator=generator)
    codebook = F.normalize(run.tokenizer.codebook.weight, dim=-1)
    written = {"generated": rollout.tokens}
    for name, refiner in zip(REFINED, run.refiners.values(), strict=True):
        refined = refiner(codebook[rollout.tokens], rollout.states, rollout.query)
        written[name] = (refined @ codebook.T).argmax(-1)
    made = {name: run.tokenizer.decode(y) for name, y in written.items()}
    errors = {name: cosine_errors(y, tokens[:, -1], codebook) for name, y in written.items()}
    return SimpleNamespace(
        written=written, made=made, errors=errors, target_tokens=tokens[:, -1], codebook=codebook
    )


@pytest.fixture
def show(run, command, tmp_path, monkeypatch):
    """show(*flags): what the command shows, {title: (rows, ...)}, the scores by name, and what it says."""

    def show(*flags, source=("--run", run.folder)):
        pictures = []
        monkeypatch.setattr(data, "save_picture", lambda *args, **kwargs: pictures.append((args, kwargs)))
        given = [*source, "--out", tmp_path / "g.png", "--device", "cpu", *flags]
        result = command(generate, *given)
        assert result.status == 0, result.err
        ((path, rows), labels) = pictures[0]
        assert path == str(tmp_path / "g.png")
        titles = labels["column_labels"]
        assert all(len(row) == len(titles) == len(set(titles)) for row in rows)
        scores = [line.split() for line in result.out.splitlines() if "cosine error" in line]
        scores = {words[0]: (words[3].rstrip(","), words[5]) for words in scores}
        columns = [torch.stack(column) for column in zip(*rows, strict=True)]
        columns = dict(zip(titles, columns, strict=True))
        return SimpleNamespace(columns=columns, scores=scores, out=result.out)

    return show


@pytest.fixture
def photo(tmp_path):
    """A picture of four colours, and what is read of it."""
    picture = Image.new("RGB", (24, 16), "white")
    for box, colour in (((0, 0, 12, 8), "red"), ((12, 0, 24, 8), "blue"), ((0, 8, 12, 16), "green")):
        picture.paste(colour, box)
    picture.save(tmp_path / "photo.png")
    return SimpleNamespace(path=tmp_path / "photo.png", image=data.load_image(tmp_path / "photo.png", 16))


def assert_shown(shown, run, images, sampling=(), sample_seed=0):
    """All columns and all numbers are those of these sentences."""
    made = expected(run, images, sampling, sample_seed)
    columns = {"source 1": images[:, 0], "target 1": images[:, 1], "query": images[:, 2]}
    columns |= {**made.made, "truth": images[:, 3]}
    columns |= {f"error of {name}": error.view(-1, 4, 4) for name, error in made.errors.items()}
    assert list(shown.columns) == list(columns)
    for title, column in columns.items():
        assert torch.allclose(shown.columns[title], column, atol=1e-5), title
    assert list(shown.scores) == ["generated", *REFINED]
    for name, (error, decibels) in shown.scores.items():
        assert float(error) == pytest.approx(made.errors[name].mean().item(), abs=6e-5)
        assert float(decibels) == pytest.approx(psnr(made.made[name], images[:, 3]), abs=6e-3)


def test_generate_shows_the_first_sentences_of_the_evaluation_and_what_each_model_makes_of_them(run, show):
    shown = show()
    assert_shown(shown, run, run.images[:8])
    pictures = [column for title, column in shown.columns.items() if column.ndim == 4]
    maps = [column for title, column in shown.columns.items() if column.ndim == 3]
    for columns in (pictures, maps):  # two that are the same could stand under each other's names
        assert all((a - b).abs().max() > 0.1 for i, a in enumerate(columns) for b in columns[:i])
    assert len(set(shown.scores.values())) == 4
    assert "8 sentences" in shown.out


@pytest.mark.parametrize("count", [1, 16])
def test_count_is_how_many_sentences_are_shown(run, show, count):
    assert_shown(show("--count", count), run, run.images[:count])


@pytest.mark.parametrize("number", range(3), ids=data.TASKS)
def test_a_task_shows_its_first_sentences_alone(run, show, number):
    shown = show("--count", 5, "--task", data.TASKS[number])
    assert_shown(shown, run, run.images[run.task == number][:5])


def test_another_seed_shows_other_sentences_of_the_test_split(run, show):
    images = data.Sentences(data.DataConfig(**CONFIG["data"]), seed=5)("test", 3, 64)[0]
    assert_shown(show("--count", 2, "--seed", 3), run, images[:2])
    assert not torch.equal(images[:2], run.images[:2])


def test_temperature_top_k_top_p_and_the_seed_are_those_of_the_flags(run, show):
    """Each of the three changes what is drawn, and what is drawn is what the backbone draws with them."""
    drawn = [show("--count", 4).columns["generated"]]
    for sampling in ((0.8,), (2.0,), (2.0, 3), (2.0, 0, 0.6), (2.0, 3, 0.6)):
        given = zip(("--temperature", "--top-k", "--top-p"), sampling, strict=False)
        shown = show("--count", 4, *(part for flag in given for part in flag))
        assert_shown(shown, run, run.images[:4], sampling)
        assert not any(torch.equal(shown.columns["generated"], other) for other in drawn)
        drawn.append(shown.columns["generated"])
    images = data.Sentences(data.DataConfig(**CONFIG["data"]), seed=5)("test", 1, 64)[0][:4]
    shown = show("--count", 4, "--seed", 1, "--temperature", 2)
    assert_shown(shown, run, images, (2.0,), sample_seed=1)
    by_another_seed = expected(run, images, (2.0,), sample_seed=0).made["generated"]
    assert not torch.equal(shown.columns["generated"], by_another_seed)


@pytest.mark.parametrize("reading", READINGS)
def test_one_refiner_is_shown_under_its_own_name(run, show, reading):
    shown = show("--reads", reading, "--count", 3)
    name = evaluate.method_name(reading)
    assert list(shown.scores) == ["generated", name]
    assert [title for title in shown.columns if title.startswith(("refined", "parallel"))] == [name]
    made = expected(run, run.images[:3])
    assert torch.allclose(shown.columns[name], made.made[name], atol=1e-5)
    assert torch.allclose(shown.columns[f"error of {name}"].flatten(1), made.errors[name], atol=1e-5)


@pytest.mark.parametrize("number", range(3), ids=data.TASKS)
def test_a_scene_is_completed_after_the_first_demonstrations_of_its_task(run, show, photo, number):
    """The task makes the source and the truth of it; the scene is the one that was given."""
    task = data.TASKS[number]
    shown = show("--task", task, "--query", photo.path, "--seed", 2)
    images, tasks = data.Sentences(data.DataConfig(**CONFIG["data"]), seed=5)("test", 2, 64)
    hole = torch.Generator().manual_seed(2)
    source, target = data.TASK_FUNCTIONS[task](photo.image[None], hole)
    images = torch.cat([images[tasks == number][:1, :2], source[None], target[None]], dim=1)
    assert torch.equal(images[0, 2 if task == "edges" else 3], photo.image)
    assert_shown(shown, run, images)


def test_own_demonstrations_are_shown_in_their_order_and_no_truth_is_made_up(run, show, photo, tmp_path):
    others = [tmp_path / "source.png", tmp_path / "target.png"]
    for path, turn in zip(others, (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180), strict=True):
        Image.open(photo.path).transpose(turn).save(path)
    shown = show("--demos", *others, "--query", photo.path)
    prompt = torch.stack([*(data.load_image(path, 16) for path in others), photo.image])
    images = torch.cat([prompt, torch.zeros(1, 3, 16, 16)])[None]
    made = expected(run, images)
    columns = {"source 1": prompt[:1], "target 1": prompt[1:2], "query": prompt[2:], **made.made}
    for name in REFINED:
        changed = cosine_errors(made.written[name], made.written["generated"], made.codebook)
        columns[f"changed by {name}"] = changed.view(-1, 4, 4)
    assert list(shown.columns) == list(columns)
    for title, column in columns.items():
        assert torch.allclose(shown.columns[title], column, atol=1e-5), title
    assert not shown.scores


def test_the_run_is_the_one_that_is_named_then_the_default_one(run, show, tmp_path, monkeypatch):
    make_run(tmp_path / "runs", seed=1).rename(tmp_path / "runs" / "toy")
    tokenizer, backbone, refiners, _ = evaluate.load_run(tmp_path / "runs" / "toy", CPU)
    other = SimpleNamespace(tokenizer=tokenizer, backbone=backbone, refiners=refiners)
    monkeypatch.chdir(tmp_path)
    named, default = show("--count", 2), show("--count", 2, source=())
    assert_shown(named, run, run.images[:2])
    assert_shown(default, other, run.images[:2])
    assert f"with the models of {run.folder}\n" in named.out
    assert "with the models of runs/toy\n" in default.out


def test_a_training_that_was_stopped_does_not_hide_the_shipped_weights(run, show, tmp_path, monkeypatch):
    make_run(tmp_path / "runs", seed=1).rename(tmp_path / "runs" / "toy")
    for path in (tmp_path / "runs" / "toy").glob("refiner_*.pt"):
        path.unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "SHIPPED", run.folder)
    assert_shown(show("--count", 2, source=()), run, run.images[:2])


# The animation


@pytest.fixture
def animation(monkeypatch):
    """The frames that are about to be written, [{title: panel (256, 256, 3) uint8}], and their times."""
    titles, frames, times, draw = [], [], [], ImageDraw.ImageDraw.text

    def text(self, xy, title, **options):
        titles.append((title, xy[0]))
        return draw(self, xy, title, **options)

    def save(image, path, **options):
        times.extend(options["duration"])
        starts = [number for number, (title, _) in enumerate(titles) if title == "query"]
        of_frame = [titles[i:j] for i, j in itertools.pairwise([*starts, len(titles)])]
        for frame, panels in zip([image, *options["append_images"]], of_frame, strict=True):
            crops = {title: frame.crop((x, 28, x + 256, 28 + 256)) for title, x in panels}
            frames.append({title: torch.from_numpy(np.array(crop)) for title, crop in crops.items()})

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    monkeypatch.setattr(Image.Image, "save", save)
    monkeypatch.setattr(runtime, "write_whole", lambda path, write: write(path))
    monkeypatch.setattr(runtime, "check_writable", lambda *_: None)
    return SimpleNamespace(frames=frames, times=times)


def enlarged(image) -> torch.Tensor:
    """(3, 16, 16) in [-1, 1] -> (256, 256, 3) uint8."""
    pixels = data.to_uint8(image).permute(1, 2, 0)
    return pixels.repeat_interleave(16, 0).repeat_interleave(16, 1)


def patches(panel) -> torch.Tensor:
    """(256, 256, 3) -> the patch of each of 4 x 4 tokens, (16, 64 * 64, 3), as numbers one can subtract."""
    return panel.view(4, 64, 4, 64, 3).transpose(1, 2).reshape(16, -1, 3).int()


def marked(panel, image, known: int = 16) -> list[bool]:
    """Which of the first tokens are not shown as they are in the image, but redder."""
    shown, plain = patches(panel)[:known], patches(enlarged(image))[:known]
    changed = (shown != plain).flatten(1).any(1)
    redder = (shown[..., 0] >= plain[..., 0]) & (shown[..., 1] <= plain[..., 1])
    assert redder[changed].all()
    return changed.tolist()


def test_the_animation_is_of_the_largest_error_and_of_our_refiner(run, show, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(generate, "save_animation", lambda *args: given.append(args))
    shown = show("--gif", tmp_path / "x.gif", "--count", 4)
    made = expected(run, run.images[:4])
    i = made.errors["generated"].mean(1).argmax()
    assert i > 0, "not the first one by chance"
    assert f"wrote {tmp_path / 'x.gif'}, with refined_tokens+query\n" in shown.out
    ((path, _, *tensors),) = given
    assert path == str(tmp_path / "x.gif")
    pictures = (run.images[i, 2], run.images[i, 3])
    tokens = (made.written["generated"][i], made.written["refined_tokens+query"][i], made.target_tokens[i])
    for found, right in zip(tensors, (*pictures, *tokens), strict=True):
        assert torch.equal(found, right)


def test_the_animation_shows_and_marks_what_its_captions_say(run, animation):
    query, truth = torch.rand(2, 3, 16, 16) * 2 - 1
    target_tokens, others = torch.randperm(24)[:16], torch.randperm(24)[:16]
    written, refined = target_tokens.clone(), target_tokens.clone()
    written[[1, 2, 7, 8, 13]], refined[[2, 4, 15]] = others[:5], others[5:8]
    wrong = [(y != target_tokens).tolist() for y in (written, refined)]
    before, after = run.tokenizer.decode(torch.stack([written, refined]))
    generate.save_animation("x.gif", run.tokenizer, query, truth, written, refined, target_tokens)

    frames = animation.frames
    assert len(frames) == len(animation.times) == 16 + 4
    for frame in frames:
        first, _, last = frame
        assert (first, last) == ("query", "truth")
        assert torch.equal(frame["query"], enlarged(query))
        assert torch.equal(frame["truth"], enlarged(truth))
    captions = [list(frame)[1] for frame in frames]
    assert captions[:16] == [f"written: {t} of 16, {sum(wrong[0][:t])} wrong" for t in range(16)]
    finished = [f"written, {sum(wrong[0])} wrong", f"refined, one pass, {sum(wrong[1])} wrong"]
    assert captions[16:] == [*finished, "generated", "refined"]

    panels = [frame[caption] for frame, caption in zip(frames, captions, strict=True)]
    for t, panel in enumerate(panels[:16]):
        unknown = patches(panel)[t:]
        assert (unknown == unknown[0, 0]).all(), "what is not written yet is of one colour"
        assert unknown.max() < 40, "and dark"
        assert marked(panel, before, t) == wrong[0][:t]
    assert marked(panels[16], before) == wrong[0]
    assert marked(panels[17], after) == wrong[1]
    assert torch.equal(panels[18], enlarged(before))
    assert torch.equal(panels[19], enlarged(after))
    assert min(animation.times[16:]) > max(animation.times[:16]), "the finished images stay longer"


def test_the_tint_of_an_error_grows_with_it(run, animation, monkeypatch):
    """Two tokens are wrong, one by much more than the other."""
    codebook = run.tokenizer.codebook.vectors
    target_tokens = torch.zeros(16, dtype=torch.long)
    error = cosine_errors(torch.arange(24), target_tokens.new_zeros(24), codebook)
    written = target_tokens.clone()
    written[3], written[9] = error[1:].argmin() + 1, error.argmax()
    grey = torch.zeros(3, 16, 16)
    monkeypatch.setattr(run.tokenizer, "decode", lambda tokens: grey.expand(len(tokens), 3, 16, 16))
    generate.save_animation("x.gif", run.tokenizer, grey, grey, written, written, target_tokens)
    panel = animation.frames[16]["written, 2 wrong"]
    inside = patches(panel)[:, 64 * 32 + 32, 0]  # red in the middle of each patch
    assert [t for t in range(16) if inside[t] > inside[0]] == [3, 9]
    assert inside[9] > inside[3] + 30


def test_without_a_truth_the_animation_marks_nothing(run, show, photo, animation):
    own = ("--demos", photo.path, photo.path, "--query", photo.path)
    shown = show("--gif", "own.gif", "--reads", "query", *own)
    assert "wrote own.gif, with parallel\n" in shown.out
    made = {name: shown.columns[name][0] for name in ("generated", "parallel")}
    assert {len(frame) for frame in animation.frames} == {2}
    frames = [frame for frame in animation.frames if " of " not in list(frame)[1]]
    assert [list(frame)[1] for frame in frames] == ["written", "refined, one pass", "generated", "refined"]
    for frame, name in zip(frames, ("generated", "parallel") * 2, strict=True):
        assert torch.equal(frame[list(frame)[1]], enlarged(made[name]))


def test_an_animation_that_is_written_can_be_played(run, tmp_path):
    images = run.images[0]
    tokens = torch.arange(16)
    generate.save_animation(tmp_path / "x.gif", run.tokenizer, images[2], images[3], tokens, tokens, tokens)
    with Image.open(tmp_path / "x.gif") as played:
        assert played.n_frames == 20
        assert played.info["loop"] == 0


def test_what_is_shown_as_refined_is_no_control_if_there_is_a_refiner(show, tmp_path):
    folder = make_run(tmp_path, readings=("tokens", "query"))
    shown = show("--save", tmp_path / "r.png", "--count", 1, source=("--run", folder))
    assert "pixels, with refined_tokens\n" in shown.out


def test_the_refined_image_is_saved_alone_at_the_size_of_the_model_or_larger(run, show, tmp_path):
    found = expected(run, run.images[:4])
    made, i = found.made, found.errors["generated"].mean(1).argmax()
    shown = show("--save", tmp_path / "r.png", "--count", 4)
    pixels = data.to_float(Image.open(tmp_path / "r.png"))
    assert (pixels - made["refined_tokens+query"][i]).abs().max() < 0.01
    assert f"wrote {tmp_path / 'r.png'}, 16 x 16 pixels, with refined_tokens+query\n" in shown.out
    show("--save", tmp_path / "r.png", "--scale", 5, "--reads", "tokens", "--count", 1)
    larger = Image.open(tmp_path / "r.png")
    assert larger.size == (80, 80)
    small = data.to_float(larger.resize((16, 16), Image.Resampling.BOX))
    assert torch.corrcoef(torch.stack([small.flatten(), made["refined_tokens"][0].flatten()]))[0, 1] > 0.9


def test_a_refiner_of_another_run_is_refused(run, tmp_path):
    """By its name: what it was trained on is not what it would be put together with."""
    mixed, other = make_run(tmp_path / "mixed"), make_run(tmp_path / "other", seed=1)
    assert evaluate.load_run(mixed, CPU)[2].keys() == set(READINGS)
    for name in ("refiner_query.pt", "backbone.pt"):
        kept = (mixed / name).read_bytes()
        (mixed / name).write_bytes((other / name).read_bytes())
        with pytest.raises(runtime.UserError, match="trained with other models"):
            evaluate.load_run(mixed, CPU)
        (mixed / name).write_bytes(kept)
