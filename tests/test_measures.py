"""What is read, measured and drawn, against values that are known or computed here in another way."""

import itertools
import json
import math
import struct
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import without_pictures
from PIL import Image
from test_generate import CONFIG, cosine_errors, make_run

import data
import evaluate
import runtime
import vqgan
import vsr
from data import TASKS
from vqgan import Codebook, VQGANConfig

CPU = torch.device("cpu")
FLOAT, BFLOAT = (torch.autocast("cpu", torch.bfloat16, enabled=enabled) for enabled in (False, True))
READINGS = ("tokens", "tokens+states", "tokens+states+query", "query")
SCENES = data.DataConfig(**CONFIG["data"], eval_sentences=70)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Models of which each does something else."""
    folder = make_run(tmp_path_factory.mktemp("measures"), readings=READINGS)
    tokenizer, backbone, refiners, _ = evaluate.load_run(folder, CPU)
    return SimpleNamespace(tokenizer=tokenizer, backbone=backbone, refiners=refiners)


@pytest.fixture
def drawn(monkeypatch):
    """Figures and grids of pictures, in place of files: {name: figure, or (rows, row labels, titles)}."""
    found = {}

    def save_picture(path, rows, row_labels=(), column_labels=(), title=""):
        found[path.name] = (rows, list(row_labels), list(column_labels))

    monkeypatch.setattr(data, "save_picture", save_picture)
    monkeypatch.setattr(runtime, "write_whole", lambda path, write: found.update({path.name: write.__self__}))
    return found


# Pictures from disk


def levels(image: torch.Tensor) -> torch.Tensor:
    """An image as the grey levels of its file, (H, W)."""
    return data.to_uint8(image)[0]


@pytest.mark.parametrize("turned", [False, True])
def test_a_long_picture_is_cropped_at_its_centre_and_not_squashed(tmp_path, turned):
    pixels = np.repeat(np.array([10, 90, 250], dtype=np.uint8), 40)[None].repeat(40, 0)  # three squares
    Image.fromarray(pixels.T if turned else pixels).save(tmp_path / "long.png")
    assert (levels(data.load_image(tmp_path / "long.png", 16)) == 90).all()


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_large_picture_is_averaged_and_none_of_it_is_lost(tmp_path, ending):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"large.{ending}", quality=100)
    means = torch.from_numpy(pixels.reshape(16, 4, 16, 4).mean((1, 3)))
    assert (levels(data.load_image(tmp_path / f"large.{ending}", 16)) - means).abs().max() <= 2


# Four quarters a b / c d as they lie in the file, and as they are seen upright (the EXIF standard's table)
UPRIGHT = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac"}


@pytest.mark.parametrize(("orientation", "upright"), UPRIGHT.items())
def test_each_orientation_of_a_camera_is_turned_upright(tmp_path, orientation, upright):
    grey = dict(zip("abcd", (0, 80, 160, 240), strict=True))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.array([[grey["a"], grey["b"]], [grey["c"], grey["d"]]], dtype=np.uint8)
    Image.fromarray(stored.repeat(8, 0).repeat(8, 1)).save(tmp_path / "photo.png", exif=exif)
    seen = levels(data.load_image(tmp_path / "photo.png", 16))
    assert seen[4::8, 4::8].flatten().tolist() == [grey[quarter] for quarter in upright]
    assert len(seen.unique()) == 4


def tiff(bits: int, packed: bytes, *more: tuple[int, int]) -> bytes:
    """A grey TIFF of 16 x 16 pixels of `bits` bits, with more tags (number, value)."""
    tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, 1), (273, None), (277, 1), (278, 16)]
    tags = sorted([*tags, (279, len(packed)), *more])
    start = 8 + 2 + 12 * len(tags) + 4
    entries = (struct.pack("<HHIHH", tag, 3, 1, start if value is None else value, 0) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4) + packed


@pytest.mark.parametrize("value", [0, 300, 15_620, 51_420, 65_407, 65_535])
def test_16_bits_are_scaled_by_their_largest_value(tmp_path, value):
    pixels = np.full((16, 16), value, dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    (tmp_path / "grey.tif").write_bytes(tiff(16, pixels.tobytes()))
    for name in ("grey.png", "grey.tif"):
        assert (levels(data.load_image(tmp_path / name, 16)) == round(value / 65_535 * 255)).all()


@pytest.mark.parametrize("value", [0, 100, 4087, 4095])
def test_12_bits_are_scaled_by_their_largest_value(tmp_path, value):
    pair = (value << 12 | value).to_bytes(3, "big")
    (tmp_path / "grey.tif").write_bytes(tiff(12, pair * 128))
    assert (levels(data.load_image(tmp_path / "grey.tif", 16)) == round(value / 4095 * 255)).all()


def test_a_largest_value_that_a_tiff_names_counts(tmp_path):
    """Ten bits of a camera, kept in sixteen."""
    pixels = np.full((16, 16), 700, dtype=np.uint16)
    (tmp_path / "grey.tif").write_bytes(tiff(16, pixels.tobytes(), (281, 1023)))
    assert (levels(data.load_image(tmp_path / "grey.tif", 16)) == round(700 / 1023 * 255)).all()


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """A folder of six pictures a split, and sentences of it."""
    folder, random = tmp_path_factory.mktemp("album"), np.random.default_rng(0)
    for split in data.SPLITS:
        (folder / split).mkdir()
        for number in range(6):
            pixels = random.integers(1, 256, (16, 16, 3), dtype=np.uint8)  # no black, as in a hole
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
    config = data.DataConfig(data=f"folder:{folder}", image_size=16, num_demos=1)
    return SimpleNamespace(folder=folder, sentences=data.Sentences(config))


def test_a_picture_and_its_mirror_image_come_up_in_both_images_of_a_pair_alike(album):
    images, task = album.sentences("val", 0, 120)
    source, target = images[:, ::2], images[:, 1::2]
    scenes = torch.where((task == TASKS.index("edges")).view(-1, 1, 1, 1, 1), source, target)
    pictures = [data.load_image(path, 16) for path in sorted((album.folder / "val").iterdir())]
    known = torch.stack([*pictures, *(picture.flip(-1) for picture in pictures)])  # 6, and 6 mirrored
    same = (scenes[:, :, None] == known).flatten(3).all(-1)  # (n, K+1, 12)
    assert (same.sum(-1) == 1).all(), "each scene is a picture of the split, or its mirror image"
    assert same.flatten(0, 1).any(0).all(), "and all of these come up"
    mirrored = same[..., 6:].any(-1)
    assert 0.2 < (mirrored[:, 0] != mirrored[:, 1]).float().mean() < 0.8, "each for itself"
    for number, name in enumerate(TASKS):
        scene, *pair = (x[task == number].flatten(0, 1) for x in (scenes, source, target))
        if name == "inpaint":
            hole = (pair[0] == -1).all(1, keepdim=True).expand_as(pair[0])
            assert (hole.flatten(1).sum(1) == 3 * 4 * 4).all()
            assert torch.equal(pair[0][~hole], pair[1][~hole])
        else:
            assert torch.equal(torch.stack(pair), torch.stack(data.TASK_FUNCTIONS[name](scene, None)))


def test_each_split_and_each_batch_has_an_order_of_tasks_of_its_own(album):
    places = [("train", 0), ("val", 0), ("test", 0), ("train", 1)]
    assert len({tuple(album.sentences(split, index, 64)[1].tolist()) for split, index in places}) == 4


def test_a_contact_sheet_shows_three_sentences_of_each_task_beside_its_name(command, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(data, "save_picture", lambda *args: sheets.append(args))
    result = command(data, "--data", "shapes", "--image-size", 16, "--num-demos", 2, "--out", tmp_path)
    assert result.status == 0, result.err
    ((path, rows, labels, titles, _),) = sheets
    assert path == tmp_path / "shapes.png"
    assert titles == ["source 1", "target 1", "source 2", "target 2", "query", "truth"]
    assert [label for label in labels if label] == list(TASKS)
    assert len(rows) == len(labels) == 9
    for number, row in enumerate(rows):
        task, images = labels[number - number % 3 + 1], torch.stack(list(row))
        source, target = images[::2], images[1::2]
        if task == "inpaint":
            assert ((source == target) | (source == -1)).all()
            assert not torch.equal(source, target)
        else:
            made = data.TASK_FUNCTIONS[task](source if task == "edges" else target, None)
            assert torch.equal(torch.stack([source, target]), torch.stack(made))


# Scenes that are drawn


def test_shapes_have_the_areas_of_their_formulas_at_two_sizes():
    of_r_squared = [math.pi, 1.75**2, 1.875**2 / 2, math.pi * 3 / 4, 2 * 2 * 0.75 - 0.75**2, 2 * 1.125**2]
    masks = data.shape_masks(64)
    for size, r in enumerate((12, 16)):
        assert torch.allclose(masks[:, size].sum((1, 2)), torch.tensor(of_r_squared) * r * r, rtol=0.02)
    assert torch.equal(masks, masks.flip(-1)), "upright"
    changed = (masks != masks.flip(-2)).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [data.SHAPES.index("triangle")]
    assert masks[2, 1].sum(1)[:32].sum() < masks[2, 1].sum(1)[32:].sum(), "and points up"


def test_no_object_hides_the_other_or_leaves_the_picture():
    masks = torch.zeros(6, 1, 16, 16)
    masks[..., 4:12, 4:12] = 1
    scenes = data.draw_scenes(masks, torch.zeros(3000, dtype=torch.long), torch.Generator().manual_seed(0))
    object = ~(scenes[:, None] == data.BACKGROUNDS[:, :, None, None]).all(2).any(1)  # (n, S, S)
    covered = object.flatten(1).sum(1)
    assert covered.min() == 64 + 32, "at least half of the one below is seen"
    assert covered.max() == 2 * 64
    assert object.any(0).all()
    assert len(object.flatten(1).unique(dim=0)) > 100


def test_a_grey_shape_can_be_told_from_every_background():
    shades = data.grey(data.palette(len(data.SHAPES)).flatten(0, 1)[..., None, None])[:, 0, 0, 0]
    backgrounds = data.grey(data.BACKGROUNDS[..., None, None])[:, 0, 0, 0]
    assert (shades[:, None] - backgrounds).abs().min() * 127.5 >= 19


# The tokenizer's measures


def test_gradient_loss_sees_both_directions():
    a, b = torch.rand(2, 2, 3, 6, 9)
    d = (a - b).numpy()
    across, down = d[..., 1:] - d[..., :-1], d[..., 1:, :] - d[..., :-1, :]
    assert vqgan.gradient_loss(a, b).item() == pytest.approx((across**2).mean() + (down**2).mean(), rel=1e-5)


def test_ssim_is_the_formula_at_every_place_of_the_window():
    random = np.random.default_rng(0)
    x = random.uniform(0, 0.1, (2, 3, 12, 13))  # dark, of little contrast: the constants matter
    y = 0.5 * x + random.uniform(0, 0.05, x.shape)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    ssim = vqgan.ssim(*(torch.from_numpy(2 * images - 1) for images in (x, y)))
    for image, truth, found in zip(x, y, ssim, strict=True):
        values = []
        for a, b in zip(image, truth, strict=True):
            for top, left in np.ndindex(2, 3):
                p, q = (c[top : top + 11, left : left + 11] for c in (a, b))
                m_p, m_q = (window * p).sum(), (window * q).sum()
                v_p, v_q = (window * (p - m_p) ** 2).sum(), (window * (q - m_q) ** 2).sum()
                both = (window * (p - m_p) * (q - m_q)).sum()
                above = (2 * m_p * m_q + 0.01**2) * (2 * both + 0.03**2)
                below = (m_p**2 + m_q**2 + 0.01**2) * (v_p + v_q + 0.03**2)
                values.append(above / below)
        assert found.item() == pytest.approx(np.mean(values), abs=1e-4)


def test_the_length_of_a_code_changes_neither_tokens_nor_images(run):
    images, codebook = torch.rand(8, 3, 16, 16) * 2 - 1, run.tokenizer.codebook.weight
    directions = F.normalize(codebook, dim=-1)
    assert codebook.norm(dim=-1).max() > 1.5 * codebook.norm(dim=-1).min()
    tokens = run.tokenizer.encode(images)
    assert torch.equal(tokens, (run.tokenizer.latents(images) @ directions.T).argmax(-1))
    assert not torch.equal(tokens, (run.tokenizer.latents(images) @ codebook.T).argmax(-1))
    made = run.tokenizer.decode_embeddings(directions[tokens]).clamp(-1, 1)
    assert torch.allclose(run.tokenizer.decode(tokens), made, atol=1e-5)
    errors = vsr.cosine_error(tokens, tokens.flip(0), codebook)
    assert torch.allclose(errors, cosine_errors(tokens, tokens.flip(0), directions), atol=1e-5)


@torch.no_grad()
def test_a_token_is_decoded_at_its_place():
    """Another token in row 2 and column 12 of a grid of 16 x 16 changes the pixels there and around it."""
    config = VQGANConfig(codebook_size=8, code_dim=4, channels=16, res_blocks=0)
    model, tokens = vqgan.VQGAN(config, 64), torch.zeros(1, 256, dtype=torch.long)
    before = model.decode(tokens)
    tokens[0, 2 * 16 + 12] = 1
    change = (model.decode(tokens) - before).abs().sum((0, 1))  # (64, 64)
    for axis, place in ((0, 2), (1, 12)):
        along = change.sum(1 - axis)
        middle = (along * torch.arange(64)).sum() / along.sum()
        assert middle.item() == pytest.approx(4 * place + 1.5, abs=4)
    assert not change[24:].any()
    assert not change[:, :36].any()


class Recorded:
    """Sentences that are given, two a batch, and a tokenizer that returns what is given for them."""

    tasks, config, codebook = TASKS, SimpleNamespace(eval_sentences=5, codebook_size=8), Codebook(8, 4)

    def __init__(self, images, task, tokens, rebuilt):
        self.given, self.encoded, self.decoded = (images, task), iter(tokens.split(8)), iter(rebuilt.split(8))

    def batches(self, split, total):
        assert (split, total) == ("val", 5)
        return zip(*(x.split(2) for x in self.given), strict=True)

    def encode(self, images):
        return next(self.encoded)

    def decode(self, tokens):
        return next(self.decoded)


def slopes(images) -> float:
    return (images.diff(dim=-1).abs().sum() + images.diff(dim=-2).abs().sum()).item()


def test_the_tokenizers_scores_go_over_all_images_of_their_kind():
    """Batches of two sizes, images that are rebuilt each as badly as no other, and codes of unequal use."""
    images, task = torch.rand(5, 4, 3, 16, 16) - 0.5, torch.tensor([0, 2, 1, 2, 0])
    rebuilt = images * torch.linspace(0.3, 0.9, 20).view(5, 4, 1, 1, 1) + 0.05 * torch.randn(images.shape)
    tokens = torch.cat([torch.tensor([0, 0, 0, 1]).repeat(16, 4), torch.tensor([2, 3, 4, 5]).repeat(4, 4)])
    recorded = Recorded(images, task, tokens, rebuilt.flatten(0, 1))
    scores = vqgan.score_tokenizer(recorded, recorded, "val", FLOAT)
    decibels = 10 * torch.log10(4 / (rebuilt - images).square().mean((2, 3, 4)))  # (5, 4)
    kinds = {"source": decibels[:, ::2], "target": decibels[:, 1::2], "edges": decibels[task == 2, 1::2]}
    assert {kind: scores[f"psnr_{kind}"] for kind in kinds} == pytest.approx(
        {kind: values.mean().item() for kind, values in kinds.items()}, abs=1e-3
    )
    maps = (task == 2).nonzero().flatten()
    sharpness = slopes(rebuilt[maps, 1::2]) / slopes(images[maps, 1::2])
    assert scores["edge_sharpness"] == pytest.approx(sharpness, rel=1e-4)
    assert abs(sharpness - 1) > 0.1
    share = tokens.flatten().bincount().double() / tokens.numel()
    assert scores["codes_used"] == 6
    assert scores["perplexity"] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-5)


def test_without_edge_maps_their_scores_are_left_out():
    images, tokens = torch.rand(5, 4, 3, 16, 16) - 0.5, torch.zeros(20, 16, dtype=torch.long)
    recorded = Recorded(images, torch.tensor([0, 1, 1, 0, 0]), tokens, images.flatten(0, 1))
    scores = vqgan.score_tokenizer(recorded, recorded, "val", FLOAT)
    assert (scores["psnr_edges"], scores["edge_sharpness"]) == (None, None)
    assert (scores["codes_used"], scores["perplexity"]) == (1, pytest.approx(1))


# What the methods write


def test_sentences_become_the_tokens_of_their_split(run):
    sentences = data.Sentences(SCENES, seed=2)
    tokens = evaluate.encode_sentences(run.tokenizer, sentences, "val", 70, CPU, FLOAT)
    assert (tokens.dtype, tokens.shape) == (torch.int16, (70, 4, 16))
    for number, index in ((0, 0), (63, 0), (64, 1), (69, 1)):
        images = sentences("val", index, 64)[0][number % 64]
        assert torch.equal(tokens[number].long(), run.tokenizer.encode(images))
    large = SimpleNamespace(config=VQGANConfig(codebook_size=70_000))
    large.encode = lambda images: torch.full((len(images), 16), 69_999)
    assert (evaluate.encode_sentences(large, sentences, "val", 2, CPU, FLOAT).long() == 69_999).all()


def test_tokens_of_many_images_are_decoded_in_their_order(run):
    tokens = torch.randint(24, (150, 16), dtype=torch.int16)
    images = evaluate.decode_images(run.tokenizer, tokens, FLOAT)
    assert torch.allclose(images, run.tokenizer.decode(tokens), atol=1e-5)


@torch.no_grad()
def test_each_method_writes_what_its_name_says(run):
    """Against the models called one by one, for more sentences than one batch holds."""
    tokens = torch.randint(24, (70, 4, 16), dtype=torch.int16)
    written = evaluate.decode_methods(
        run.tokenizer, run.backbone, evaluate.by_method(run.refiners), tokens, FLOAT, seed=3
    )
    prompt, target_tokens = tokens[:, :-1].flatten(1).long(), tokens[:, -1].long()
    codebook = F.normalize(run.tokenizer.codebook.weight, dim=-1)
    rollout, generator = run.backbone.generate(prompt, 16), torch.Generator().manual_seed(3)
    sampled = [run.backbone.generate(part, 16, 1.0, generator=generator).tokens for part in prompt.split(64)]
    forced = run.backbone.hidden(run.backbone.shifted(tokens.flatten(1).long()))[:, -16:]
    expected = {
        "vqgan_limit": target_tokens,
        "teacher_forced": run.backbone.head(forced).argmax(-1),
        "ar_greedy": rollout.tokens,
        "ar_sampled": torch.cat(sampled),
    }
    names = {"refined_tokens": "tokens", "refined_tokens+states": "tokens+states", "parallel": "query"}
    names["refined_tokens+states+query"] = "tokens+states+query"
    for of, y, states in (("", "ar_greedy", rollout.states), (evaluate.OF_FORCED, "teacher_forced", forced)):
        mean = run.backbone.head(states).softmax(-1) @ codebook
        expected[f"expected_embedding{of}"] = (mean @ codebook.T).argmax(-1)
        for name, reading in names.items():
            refined = run.refiners[reading](codebook[expected[y]], states, rollout.query)
            expected[name + of] = (refined @ codebook.T).argmax(-1)
    assert written.keys() == expected.keys()
    for name, y in expected.items():
        assert torch.equal(written[name], y), name
    others = [y for name, y in expected.items() if name != f"parallel{evaluate.OF_FORCED}"]  # reads no output
    assert not any(torch.equal(a, b) for i, a in enumerate(others) for b in others[:i])


@torch.no_grad()
def test_what_is_likeliest_or_nearest_is_found_in_float32(run):
    """Logits and codes so near to each other that they are one and the same in bfloat16."""
    tokenizer = SimpleNamespace(codebook=Codebook(24, 6))
    backbone = vsr.GPT(vsr.GPTConfig(layers=1, width=16), 24, 16, 4)
    tokenizer.codebook.weight.copy_(torch.randn(1, 6) + 0.03 * torch.randn(24, 6))
    backbone.head.weight.copy_(10 * torch.randn(1, 16) + 0.1 * torch.randn(24, 16))
    codebook, tokens = tokenizer.codebook.vectors, torch.randint(24, (20, 4, 16))
    reader = {"refined_tokens": run.refiners["tokens"]}
    written = evaluate.decode_methods(tokenizer, backbone.eval(), reader, tokens, BFLOAT)
    prompt, target_tokens = tokens[:, :-1].flatten(1), tokens[:, -1]
    with BFLOAT:
        rollout = backbone.generate(prompt, 16)
        forced = backbone.replay(prompt, target_tokens).states
        refined = reader["refined_tokens"](codebook[rollout.tokens])
    logits = [F.linear(states.float(), backbone.head.weight) for states in (rollout.states, forced)]
    mean = logits[0].softmax(-1) @ codebook
    expected = {"ar_greedy": logits[0].argmax(-1), "teacher_forced": logits[1].argmax(-1)}
    expected |= {"expected_embedding": (mean @ codebook.T).argmax(-1)}
    expected |= {"refined_tokens": (refined.float() @ codebook.T).argmax(-1)}
    for name, y in expected.items():
        assert torch.equal(written[name], y), name
    with BFLOAT:  # what the same would be in bfloat16: the test would notice
        assert not torch.equal(backbone.head(forced).argmax(-1), expected["teacher_forced"])
        assert not torch.equal((mean @ codebook.T).argmax(-1), expected["expected_embedding"])
        assert not torch.equal((refined @ codebook.T).argmax(-1), expected["refined_tokens"])
        rounded_logits, rounded_mean = backbone.head(rollout.states), logits[0].softmax(-1) @ codebook
    for rounded in (rounded_logits.float().softmax(-1) @ codebook, rounded_mean.float()):
        assert not torch.equal((rounded @ codebook.T).argmax(-1), expected["expected_embedding"])


def test_hedging_weighs_the_directions_of_codes_and_not_their_lengths():
    codebook = torch.tensor([[1.0, 0.0], [0.0, 4.0], [0.5, 0.5]])
    assert vsr.expected_embedding(torch.tensor([[[0.0, 0.0, -99.0]]]), codebook).item() == 2


def test_a_reading_has_one_spelling_and_a_method_by_it():
    assert evaluate.reading("query+states+tokens") == "tokens+states+query"
    assert evaluate.method_name("tokens+states") == "refined_tokens+states"
    assert evaluate.method_name("states+query") == "refined_states+query", "states depend on what was written"
    assert evaluate.method_name("query") == "parallel"
    for text in ("pixels", "tokens+pixels", ""):
        with pytest.raises(ValueError, match="expected one or more of tokens, states, query"):
            evaluate.reading(text)


# How good it is

ANGLES = torch.tensor([0.0, 60.0, 90.0, 180.0])  # of four codes: errors of 0.5, 1 and 2 against the first


class Painter:
    """A tokenizer of 2 x 2 tokens, each of which is a grey square: its images are known."""

    grid, codebook = (2, 2), Codebook(4, 2)
    codebook.weight.requires_grad_(False).data = (
        torch.stack([ANGLES.deg2rad().cos(), ANGLES.deg2rad().sin()], dim=1) * 3
    )

    def decode(self, tokens):
        grey = (tokens / 4 - 0.5).view(-1, 1, 2, 2)
        return grey.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1).contiguous()


def test_scores_are_those_of_a_method_and_of_the_sentences_of_a_task():
    task = torch.tensor([2, 0, 1, 2, 2, 0])
    target_tokens = torch.zeros(6, 4, dtype=torch.long)
    y = torch.tensor([[0, 1, 0, 3], [2, 0, 0, 0], [0, 0, 3, 3], [0, 1, 0, 0], [0, 0, 0, 0], [2, 2, 1, 0]])
    written = {"vqgan_limit": target_tokens, "ar_greedy": y, "ar_sampled": y.flip(1)}
    truth = Painter().decode(target_tokens) + 0.1 * torch.rand(6, 1, 16, 16)
    scores = evaluate.score_methods(Painter(), written, truth, task, FLOAT)
    assert scores.keys() == written.keys()
    error_of = (0.0, 0.5, 1.0, 2.0)
    for method, tokens in written.items():
        images = Painter().decode(tokens)
        assert scores[method].keys() == {"all", *TASKS}
        for name, score in scores[method].items():
            rows = [i for i in range(6) if name in ("all", TASKS[task[i]])]
            errors = [[error_of[k] for k in tokens[i].tolist()] for i in rows]
            by_position = [sum(column) / len(rows) for column in zip(*errors, strict=True)]
            decibels = [10 * math.log10(4 / (images[i] - truth[i]).square().mean()) for i in rows]
            assert score["cosine_error_by_position"] == pytest.approx(by_position, abs=1e-6)
            assert score["cosine_error"] == pytest.approx(sum(by_position) / 4, abs=1e-6)
            assert score["auc"] == pytest.approx(sum(by_position), abs=1e-6)
            right = [k == 0 for i in rows for k in tokens[i].tolist()]
            assert score["token_accuracy"] == pytest.approx(sum(right) / len(right))
            assert score["psnr"] == pytest.approx(sum(decibels) / len(rows), abs=1e-3)
            assert score["ssim"] == pytest.approx(vqgan.ssim(images, truth)[rows].mean().item(), abs=1e-5)


def test_errors_of_tokens_are_the_same_in_bfloat16_and_images_nearly_so(run):
    tokens, images = torch.randint(24, (2, 12, 16)), torch.rand(12, 3, 16, 16)
    written, task = {"vqgan_limit": tokens[0], "ar_greedy": tokens[1]}, torch.arange(12) % 3
    measured = (run.tokenizer, written, images, task)
    exact, rounded = (evaluate.score_methods(*measured, autocast) for autocast in (FLOAT, BFLOAT))
    for method in written:
        for name in ("all", *TASKS):
            a, b = exact[method][name], rounded[method][name]
            for measure in ("cosine_error", "auc", "token_accuracy", "cosine_error_by_position"):
                assert a[measure] == b[measure]
            assert a["psnr"] == pytest.approx(b["psnr"], abs=0.05)
            assert a["ssim"] == pytest.approx(b["ssim"], abs=0.02)


def test_each_number_of_the_table_stands_under_its_name():
    errors = {
        "teacher_forced": 0.1,
        "ar_greedy": 0.3,
        "ar_sampled": 0.2,
        "refined_tokens": 0.15,
    }  # a sample that is better
    scores = {method: {} for method in errors}
    for (number, method), (column, name) in itertools.product(enumerate(errors), enumerate(("all", *TASKS))):
        error, psnr = errors[method] + 0.01 * column, 20 + number + 0.1 * column
        score = {"cosine_error": error, "auc": 16 * error, "token_accuracy": 0.9 - error, "ssim": 0.8}
        scores[method][name] = {**score, "psnr": psnr}
    methods = list(scores)
    scores[f"refined_tokens{evaluate.OF_FORCED}"] = {"all": {"cosine_error": 0.08}}
    _, titles, *rows = evaluate.format_table(scores).splitlines()
    right_ends = {}  # {place in the line: title}
    for title in ("all", *TASKS, "closed", "removed", "acc.", "all", "color", *TASKS[1:]):
        start = titles.index(title, max(right_ends, default=0))
        right_ends[start + len(title)] = title
    assert " ".join(right_ends.values()) == " ".join(titles.split())
    for method, row in zip(methods, rows, strict=True):
        score = scores[method]
        numbers = [f"{score[name]['cosine_error']:.4f}" for name in ("all", *TASKS)]
        # (0.3 - 0.15) / (0.3 - 0.1), and 1 - (0.15 - 0.08) / (0.3 - 0.1): what was refined is greedy
        numbers += ["0.75", "0.65"] if method == "refined_tokens" else ["", ""]
        numbers.append(f"{score['all']['token_accuracy']:.3f}")
        numbers += [f"{score[name]['psnr']:.2f}" for name in ("all", *TASKS)]
        assert row.split() == [method, *filter(None, numbers)]
        for end, number in zip(right_ends, numbers, strict=True):
            assert row[:end].endswith(number or " ")
    scores["refined_tokens+states+query"] = scores["refined_tokens"]
    scores[f"refined_tokens+states+query{evaluate.OF_FORCED}"] = {"all": {"cosine_error": 0.08}}
    assert len({len(line.rstrip()) for line in evaluate.format_table(scores).splitlines()[1:]}) == 1


# Its pictures


def test_the_sentences_that_are_shown_have_the_median_and_the_largest_error_of_their_task():
    task = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0])
    errors = torch.tensor([0.2, 0.0, 0.5, 0.9, 0.1, 0.5, 0.3, 0.3, 0.5, 0.1, 2.0])
    chosen = evaluate.median_and_largest(errors, task, first=4)  # not the last one: the fifth of its task
    assert chosen == [
        ("colorize, median", 6), ("colorize, largest", 3), ("inpaint, median", 4), ("inpaint, largest", 7),
        ("edges, median", 5), ("edges, largest", 8),
    ]  # fmt: skip


def test_samples_are_chosen_by_the_rule_and_every_column_is_what_it_is_called(drawn, tmp_path):
    task = torch.tensor([1, 1, 0, 2, 1, 0, 2, 0, 2])
    images = torch.rand(9, 4, 3, 16, 16)
    names = ("vqgan_limit", "teacher_forced", "ar_greedy", "expected_embedding", "refined_tokens", "parallel")
    names += tuple(f"{name}{evaluate.OF_FORCED}" for name in names[3:])
    written = {name: torch.randint(4, (9, 4)) for name in names}
    evaluate.save_samples(tmp_path / "samples.png", Painter(), written, images, task, FLOAT)
    rows, labels, titles = drawn["samples.png"]
    errors = cosine_errors(written["ar_greedy"], written["vqgan_limit"], Painter.codebook.weight).mean(1)
    chosen = evaluate.median_and_largest(errors, task)
    shown = ["ar_greedy", "refined_tokens", "parallel"]
    assert titles == ["source 1", "target 1", "query", *shown, "truth", *(f"error of {m}" for m in shown)]
    assert labels == [f"{name}\n{which}" for name in TASKS for which in ("median", "largest")]
    for row, (_, i) in zip(rows, chosen, strict=True):
        cells = dict(zip(titles, row, strict=True))
        prompt = [cells[title] for title in ("source 1", "target 1", "query", "truth")]
        assert torch.equal(torch.stack(prompt), images[i])
        for method in shown:
            y, target_tokens = written[method][i], written["vqgan_limit"][i]
            assert torch.equal(cells[method], Painter().decode(y[None])[0])
            error = cosine_errors(y, target_tokens, Painter.codebook.weight)
            assert torch.allclose(cells[f"error of {method}"].flatten(), error, atol=1e-6)


def test_reconstructions_stand_below_the_images_of_their_split(run, drawn, tmp_path):
    sentences = data.Sentences(SCENES, seed=2)
    evaluate.save_reconstructions(tmp_path / "r.png", run.tokenizer, sentences, "test", FLOAT)
    rows, labels, titles = drawn["r.png"]
    images, task = sentences("test", 0, 64)
    assert titles == ["source", "target"] * 4
    assert labels == ["colorize", "rebuilt", "inpaint", "rebuilt", "edges", "rebuilt"]
    for number in range(3):
        above, below = (torch.stack(row) for row in rows[2 * number : 2 * number + 2])
        assert torch.equal(above, images[task == number][:4, -2:].flatten(0, 1))
        assert torch.allclose(below, run.tokenizer.decode(run.tokenizer.encode(above)), atol=1e-5)


def test_a_grid_of_pictures_has_each_where_it_belongs(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(runtime, "write_whole", lambda path, write: figures.append(write.__self__))
    images = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    error = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    rows = [[*images[0], error], [*images[1], 1 - error]]
    data.save_picture(tmp_path / "x.png", rows, ["up", "down"], ["a", "b_c", "map"], "title")
    (figure,), (axis,) = figures, figures[0].axes
    pixels = torch.from_numpy(np.array(axis.images[0].get_array()))
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 3
    cells = pixels.view(2, height, 3, width, 3).transpose(1, 2)  # (rows, columns, height, width, 3)
    inner = cells[:, :, 1:33, 1:33]
    for row, column in np.ndindex(2, 2):
        assert torch.equal(inner[row, column].permute(2, 0, 1), data.to_uint8(images[row, column]))
    for row, values in enumerate((error, 1 - error)):
        brightness = inner[row, 2, 8::16, 8::16].float().sum(-1).flatten()
        assert torch.equal(brightness.argsort(), values.flatten().argsort()), "the brighter, the larger"
        assert len(inner[row, 2].flatten(0, 1).unique(dim=0)) == 4
    centres = {"x": [width * (i + 0.5) for i in range(3)], "y": [height * (i + 0.5) for i in range(2)]}
    assert (list(axis.get_xticks()), list(axis.get_yticks())) == (centres["x"], centres["y"])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b c", "map"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["up", "down"]
    assert figure.get_suptitle() == "title"


def test_curves_of_the_error_by_position_are_those_of_their_method_and_task(drawn, tmp_path):
    methods = ("vqgan_limit", "teacher_forced", "ar_greedy", "ar_sampled", "refined_tokens")
    by_position = torch.rand(len(methods), 4, 12)
    scores = {method: {} for method in methods}
    for (i, method), (j, name) in itertools.product(enumerate(methods), enumerate(("all", *TASKS))):
        scores[method][name] = {"cosine_error_by_position": by_position[i, j].tolist()}
    evaluate.plot_error_by_position(tmp_path / "e.png", scores)
    assert [axis.get_title() for axis in drawn["e.png"].axes] == ["all", *TASKS]
    legend = [text.get_text() for text in drawn["e.png"].legends[0].get_texts()]
    for j, axis in enumerate(drawn["e.png"].axes):
        curves = [line.get_ydata() for line in axis.lines]
        labels = [line.get_label() for line in axis.lines]
        assert len(curves) == 3
        for i, method in ((1, "teacher_forced"), (2, "ar_greedy"), (4, "refined_tokens")):
            error = by_position[i, j]
            number = labels.index(f"{method}  AUC {error.sum():.2f}")
            smooth = torch.as_tensor(curves[number])
            assert torch.allclose(smooth[3:-3], error.unfold(0, 7, 1).mean(1), atol=1e-5)
            assert axis.lines[number].get_color() == evaluate.COLOURS[method]
            if j == 0:
                assert f"{method}  AUC {error.sum():.2f}" in legend


def test_curves_of_the_training_are_those_of_its_logs(drawn, tmp_path):
    logs = {
        "tokenizer": {
            "step": [0, 20],
            "codes_in_use": [9, 12],
            "generator": [0, -2],
            "discriminator": [0, 0],
        },
        "backbone": {"step": [0, 20], "loss": [3.0, 2.0], "val_step": [0, 10], "val_loss": [3.1, 2.1]},
        "refiner_query": {"step": [0, 20], "loss": [1.0, 0.5], "val_step": [0, 10], "val_loss": [1.1, 0.6]},
    }
    logs["tokenizer"] |= {"reconstruction": [1.0, 0.1], "gradient": [2.0, 0.2], "commitment": [0.5, 0.4]}
    logs["backbone"]["val_target_loss"] = [3.2, 2.2]
    evaluate.plot_training(tmp_path / "t.png", logs)
    curves = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
        for axis in drawn["t.png"].axes
    ]
    losses = {name: logs["tokenizer"][name] for name in ("reconstruction", "gradient", "commitment")}
    losses["|generator|"] = [0, 2]  # below zero, on a log scale; without a discriminator there is no curve
    assert curves[0] == {name: ([0, 20], values) for name, values in losses.items()}
    assert curves[1] == {"codes used by the batch": ([0, 20], [9, 12])}
    validation = {"validation": ([0, 10], [3.1, 2.1]), "validation, last image": ([0, 10], [3.2, 2.2])}
    assert curves[2] == {"training": ([0, 20], [3.0, 2.0]), **validation}
    assert curves[3]["parallel"] == ([0, 10], [1.1, 0.6])
    assert ([0, 20], [1.0, 0.5]) in curves[3].values()


def test_an_evaluation_measures_the_test_split_and_the_tokenizer_on_the_validation_split(run, tmp_path):
    sentences = data.Sentences(replace(SCENES, eval_sentences=70), seed=2)
    images, task = data.joined(sentences.batches("test", 70))
    names = ("loss", "val_loss", "val_target_loss", "val_target_accuracy")
    log = {name: [9.0, 1.0 + number] for number, name in enumerate(names)}
    trained = SimpleNamespace(**vars(run), logs={"backbone": log}, seconds={"backbone": 7.0})
    setting = {"dtype": "float32", "seed": 3}
    with without_pictures():
        said = evaluate.evaluate_run(tmp_path, trained, sentences, setting, {"backbone": 5})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    tokens = run.tokenizer.encode(images.flatten(0, 1)).view(70, 4, 16)
    written = evaluate.decode_methods(
        run.tokenizer, run.backbone, evaluate.by_method(run.refiners), tokens, FLOAT, seed=3
    )
    scores = evaluate.score_methods(run.tokenizer, written, images[:, -1], task, FLOAT)
    assert metrics["methods"].keys() == scores.keys()
    for method, by_task in scores.items():
        for name, score in by_task.items():
            for measure, value in score.items():
                assert metrics["methods"][method][name][measure] == pytest.approx(value, abs=1e-4)
    quality = vqgan.score_tokenizer(run.tokenizer, sentences, "val", FLOAT)
    assert metrics["tokenizer"] == pytest.approx(quality, rel=1e-4)
    assert quality != vqgan.score_tokenizer(run.tokenizer, sentences, "test", FLOAT)
    assert metrics["backbone"] == {name: 1.0 + number for number, name in enumerate(names)}
    assert (metrics["config"], metrics["params"]) == (setting, {"backbone": 5})
    assert metrics["seconds"].keys() == {"backbone", "evaluation"}
    assert "70 test sentences" in said
    assert evaluate.format_table(metrics["methods"]) in said
