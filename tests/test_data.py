"""Datasets, tasks, and folders of images."""

import os
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import data
from data import DataConfig, Sentences
from runtime import UserError


def scenes_of(sentences: Sentences, split: str, n: int, seed: int = 0) -> torch.Tensor:
    """At least n scenes, uint8 (n, 3, S, S)."""
    sets = -(-n // (sentences.config.num_demos + 1))
    return data.to_uint8(sentences.scenes(split, sets, torch.Generator().manual_seed(seed)).flatten(0, 1))


def as_bytes(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.fixture
def photos(tmp_path):
    """A folder with 150 small random pictures, in sub-folders."""
    for i in range(150):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8)
        path = tmp_path / "photos" / f"{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("name", "size", "demos"), [("shapes", 32, 1), ("shapes", 64, 3), ("glyphs", 32, 2), ("glyphs", 64, 1)]
)
def test_sentences_have_the_documented_shape_and_range(name, size, demos):
    images, task = Sentences(DataConfig(data=name, image_size=size, num_demos=demos))("train", 0, 40)
    assert images.shape == (40, 2 * demos + 2, 3, size, size)
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() <= 1
    assert set(task.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("name", ["shapes", "glyphs"])
def test_sentences_depend_on_seed_split_and_index_alone(name):
    config = DataConfig(data=name, image_size=16)
    sentences = Sentences(config, seed=5)
    images, task = sentences("train", 3, 8)
    sentences("val", 0, 8)
    again, task_again = sentences("train", 3, 8)
    assert torch.equal(images, again)
    assert torch.equal(task, task_again)
    assert torch.equal(images, Sentences(config, seed=5)("train", 3, 8)[0])
    for other in (sentences("train", 4, 8), sentences("val", 3, 8), Sentences(config, seed=6)("train", 3, 8)):
        assert not torch.equal(images, other[0])


def test_each_sentence_follows_its_task_in_every_pair():
    images, task = Sentences(DataConfig(num_demos=2))("train", 0, 60)
    source, target = images[:, 0::2], images[:, 1::2]
    for number, rule in enumerate((data.colorize, data.inpaint, data.edges)):
        pairs = source[task == number].flatten(0, 1), target[task == number].flatten(0, 1)
        if rule is data.colorize:
            assert torch.equal(pairs[0], data.grey(pairs[1]))
        elif rule is data.edges:
            assert torch.equal(pairs[1], data.edges(pairs[0], None)[1])
        else:
            kept = pairs[0] != -1
            assert torch.equal(pairs[0][kept], pairs[1][kept])
            assert (pairs[0] != pairs[1]).flatten(1).any(1).float().mean() > 0.95


def test_batches_give_the_first_sentences_whatever_the_total():
    sentences = Sentences(DataConfig(image_size=16))
    few, many = (data.joined(sentences.batches("val", total)) for total in (70, 300))
    assert len(few[0]) == len(few[1]) == 70
    assert torch.equal(few[0], many[0][:70])
    assert torch.equal(few[1], many[1][:70])
    assert len(as_bytes(data.to_uint8(many[0]))) == 300


def test_a_palette_of_its_own_rotates_the_hues_of_a_whole_sentence(monkeypatch):
    """The colour of a kind of object differs between sentences, and is one in all scenes of a sentence."""
    masks = data.shape_masks(32)

    def turned(turn):
        return data.draw_scenes(masks, torch.full((64,), turn), torch.Generator().manual_seed(0))

    assert not torch.equal(turned(0), turned(1))
    assert torch.equal(turned(0), turned(len(masks))), "a whole turn changes nothing"
    unturned = [(turned(0) == turned(turn)).all(1) for turn in (1, 2)]
    assert torch.equal(*unturned), "places, shapes and background stay"
    turns, draw = [], data.draw_scenes
    monkeypatch.setattr(data, "draw_scenes", lambda m, turn, g: turns.append(turn) or draw(m, turn, g))
    Sentences(DataConfig(palette="sentence", num_demos=2))("train", 0, 64)
    by_sentence = turns[0].view(64, 3)
    assert torch.equal(by_sentence, by_sentence[:, :1].expand(-1, 3)), "one rotation for a whole sentence"
    assert by_sentence.unique().tolist() == list(range(len(masks)))
    turns.clear()
    Sentences(DataConfig())("train", 0, 64)
    assert not turns[0].any()
    with pytest.raises(UserError, match="palette"):
        DataConfig(data="folder:x", palette="sentence")
    with pytest.raises(UserError, match="palette"):
        DataConfig(palette="rainbow")


@pytest.mark.parametrize(
    ("name", "palette"), [("shapes", "fixed"), ("shapes", "sentence"), ("glyphs", "fixed")]
)
def test_no_picture_is_in_two_splits(name, palette):
    sentences = Sentences(DataConfig(data=name, image_size=16, palette=palette))
    scenes = [scenes_of(sentences, split, 1000) for split in data.SPLITS]
    for number, pictures in enumerate(scenes):
        assert (data.split_of(data.to_float(pictures)) == number).all()
    train, val, test = map(as_bytes, scenes)
    assert min(len(train), len(val), len(test)) > 900
    assert not train & val
    assert not train & test
    assert not val & test


def test_split_is_decided_by_the_pixels_80_10_10():
    images = torch.rand(3000, 3, 16, 16) * 2 - 1
    split = data.split_of(images)
    assert torch.equal(split.flip(0), data.split_of(images.flip(0)))
    share = torch.bincount(split, minlength=3) / len(split)
    assert torch.allclose(share, torch.tensor([0.8, 0.1, 0.1]), atol=0.03)


def test_colorize_source_is_bt601_luma():
    primaries = torch.eye(3)[:, :, None, None].expand(3, 3, 16, 16)
    source, target = data.colorize(primaries, torch.Generator())
    assert torch.equal(target, primaries)
    assert torch.equal(source[:, 0], source[:, 1])
    assert torch.equal(source[:, 0], source[:, 2])
    assert torch.allclose(source[:, 0, 0, 0], torch.tensor([0.299, 0.587, 0.114]))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_inpaint_cuts_one_black_square_and_leaves_the_target(size):
    images = torch.rand(50, 3, size, size)
    source, target = data.inpaint(images, torch.Generator().manual_seed(0))
    assert torch.equal(target, images)
    hole = source != images
    assert torch.equal(hole.any(1), hole.all(1))
    corners, sides = set(), set()
    for image, mask in zip(source, hole.all(1), strict=True):
        rows, columns = mask.nonzero().unbind(1)
        top, left, side = rows.min().item(), columns.min().item(), (rows.max() - rows.min() + 1).item()
        assert mask.sum() == side * side
        assert (image[:, top : top + side, left : left + side] == -1).all()
        corners.add((top, left))
        sides.add(side)
    assert len(sides) == 1
    assert size / 4 <= sides.pop() <= size / 2
    assert len(corners) > 20


def test_edges_of_a_flat_image_are_black():
    images = torch.full((1, 3, 16, 16), 0.3)
    source, target = data.edges(images, torch.Generator())
    assert torch.equal(source, images)
    assert torch.equal(target, torch.full_like(target, -1))


@pytest.mark.parametrize(("step", "expected"), [(0.25, -0.5), (0.5, 0.0), (1.0, 1.0), (1.8, 1.0)])
def test_edges_of_a_vertical_step(step, expected):
    """|g| is the step itself, at most 1; black is -1 and white 1. The strongest of three channels counts."""
    images = torch.zeros(1, 3, 16, 16)
    images[:, 1, :, 8:] = step
    images[:, 2, :, 8:] = -step / 2
    target = data.edges(images, torch.Generator())[1]
    assert torch.allclose(target[..., 7:9], torch.tensor(expected))
    assert (target[..., :7] == -1).all()
    assert (target[..., 9:] == -1).all()


def test_edges_turn_with_the_image():
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    edge_map = data.edges(images, torch.Generator())[1]
    turned = data.edges(images.rot90(1, (2, 3)), torch.Generator())[1]
    assert torch.allclose(turned, edge_map.rot90(1, (2, 3)), atol=1e-5)
    assert edge_map.std() > 0.1


def test_uint8_and_float_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(levels)), levels)
    assert data.to_float(levels).min() == -1
    assert data.to_float(levels).max() == 1
    assert data.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_image_formats_are_read(tmp_path, ending):
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / f"x.{ending}")
    image = data.load_image(tmp_path / f"x.{ending}", 16)
    assert image.shape == (3, 16, 16)
    assert (data.to_uint8(image).float() - torch.tensor([200.0, 100, 50])[:, None, None]).abs().max() <= 3


