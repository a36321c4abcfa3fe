"""Files that are written whole and read back, and numbers of flags that are checked."""

import argparse
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import runtime
import train_refiner
from runtime import UserError

ROOT = Path(__file__).parent.parent
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


def test_the_first_difference_of_two_configurations_is_named():
    old = {"gpt": {"layers": 2, "width": 64}, "seed": 0}
    runtime.check_config("x.pt", old, {"gpt": {"layers": 2, "width": 64}, "seed": 0, "found_in": "here"}, "")
    layers, heads, factor = {"layers": 3, "width": 64}, {"heads": 2}, {"factor": 4}
    for changed in ({"gpt": layers}, {"seed": 1}, {"gpt": heads}, {"vqgan": factor}):
        ((group, value),) = changed.items()
        name = f"{group}.{next(iter(value))}" if isinstance(value, dict) else group
        with pytest.raises(UserError, match=rf"^x\.pt was made with {name} = .*, or advice$"):
            runtime.check_config("x.pt", old, {**old, **changed}, "advice")


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


# Weights that belong together, folders in use, precision


def test_a_fingerprint_is_that_of_the_values():
    weights = {"a": torch.randn(3, 4), "count": torch.arange(3)}
    name = runtime.fingerprint(weights)
    assert name == runtime.fingerprint({key: weights[key].clone() for key in ("count", "a")})
    assert name == runtime.fingerprint({**weights, "a": weights["a"].half()})
    assert name == runtime.fingerprint({**weights, "a": weights["a"].T.contiguous().T})
    for other in ({**weights, "a": weights["a"] * 1.01}, {**weights, "count": torch.arange(1, 4)}):
        assert name != runtime.fingerprint(other)


def test_a_folder_is_locked_for_others_and_free_again(tmp_path):
    error = pytest.raises(UserError, match=r"--out .*another process")
    with runtime.locked(tmp_path), error, runtime.locked(tmp_path):
        pass
    with runtime.locked(tmp_path):
        pass


def test_a_lock_of_a_killed_process_does_not_stand_in_the_way(tmp_path):
    code = """if True:
        import runtime, sys, time
        with runtime.locked(sys.argv[1]):
            print("locked", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="another process"), runtime.locked(tmp_path):
        pass
    process.kill()
    process.wait()
    with runtime.locked(tmp_path):
        pass


def test_auto_goes_on_in_the_precision_of_a_run_that_was_begun(tmp_path, capsys):
    device = torch.device("cpu")
    here = runtime.pick_dtype("auto", device)
    other = torch.bfloat16 if here == torch.float32 else torch.float32
    first_stage = [tmp_path / "tokenizer.pt", tmp_path / "tokenizer.progress"]
    assert runtime.pick_dtype("auto", device, first_stage) == here
    assert not capsys.readouterr().out
    for dtype in (other, here):
        runtime.save(tmp_path / "tokenizer.progress", {"config": {"run": {"dtype": str(dtype)[6:]}}})
        assert runtime.pick_dtype("auto", device, first_stage) == dtype
        assert (f"--dtype {str(dtype)[6:]}" in capsys.readouterr().out) == (dtype == other)
        assert runtime.pick_dtype("float32", device, first_stage) == torch.float32


def test_compilation_that_does_not_work_is_one_line(monkeypatch):
    def compile(function):
        raise RuntimeError("\nNo C++ compiler found\n" + "traceback\n" * 80)

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(UserError) as error:
        runtime.check_compile(torch.device("cpu"))
    line = "--compile: torch.compile does not work here (No C++ compiler found); leave it out"
    assert str(error.value) == line


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_names_that_a_terminal_cannot_show_are_written_all_the_same(tmp_path, encoding):
    for number, split in enumerate(("train", "val", "test")):
        (tmp_path / "写真" / split).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (16, 16), 40 * number + 9 * i).save(tmp_path / "写真" / split / f"{i}.png")
    env = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    flags = ["--image-size", "16", "--data", "folder:写真", "folder:нет"]
    command = [sys.executable, ROOT / "data.py", *flags]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, encoding=encoding)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "no such folder" in result.stderr.splitlines()[-1]
    assert "4 train, 4 val, 4 test" in result.stdout
