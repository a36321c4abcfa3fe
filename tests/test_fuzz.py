"""Damaged and foreign files: the readers either understand them or say so in one line."""

import io
import pickle
import random
import re

import pytest
import torch
from PIL import Image, ImageDraw

import data
import evaluate
import runtime
import train_refiner
from runtime import UserError


def picture(ending, frames=1, size=(20, 16), mode="RGB"):
    image = Image.linear_gradient("L").resize(size).convert(mode)
    ImageDraw.Draw(image).ellipse((3, 3, 12, 12), fill=1)
    file = io.BytesIO()
    more = [image.rotate(9 * i) for i in range(1, frames)]
    image.save(file, ending, **({"save_all": True, "append_images": more} if more else {}))
    return file.getvalue()


def damaged(content, count, seed=0):
    """Copies of a file: cut short, with single bytes changed, with a piece left out, with noise in it."""
    chance = random.Random(seed)
    for number in range(count):
        copy, at = bytearray(content), chance.randrange(len(content))
        if number % 4 == 0:
            copy = copy[:at]
        elif number % 4 == 1:
            for _ in range(3):
                copy[chance.randrange(len(copy))] = chance.randrange(256)
        elif number % 4 == 2:
            del copy[at : at + chance.randrange(1, 40)]
        else:
            copy[at : at + 16] = chance.randbytes(16)
        yield bytes(copy)


@pytest.mark.parametrize("ending", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_damaged_image_is_read_or_named(tmp_path, ending):
    path, refused = tmp_path / "picture", 0
    for content in damaged(picture(ending), 60):
        path.write_bytes(content)
        try:
            image = data.load_image(path, 16)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
            assert "\n" not in str(error)
        else:
            assert image.shape == (3, 16, 16)
            assert image.isfinite().all()
            assert -1 <= image.min() <= image.max() <= 1
    assert refused


UNUSUAL = {
    "animated gif": picture("GIF", frames=4),
    "animated webp": picture("WEBP", frames=3),
    "one pixel": picture("PNG", size=(1, 1)),
    "one line": picture("PNG", size=(1, 3000)),
    "1 bit": picture("PNG", mode="1"),
    "16 bit": picture("PNG", mode="I;16"),
    "palette": picture("PNG", mode="P"),
    "alpha": picture("PNG", mode="LA"),
    "CMYK": picture("JPEG", mode="CMYK"),
}


@pytest.mark.parametrize("content", UNUSUAL.values(), ids=UNUSUAL)
def test_an_unusual_image_is_read(tmp_path, content):
    (tmp_path / "picture").write_bytes(content)
    image = data.load_image(tmp_path / "picture", 16)
    assert image.shape == (3, 16, 16)
    assert -1 <= image.min() <= image.max() <= 1


def test_a_picture_that_would_fill_the_memory_is_named(tmp_path):
    header = picture("PNG")
    # width and height in the header, little behind it
    huge = header[:16] + (60_000).to_bytes(4, "big") * 2 + header[24:]
    (tmp_path / "huge.png").write_bytes(huge)
    with pytest.raises(UserError, match=r"huge\.png: cannot be read as an image"):
        data.load_image(tmp_path / "huge.png", 16)


def test_a_damaged_checkpoint_is_read_or_named(copied):
    folder, _ = copied
    path, refused = folder / "refiner_tokens.pt", 0
    for content in damaged(path.read_bytes(), 80):
        path.write_bytes(content)
        try:
            evaluate.load_run(folder, torch.device("cpu"))
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
            assert "\n" not in str(error)
    assert refused


class Boom:
    def __reduce__(self):
        return (print, ("code ran",))


FOREIGN = {
    "empty config": {"config": {}},
    "another config": {"config": {"vqgan": {}}},
    "a number": {"config": 3},
    "no config": {"model": {}},
    "list": [1, 2],
    "tensor": torch.zeros(3),
    "code": {"config": Boom()},
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("name", ["tokenizer.pt", "backbone.pt", f"refiner_{train_refiner.READINGS[-1]}.pt"])
def test_a_foreign_checkpoint_is_named(copied, capsys, foreign, name):
    folder, _ = copied
    torch.save(foreign, folder / name)
    with pytest.raises(UserError, match=re.escape(name)):
        evaluate.load_run(folder, torch.device("cpu"))
    assert "code ran" not in capsys.readouterr().out


def test_a_plain_pickle_with_code_in_it_is_not_run(tmp_path, capsys):
    (tmp_path / "tokenizer.pt").write_bytes(pickle.dumps({"config": Boom()}))
    with pytest.raises(UserError, match=r"tokenizer\.pt"):
        runtime.load_checkpoint(tmp_path / "tokenizer.pt")
    assert "code ran" not in capsys.readouterr().out