def test_grey_and_palette_images_are_read(tmp_path):
    Image.new("L", (20, 20), 77).save(tmp_path / "grey.png")
    Image.new("RGB", (20, 20), (255, 0, 0)).convert("P").save(tmp_path / "palette.png")
    assert (data.to_uint8(data.load_image(tmp_path / "grey.png", 16)) == 77).all()
    assert data.to_uint8(data.load_image(tmp_path / "palette.png", 16))[:, 0, 0].tolist() == [255, 0, 0]


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 51)).save(tmp_path / "faint.png")
    assert (data.load_image(tmp_path / "clear.png", 16) == 1).all()
    assert (data.to_uint8(data.load_image(tmp_path / "faint.png", 16)) == 204).all()


def test_exif_rotation_is_undone_and_the_centre_is_kept(tmp_path):
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left half is the upper half
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.save(tmp_path / "plain.png")
    turned, plain = (data.load_image(tmp_path / f"{name}.png", 16) for name in ("turned", "plain"))
    assert (turned[:, 0] == 1).all()
    assert (turned[:, -1] == -1).all()
    assert (plain[:, :, 0] == 1).all()
    assert (plain[:, :, -1] == -1).all()


def test_one_line_says_what_a_folder_holds_and_what_is_left_out(photos, capsys):
    for number in range(200):
        (photos / f"._{number}.png").write_bytes(b"what macOS writes beside a file")
    for name in (".Trash-0", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "$RECYCLE.BIN"):
        (photos / name).mkdir()
        Image.new("RGB", (20, 20), "red").save(photos / name / "thrown_away.png")
    for name in ("broken.png", "broken too.jpg", "empty.webp"):
        (photos / name).write_bytes(b"not a picture" * (name != "empty.webp"))
    for name in ("a.heic", "b.HEIC", "notes.txt", "LICENSE"):
        (photos / name).write_text("")
    first = min((photos / "0").glob("*.png"))
    for number in range(3):
        (photos / f"copy {number}.png").write_bytes(first.read_bytes())
    found = data.load_folder(str(photos), 16)
    printed = capsys.readouterr()
    line = printed.out.splitlines()
    counts = ", ".join(f"{len(found[split])} {split}" for split in data.SPLITS)
    assert sum(len(images) for images in found.values()) == 150
    assert len(line) == 1
    colours = sorted(len({*map(tuple, image.flatten(1).T.tolist())}) for image in found["train"])
    colours = f"{colours[len(colours) // 2]} colours in the median one"
    assert line[0].startswith(f"folder:{photos}: {counts} images, {colours}; left out: ")
    for part in ("200 hidden", "3 copies", "2 .heic", "1 .txt", "1 without ending", "3 unreadable"):
        assert part in line[0]
    assert f"; first unreadable: {photos / 'broken too.jpg'}: cannot be read" in line[0]
    assert "thrown_away" not in line[0]
    assert not [text for text in printed.err.splitlines() if text.strip() and "read photos" not in text]


