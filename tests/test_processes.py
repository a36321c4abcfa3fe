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
from types import SimpleNamespace

import pytest
import torch
from conftest import without_pictures
from test_resume import SHORT

import data
import runtime
import train_refiner
import vqgan
import vsr

ROOT = Path(__file__).parent.parent
PROC = Path("/proc")  # Linux
CPU, FLOAT = torch.device("cpu"), torch.float32
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def train_all() -> dict:
    """All trainings and a rollout, on inputs that do not depend on each other: {name: losses or tensors}."""
    config = data.DataConfig(image_size=16, train_sentences=64, eval_sentences=16)
    options = {"steps": 16, "batch_size": 8, "revive_every": 4, "gan_weight": 0.5, "gan_start": 0.5}
    made = vqgan.VQGANConfig(codebook_size=32, channels=16, **options)
    tokenizer, log = train_refiner.train_tokenizer(made, data.Sentences(config, 0), CPU, FLOAT)
    names = ("reconstruction", "commitment", "generator", "discriminator")
    result = {f"tokenizer {name}": log[name] for name in names}
    result |= {"codebook": tokenizer.codebook.weight, "unused": tokenizer.codebook.unused}

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(8, (41, 4, 16), generator=generator).short()
    gpt = vsr.GPTConfig(layers=1, width=32, steps=16, batch_size=8)
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
    refining = vsr.RefinerConfig(layers=1, heads=2, width=16, steps=16, batch_size=8)
    refiner, log = train_refiner.train_refiner(
        refining, vsr.READS, codebook, (4, 4), rollouts, targets, CPU, FLOAT, 0
    )
    return {**result, "refiner": log["loss"], "refiner weights": refiner.to_code.weight}


def process_of_rank(rank: int, parent: int) -> int:
    """The process that torchrun started with this rank (Linux)."""
    for folder in PROC.glob("[0-9]*"):
        try:
            started_by = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if started_by == parent and f"\0RANK={rank}\0" in (folder / "environ").read_text():
                return int(folder.name)
        except (OSError, ValueError):  # it has ended meanwhile, or is not ours
            continue
    raise AssertionError(f"no process of rank {rank}")


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
def killed(tmp_path_factory):
    """The real command in two processes, one of which is killed: its folder, exit status and errors."""
    out = tmp_path_factory.mktemp("killed") / "run"
    run = torchrun(ROOT / "train_refiner.py", *SHORT.split(), "--out", out)
    while not (out / "backbone.progress").is_file():
        assert run.poll() is None, run.communicate(timeout=240)
        time.sleep(0.02)
    if PROC.is_dir():
        os.kill(process_of_rank(1, run.pid), signal.SIGKILL)
    else:
        run.terminate()
    _, errors = run.communicate(timeout=240)
    return SimpleNamespace(out=out, status=run.returncode, errors=errors)


@pytest.fixture(scope="module")
def theirs(killed):
    """What each of two processes computes: the main part of this file, which goes on with the killed run."""
    step = runtime.load_checkpoint(killed.out / "backbone.progress")["step"]
    run = torchrun(__file__, killed.out)
    printed, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    results = [torch.load(killed.out.parent / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return SimpleNamespace(results=results, printed=printed, went_on_at=step)


def test_two_processes_follow_one(ours, theirs):
    for name, values in ours.items():
        a, b, single = map(torch.as_tensor, (*[result[name] for result in theirs.results], values))
        assert torch.equal(a, b), f"{name} differs between the processes"
        assert torch.allclose(a.double(), single.double(), rtol=1e-3, atol=1e-3), (name, a, single)
    assert torch.equal(theirs.results[0]["rollouts"], ours["rollouts"])
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
    for result in theirs.results:
        assert result["refused"] == "error: --gpt-batch-size 5: not a multiple of the 2 processes\n"
        assert result["status"] == 2
        assert not result["wrote"]


@pytest.mark.skipif(not PROC.is_dir(), reason="the process to kill is looked up in /proc")
def test_a_process_that_dies_ends_the_job_and_it_goes_on(killed, theirs):
    assert killed.status != 0
    assert "exitcode  : -9" in killed.errors  # torchrun's report names the process that died
    assert theirs.went_on_at >= 100
    assert theirs.printed.count("backbone: goes on at step") == 1  # the first process alone prints
    assert theirs.printed.count("metrics and pictures are in") == 1
    assert (killed.out / "metrics.json").is_file()
    assert not list(killed.out.glob("*.progress"))


def command(*flags) -> tuple[int, str]:
    """The real command in this process: exit status and what it said."""
    sys.argv = ["train_refiner.py", *SHORT.split(), *flags]
    errors, status = io.StringIO(), 0
    with contextlib.redirect_stderr(errors):
        try:
            runtime.run_command(train_refiner.main, divides=True)
        except SystemExit as stop:
            status = stop.code
    runtime.end_processes()
    return status, errors.getvalue()


if __name__ == "__main__":
    out = Path(sys.argv[1])
    status, refused = command("--gpt-batch-size", "5", "--out", f"{out}-refused")
    wrote = Path(f"{out}-refused").exists()
    runtime.start_processes(CPU, {})
    result = {**train_all(), "status": status, "refused": refused, "wrote": wrote}
    torch.save(result, out.parent / f"{os.environ['RANK']}.pt")
    runtime.end_processes()
    with without_pictures():
        status, errors = command("--out", str(out))
    print(errors, file=sys.stderr)
    sys.exit(status)
