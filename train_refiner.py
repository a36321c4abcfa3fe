"""The main job: train tokenizer, backbone and refiners on toy visual sentences, and show what refinement repaired.

    python train_refiner.py                    # preset toy: about 7 minutes on 2 CPU cores

Five stages, each a function below, in the order of the method:

    1. tokenizer   a VQGAN turns images into tokens                     tokenizer.pt
    2. backbone    a GPT learns whole visual sentences, next token      backbone.pt
    3. rollouts    the frozen backbone generates, with its mistakes     rollouts.pt
    4. refiners    learn to undo those mistakes, cosine loss            refiner_tokens.pt, refiner_hidden.pt
    5. evaluation  on sentences of the test split                       metrics.json and four pictures

A stage whose checkpoint lies in --out with the same configuration is reused. All functions are plain; the
training loops are flat: batch, forward, loss, step, log.
"""

import math
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import vqgan
import vsr
from data import TASKS, DataConfig, UserError
from vqgan import VQGAN, VQGANConfig, scheduled_rate
from vsr import GPT, GPTConfig, Refiner, RefinerConfig, Rollout

CHECKPOINTS = {"tokenizer": "tokenizer.pt", "backbone": "backbone.pt", "rollouts": "rollouts.pt", "refiner": "refiner_*.pt"}
CONFIGS = {"data": DataConfig, "vqgan": VQGANConfig, "gpt": GPTConfig, "refiner": RefinerConfig}