def test_copies_in_a_folder_count_once(photos):
    """Otherwise demonstration and query could be one picture."""
    for path in sorted(photos.rglob("*.png"))[:20]:
        (photos / f"copy of {path.name}").write_bytes(path.read_bytes())
    found = data.load_folder(str(photos), 16)
    assert sum(len(images) for images in found.values()) == 150


def test_a_mirror_image_in_a_folder_is_a_copy_and_changes_nothing(photos, capsys):
    """Scenes are mirrored at random: it could be in two splits, or demonstration and query at once."""
    before = data.load_folder(str(photos), 16)
    for path in sorted(photos.rglob("*.png"))[:20]:
        mirrored = Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mirrored.save(photos / f"z{path.parent.name}{path.name}")
    found = data.load_folder(str(photos), 16)
    assert "left out: 20 copies" in capsys.readouterr().out
    assert all(torch.equal(found[split], before[split]) for split in data.SPLITS)


def test_a_folder_that_cannot_be_opened_is_named(photos, capsys, monkeypatch):
    scandir, closed = os.scandir, str(photos / "0")

    def refuse(path):
        if os.fspath(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    data.load_folder(str(photos), 16)
    line = capsys.readouterr().out
    assert "1 folders that cannot be opened" in line
    assert f"first folders that cannot be opened: {closed}" in line


def test_split_of_a_folder_survives_renaming(photos):
    before = data.load_folder(str(photos), 16)
    for number, path in enumerate(sorted(photos.rglob("*.png"), reverse=True)):
        path.rename(photos / f"renamed{number}.png")
    after = data.load_folder(str(photos), 16)
    for split in data.SPLITS:
        assert as_bytes(before[split]) == as_bytes(after[split])
    assert not as_bytes(before["train"]) & (as_bytes(before["val"]) | as_bytes(before["test"]))


def test_given_split_folders_are_respected(tmp_path):
    for level, split in enumerate(data.SPLITS):
        (tmp_path / split / "deep").mkdir(parents=True)
        for i in range(5):
            Image.new("L", (16, 16), 60 * level + i).save(tmp_path / split / "deep" / f"{i}.png")
    found = data.load_folder(str(tmp_path), 16)
    for level, split in enumerate(data.SPLITS):
        assert found[split][:, 0, 0, 0].tolist() == [60 * level + i for i in range(5)]


def write_splits(folder, names, number: int = 4):
    """`number` pictures in each folder, of another grey for each of `names`: 60 * place + i."""
    for level, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            Image.new("L", (16, 16), 60 * level + i).save(folder / name / f"{i}.png")


@pytest.mark.parametrize(
    "names",
    [
        ("train", "validation", "test"),
        ("Train", "VAL", "Testing"),
        ("training_set", "dev_set", "test_set"),
        ("TrainSet", "Validation Set", "Test_Images"),
        ("train2017", "val2017", "test2017"),
        ("trainA", "valid", "testA"),
        ("cats/train", "cats/val", "cats/test"),
    ],
    ids="-".join,
)
def test_usual_spellings_of_splits_are_understood(tmp_path, names):
    write_splits(tmp_path, names)
    found = data.load_folder(str(tmp_path), 16)
    for level, split in enumerate(data.SPLITS):
        assert found[split][:, 0, 0, 0].tolist() == [60 * level + i for i in range(4)]


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "validation"), ("test",), ("cats/train",)])
def test_incomplete_splits_are_refused_and_not_mixed(tmp_path, names):
    write_splits(tmp_path, names, 20)
    write_splits(tmp_path, ["others"], 20)
    with pytest.raises(UserError, match=r"has no folder for .*; add .* mixed$"):
        data.load_folder(str(tmp_path), 16)


