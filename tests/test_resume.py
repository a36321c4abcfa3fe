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

import data
import train_refiner
import vsr

ROOT = Path(__file__).parent.parent
SHORT = [
    *("--preset", "smoke", "--image-size", "16", "--train-sentences", "64", "--eval-sentences", "24"),
    *("--vqgan-steps", "130", "--vqgan-channels", "16", "--vqgan-batch-size", "8", "--vqgan-revive-every", "30"),
    *("--vqgan-gan-weight", "0.5"),
    *("--gpt-steps", "130", "--gpt-width", "16", "--gpt-batch-size", "4", "--gpt-dropout", "0.1"),
    *("--refiner-rollouts", "32", "--refiner-steps", "130", "--refiner-width", "16", "--refiner-batch-size", "4"),
    *("--refiner-dropout", "0.1", "--inputs", "hidden", "--device", "cpu"),
]


def train(progress, steps=40, every=10, meanwhile=lambda step, model: None):
    """A training with everything that has a state: weights, a tensor beside them, moments, batches, dropout."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    seen, log = torch.zeros(()), {"loss": []}
    parts = {"model": model, "optimizer": optimizer, "generator": generator, "seen": seen}
    for step in data.training_steps("trial", steps, log, parts, progress, every):
        loss = model(torch.randn(16, 4, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += 1
        log["loss"].append(loss.item())
        meanwhile(step, model)
    return [*model.parameters(), seen, torch.tensor(log["loss"])]


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


def test_rollouts_go_on_and_their_seconds_are_those_of_all_attempts(tmp_path):
    """A backbone that repeats the last token of its prompt, and stops once in the 13th of 16 batches."""
    batches = []

    class Backbone(types.SimpleNamespace):
        def generate(self, prompt, N):
            batches.append(prompt)
            if len(batches) == 13:
                raise RuntimeError("power cut")
            time.sleep(0.02)
            return vsr.Rollout(prompt[:, -1:].expand(-1, N), None, None)

    backbone = Backbone(head=types.SimpleNamespace(weight=torch.zeros(1)))
    tokens, progress = torch.arange(32 * 4 * 3).view(32, 4, 3), (tmp_path / "rollouts.progress", {})
    with pytest.raises(RuntimeError):
        train_refiner.make_rollouts(backbone, tokens, contextlib.nullcontext(), 2, progress)
    generated, seconds = train_refiner.make_rollouts(backbone, tokens, contextlib.nullcontext(), 2, progress)
    assert len(batches) == 13 + 6  # ten batches were kept
    assert torch.equal(generated, tokens[:, 2, -1:].expand(-1, 3))
    assert seconds > 16 * 0.02


def test_ctrl_c_lets_the_step_end_and_saves(tmp_path):
    progress, handler = (tmp_path / "trial.progress", {}), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="step 4 of 40 is saved"):
        train(progress, meanwhile=lambda step, model: step == 3 and os.kill(os.getpid(), signal.SIGINT))
    assert data.load_checkpoint(progress[0])["step"] == 4
    assert signal.getsignal(signal.SIGINT) is handler
    assert all(torch.equal(a, b) for a, b in zip(train(progress), train(None), strict=True))


def test_ctrl_c_says_what_is_saved_when_the_weights_are_no_numbers(tmp_path):
    def spoil(step, model):
        if step == 15:
            model[0].weight.data.fill_(torch.nan)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="step 10 of 40 is saved"):
        train((tmp_path / "trial.progress", {}), meanwhile=spoil)
    assert data.load_checkpoint(tmp_path / "trial.progress")["step"] == 10


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

    train(progress := (tmp_path / "trial.progress", {}), meanwhile=spoil)
    saved = data.load_checkpoint(progress[0])
    assert saved["step"] == 10
    assert all(x.isfinite().all() for x in saved["parts"]["model"].values())


def test_progress_of_another_configuration_is_refused(tmp_path):
    path = tmp_path / "trial.progress"
    with pytest.raises(RuntimeError):
        train((path, {"rate": 0.1}), meanwhile=fail_at(20))
    before = path.read_bytes()
    with pytest.raises(data.UserError, match=r"rate = 0\.1, now 0\.2"):
        train((path, {"rate": 0.2}))
    assert path.read_bytes() == before


def test_progress_that_lacks_something_is_named(tmp_path):
    path = tmp_path / "trial.progress"
    data.save_checkpoint(path, {"config": {}, "step": 10, "parts": {}})
    with pytest.raises(data.UserError, match=r"trial\.progress: not what this version"):
        train((path, {}))


def start(out, *flags, **options):
    command = [sys.executable, ROOT / "train_refiner.py", "--out", out, *SHORT, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_real_run_killed_in_every_stage_ends_with_the_same_weights(tmp_path):
    whole = start(tmp_path / "whole")
    for number, stage in enumerate(("tokenizer", "backbone", "refiner_hidden")):
        run = start(tmp_path / "killed")
        while run.poll() is None and not (tmp_path / "killed" / f"{stage}.progress").is_file():
            time.sleep(0.02)
        time.sleep(0.03 * number)  # once while the file is fresh, then later in the stage
        assert run.poll() is None, run.communicate()
        run.send_signal(signal.SIGINT if stage == "backbone" else signal.SIGKILL)
        _, errors = run.communicate()
        assert run.returncode == (130 if stage == "backbone" else -signal.SIGKILL)
        assert ("interrupted. backbone: step" in errors) == (stage == "backbone")
        assert ("is saved. Finished stages and saved steps are kept; " in errors) == (stage == "backbone")
    run = start(tmp_path / "killed")
    printed, errors = run.communicate()
    assert run.returncode == 0, errors
    assert "refiner (hidden): goes on at step" in printed
    assert whole.wait() == 0
    for name in ("tokenizer", "backbone", "refiner_hidden"):
        a, b = [data.load_checkpoint(tmp_path / folder / f"{name}.pt")["model"] for folder in ("whole", "killed")]
        assert all(torch.equal(a[key], b[key]) for key in a), name
    files = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("whole", "killed")]
    assert files[0] == files[1]  # nothing half written, nothing left over


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    run = start(tmp_path / "run", preexec_fn=limit)
    _, errors = run.communicate()
    assert run.returncode == 2
    assert errors.splitlines()[-1].startswith(f"error: {tmp_path}/run/tokenizer.progress: cannot be written (")
    assert not list((tmp_path / "run").iterdir())


def test_a_loss_that_is_no_number_is_one_line(tmp_path):
    run = start(tmp_path / "run", "--gpt-learning-rate", "1e30")
    _, errors = run.communicate()
    assert run.returncode == 2
    last = errors.splitlines()[-1]
    assert last.startswith("error: backbone: the loss is ")
    assert "try a lower --gpt-learning-rate" in last
    assert (tmp_path / "run" / "tokenizer.pt").is_file()
