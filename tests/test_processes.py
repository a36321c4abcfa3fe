"""More than one process: `torchrun` with two, on the CPU, against one.

Run by torchrun, this file is what they compute.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_resume import SHORT

import data
import runtime
import train_refiner
import vqgan
import vsr

ROOT = Path(__file__).parent.parent
CPU, FLOAT = torch.device("cpu"), torch.float32
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def train_all() -> dict:
    """All trainings and a rollout, on inputs that do not depend on each other: {name: losses or tensors}."""
    config = data.DataConfig(image_size=16, train_sentences=64, eval_sentences=16)
    options = {"steps": 24, "batch_size": 8, "revive_every": 6, "gan_weight": 0.5, "gan_start": 0.5}
    made = vqgan.VQGANConfig(codebook_size=32, channels=16, **options)
    tokenizer, log = train_refiner.train_tokenizer(made, data.Sentences(config, 0), CPU, FLOAT)
    names = ("reconstruction", "commitment", "generator", "discriminator")
    result = {f"tokenizer {name}": log[name] for name in names}
    result |= {"codebook": tokenizer.codebook.weight, "unused": tokenizer.codebook.unused}

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(8, (41, 4, 16), generator=generator).short()
    gpt = vsr.GPTConfig(layers=1, width=32, steps=25, batch_size=8)
    backbone, log = train_refiner.train_backbone(gpt, tokens, tokens[:16], 32, CPU, FLOAT, 0)
    result |= {"backbone": log["loss"], "backbone weights": backbone.head.weight}
    torch.manual_seed(0)  # the same weights everywhere
    backbone.load_state_dict(vsr.GPT(gpt, 32, 16, 4).state_dict())
    autocast = torch.autocast("cpu", enabled=False)
    # 41 sentences: the last batch has one row
    result["rollouts"], _ = train_refiner.make_rollouts(backbone, tokens, autocast, batch=8)

    codebook = torch.randn(32, 4, generator=generator)
    states, query = torch.randn(2, 41, 16, 5, generator=generator)
    whole = vsr.Rollout(tokens[:, 0], states, query)
    rollouts = {"train": whole, "val": vsr.Rollout(*[x[:8] for x in whole])}
    targets = {"train": tokens[:, 3], "val": tokens[:8, 3]}
    refining = vsr.RefinerConfig(layers=1, heads=2, width=16, steps=25, batch_size=8)
    refiner, log = train_refiner.train_refiner(
        refining, vsr.SOURCES, codebook, (4, 4), rollouts, targets, CPU, FLOAT, 0
    )
    return {**result, "refiner": log["loss"], "refiner weights": refiner.to_code.weight}


def torchrun(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def ours():
    """What one process computes, with one thread."""
    return train_all()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """What each of two processes computes, and what it said to a batch that cannot be divided."""
    folder = tmp_path_factory.mktemp("processes")
    run = torchrun(__file__, folder)
    _, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_follow_one(ours, theirs):
    for name, values in ours.items():
        a, b, single = (torch.as_tensor(v) for v in (theirs[0][name], theirs[1][name], values))
        assert torch.equal(a, b), f"{name} differs between the processes"
        assert torch.allclose(a.double(), single.double(), rtol=1e-3, atol=1e-3), (name, a, single)
    assert torch.equal(theirs[0]["rollouts"], ours["rollouts"])
    assert ours["unused"].max() > 0
    assert ours["tokenizer generator"][-1] != 0


def test_two_threads_follow_one(ours):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = train_all()
    finally:
        torch.set_num_threads(threads)
    for name, values in ours.items():
        a, b = torch.as_tensor(two[name]).double(), torch.as_tensor(values).double()
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3), (name, a, b)


def test_a_batch_that_cannot_be_divided_is_one_line(theirs):
    for result in theirs:
        assert result["refused"] == "error: --gpt-batch-size 5: not a multiple of the 2 processes\n"
        assert result["status"] == 2
        assert not result["wrote"]


def wait_for(path, run):
    while not path.is_file():
        assert run.poll() is None, run.communicate(timeout=240)
        time.sleep(0.02)


def process_of_rank(rank: int, parent: int) -> int:
    """The process that torchrun started with this rank (Linux)."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            started_by = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if started_by == parent and f"\0RANK={rank}\0" in (folder / "environ").read_text():
                return int(folder.name)
        except (OSError, ValueError):  # it has ended meanwhile, or is not ours
            continue
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="looks for the process in /proc")
def test_a_process_that_dies_ends_the_job_and_it_goes_on(tmp_path):
    flags = [ROOT / "train_refiner.py", *SHORT.split(), "--out", tmp_path / "run"]
    run = torchrun(*flags)
    wait_for(tmp_path / "run" / "backbone.progress", run)
    os.kill(process_of_rank(1, run.pid), signal.SIGKILL)
    _, errors = run.communicate(timeout=240)
    assert run.returncode != 0
    assert "exitcode  : -9" in errors  # torchrun's report names the process that died
    assert runtime.load_checkpoint(tmp_path / "run" / "backbone.progress")["step"] >= 100

    run = torchrun(*flags)
    printed, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    assert printed.count("backbone: goes on at step") == 1  # the first process alone prints
    assert printed.count("metrics and pictures are in") == 1
    assert not list((tmp_path / "run").glob("*.progress"))


def refused_command(out: Path) -> dict:
    """The real command with a batch that two processes cannot divide: exit status and what it said."""
    sys.argv = ["train_refiner.py", *SHORT.split(), "--gpt-batch-size", "5", "--out", str(out)]
    errors, status = io.StringIO(), 0
    with contextlib.redirect_stderr(errors):
        try:
            runtime.run_command(train_refiner.main, divides=True)
        except SystemExit as stop:
            status = stop.code
    runtime.end_processes()
    return {"refused": errors.getvalue(), "status": status, "wrote": out.exists()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    refused = refused_command(folder / "run")
    runtime.start_processes("cpu", {})
    torch.save({**train_all(), **refused}, folder / f"{os.environ['RANK']}.pt")
    runtime.end_processes()
