"""Fixtures shared by all tests: one finished (very small) run, and a way to call a command here."""

import io
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
import runtime

ROOT = Path(__file__).parent.parent
CPU = ("--device", "cpu", "--dtype", "float32")
SMOKE = """
    --preset smoke --image-size 16 --train-sentences 128 --eval-sentences 48
    --vqgan-steps 40 --gpt-steps 40 --refiner-rollouts 64 --refiner-steps 20
"""

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """A finished run of the real command: its folder, its flags, and what it printed."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    flags = [*SMOKE.split(), *CPU, "--out", str(out)]
    result = subprocess.run(
        [sys.executable, ROOT / "train_refiner.py", *flags],
        cwd=out.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(out=out, flags=flags, stdout=result.stdout)


@pytest.fixture
def copied(smoke, tmp_path):
    """A copy of the finished run that a test may change: the folder, and the flags that go on with it."""
    shutil.copytree(smoke.out, tmp_path / "run")
    return tmp_path / "run", [*smoke.flags[:-1], tmp_path / "run"]


@pytest.fixture(scope="session")
def command():
    """command(module, *flags) runs a command here: exit status, stdout, and stderr without progress bars."""

    def run(module, *flags):
        out, err, status = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
            try:
                runtime.run_command(module.main)
            except SystemExit as stop:
                status = stop.code
        lines = [line for line in err.getvalue().splitlines() if line.strip() and "%|" not in line]
        return SimpleNamespace(status=status, out=out.getvalue(), err=lines)

    return run


@contextmanager
def without_pictures():
    """Leave out the pictures of a run: most of its time, where nobody looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_error_by_position", "plot_training", "save_samples", "save_reconstructions"):
            patch.setattr(evaluate, name, lambda *_: None)
        patch.setattr(data, "save_picture", lambda *_, **__: None)
        yield


@pytest.fixture
def no_pictures():
    with without_pictures():
        yield