def test_folders_whose_names_only_begin_like_a_splits_are_no_splits(photos):
    (photos / "0").rename(photos / "trains and planes")
    (photos / "1").rename(photos / "valley")
    assert sum(len(images) for images in data.load_folder(str(photos), 16).values()) == 150


def test_what_lies_beside_the_splits_is_named_and_a_held_out_copy_is_not_trained_on(tmp_path, capsys):
    write_splits(tmp_path, data.SPLITS, 6)
    write_splits(tmp_path, ["extra"], 3)
    Image.new("L", (16, 16), 200).save(tmp_path / "lonely.png")
    Image.new("L", (16, 16), 120).save(tmp_path / "train" / "copy of a test picture.png")
    found = data.load_folder(str(tmp_path), 16)
    assert [len(found[split]) for split in data.SPLITS] == [6, 6, 6]
    assert 120 not in found["train"][:, 0, 0, 0]
    line = capsys.readouterr().out
    assert "4 beside the splits" in line
    assert f"; first beside the splits: {tmp_path / 'extra' / '0.png'}" in line
    assert "1 copies" in line


def test_links_to_folders_are_followed_and_never_in_a_circle(photos, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "link").symlink_to(photos / "0", target_is_directory=True)
    (tmp_path / "linked" / "again").symlink_to(photos / "0", target_is_directory=True)
    (tmp_path / "linked" / "one.png").symlink_to(next((photos / "1").iterdir()))
    (tmp_path / "linked" / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (photos / "0" / "circle").symlink_to(tmp_path / "linked", target_is_directory=True)
    (tmp_path / "way in").symlink_to(tmp_path / "linked", target_is_directory=True)
    for root in ("linked", "way in"):
        files, _ = data.image_files(tmp_path / root)
        assert sorted(path.name for path in files) == sorted(
            [*(path.name for path in (photos / "0").glob("*.png")), "one.png", "nowhere.png"]
        )


def test_many_copies_of_one_picture_are_said_to_be_copies(tmp_path):
    for i in range(30):
        Image.new("RGB", (16, 16), "green").save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match=r"each split needs 4 .*left out: 29 copies"):
        data.load_folder(str(tmp_path), 16)


