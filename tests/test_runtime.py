"""Files that are written whole and read back, and numbers of flags that are checked."""

import argparse
import json
import math
import pickle
from pathlib import Path

import pytest
import torch

import runtime
import train_refiner
from runtime import UserError

FIELDS = [
    pytest.param(part, name, kind, *(limits or [(int(kind is int), math.inf)]), id=f"{part} {name}")
    for part, config_class in train_refiner.CONFIGS.items()
    for name, (kind, _, *limits) in runtime.annotations(config_class).items()
    if kind in (int, float)
]


def config_of(part: str, preset: dict, **given):
    """The configuration of one part, from a preset and flags."""
    prefix = "" if part == "data" else f"{part}_"
    args = argparse.Namespace(**{f"{prefix}{name}": value for name, value in given.items()})
    return runtime.configs_from_flags(args, {part: train_refiner.CONFIGS[part]}, {part: preset})[part]


# Numbers


@pytest.mark.parametrize(("part", "name", "kind", "limits"), FIELDS)
def test_every_number_has_a_range_and_a_message_with_its_flag(part, name, kind, limits):
    """From 1 for counts and from 0 for the rest, if nothing else is said; always finite."""
    low, high = limits
    flag = f"--{'' if part == 'data' else f'{part}_'}{name}".replace("_", "-")
    outside = [low - 1, -1, *([high + 1] if high < math.inf else [])]
    for value in [*map(kind, outside), *([math.inf, math.nan] if kind is float else [])]:
        with pytest.raises(UserError, match=rf"^{flag} {value}: expected a number of at least "):
            config_of(part, {}, **{name: value})
    for value in [low, *([high] if high < math.inf else [])]:
        if name not in ("image_size", "factor"):  # which have to divide something besides
            assert getattr(config_of(part, {}, **{name: kind(value)}), name) == value


def test_a_flag_goes_over_the_preset_and_the_preset_over_the_default():
    preset = {"layers": 7, "heads": 3}
    config = config_of("gpt", preset, layers=9, width=None)
    assert (config.layers, config.heads, config.width) == (9, 3, train_refiner.CONFIGS["gpt"]().width)
    assert preset == {"layers": 7, "heads": 3}


def test_first_difference_names_the_nested_field():
    old = {"gpt": {"layers": 2, "width": 64}, "seed": 0}
    assert runtime.first_difference(old, {"gpt": {"layers": 2, "width": 64}, "seed": 0}) is None
    layers, heads, factor = {"layers": 3, "width": 64}, {"heads": 2}, {"factor": 4}
    for changed in ({"gpt": layers}, {"seed": 1}, {"gpt": heads}, {"vqgan": factor}):
        ((group, value),) = changed.items()
        name = f"{group}.{next(iter(value))}" if isinstance(value, dict) else group
        assert runtime.first_difference(old, {**old, **changed}).startswith(f"{name} = ")


# Files


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file.txt"
    runtime.write_whole(path, lambda p: p.write_text("old"))

    def fail(p):
        p.write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match="disk full"):
        runtime.write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_and_checkpoints_are_read_back(tmp_path):
    runtime.save(tmp_path / "new" / "x.json", {"a": [1, None]})
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"a": [1, None]}
    runtime.save(tmp_path / "x.pt", {"config": {"k": 1}, "weight": torch.arange(3)})
    content = runtime.load_checkpoint(tmp_path / "x.pt")
    assert content["config"] == {"k": 1}
    assert content["weight"].tolist() == [0, 1, 2]


class Touch:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "foreign", "code", "plain pickle"])
def test_a_bad_checkpoint_is_named_and_its_code_is_not_run(tmp_path, kind):
    path, touched = tmp_path / "bad.pt", tmp_path / "touched"
    runtime.save(tmp_path / "good.pt", {"config": {}, "weight": torch.zeros(999)})
    if kind == "truncated":
        path.write_bytes((tmp_path / "good.pt").read_bytes()[:2000])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "foreign":
        torch.save({"state_dict": {}}, path)
    elif kind == "code":
        torch.save({"config": {}, "x": Touch(touched)}, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps({"config": {}, "x": Touch(touched)}, protocol=2))
    with pytest.raises(UserError, match=r"bad\.pt"):
        runtime.load_checkpoint(path)
    assert not touched.exists()
    if kind == "plain pickle":
        pickle.loads(path.read_bytes())
        assert touched.exists(), "the attack itself must work, or this test shows nothing"
