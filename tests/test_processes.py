"""More than one process: `torchrun` with two, on the CPU, against one. Run by torchrun, this file is what they compute."""

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
import train_refiner
import vqgan
import vsr

ROOT = Path(__file__).parent.parent
CPU, FLOAT = torch.device("cpu"), torch.float32
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def train_all() -> dict:
    """All trainings and a rollout, each on inputs that do not depend on the others: {name: losses or final tensors}."""
    config = data.DataConfig(image_size=16, train_sentences=64, eval_sentences=16)
    made = vqgan.VQGANConfig(
        codebook_size=32, channels=16, steps=50, batch_size=8, revive_every=10, gan_weight=0.5, gan_start=0.5
    )
    tokenizer, log = vqgan.train_tokenizer(made, data.Sentences(config, 0), CPU, FLOAT)
    result = {f"tokenizer {name}": log[name] for name in ("reconstruction", "commitment", "generator", "discriminator")}
    result |= {"codebook": tokenizer.codebook.weight, "unused": tokenizer.codebook.unused}

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(8, (41, 4, 16), generator=generator).short()
    gpt = vsr.GPTConfig(layers=1, width=32, steps=50, batch_size=8)
    backbone, log = train_refiner.train_backbone(gpt, tokens, tokens[:16], 32, CPU, FLOAT, 0)
    result |= {"backbone": log["loss"], "backbone weights": backbone.head.weight}
    backbone.load_state_dict(vsr.GPT(gpt, 32, 16, 4).state_dict())  # the same seed: the same weights everywhere
    autocast = torch.autocast("cpu", enabled=False)
    result["rollouts"], _ = train_refiner.make_rollouts(backbone, tokens, autocast, batch=8)  # 41: the last has one row

    codebook = torch.randn(32, 4, generator=generator)
    hidden = torch.randn(41, 16, 5, generator=generator)
    rollouts = {"train": vsr.Rollout(tokens[:, 0], hidden, hidden), "val": vsr.Rollout(tokens[:8, 0], hidden[:8], hidden[:8])}
    targets = {"train": tokens[:, 3], "val": tokens[:8, 3]}
    refining = vsr.RefinerConfig(layers=1, heads=2, width=16, steps=50, batch_size=8)
    refiner, log = train_refiner.train_refiner(refining, "hidden", codebook, (4, 4), rollouts, targets, CPU, FLOAT, 0)
    return {**result, "refiner": log["loss"], "refiner weights": refiner.move.weight}


def torchrun(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_two_processes_follow_one(tmp_path):
    run = torchrun(__file__, tmp_path)
    one = train_all()
    _, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, values in one.items():
        a, b, single = (torch.as_tensor(v) for v in (ranks[0][name], ranks[1][name], values))
        assert torch.equal(a, b), f"{name} differs between the processes"
        assert torch.allclose(a.double(), single.double(), rtol=1e-3, atol=1e-3), (name, a, single)
    assert torch.equal(ranks[0]["rollouts"], one["rollouts"])
    assert one["unused"].max() > 0
    assert one["tokenizer generator"][-1] != 0


def test_two_threads_follow_one():
    one, threads = train_all(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = train_all()
    finally:
        torch.set_num_threads(threads)
    for name, values in one.items():
        a, b = torch.as_tensor(two[name]).double(), torch.as_tensor(values).double()
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3), (name, a, b)


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
    flags = [ROOT / "train_refiner.py", *SHORT, "--dtype", "float32", "--out", tmp_path / "run"]
    run = torchrun(*flags)
    wait_for(tmp_path / "run" / "backbone.progress", run)
    os.kill(process_of_rank(1, run.pid), signal.SIGKILL)
    _, errors = run.communicate(timeout=240)
    assert run.returncode != 0
    assert "exitcode  : -9" in errors  # torchrun's report names the process that died
    assert data.load_checkpoint(tmp_path / "run" / "backbone.progress")["step"] >= 100

    run = torchrun(*flags)
    printed, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    assert printed.count("backbone: goes on at step") == 1  # the first process alone prints
    assert printed.count("wrote metrics.json") == 1
    assert not list((tmp_path / "run").glob("*.progress"))


def test_a_batch_that_cannot_be_divided_is_one_line(tmp_path):
    run = torchrun(ROOT / "train_refiner.py", *SHORT, "--gpt-batch-size", "5", "--out", tmp_path / "run")
    _, errors = run.communicate(timeout=240)
    assert run.returncode != 0
    assert "error: --gpt-batch-size 5: not a multiple of the 2 processes" in errors
    assert "Traceback" not in errors.split("error: --gpt")[0]
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    data.start_processes(CPU)
    torch.save(train_all(), Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
    data.end_processes()