def test_a_folder_of_other_files_says_which(tmp_path):
    (tmp_path / "photo.heic").write_text("")
    with pytest.raises(UserError, match=r"0 train, .*1 \.heic"):
        data.load_folder(str(tmp_path), 16)


@pytest.mark.parametrize("ending", ["jpg", "tif", "png", "webp"])
@pytest.mark.parametrize("tag", [0x0128, 0x9003, 0x8769, 0x0131])
def test_a_tag_that_is_damaged_is_no_reason_to_refuse_a_picture(tmp_path, ending, tag):
    picture, exif = Image.new("RGB", (32, 16), "black"), Image.Exif()
    picture.paste("white", (0, 0, 16, 16))
    exif[0x0112], exif[tag] = 6, "inches" if tag != 0x8769 else 7
    path = tmp_path / f"turned.{ending}"
    try:
        picture.save(path, exif=exif, lossless=True)
    except Exception as error:
        pytest.skip(f"Pillow does not write it ({error})")
    image = data.load_image(path, 16)
    assert image[:, 0].mean() > 0.9
    assert image[:, -1].mean() < -0.9


def test_a_picture_whose_tags_are_no_tags_is_read(tmp_path):
    Image.new("RGB", (20, 20), "white").save(tmp_path / "x.webp", exif=b"nonsense", lossless=True)
    assert (data.load_image(tmp_path / "x.webp", 16) == 1).all()


def tiff(path, values, bits: int, *, kind: int = 1, top: int | None = None):
    """Write a grey TIFF of one strip by hand: `values` are the bytes of 16 x 16 numbers."""
    entries = [(256, 3, 16), (257, 3, 16), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 200)]
    entries += [(277, 3, 1), (278, 3, 16), (279, 4, len(values))]
    entries += [(281, 3, top)] if top else []
    entries += [(339, 3, kind)]
    block = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + block + struct.pack("<I", 0)
    path.write_bytes(head.ljust(200, b"\0") + values)