# The defaults of the dataclasses are the preset `toy`; the others say where they differ.
PRESETS = {
    "smoke": {
        "data": {"train_sentences": 512, "eval_sentences": 96},
        "vqgan": {"channels": 48, "steps": 150, "batch_size": 32},
        "gpt": {"layers": 2, "width": 64, "steps": 100, "batch_size": 16},
        "refiner": {"layers": 1, "width": 64, "rollouts": 256, "steps": 60, "batch_size": 32},
    },
    "toy": {},
    "paper": {
        "data": {"image_size": 256, "train_sentences": 100_000, "eval_sentences": 1000},
        "vqgan": {"factor": 16, "codebook_size": 8192, "code_dim": 32, "channels": 512, "steps": 100_000,
                  "batch_size": 128, "learning_rate": 3e-4, "gan_weight": 0.5},
        "gpt": {"layers": 24, "heads": 16, "width": 1024, "head_width": 64, "steps": 100_000, "batch_size": 64,
                "learning_rate": 3e-4},
        "refiner": {"layers": 6, "width": 512, "rollouts": 20_000, "rollout_batch": 64, "steps": 20_000, "batch_size": 128,
                    "learning_rate": 3e-4},
    },
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Stage 2: the backbone
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_sentences(tokenizer: VQGAN, sentences: data.Sentences, split: str, total: int, device, autocast):
    """Turn `total` sentences of a split into tokens: (total, 2K+2, N) int16 or int32 on the CPU."""
    small = torch.int16 if tokenizer.config.codebook_size < 2**15 else torch.int32
    tokens = []
    for images, _ in tqdm(sentences.batches(split, total), f"encode {split}", -(-total // 64), mininterval=1, leave=None):
        with autocast:
            encoded = tokenizer.encode(images.flatten(0, 1).to(device))
        tokens.append(encoded.view(*images.shape[:2], -1).to("cpu", small))
    return torch.cat(tokens)


def make_optimizers(model: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for all that has two dimensions inside the Transformer blocks, AdamW for everything else.

    In a refiner's block that is the weight matrices and the table of relative position biases.

    Muon (Jordan et al., 2024) orthogonalises the update of a matrix. In a trial on an earlier recipe the backbone's
    validation loss after 500 steps was 1.20, AdamW's 1.55 at the better of two learning rates.
    """
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_backbone(
    config: GPTConfig, train, val, codebook_size: int, device, dtype, seed: int, compile: bool = False, make=GPT, progress=None
):
    """Pretrain the backbone, a GPT or what `make` builds, on whole sentences with next-token cross-entropy.

    train, val: tokens (S, 2K+2, N). progress: where an unfinished training is kept, see `data.training_steps`. Returns
    the frozen model and the log; `val_loss` is on 128 held-out sentences, all tokens, `val_target_loss` and
    `val_target_accuracy` on the tokens of their last image.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    _, num_images, N = train.shape
    model = make(config, codebook_size, N, num_images).to(device)
    optimizers = make_optimizers(model, config.learning_rate)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    step_model = torch.compile(data.parallel(model)) if compile else data.parallel(model)
    val = val[:128].flatten(1).long().to(device)
    log = {"step": [], "loss": [], "val_step": [], "val_loss": [], "val_target_loss": [], "val_target_accuracy": []}

    began = time.perf_counter()
    parts = {"model": model, "muon": optimizers[0], "adamw": optimizers[1], "generator": generator}
    bar = data.training_steps("backbone", config.steps, log, parts, progress)
    for step in bar:
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = scheduled_rate(step, config.steps, config.learning_rate)
        chosen = torch.randint(len(train), (config.batch_size,), generator=generator)[data.own_rows(config.batch_size)]
        tokens = train[chosen].flatten(1).long().to(device)  # (B, T)
        with autocast:
            logits = step_model(tokens)  # (B, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

        if step % 20 == 0 or step == config.steps - 1:
            loss = data.mean_of_all(loss)
            data.check_finite(loss, "backbone", step, "--gpt-learning-rate", optimizers[0].param_groups[0]["lr"])
            log["step"].append(step)
            log["loss"].append(loss.item())
            rate = config.batch_size * tokens.shape[1] * (bar.format_dict["rate"] or 0)
            bar.set_postfix(loss=f"{loss.item():.3f}", tokens_per_s=f"{rate:,.0f}", refresh=False)
        if step % max(1, config.steps // 15) == 0 or step == config.steps - 1:
            model.eval()
            losses, right = [], []
            for part in val.split(32):
                with torch.no_grad(), autocast:
                    logits = model(part).float()  # (B, T, V)
                losses.append(F.cross_entropy(logits.flatten(0, 1), part.flatten(), reduction="none").view(part.shape))
                right.append(logits[:, -N:].argmax(-1) == part[:, -N:])
            model.train()
            losses, right = torch.cat(losses), torch.cat(right).float()  # (S, T), (S, N)
            log["val_step"].append(step)
            log["val_loss"].append(losses.mean().item())
            log["val_target_loss"].append(losses[:, -N:].mean().item())
            log["val_target_accuracy"].append(right.mean().item())
    log["tokens_per_s"] = (
        config.steps * train[0].numel() * config.batch_size / (log["earlier_seconds"] + time.perf_counter() - began)
    )
    return model.eval().requires_grad_(False), log


# --------------------------------------------------------------------------------------------------
# Stage 3: rollouts
# --------------------------------------------------------------------------------------------------


def make_rollouts(backbone: GPT, tokens: torch.Tensor, autocast, batch: int = 256, progress=None) -> tuple[torch.Tensor, float]:
    """Let the frozen backbone generate the last image of each sentence: tokens (S, 2K+2, N) -> y_q (S, N), and seconds.

    progress: where unfinished rollouts are kept, see `data.training_steps`. The seconds are those of all attempts.
    """
    began, device = time.perf_counter(), backbone.head.weight.device
    parts, log = tokens.split(batch), {"generated": []}
    for index in data.training_steps("rollouts", len(parts), log, {}, progress, every=10, unit="batch"):
        total = len(parts[index])
        prompt = parts[index][data.own_rows(total), :-1].flatten(1).long().to(device)  # (B, P)
        with autocast:
            generated = backbone.generate(prompt, tokens.shape[2]).tokens  # (B, N)
        log["generated"].append(data.all_rows(generated, total).to("cpu", tokens.dtype))
    return torch.cat(log["generated"]), log["earlier_seconds"] + time.perf_counter() - began


# --------------------------------------------------------------------------------------------------
# Stage 4: refiners
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_states(backbone: GPT, tokens: torch.Tensor, generated: torch.Tensor, autocast) -> Rollout:
    """The rollouts with their hidden states, read in one parallel pass: states are (S, N, C) in bfloat16 on the CPU.

    tokens: sentences (S, 2K+2, N); generated: y_q (S, N). Only the tokens of rollouts are kept on disk. Their states
    are read again here, which is cheap, since all positions go through the backbone at once.
    """
    device = backbone.head.weight.device
    hidden = torch.empty(*generated.shape, backbone.config.width, dtype=torch.bfloat16)
    context = torch.empty_like(hidden)
    for rows in tqdm(torch.arange(len(generated)).split(128), desc="hidden states", unit="batch", mininterval=1, leave=None):
        with autocast:
            read = backbone.read(tokens[rows, :-1].flatten(1).long().to(device), generated[rows].long().to(device))
        hidden[rows], context[rows] = read.hidden.bfloat16().cpu(), read.context.bfloat16().cpu()
    return Rollout(generated, hidden, context)


def train_refiner(
    config: RefinerConfig, inputs: str, codebook, grid, rollouts, targets, device, dtype, seed: int,
    loss_function=vsr.cosine_loss, make=Refiner, progress=None,
):  # fmt: skip
    """Train one refiner on rollouts of a frozen backbone, of whatever kind.

    rollouts: {"train", "val": Rollout of S rows; states that `inputs` does not read may be None}. targets: {"train",
    "val": y* (S, N)}. codebook: (V, D), frozen. Returns the refiner and the log; `val_loss` is the cosine loss on
    held-out rollouts. A study may name another loss of (refined, target), or another class than `Refiner`.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    hidden_dim = 0 if inputs == "tokens" else rollouts["train"].hidden.shape[-1]
    refiner = make(config, inputs, grid, codebook.shape[1], hidden_dim).to(device)
    optimizers = make_optimizers(refiner, config.learning_rate)
    step_refiner = data.parallel(refiner)

    def batch_loss(refiner, split, chosen):
        y, *states = [x[chosen].to(device) for x in rollouts[split][: 1 + vsr.INPUTS.index(inputs)]]  # (B, N), (B, N, C)
        with autocast:
            refined = refiner(codebook[y.long()], *states)  # (B, N, D)
        return loss_function(refined, codebook[targets[split][chosen].long().to(device)])

    log = {"step": [], "loss": [], "val_step": [], "val_loss": []}
    parts = {"model": refiner, "muon": optimizers[0], "adamw": optimizers[1], "generator": generator}
    bar = data.training_steps(f"refiner ({inputs})", config.steps, log, parts, progress)
    for step in bar:
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = scheduled_rate(step, config.steps, config.learning_rate)
        chosen = torch.randint(len(targets["train"]), (config.batch_size,), generator=generator)
        loss = batch_loss(step_refiner, "train", chosen[data.own_rows(config.batch_size)])
        refiner.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(refiner.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

        if step % 20 == 0 or step == config.steps - 1:
            loss = data.mean_of_all(loss)
            data.check_finite(loss, "refiner", step, "--refiner-learning-rate", optimizers[0].param_groups[0]["lr"])
            log["step"].append(step)
            log["loss"].append(loss.item())
        if step % max(1, config.steps // 15) == 0 or step == config.steps - 1:
            refiner.eval()
            with torch.no_grad():
                held_out = torch.arange(len(targets["val"])).split(128)
                total = sum(batch_loss(refiner, "val", part).item() * len(part) for part in held_out)
            refiner.train()
            log["val_step"].append(step)
            log["val_loss"].append(total / len(targets["val"]))
            bar.set_postfix(loss=f"{loss.item():.4f}", val=f"{log['val_loss'][-1]:.4f}", refresh=False)
    return refiner.eval().requires_grad_(False), log


def refiner_for(
    write, prompts: torch.Tensor, truth: torch.Tensor, codebook: torch.Tensor, grid: tuple[int, int],
    inputs: str = "hidden", config: RefinerConfig | None = None, device="cpu", dtype=torch.float32, seed: int = 0,
):  # fmt: skip
    """Train a refiner for a frozen model from elsewhere: whatever can write tokens, over whatever codebook.

    write: a function from prompts (B, ...) on the device to what the model writes after them, free-running: a `Rollout`
        of tokens (B, N) and, if it has them, hidden states (B, N, C), each taken where its token was predicted; None for
        the states that `inputs` does not read. Tokens are rows of the codebook: take off an offset of the vocabulary.
    prompts: (S, ...), the sentences without their last image. truth: (S, N), its true tokens y*.
    codebook: (V, D), of any norm. grid: (h, w), N = h * w, raster order.
    Returns the refiner and the log of `train_refiner`; a sixteenth of the sentences is held out for `val_loss`. Apply it
    with `vsr.refine(refiner, codebook, tokens, hidden=hidden)`. Raises ValueError if the shapes do not fit.
    """
    config, device = config or RefinerConfig(), torch.device(device)
    batches = prompts.split(config.rollout_batch)
    with torch.no_grad():
        parts = [write(part.to(device)) for part in tqdm(batches, desc="rollouts", unit="batch", mininterval=1, leave=None)]
    fields = [None if None in field else torch.cat([x.cpu() for x in field]) for field in map(list, zip(*parts, strict=True))]
    if any(field is None for field in fields[: 1 + vsr.INPUTS.index(inputs)]):
        raise ValueError(f"inputs {inputs!r}: `write` gave no such states; give them, or take inputs='tokens'")
    if fields[0].shape != truth.shape or truth.shape[1] != grid[0] * grid[1] or len(truth) < 2:
        raise ValueError(
            f"tokens {tuple(fields[0].shape)}, truth {tuple(truth.shape)}, grid {grid}: expected (S, N), (S, N), N = h w"
        )
    if not 0 <= min(fields[0].min(), truth.min()) <= max(fields[0].max(), truth.max()) < len(codebook):
        raise ValueError(f"tokens outside the codebook, 0 to {len(codebook) - 1}; take off the offset of the vocabulary")
    held = max(1, len(truth) // 16)
    cuts = {"train": slice(held, None), "val": slice(held)}
    rollouts = {split: Rollout(*[None if x is None else x[rows] for x in fields]) for split, rows in cuts.items()}
    targets = {split: truth[rows].cpu() for split, rows in cuts.items()}
    codebook = F.normalize(codebook.detach().float().to(device), dim=-1)
    return train_refiner(config, inputs, codebook, grid, rollouts, targets, device, dtype, seed)


# --------------------------------------------------------------------------------------------------
# Stage 5: evaluation
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode_methods(tokenizer: VQGAN, backbone: GPT, refiners: dict, tokens: torch.Tensor, autocast, seed: int = 0) -> dict:
    """What every method writes for the last image of test sentences: tokens (S, 2K+2, N) -> {method: (S, N)}.

    `teacher_forced` sees the true prefix at each position: what the backbone would do had it made no mistake
    before. `vqgan_limit` is the truth itself, so its images show what the tokenizer alone loses.
    """
    device = backbone.head.weight.device
    codebook = tokenizer.codebook.vectors
    generator = torch.Generator().manual_seed(seed)
    written = {}
    for part in tokens.split(64):
        prompt, y_true = part[:, :-1].flatten(1).long().to(device), part[:, -1].long().to(device)
        N = y_true.shape[1]
        with autocast:
            rollout = backbone.generate(prompt, N)
            now = {
                "vqgan_limit": y_true,
                "teacher_forced": backbone.logits(backbone.read(prompt, y_true).hidden).argmax(-1),
                "ar_greedy": rollout.tokens,
                "ar_sampled": backbone.generate(prompt, N, temperature=1.0, generator=generator).tokens,
                "expected_embedding": vsr.expected_embedding(backbone.logits(rollout.hidden), codebook),
            }
            for inputs, refiner in refiners.items():
                now[f"refined_{inputs}"], _ = vsr.refine(
                    refiner, codebook, rollout.tokens, hidden=rollout.hidden, context=rollout.context
                )
        for method, y in now.items():
            written.setdefault(method, []).append(y.cpu())
    return {method: torch.cat(parts) for method, parts in written.items()}


@torch.no_grad()
def decode_images(tokenizer: VQGAN, tokens: torch.Tensor, autocast) -> torch.Tensor:
    """Tokens (S, N) -> images (S, 3, H, W) in [-1, 1] on the CPU, in batches."""
    device = tokenizer.codebook.weight.device
    with autocast:
        return torch.cat([tokenizer.decode(part.long().to(device)).cpu() for part in tokens.split(128)])


def score_methods(tokenizer: VQGAN, written: dict, truth: torch.Tensor, task: torch.Tensor, autocast) -> dict:
    """Measure each method on all sentences and task by task, against the true images (S, 3, H, W)."""
    codebook = tokenizer.codebook.vectors.cpu()
    y_true = written["vqgan_limit"]
    scores = {}
    for method, y in written.items():
        error = vsr.cosine_error(y, y_true, codebook)  # (S, N)
        images = decode_images(tokenizer, y, autocast)
        quality, likeness = vqgan.psnr(images, truth), vqgan.ssim(images, truth)  # (S,)
        scores[method] = {}
        for name in ("all", *TASKS):
            rows = torch.ones_like(task, dtype=torch.bool) if name == "all" else task == TASKS.index(name)
            by_position = error[rows].mean(0)  # (N,)
            scores[method][name] = {
                "cosine_error": by_position.mean().item(),
                "auc": by_position.sum().item(),
                "token_accuracy": (y == y_true)[rows].float().mean().item(),
                "psnr": quality[rows].mean().item(),
                "ssim": likeness[rows].mean().item(),
                "cosine_error_by_position": by_position.tolist(),
            }
    return scores


def gap_of(scores: dict, method: str, name: str) -> float:
    """`vsr.gap_closed` of a method on all sentences or a task, against the backbone's better decoding of the two."""
    baseline = min(scores[m][name]["cosine_error"] for m in ("ar_greedy", "ar_sampled"))
    return vsr.gap_closed(baseline, scores[method][name]["cosine_error"], scores["teacher_forced"][name]["cosine_error"])


def gaps_closed(scores: dict) -> dict:
    """`gap_closed` of each refiner and of the expected embedding, over all and by task; None where nothing accumulated."""
    closed = {}
    for method in scores:
        if method.startswith("refined_") or method == "expected_embedding":
            shares = {name: gap_of(scores, method, name) for name in scores[method]}
            closed[method] = {name: None if math.isnan(share) else share for name, share in shares.items()}
    return closed


def seconds_of(function, device, repeats: int = 5) -> float:
    """Median wall time of a call in seconds, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


@torch.no_grad()
def uncached_seconds(backbone: GPT, sentences: torch.Tensor, N: int, device) -> float:
    """Seconds that a loop without a KV cache takes to write the last N tokens of sentences (B, T), all of them given.

    Of its N steps every eighth is timed, and stands for the others.
    """
    seconds, timed = 0.0, range(0, N, 8)
    for t in timed:
        inputs = backbone.shifted(sentences[:, : sentences.shape[1] - N + t + 1])  # (B, P+t+1)
        seconds += seconds_of(lambda: backbone.logits(backbone.states(inputs)[:, -1]).argmax(-1), device, 1)  # noqa: B023
    return seconds * N / len(timed)


@torch.no_grad()
def measure_throughput(tokenizer: VQGAN, backbone: GPT, refiners: dict, tokens: torch.Tensor, autocast) -> dict:
    """How fast generation and refinement are, on one batch of at most 64 sentences (S, 2K+2, N).

    `cached_speedup` compares `generate` with a loop that has no KV cache. `refine_share_of_generation_time` is for the
    slowest refiner.
    """
    device = backbone.head.weight.device
    codebook = tokenizer.codebook.vectors
    part = tokens[:64].long().to(device)
    prompt, (B, N) = part[:, :-1].flatten(1), part[:, -1].shape
    with autocast:
        rollout = backbone.generate(prompt, N)
        cached = seconds_of(lambda: backbone.generate(prompt, N), device)
        uncached = uncached_seconds(backbone, torch.cat([prompt, rollout.tokens], dim=1), N, device)
        states = {"hidden": rollout.hidden, "context": rollout.context}
        refining = {n: seconds_of(lambda: vsr.refine(r, codebook, rollout.tokens, **states), device) for n, r in refiners.items()}  # noqa: B023
    slowest = max(refining.values())
    return {
        "generate_tokens_per_s": B * N / cached,
        "cached_speedup": uncached / cached,
        "refine_images_per_s": B / slowest,
        "refine_share_of_generation_time": slowest / cached,
    }


# --------------------------------------------------------------------------------------------------
# Pictures and the table
# --------------------------------------------------------------------------------------------------

COLOURS = {
    "teacher_forced": "#2a9d4a",
    "ar_greedy": "#d1495b",
    "ar_sampled": "#edae49",
    "expected_embedding": "#8d99ae",
    "refined_tokens": "#66a5e0",
    "refined_hidden": "#1d4e9e",
    "refined_context": "#5e3c99",
}


def plot_error_by_position(path, scores: dict) -> None:
    """The paper's Figure 2 on the toy: cosine error by token position, AUC in the legend; one panel a task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained", dpi=120)
    for axis, name in zip(figure.subplots(1, 4), ("all", *TASKS), strict=True):
        for method, colour in COLOURS.items():
            if method in scores and method != "ar_sampled":
                error = torch.tensor(scores[method][name]["cosine_error_by_position"])
                smooth = F.avg_pool1d(F.pad(error[None, None], (3, 3), mode="replicate"), 7, 1)[0, 0]
                axis.plot(error, color=colour, alpha=0.15, linewidth=0.8)
                axis.plot(smooth, color=colour, label=f"{method}  AUC {error.sum():.2f}")
        axis.set(title=name, xlabel="token position t (raster order)", ylim=(0, None))
        axis.legend(fontsize=6.5, edgecolor="none", framealpha=0.85)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("cosine error")
    data.write_whole(path, figure.savefig)


def plot_training(path, logs: dict) -> None:
    """All losses of all stages, training (thin) and validation (dots)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained", dpi=120)
    left, right, middle, last = figure.subplots(1, 4)
    log = logs["tokenizer"]
    for name in ("reconstruction", "gradient", "commitment"):
        left.plot(log["step"], log[name], label=name)
    for name in ("generator", "discriminator"):
        if any(log[name]):
            left.plot(log["step"], [abs(v) for v in log[name]], label=f"|{name}|", linewidth=0.8)
    left.set(title="tokenizer", yscale="log", ylabel="loss")
    right.plot(log["step"], log["codes_in_use"], label="codes used by the batch")
    right.set(title="tokenizer", ylim=(0, None), ylabel="codes")
    log = logs["backbone"]
    middle.plot(log["step"], log["loss"], label="training", linewidth=0.8)
    middle.plot(log["val_step"], log["val_loss"], "o-", markersize=3, label="validation")
    middle.plot(log["val_step"], log["val_target_loss"], "o-", markersize=3, label="validation, last image")
    middle.set(title="backbone", ylabel="cross-entropy in nats per token")
    for name, log in logs.items():
        if name.startswith("refiner_"):
            colour = COLOURS[name.replace("refiner", "refined")]
            last.plot(log["step"], log["loss"], color=colour, linewidth=0.6, alpha=0.6)
            last.plot(log["val_step"], log["val_loss"], "o-", color=colour, markersize=3, label=f"{name}, validation")
    last.set(title="refiners", ylabel="cosine loss")
    for axis in figure.axes:
        axis.set_xlabel("step")
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    data.write_whole(path, figure.savefig)


def save_samples(path, tokenizer: VQGAN, written: dict, images, task, best: str, autocast, per_task: int = 3) -> None:
    """Rows of test sentences: demonstrations, query, greedy, refined, truth, token-error maps before and after.

    The rows are the first sentences of each task, not chosen ones. images: (S, 2K+2, 3, H, W).
    """
    codebook = tokenizer.codebook.vectors.cpu()
    rows, labels = [], []
    for number, name in enumerate(TASKS):
        for i in (task == number).nonzero().flatten()[:per_task].tolist():
            y, y_refined, y_true = (written[m][i : i + 1] for m in ("ar_greedy", best, "vqgan_limit"))
            greedy, refined = decode_images(tokenizer, torch.cat([y, y_refined]), autocast)
            maps = [vsr.cosine_error(v, y_true, codebook).view(tokenizer.grid) for v in (y, y_refined)]
            rows.append([*images[i, :-1], greedy, refined, images[i, -1], *maps])
            labels.append(name)
    demos = [f"{role} {k + 1}" for k in range(images.shape[1] // 2 - 1) for role in ("source", "target")]
    heads = [*demos, "query", "greedy", "refined", "truth", "error\nbefore", "error\nafter"]
    data.save_picture(path, rows, labels, heads)


def format_table(scores: dict, closed: dict) -> str:
    """The results as text, one line a method."""
    lines = [
        f"{'':20}{'cosine error (lower is better)':^40}{'gap':>7}{'token':>8}{'PSNR in dB':^32}",
        f"{'':20}{'all':>10}{'colorize':>10}{'inpaint':>10}{'edges':>10}{'closed':>7}{'acc.':>8}"
        f"{'all':>8}{'color':>8}{'inpaint':>8}{'edges':>8}",
    ]
    for method, score in scores.items():
        share = closed.get(method, {}).get("all")
        gap = "" if share is None else f"{share:.2f}"
        errors = "".join(f"{score[name]['cosine_error']:10.4f}" for name in ("all", *TASKS))
        quality = "".join(f"{score[name]['psnr']:8.2f}" for name in ("all", *TASKS))
        lines.append(f"{method:20}{errors}{gap:>7}{score['all']['token_accuracy']:8.3f}{quality}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


def sizes(config: dict) -> tuple[int, tuple[int, int], int]:
    """From the configuration in a checkpoint: V, the grid (h, w) of an image's tokens, images in a sentence."""
    side = config["data"]["image_size"] // config["vqgan"]["factor"]
    return config["vqgan"]["codebook_size"], (side, side), 2 * config["data"]["num_demos"] + 2


def build_backbone(checkpoint: dict, device) -> GPT:
    """Rebuild the frozen backbone from its checkpoint."""
    V, (h, w), num_images = sizes(checkpoint["config"])
    model = GPT(GPTConfig(**checkpoint["config"]["gpt"]), V, h * w, num_images)
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval().requires_grad_(False)


def build_refiner(checkpoint: dict, device) -> Refiner:
    """Rebuild a trained refiner from its checkpoint."""
    config = checkpoint["config"]
    _, grid, _ = sizes(config)
    code_dim, hidden_dim = config["vqgan"]["code_dim"], config["gpt"]["width"]
    model = Refiner(RefinerConfig(**config["refiner"]), config["inputs"], grid, code_dim, hidden_dim)
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval().requires_grad_(False)


def rebuild(build, checkpoint: dict, device, path):
    """The model in a checkpoint. Raises UserError, naming the file, if it is none that `build` understands."""
    try:
        return build(checkpoint, device)
    except (KeyError, TypeError, RuntimeError):  # some other model's checkpoint, or a field that is no more
        raise UserError(f"{path}: the checkpoint of another model or another version") from None


def load_run(path, device) -> tuple[VQGAN, GPT, dict, dict]:
    """All models of a finished run: tokenizer, backbone, {inputs: refiner}, and the configuration they share.

    path: the folder of a run, or a file that `save_weights` wrote. Raises UserError, naming the file, if a
    checkpoint is missing or damaged.
    """
    path = Path(path)
    whole = data.load_checkpoint(path) if path.is_file() else None
    if whole is None and not path.is_dir():
        raise UserError(f"--run {path}: no such folder or file; `python train_refiner.py` makes one")

    def load(name, build):
        checkpoint = data.load_checkpoint(path / name) if whole is None else whole.get("checkpoints", {}).get(name, {})
        return rebuild(build, checkpoint, device, path / name), checkpoint.get("config")

    tokenizer, _ = load("tokenizer.pt", vqgan.build_tokenizer)
    backbone, config = load("backbone.pt", build_backbone)
    names = {inputs: f"refiner_{inputs}.pt" for inputs in vsr.INPUTS}
    present = [i for i, name in names.items() if ((path / name).is_file() if whole is None else name in whole["checkpoints"])]
    refiners = {inputs: load(names[inputs], build_refiner)[0] for inputs in present}
    if not refiners:
        raise UserError(f"--run {path}: no refiner_*.pt in it; `python train_refiner.py --out {path}` goes on")
    return tokenizer, backbone, refiners, config


def save_weights(path, out: Path, inputs, sentences: data.Sentences, device, count: int = 96) -> None:
    """Put all models of a run into one file, in half precision, and beside it, as JSON, what they score.

    The scores are of the first `count` test sentences, in float32, with the weights as they are in the file.
    """
    names = ["tokenizer.pt", "backbone.pt", *(f"refiner_{name}.pt" for name in inputs)]
    checkpoints = {name: data.load_checkpoint(out / name) for name in names}
    small = {
        name: {"config": c["config"], "model": {k: v.half() if v.is_floating_point() else v for k, v in c["model"].items()}}
        for name, c in checkpoints.items()
    }
    data.save_checkpoint(path, {"config": checkpoints["backbone.pt"]["config"], "checkpoints": small})
    data.save_json(Path(path).with_suffix(".json"), {"sentences": count, "scores": score_weights(path, sentences, device, count)})


def score_weights(path, sentences: data.Sentences, device, count: int) -> dict:
    """{method: {task: {cosine_error, token_accuracy, psnr, ssim}}} of the models in a file, on the first test sentences."""
    tokenizer, backbone, refiners, _ = load_run(path, device)
    autocast = torch.autocast(device.type, enabled=False)
    images, task = data.joined(sentences.batches("test", count))
    tokens = encode_sentences(tokenizer, sentences, "test", count, device, autocast)
    scores = score_methods(
        tokenizer, decode_methods(tokenizer, backbone, refiners, tokens, autocast), images[:, -1], task, autocast
    )
    kept = ("cosine_error", "token_accuracy", "psnr", "ssim")
    return {m: {name: {k: round(score[k], 5) for k in kept} for name, score in by.items()} for m, by in scores.items()}


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def reuse(path: Path, config: dict, stage: str, fresh: str | None) -> dict | None:
    """The checkpoint of a finished stage, if there is one with this configuration. Raises UserError for another.

    If `fresh` is this stage, its checkpoint is removed, and with it all that was built on it: no later run, and no
    run that goes on after an interruption, can then put models together that were not trained together.
    """
    if stage == fresh and data.is_first():
        later = list(CHECKPOINTS.values())[list(CHECKPOINTS).index(stage) + 1 :]
        for name in (path.name, *later):
            for old in path.parent.glob(name.removesuffix(".pt") + ".*"):  # the .progress of an unfinished training too
                old.unlink()
    data.wait_for_all()
    if not path.is_file():
        return None
    checkpoint = data.load_checkpoint(path)
    difference = data.first_difference(checkpoint["config"], config)
    if difference:
        raise UserError(f"{path} was made with {difference}: give another --out, or --fresh {stage} to train again from there")
    if "seconds" not in checkpoint:  # not one of `finish`
        raise UserError(f"{path}: not a checkpoint of this stage; remove it, or give another --out")
    print(f"{stage}: reusing {path}")
    return checkpoint


def finish(path: Path, checkpoint: dict) -> dict:
    """Write the checkpoint of a finished stage; what was kept of the unfinished one is no longer needed."""
    if data.is_first():
        data.save_checkpoint(path, checkpoint)
        path.with_suffix(".progress").unlink(missing_ok=True)
    return checkpoint


def trained_stage(path: Path, config: dict, model, log: dict, began: float) -> dict:
    """`finish` for a training that began at `began` (of `time.perf_counter`): its weights, its log and its seconds."""
    seconds = log["earlier_seconds"] + time.perf_counter() - began
    return finish(path, {"config": config, "model": model.state_dict(), "log": log, "seconds": seconds})


def describe(config: dict, inputs: list, device) -> dict:
    """Parameter counts of all models, printed with an estimate of the memory that pretraining the backbone takes."""
    images = 2 * config["data"].num_demos + 2
    with torch.device("meta"):
        tokenizer = VQGAN(config["vqgan"], config["data"].image_size)
        N, V = tokenizer.tokens_per_image, config["vqgan"].codebook_size
        backbone = GPT(config["gpt"], V, N, images)
        dims = config["vqgan"].code_dim, config["gpt"].width
        refiners = {f"refiner_{name}": Refiner(config["refiner"], name, tokenizer.grid, *dims) for name in inputs}
    models = {"tokenizer": tokenizer, "backbone": backbone, **refiners}
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    tokens = config["gpt"].batch_size * images * N
    # Weights, gradients and moments (two in AdamW, one in Muon) are at most 16 bytes a parameter. Activations in
    # bfloat16 with fused attention are about 34 bytes per token, layer and channel (Korthikanti et al., 2022).
    # The logits stand there three times in float32.
    memory = 16 * params["backbone"] + tokens * (34 * config["gpt"].layers * config["gpt"].width + 12 * V)
    print(f"device {device}, {images} images a sentence, {N} tokens an image, {images * N} tokens a sentence, V = {V}")
    for name, count in params.items():
        print(f"  {name:16}{count / 1e6:10.3f} M parameters")
    print(f"  backbone training, batch {config['gpt'].batch_size}: about {memory / 2**30:.1f} GiB")
    return params


def configs_from_flags(args, classes: dict, preset: dict) -> dict:
    """{component: config dataclass} from {component: class}, a preset and the flags. Raises UserError if they do not fit."""
    config = {}
    for name, config_class in classes.items():
        config[name] = data.config_from_flags(args, config_class, "" if name == "data" else f"{name}_", preset.get(name))
    if config["refiner"].rollouts > config["data"].train_sentences:
        raise UserError(f"--refiner-rollouts {config['refiner'].rollouts}: more than there are --train-sentences")
    return config


def parse_arguments():
    parser = data.Parser(description="Train tokenizer, backbone and refiners; measure what refinement repaired.")
    parser.add_argument("--preset", choices=PRESETS, default="toy", help="sizes of everything (default: toy)")
    parser.add_argument("--out", default=None, help="folder for checkpoints, metrics and pictures (default: runs/PRESET)")
    parser.add_argument("--seed", type=data.seed, default=0, help="of data, initialisation and batches")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: auto)")
    parser.add_argument("--inputs", nargs="+", choices=vsr.INPUTS, default=["tokens", "hidden"], help="refiners to train")
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone's training")
    parser.add_argument(
        "--fresh",
        nargs="?",
        const="tokenizer",
        choices=CHECKPOINTS,
        help="train again from this stage on (no stage: all)",
    )
    parser.add_argument("--weights", metavar="FILE.pt", help="also write all models into one file, in half precision")
    parser.add_argument("--dry-run", action="store_true", help="print sizes and memory, train nothing")
    for name, config_class in CONFIGS.items():
        parser.add_config(config_class, "" if name == "data" else f"{name}_")
    args = parser.parse_args()
    args.inputs = [name for name in vsr.INPUTS if name in args.inputs]  # each once, the one that reads most at the end
    return args


class Trained(NamedTuple):
    """What stages 1 to 4 leave behind."""

    tokenizer: VQGAN
    backbone: GPT
    refiners: dict  # {inputs: Refiner}
    tokens: dict  # {"train", "val": (S, 2K+2, N)} the sentences
    generated: dict  # {"train", "val": (S, N)} what the backbone wrote for their last image
    logs: dict  # {stage: its log}
    seconds: dict  # {stage: wall time}


def train_models(out: Path, config: dict, inputs, sentences, device, dtype, seed: int, fresh=None, compile=False) -> Trained:
    """Stages 1 to 4. config: {"data", "vqgan", "gpt", "refiner": a config dataclass}. Finished stages in `out` are reused."""
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    run = {"seed": seed, "dtype": str(dtype).removeprefix("torch.")}
    scenes = {name: value for name, value in asdict(config["data"]).items() if not name.endswith("sentences")}
    seconds, logs = {}, {}

    # 1. The tokenizer
    path, began = out / "tokenizer.pt", time.perf_counter()
    stage_config = {"run": run, "data": scenes, "vqgan": asdict(config["vqgan"])}
    if sentences.fingerprint:
        stage_config["pictures"] = sentences.fingerprint
    checkpoint = reuse(path, stage_config, "tokenizer", fresh)
    if checkpoint is None:
        progress = path.with_suffix(".progress"), stage_config
        model, log = vqgan.train_tokenizer(config["vqgan"], sentences, device, dtype, seed, progress)
        checkpoint = trained_stage(path, stage_config, model, log, began)
    tokenizer = rebuild(vqgan.build_tokenizer, checkpoint, device, path)
    codebook = tokenizer.codebook.vectors
    logs["tokenizer"], seconds["tokenizer"] = checkpoint["log"], checkpoint["seconds"]

    # 2. The backbone
    path, began = out / "backbone.pt", time.perf_counter()
    stage_config |= {"gpt": asdict(config["gpt"]), "train_sentences": config["data"].train_sentences}
    stage_config |= {"eval_sentences": config["data"].eval_sentences}
    checkpoint = reuse(path, stage_config, "backbone", fresh)
    tokens = {
        "train": encode_sentences(tokenizer, sentences, "train", config["data"].train_sentences, device, autocast),
        "val": encode_sentences(tokenizer, sentences, "val", config["data"].eval_sentences, device, autocast),
    }
    if checkpoint is None:
        progress = path.with_suffix(".progress"), stage_config
        model, log = train_backbone(
            config["gpt"], tokens["train"], tokens["val"], len(codebook), device, dtype, seed, compile, progress=progress
        )
        checkpoint = trained_stage(path, stage_config, model, log, began)
    backbone = rebuild(build_backbone, checkpoint, device, path)
    logs["backbone"], seconds["backbone"] = checkpoint["log"], checkpoint["seconds"]

    # 3. Rollouts of the frozen backbone
    path = out / "rollouts.pt"
    tokens["train"] = tokens["train"][: config["refiner"].rollouts]
    batch = config["refiner"].rollout_batch
    stage_config |= {"rollouts": config["refiner"].rollouts, "rollout_batch": batch}
    checkpoint = reuse(path, stage_config, "rollouts", fresh)
    if checkpoint is None:
        progress = path.with_suffix(".progress"), stage_config
        train, train_seconds = make_rollouts(backbone, tokens["train"], autocast, batch, progress)
        val, val_seconds = make_rollouts(backbone, tokens["val"], autocast, batch)
        checkpoint = {"config": stage_config, "train": train, "val": val, "seconds": train_seconds + val_seconds}
        finish(path, checkpoint)
    generated = {split: checkpoint[split] for split in tokens}
    seconds["rollouts"] = checkpoint["seconds"]

    # 4. The refiners
    refiners, rollouts = {}, None
    targets = {split: tokens[split][:, -1] for split in tokens}
    for name in inputs:
        path, began = out / f"refiner_{name}.pt", time.perf_counter()
        refiner_config = {**stage_config, "refiner": asdict(config["refiner"]), "inputs": name}
        checkpoint = reuse(path, refiner_config, "refiner", fresh)
        if checkpoint is None:
            if rollouts is None:
                rollouts = {split: read_states(backbone, tokens[split], generated[split], autocast) for split in tokens}
                seconds["states"], began = time.perf_counter() - began, time.perf_counter()
            model, log = train_refiner(
                *(config["refiner"], name, codebook, tokenizer.grid, rollouts, targets, device, dtype, seed),
                progress=(path.with_suffix(".progress"), refiner_config),
            )
            checkpoint = trained_stage(path, refiner_config, model, log, began)
        refiners[name] = rebuild(build_refiner, checkpoint, device, path)
        logs[f"refiner_{name}"], seconds[f"refiner_{name}"] = checkpoint["log"], checkpoint["seconds"]
    return Trained(tokenizer, backbone, refiners, tokens, generated, logs, seconds)


def main():
    args = parse_arguments()
    device = data.start_processes(data.pick_device(args.device))
    dtype = data.pick_dtype(args.dtype, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    config = configs_from_flags(args, CONFIGS, PRESETS[args.preset])
    for name in ("vqgan", "gpt", "refiner"):
        data.check_divides(config[name].batch_size, f"--{name}-batch-size")
    params = describe(config, args.inputs, device)
    if args.dry_run:
        return
    out = Path(args.out or f"runs/{args.preset}")
    data.check_writable(out)
    if args.weights:
        if Path(args.weights).suffix != ".pt":
            raise UserError(f"--weights {args.weights}: expected a file name that ends in .pt")
        if Path(args.weights).resolve().parent == out.resolve():
            raise UserError(f"--weights {args.weights}: --out is for the checkpoints of the stages; give another folder")
        data.check_writable(Path(args.weights).parent, "--weights")
    sentences = data.Sentences(config["data"], args.seed)
    tested = data.joined(sentences.batches("test", config["data"].eval_sentences))[1]
    if len(tested.unique()) < len(TASKS):
        raise UserError(f"--eval-sentences {len(tested)}: too few, one of the tasks does not come up; give more")
    trained = train_models(out, config, args.inputs, sentences, device, dtype, args.seed, args.fresh, args.compile)
    if not data.end_processes():
        return
    tokenizer, backbone, refiners, _, _, logs, seconds = trained
    run = {"seed": args.seed, "dtype": str(dtype).removeprefix("torch.")}

    # 5. Evaluation on the test split
    began = time.perf_counter()
    test_images, test_task = data.joined(sentences.batches("test", config["data"].eval_sentences))
    test_tokens = encode_sentences(tokenizer, sentences, "test", config["data"].eval_sentences, device, autocast)
    written = decode_methods(tokenizer, backbone, refiners, test_tokens, autocast, args.seed)
    scores = score_methods(tokenizer, written, test_images[:, -1], test_task, autocast)
    closed = gaps_closed(scores)
    throughput = measure_throughput(tokenizer, backbone, refiners, test_tokens, autocast)
    best = f"refined_{args.inputs[-1]}"  # the refiner that reads most
    plot_error_by_position(out / "error_by_position.png", scores)
    plot_training(out / "training.png", logs)
    save_samples(out / "samples.png", tokenizer, written, test_images, test_task, best, autocast)
    vqgan.save_reconstructions(out / "reconstructions.png", tokenizer, sentences, "test", autocast)
    seconds["evaluation"] = time.perf_counter() - began
    log = logs["backbone"]
    metrics = {
        "config": {**run, "device": str(device), "preset": args.preset, **{name: asdict(c) for name, c in config.items()}},
        "seconds": seconds,
        "params": params,
        "tokenizer": vqgan.evaluate(tokenizer, sentences, "val", autocast),
        "backbone": {name: log[name][-1] for name in ("loss", "val_loss", "val_target_loss", "val_target_accuracy")},
        "methods": scores,
        "gap_closed": closed,
        "throughput": {"gpt_train_tokens_per_s": log["tokens_per_s"], **throughput},
        "peak_memory_gib": data.peak_memory(device),
    }
    data.save_json(out / "metrics.json", metrics)

    print(f"\n{config['data'].eval_sentences} test sentences of {config['data'].data}, K = {config['data'].num_demos}\n")
    print(format_table(scores, closed))
    print("\ntokenizer   " + ", ".join(f"{k} {v:.2f}" for k, v in metrics["tokenizer"].items() if v is not None))
    print("backbone    " + ", ".join(f"{k} {v:.3f}" for k, v in metrics["backbone"].items()))
    print("throughput  " + ", ".join(f"{k} {v:,.3g}" for k, v in metrics["throughput"].items()))
    print("seconds     " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()) + f", all {sum(seconds.values()):.0f}")
    if args.weights:
        save_weights(args.weights, out, args.inputs, sentences, device)
        print(f"\nwrote {args.weights}, and what it scores as JSON beside it")
    print(f"\nwrote metrics.json, error_by_position.png, samples.png, reconstructions.png and training.png to {out}")


if __name__ == "__main__":
    data.run_command(main, "Finished stages and saved steps are kept; the same command, without --fresh, goes on from there")
