"""Killed, interrupted, out of disk, gone to infinity: what a training leaves behind, and how it goes on."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import runtime
import train_refiner
import vsr

ROOT = Path(__file__).parent.parent
# Codes are revived at step 101: a training that goes on at step 100 has to know which were unused before.
SHORT = """
    --preset smoke --image-size 16 --train-sentences 64 --eval-sentences 24 --device cpu --dtype float32
    --vqgan-steps 130 --vqgan-channels 16 --vqgan-batch-size 8 --vqgan-revive-every 34 --vqgan-gan-weight 0.5
    --gpt-steps 130 --gpt-width 16 --gpt-batch-size 4 --gpt-dropout 0.1
    --refiner-rollouts 32 --refiner-steps 130 --refiner-width 16 --refiner-batch-size 4 --refiner-dropout 0.1
    --reads tokens+query
"""
REFINER = "refiner_tokens+query"


def train(progress, steps=40, every=10, meanwhile=lambda step, model: None, device="cpu"):
    """A training with all that has a state: weights, a buffer, moments, batches, dropout."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.register_buffer("seen", torch.zeros(()))
    log = {"loss": []}
    parts = {"model": model, "optimizer": optimizer, "generator": generator}
    for step in runtime.training_steps("trial", steps, log, parts, progress, every):
        loss = model(torch.randn(16, 4, generator=generator).to(device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.seen += 1
        log["loss"].append(loss.item())
        meanwhile(step, model)
    return [*model.state_dict().values(), torch.tensor(log["loss"])]


def fail_at(when):
    def meanwhile(step, model):
        if step == when:
            raise RuntimeError("power cut")

    return meanwhile


@pytest.mark.parametrize("when", [3, 10, 25, 39])
def test_a_training_goes_on_as_if_nothing_had_happened(tmp_path, when):
    progress = tmp_path / "trial.progress", {"rate": 0.1}
    with pytest.raises(RuntimeError):
        train(progress, meanwhile=fail_at(when))
    assert progress[0].is_file() == (when >= 10)
    steps = []
    resumed = train(progress, meanwhile=lambda step, model: steps.append(step))
    assert steps[0] == when // 10 * 10  # no more than the steps since the last save are lost
    assert all(torch.equal(a, b) for a, b in zip(resumed, train(None), strict=True))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
def test_dropout_on_a_gpu_goes_on_as_well(tmp_path):
    """Up to rounding: other masks would change the losses by half of themselves."""
    progress, device = (tmp_path / "trial.progress", {"rate": 0.1}), torch.accelerator.current_accelerator()
    with pytest.raises(RuntimeError):
        train(progress, meanwhile=fail_at(25), device=device)
    for a, b in zip(train(progress, device=device), train(None, device=device), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_rollouts_go_on_and_their_seconds_are_those_of_all_attempts(tmp_path):
    """A backbone that repeats the last token of its prompt, and stops once in the 13th of 16 batches."""
    batches = []

    class Backbone(types.SimpleNamespace):
        def generate(self, prompt, N):
            batches.append(prompt)
            if len(batches) == 13:
                raise RuntimeError("power cut")
            time.sleep(0.02)
            return vsr.Rollout(prompt[:, -1:].expand(-1, N))

    backbone = Backbone(head=types.SimpleNamespace(weight=torch.zeros(1)))
    tokens = torch.arange(32 * 4 * 3).view(32, 4, 3)

    def write(progress):
        y, log = train_refiner.make_rollouts(backbone, tokens, contextlib.nullcontext(), 2, progress)
        return {"train": y}, log

    path = tmp_path / "rollouts.pt"
    with pytest.raises(RuntimeError):
        runtime.stage(path, {"seed": 0}, "rollouts", write)
    assert [file.name for file in tmp_path.iterdir()] == ["rollouts.progress"]
    made = runtime.stage(path, {"seed": 0}, "rollouts", write)
    assert len(batches) == 13 + 6  # ten batches were kept
    assert torch.equal(made["train"], tokens[:, 2, -1:].expand(-1, 3))
    assert made["seconds"] > 16 * 0.02
    assert runtime.load_checkpoint(path)["seconds"] == made["seconds"]
    assert [file.name for file in tmp_path.iterdir()] == ["rollouts.pt"]


def test_a_stage_is_made_once_and_refused_for_another_configuration(tmp_path):
    made, model = [], torch.nn.Linear(2, 1)

    def train(progress):
        made.append(progress)
        return model, {"seconds": 100.0}

    path = tmp_path / "trial.pt"
    first = runtime.stage(path, {"rate": 0.1}, "trial", train)
    again = runtime.stage(path, {"rate": 0.1}, "trial", train)
    assert made == [(tmp_path / "trial.progress", {"rate": 0.1})]
    assert first["seconds"] == again["seconds"] == 100
    assert torch.equal(again["model"]["weight"], model.weight)
    with pytest.raises(runtime.UserError, match=r"rate = 0\.1, now 0\.2: .*--fresh trial"):
        runtime.stage(path, {"rate": 0.2}, "trial", train)
    assert len(made) == 1
    runtime.save(path, {"config": {"rate": 0.1}, "model": {}})  # of something else, by chance under this name
    with pytest.raises(runtime.UserError, match="not a checkpoint of this stage"):
        runtime.stage(path, {"rate": 0.1}, "trial", train)


def test_ctrl_c_lets_the_step_end_and_saves(tmp_path):
    progress, handler = (tmp_path / "trial.progress", {}), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="step 4 of 40 is saved"):
        train(progress, meanwhile=lambda step, model: step == 3 and os.kill(os.getpid(), signal.SIGINT))
    assert runtime.load_checkpoint(progress[0])["step"] == 4
    assert signal.getsignal(signal.SIGINT) is handler
    assert all(torch.equal(a, b) for a, b in zip(train(progress), train(None), strict=True))


def test_ctrl_c_says_what_is_saved_when_the_weights_are_no_numbers(tmp_path):
    def spoil(step, model):
        if step == 15:
            model[0].weight.data.fill_(torch.nan)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="step 10 of 40 is saved"):
        train((tmp_path / "trial.progress", {}), meanwhile=spoil)
    assert runtime.load_checkpoint(tmp_path / "trial.progress")["step"] == 10


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def twice(step, model):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train((tmp_path / "trial.progress", {}), meanwhile=twice)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_numbers_are_never_saved(tmp_path):
    def spoil(step, model):
        if step == 15:
            with torch.no_grad():
                model[0].weight.fill_(torch.nan)

    progress = (tmp_path / "trial.progress", {})
    with pytest.raises(runtime.UserError, match="trial: the weights are not finite"):
        train(progress, meanwhile=spoil)
    saved = runtime.load_checkpoint(progress[0])
    assert saved["step"] == 10
    assert all(x.isfinite().all() for x in saved["parts"]["model"].values())


def test_progress_of_another_configuration_is_refused(tmp_path):
    path = tmp_path / "trial.progress"
    with pytest.raises(RuntimeError):
        train((path, {"rate": 0.1}), meanwhile=fail_at(20))
    before = path.read_bytes()
    with pytest.raises(runtime.UserError, match=r"rate = 0\.1, now 0\.2"):
        train((path, {"rate": 0.2}))
    assert path.read_bytes() == before


def test_progress_that_lacks_something_is_named(tmp_path):
    path = tmp_path / "trial.progress"
    runtime.save(path, {"config": {}, "step": 10, "parts": {}})
    with pytest.raises(runtime.UserError, match=r"trial\.progress: not what this version"):
        train((path, {}))


def start(out):
    command = [sys.executable, ROOT / "train_refiner.py", "--out", out, *SHORT.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_a_real_run_killed_in_every_stage_ends_with_the_same_weights(command, no_pictures, tmp_path):
    for number, stage in enumerate(("tokenizer", "backbone", REFINER)):
        run = start(tmp_path / "killed")
        while run.poll() is None and not (tmp_path / "killed" / f"{stage}.progress").is_file():
            time.sleep(0.01)
        time.sleep(0.02 * number)  # once while the file is fresh, then later in the stage
        assert run.poll() is None, run.communicate()
        run.send_signal(signal.SIGINT if stage == "backbone" else signal.SIGKILL)
        _, errors = run.communicate()
        assert run.returncode == (130 if stage == "backbone" else -signal.SIGKILL)
        assert ("interrupted. backbone: step" in errors) == (stage == "backbone")
        assert ("is saved. Finished stages and saved steps are kept; " in errors) == (stage == "backbone")
    # The last attempt, and the run that is not interrupted, in this process
    resumed = command(train_refiner, *SHORT.split(), "--out", tmp_path / "killed")
    assert resumed.status == 0, resumed.err
    assert "refiner (tokens+query): goes on at step" in resumed.out
    whole = command(train_refiner, *SHORT.split(), "--out", tmp_path / "whole")
    assert whole.status == 0, whole.err
    assert "goes on" not in whole.out
    for name in ("tokenizer", "backbone", REFINER):
        a, b = [
            runtime.load_checkpoint(tmp_path / folder / f"{name}.pt")["model"]
            for folder in ("whole", "killed")
        ]
        assert all(torch.equal(a[key], b[key]) for key in a), name
    files = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("whole", "killed")]
    assert files[0] == files[1]  # nothing half written, nothing left over


@pytest.fixture
def full_disk():
    """No file grows beyond 20,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(command, full_disk, tmp_path):
    result = command(train_refiner, *SHORT.split(), "--out", tmp_path / "run")
    assert result.status == 2
    assert result.err[-1].startswith(f"error: {tmp_path}/run/tokenizer.progress: cannot be written (")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_loss_that_is_no_number_is_one_line(command, tmp_path):
    flags = ["--vqgan-steps", 5, "--gpt-learning-rate", "1e30", "--out", tmp_path / "run"]
    result = command(train_refiner, *SHORT.split(), *flags)
    assert result.status == 2
    assert result.err[-1].startswith("error: backbone: the loss is ")
    assert "try a lower --gpt-learning-rate" in result.err[-1]
    assert (tmp_path / "run" / "tokenizer.pt").is_file()