def test_numbers_of_other_depths_are_scaled_by_what_the_file_says(tmp_path):
    half = {12: 0x7FF, 16: 0x7FFF}
    packed = bytes([half[12] >> 4, (half[12] & 15) << 4 | half[12] >> 8, half[12] & 255])  # two numbers
    tiff(tmp_path / "12.tif", packed * 128, 12)
    tiff(tmp_path / "16.tif", struct.pack("<H", half[16]) * 256, 16)
    tiff(tmp_path / "12 in 16.tif", struct.pack("<H", half[12]) * 256, 16, top=0xFFF)
    Image.fromarray(np.full((16, 16), half[16], np.uint16)).save(tmp_path / "16.png")
    for name in ("12.tif", "16.tif", "12 in 16.tif", "16.png"):
        pixels = data.to_uint8(data.load_image(tmp_path / name, 16))
        assert (pixels.int() - 127).abs().max() <= 1, name
    Image.fromarray(np.array([[0, 255, 256, 65535]] * 4, np.uint16)).save(tmp_path / "steps.png")
    steps = data.to_uint8(data.load_image(tmp_path / "steps.png", 4))[0, 0]
    assert steps.tolist() == [0, 1, 1, 255]


@pytest.mark.parametrize(("kind", "bits"), [(2, 16), (1, 32), (3, 32)], ids=["signed", "whole", "floating"])
def test_numbers_without_a_range_are_named(tmp_path, kind, bits):
    tiff(tmp_path / "x.tif", bytes(256 * bits // 8), bits, kind=kind)
    with pytest.raises(UserError, match=r"x\.tif: .*numbers without a known range"):
        data.load_image(tmp_path / "x.tif", 16)


def test_large_photographs_are_read_at_the_size_that_is_needed(tmp_path, monkeypatch):
    Image.linear_gradient("L").resize((1600, 1200)).convert("RGB").save(tmp_path / "large.jpg")
    loaded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: loaded.append(image.size) or load(image))
    small = data.load_image(tmp_path / "large.jpg", 16)
    assert max(max(size) for size in loaded) <= 400
    monkeypatch.setattr(Image.Image, "draft", lambda *_: None)
    assert (data.load_image(tmp_path / "large.jpg", 16) - small).abs().max() < 0.05


def test_of_many_pixels_only_too_many_are_spoken_of(tmp_path, monkeypatch, recwarn):
    Image.linear_gradient("L").resize((40, 30)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert data.load_image(tmp_path / "x.png", 16).shape == (3, 16, 16)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UserError, match=r"x\.png: .*exceeds limit"):
        data.load_image(tmp_path / "x.png", 16)


@pytest.mark.parametrize("files", [None, 0, 3])
def test_a_missing_empty_or_too_small_folder_is_an_error(tmp_path, files):
    folder = tmp_path / "photos"
    if files is not None:
        folder.mkdir()
        for i in range(files):
            Image.new("L", (16, 16), i).save(folder / f"{i}.png")
    with pytest.raises(UserError, match="photos"):
        Sentences(DataConfig(data=f"folder:{folder}"))


def test_no_scene_comes_twice_in_a_sentence_from_a_folder(tmp_path):
    for level, split in enumerate(data.SPLITS):
        (tmp_path / split).mkdir()
        for i in range(4):
            Image.new("L", (16, 16), 60 * level + 9 * i).save(tmp_path / split / f"{i}.png")
    sentences = Sentences(DataConfig(data=f"folder:{tmp_path}", image_size=16, num_demos=3))
    scenes = data.to_uint8(sentences.scenes("val", 50, torch.Generator().manual_seed(0)))
    for levels in scenes[..., 0, 0, 0].tolist():
        assert sorted(levels) == [60, 69, 78, 87]


def test_contact_sheets(command, tmp_path):
    result = command(data, "--out", tmp_path, "--data", "shapes")
    assert result.status == 0
    assert Image.open(tmp_path / "shapes.png").width > 100


def test_contact_sheets_of_folders_have_names_of_their_own(command, photos, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    shutil.copytree(photos, tmp_path / "other" / "photos")
    monkeypatch.chdir(photos)
    names = ["folder:.", f"folder:{photos}/", f"folder:{tmp_path}/other/photos"]
    result = command(data, "--out", tmp_path / "sheets", "--image-size", 16, "--data", *names)
    assert result.status == 0, result.err
    written = sorted(path.name for path in (tmp_path / "sheets").iterdir())
    assert written == ["photos-2.png", "photos-3.png", "photos.png"]
