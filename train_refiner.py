"""The main job: train tokenizer, backbone and refiners on visual sentences, and measure them.

    1. tokenizer   a VQGAN turns images into tokens                     tokenizer.pt
    2. backbone    a GPT learns whole visual sentences, next token      backbone.pt
    3. rollouts    the frozen backbone generates, with its mistakes     rollouts.pt
    4. refiners    learn to undo those mistakes, cosine loss            refiner_*.pt
    5. evaluation  on sentences of the test split                       metrics.json and four pictures

A stage whose checkpoint lies in --out with the same configuration is reused.
"""

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import evaluate
import runtime
import vqgan
import vsr
from data import DataConfig
from runtime import UserError
from vqgan import VQGAN, VQGANConfig
from vsr import GPT, GPTConfig, Refiner, RefinerConfig, Rollout

CONFIGS = {"data": DataConfig, "vqgan": VQGANConfig, "gpt": GPTConfig, "refiner": RefinerConfig}
STAGES = ("tokenizer", "backbone", "rollouts", "refiner")
READINGS = ("tokens", "tokens+query", "query")  # the paper's, ours, and the control without a rollout

# The defaults of the dataclasses are the preset `toy`; the others say where they differ.
PRESETS = {
    "smoke": {
        "data": {"train_sentences": 512, "eval_sentences": 96},
        "vqgan": {"channels": 48, "steps": 150, "batch_size": 32},
        "gpt": {"layers": 2, "width": 64, "steps": 100, "batch_size": 16},
        "refiner": {"layers": 1, "rollouts": 256, "steps": 60, "batch_size": 32},
    },
    "toy": {},
    "paper": {
        "data": {"image_size": 256, "train_sentences": 100_000, "eval_sentences": 1000},
        "vqgan": {"factor": 16, "codebook_size": 8192, "code_dim": 32, "channels": 512, "steps": 100_000,
                  "batch_size": 128, "learning_rate": 3e-4, "gan_weight": 0.5},
        "gpt": {"layers": 24, "heads": 16, "width": 1024, "head_width": 64, "steps": 100_000,
                "batch_size": 64, "learning_rate": 3e-4},
        "refiner": {"layers": 6, "heads": 8, "width": 512, "rollouts": 20_000, "rollout_batch": 64,
                    "steps": 20_000, "batch_size": 128, "learning_rate": 3e-4},
    },
}  # fmt: skip


def scheduled_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of the steps (100 at most), then a cosine down to 2 % of the peak."""
    warmup = min(100, max(1, steps // 20))
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
    return peak * min(1, (step + 1) / warmup) * max(0.02, cosine)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for weight matrices (Jordan et al., 2024).

        m = lerp(m, g, 1 - mu),   u = NewtonSchulz(lerp(g, m, mu)) ~ U V^T,   from the SVD U S V^T
        W = (1 - lr * decay) W - lr * 0.2 sqrt(max(rows, columns)) u

    The factor gives the update the size that AdamW's has.
    """

    # `torch.optim.Muon` has its products in bfloat16. Without fast bfloat16 that is half of a training step
    # (0.70 of 1.39 s, two AVX2 cores); in float32, with equal shapes stacked, a tenth (0.06 of 0.68 s).

    def __init__(self, params, lr: float, weight_decay=0.05, momentum=0.95, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            updates = {}  # {shape: [(parameter, update), ...]}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                m = self.state[p]["momentum_buffer"]
                m.lerp_(p.grad, 1 - group["momentum"])
                updates.setdefault(p.shape, []).append((p, p.grad.lerp(m, group["momentum"])))
            for shape, pairs in updates.items():
                u = torch.stack([u for _, u in pairs]).to(self.dtype)  # (n, rows, columns)
                u = u.mT if shape[0] > shape[1] else u
                u = u / u.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
                for _ in range(5):
                    square = u @ u.mT
                    u = 3.4445 * u + (2.0315 * square @ square - 4.7750 * square) @ u
                u = u.mT if shape[0] > shape[1] else u
                for (p, _), update in zip(pairs, u, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def make_optimizers(model: nn.Module, learning_rate: float, dtype=torch.float32) -> list:
    """Muon for all that has two dimensions inside the blocks, position biases too, AdamW for the rest."""
    # On an earlier recipe the backbone's validation loss after 500 steps was 1.20 with Muon, and 1.55
    # with AdamW at the better of two learning rates.
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, learning_rate, dtype=dtype), adamw]


def optimizer_step(loss, model: nn.Module, optimizers: list, rate: float, clip: float | None = 1.0) -> None:
    """One step of the model down the gradient of `loss`, clipped to a norm, at a learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    model.zero_grad()
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()


# Stage 1: the tokenizer


def train_tokenizer(config: VQGANConfig, sentences: data.Sentences, device, dtype, seed=0, progress=None):
    """Train a VQGAN on the images of training sentences, drawn afresh at each step -> (model, log).

    progress: see `runtime.training_steps`, here and below. log: {"step": [...], "reconstruction": ...}.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = VQGAN(config, sentences.config.image_size).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=1e-4)
    discriminator = vqgan.Discriminator().to(device, memory_format=torch.channels_last)
    d_optimizer = torch.optim.AdamW(discriminator.parameters(), betas=(0.5, 0.9))
    autocast = runtime.autocast(device, dtype)
    step_model, step_discriminator = runtime.data_parallel(model), runtime.data_parallel(discriminator)
    gan_from = round(config.gan_start * config.steps) if config.gan_weight > 0 else config.steps
    per_sentence = 2 * sentences.config.num_demos + 2
    names = ("reconstruction", "gradient", "commitment", "generator", "discriminator", "codes_in_use")
    log = {"step": [], **{name: [] for name in names}}

    parts = {"model": model, "optimizer": optimizer, "generator": generator}
    parts |= {"discriminator": discriminator, "d_optimizer": d_optimizer}
    bar = runtime.training_steps("tokenizer", config.steps, log, parts, progress)
    for step in bar:
        rate = scheduled_rate(step, config.steps, config.learning_rate)
        images, _ = sentences("train", step, -(-config.batch_size // per_sentence))
        images = images.flatten(0, 1)[: config.batch_size][runtime.own_rows(config.batch_size)]
        images = images.to(device, memory_format=torch.channels_last)  # (B, 3, H, W)

        with autocast:
            rebuilt, tokens, z, codebook_loss, commitment_loss = step_model(images)  # tokens (B, N)
        reconstruction, gradient = F.mse_loss(rebuilt, images), vqgan.gradient_loss(rebuilt, images)
        fidelity = reconstruction + config.gradient_weight * gradient
        loss = fidelity + 0.1 * (codebook_loss + config.beta * commitment_loss)
        adversarial = d_loss = torch.zeros((), device=device)
        if step >= gan_from:
            with autocast:
                adversarial = vqgan.generator_loss(discriminator, rebuilt)
            last_layer = model.decoder[-1].weight
            weight = vqgan.adaptive_weight(fidelity, adversarial, last_layer, runtime.mean_of_all)
            loss = loss + config.gan_weight * weight * adversarial
        optimizer_step(loss, model, [optimizer], rate, clip=None)
        if step >= gan_from:
            with autocast:
                d_loss = vqgan.discriminator_loss(step_discriminator, images, rebuilt)
            optimizer_step(d_loss, discriminator, [d_optimizer], 5e-4, clip=None)

        tokens = runtime.all_rows(tokens, config.batch_size)
        model.codebook.count_use(tokens)
        if step % config.revive_every == config.revive_every - 1 and step < 0.8 * config.steps:
            # Not in the last fifth: by then every revived code has had time to find its place.
            z = runtime.all_rows(z.detach(), config.batch_size)
            model.codebook.revive(z.flatten(0, 1), config.revive_every, generator)
        if step % 20 == 0 or step == config.steps - 1:
            runtime.finite_mean(loss, "tokenizer", step, "--vqgan-learning-rate", rate)
            losses = (reconstruction, gradient, commitment_loss, adversarial, d_loss)
            values = [runtime.mean_of_all(x).item() for x in losses] + [len(tokens.unique())]
            log["step"].append(step)
            for name, value in zip(names, values, strict=True):
                log[name].append(value)
            bar.set_postfix(mse=f"{values[0]:.4f}", codes=f"{values[-1]}", refresh=False)
    return model.eval().requires_grad_(False), log


# Stage 2: the backbone


def train_backbone(config: GPTConfig, train, val, codebook_size: int, device, dtype, seed: int,
                   compile=False, make=GPT, progress=None):  # fmt: skip
    """Pretrain the backbone, a GPT or what `make` builds, on whole sentences -> (frozen model, log).

    train, val: tokens (S, 2K+2, N). `val_loss` is on all tokens of up to 128 held-out sentences,
    `val_target_loss` and `val_target_accuracy` on those of their last image.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    _, num_images, N = train.shape
    model = make(config, codebook_size, N, num_images).to(device)
    optimizers = make_optimizers(model, config.learning_rate, dtype)
    autocast = runtime.autocast(device, dtype)
    step_model = torch.compile(runtime.data_parallel(model)) if compile else runtime.data_parallel(model)
    val = val[:128].flatten(1).long().to(device)  # (S, T)
    names = ("step", "loss", "val_step", "val_loss", "val_target_loss", "val_target_accuracy")
    log = {name: [] for name in names}

    parts = {"model": model, "muon": optimizers[0], "adamw": optimizers[1], "generator": generator}
    bar = runtime.training_steps("backbone", config.steps, log, parts, progress)
    for step in bar:
        rate = scheduled_rate(step, config.steps, config.learning_rate)
        rows = torch.randint(len(train), (config.batch_size,), generator=generator)
        rows = rows[runtime.own_rows(config.batch_size)]
        tokens = train[rows].flatten(1).long().to(device)  # (B, T)
        with autocast:
            logits = step_model(tokens)  # (B, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        optimizer_step(loss, model, optimizers, rate)

        if step % 20 == 0 or step == config.steps - 1:
            log["step"].append(step)
            log["loss"].append(runtime.finite_mean(loss, "backbone", step, "--gpt-learning-rate", rate))
            speed = config.batch_size * tokens.shape[1] * (bar.format_dict["rate"] or 0)
            bar.set_postfix(loss=f"{log['loss'][-1]:.3f}", tokens_per_s=f"{speed:,.0f}", refresh=False)
        if step % max(1, config.steps // 15) == 0 or step == config.steps - 1:
            model.eval()
            losses, right = [], []
            for part in val.split(32):
                with torch.no_grad(), autocast:
                    logits = model(part).float()  # (B, T, V)
                losses.append(F.cross_entropy(logits.mT, part, reduction="none"))  # (B, T)
                right.append(logits[:, -N:].argmax(-1) == part[:, -N:])
            model.train()
            losses, right = torch.cat(losses), torch.cat(right).float()  # (S, T), (S, N)
            log["val_step"].append(step)
            log["val_loss"].append(losses.mean().item())
            log["val_target_loss"].append(losses[:, -N:].mean().item())
            log["val_target_accuracy"].append(right.mean().item())
    return model.eval().requires_grad_(False), log


def turned_at(log: dict) -> int | None:
    """The step with the least validation loss on the last image, if that has risen by 5 % or more since."""
    least = min(log["val_target_loss"])
    step = log["val_step"][log["val_target_loss"].index(least)]
    return step if log["val_target_loss"][-1] >= 1.05 * least else None


# Stage 3: rollouts


def make_rollouts(backbone: GPT, tokens: torch.Tensor, autocast, batch: int = 256, progress=None):
    """The frozen backbone generates the last image of sentences (S, 2K+2, N) -> (y_q (S, N), log)."""
    device, batches, log = backbone.head.weight.device, tokens.split(batch), {"generated": []}
    bar = runtime.training_steps("rollouts", len(batches), log, {}, progress, every=10, unit="batch")
    for index in bar:
        total = len(batches[index])
        own = batches[index][runtime.own_rows(total)]
        with autocast:
            rollout = backbone.generate(own[:, :-1].flatten(1).long().to(device), tokens.shape[2])
        log["generated"].append(runtime.all_rows(rollout.tokens, total).to("cpu", tokens.dtype))
    return torch.cat(log.pop("generated")), log


@torch.no_grad()
def replay_rollouts(backbone: GPT, tokens, generated, reads, autocast) -> Rollout:
    """The rollouts with the hidden states that `reads` names, (S, N, C) in bfloat16 on the CPU.

    tokens: sentences (S, 2K+2, N); generated: y_q (S, N). Only tokens are kept on disk: to compute their
    states again is cheap, all positions at once.
    """
    device, kept = backbone.head.weight.device, {name: [] for name in ("states", "query") if name in reads}
    if not kept:
        return Rollout(generated)
    for rows in tqdm(torch.arange(len(tokens)).split(64), "hidden states", mininterval=1, leave=None):
        y = generated[rows].long().to(device) if "states" in reads else None  # (B, N)
        with autocast:
            rollout = backbone.replay(tokens[rows, :-1].flatten(1).long().to(device), y)
        for name, parts in kept.items():
            parts.append(getattr(rollout, name).bfloat16().cpu())  # (B, N, C)
    return Rollout(generated, **{name: torch.cat(parts) for name, parts in kept.items()})


# Stage 4: refiners


def train_refiner(config: RefinerConfig, reads, codebook, grid, rollouts: dict, target_tokens: dict, device,
                  dtype, seed: int, loss_function=vsr.cosine_loss, make=Refiner, progress=None):  # fmt: skip
    """Train one refiner on rollouts of a frozen backbone, of whatever kind -> (refiner, log).

    reads: see `vsr.Refiner`. codebook: (V, D), frozen. rollouts: {"train", "val": Rollout of S rows; what is
    not read may be None}. target_tokens: {"train", "val": y* (S, N)}. `val_loss`: on held-out rollouts.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    autocast = runtime.autocast(device, dtype)
    state_dim = next((x.shape[-1] for x in rollouts["train"][1:] if x is not None), 0)
    refiner = make(config, reads, grid, codebook.shape[1], state_dim).to(device)
    optimizers = make_optimizers(refiner, config.learning_rate, dtype)
    step_refiner = runtime.data_parallel(refiner)

    def batch_loss(model, split: str, rows: torch.Tensor) -> torch.Tensor:
        rollout = rollouts[split]
        embeddings = codebook[rollout.tokens[rows].long().to(device)]  # (B, N, D)
        states = rollout.states[rows].to(device) if "states" in reads else None  # (B, N, C)
        query = rollout.query[rows].to(device) if "query" in reads else None  # (B, N, C)
        with autocast:
            refined = model(embeddings, states, query)  # (B, N, D)
        target = codebook[target_tokens[split][rows].long().to(device)]  # e*_seq (B, N, D)
        return loss_function(refined, target)

    log = {"step": [], "loss": [], "val_step": [], "val_loss": []}
    parts = {"model": refiner, "muon": optimizers[0], "adamw": optimizers[1], "generator": generator}
    name = f"refiner ({'+'.join(reads)})"
    bar = runtime.training_steps(name, config.steps, log, parts, progress)
    for step in bar:
        rate = scheduled_rate(step, config.steps, config.learning_rate)
        rows = torch.randint(len(target_tokens["train"]), (config.batch_size,), generator=generator)
        loss = batch_loss(step_refiner, "train", rows[runtime.own_rows(config.batch_size)])
        optimizer_step(loss, refiner, optimizers, rate)

        if step % 20 == 0 or step == config.steps - 1:
            log["step"].append(step)
            log["loss"].append(runtime.finite_mean(loss, "refiner", step, "--refiner-learning-rate", rate))
        if step % max(1, config.steps // 15) == 0 or step == config.steps - 1:
            refiner.eval()
            with torch.no_grad():
                held_out = torch.arange(len(target_tokens["val"])).split(128)
                total = sum(batch_loss(refiner, "val", rows).item() * len(rows) for rows in held_out)
            refiner.train()
            log["val_step"].append(step)
            log["val_loss"].append(total / len(target_tokens["val"]))
            bar.set_postfix(loss=f"{log['loss'][-1]:.4f}", val=f"{log['val_loss'][-1]:.4f}", refresh=False)
    return refiner.eval().requires_grad_(False), log


def refiner_for(write, prompts, target_tokens, codebook, grid: tuple[int, int], reads=("tokens", "states"),
                config=None, device="cpu", dtype=torch.float32, seed: int = 0):  # fmt: skip
    """Train a refiner for a frozen model from elsewhere: whatever can write tokens, over any codebook.

    write: a function from prompts (B, ...) on the device to the `Rollout` of what the model writes after
        them, free-running, an offset of the vocabulary taken off. States that are not read may be None.
    prompts: (S, ...), the sentences without their last image. target_tokens: (S, N), its true tokens y*.
    codebook: (V, D), of any norm. grid: (h, w), N = h * w, raster order. config: a `RefinerConfig`.
    Returns the refiner and the log; a sixteenth of the sentences is held out for `val_loss`. Apply it with
    `vsr.refine`. Raises ValueError if the shapes do not fit.
    """
    if not set(reads) <= set(vsr.SOURCES):
        raise ValueError(f"reads {reads!r}: expected one or more of {vsr.SOURCES}")
    config, device = config or RefinerConfig(), torch.device(device)
    parts = {name: [] for name in vsr.SOURCES if name in {"tokens", *reads}}
    for batch in tqdm(prompts.split(config.rollout_batch), "rollouts", leave=None):
        with torch.no_grad():
            rollout = write(batch.to(device))
        for name in parts:
            if (part := getattr(rollout, name)) is None:
                raise ValueError(f"reads {reads}: `write` gave no {name}; give them, or read ('tokens',)")
            vsr.require_finite(part, **{name: part})
            parts[name].append(part.cpu())  # the states of all sentences would fill a GPU
    fields = {name: torch.cat(part) for name, part in parts.items()}  # (S, N) or (S, N, C)
    y, target_tokens = fields["tokens"], target_tokens.cpu()
    vsr.require_same_shape(y, target_tokens)
    if len(y) < 2:
        raise ValueError("one sentence is held out, and none is left to train on: give two or more")
    if min(y.min(), target_tokens.min()) < 0 or max(y.max(), target_tokens.max()) >= len(codebook):
        raise ValueError(f"tokens outside 0 to {len(codebook) - 1}: take off the offset of the vocabulary")
    held, rollouts, targets = max(1, len(target_tokens) // 16), {}, {}
    for split, rows in (("train", slice(held, None)), ("val", slice(held))):
        rollouts[split] = Rollout(**{name: x[rows] for name, x in fields.items()})
        targets[split] = target_tokens[rows]
    codebook = F.normalize(codebook.detach().float().to(device), dim=-1)
    return train_refiner(config, reads, codebook, grid, rollouts, targets, device, dtype, seed)


# The command


class Trained(NamedTuple):
    """What stages 1 to 4 leave behind."""

    tokenizer: VQGAN
    backbone: GPT
    refiners: dict  # {reading: Refiner}, a reading being "tokens+query" for instance
    tokens: dict  # {"train", "val": (S, 2K+2, N)} the sentences
    generated: dict  # {"train", "val": (S, N)} what the backbone wrote for the first of them
    logs: dict  # {stage: its log}
    seconds: dict  # {stage: wall time}

    def written_for(self, split: str) -> torch.Tensor:
        """The sentences of a split that the backbone wrote an image for, as many as `generated` has."""
        return self.tokens[split][: len(self.generated[split])]


def train_models(out: Path, config, readings, sentences, device, dtype, seed, fresh=None, compile=False):
    """Stages 1 to 4, for configurations {"data", "vqgan", "gpt", "refiner"} -> `Trained`.

    A stage that is finished in `out` is reused; `fresh` names one to train again, with all after it.
    """
    autocast, logs, seconds = runtime.autocast(device, dtype), {}, {}
    scenes = {name: value for name, value in asdict(config["data"]).items() if not name.endswith("sentences")}
    made_with = {"run": {"seed": seed, "dtype": str(dtype).removeprefix("torch.")}, "data": scenes}
    if sentences.folder is not None:  # its pictures are its identity, not the spelling of its path
        made_with["pictures"] = sentences.fingerprint
        made_with["found_in"] = str(Path(scenes["data"].removeprefix("folder:")).expanduser().resolve())
        scenes["data"] = "folder:"
    made_with["weights"] = {}  # {stage: the fingerprint of the models that later stages are trained on}

    def stage(name: str, train):
        """The frozen model of a stage, or its rollouts: reused, or trained by `train(progress)`."""
        kind, path = name.split("_")[0], out / f"{name}.pt"
        if kind == fresh and runtime.is_first():  # and what was built on it: two trainings never meet
            later = ["refiner_*" if k == "refiner" else k for k in STAGES[STAGES.index(kind) + 1 :]]
            for stem in (name, *later):
                for file in (*out.glob(f"{stem}.pt"), *out.glob(f"{stem}.progress")):
                    file.unlink()
        checkpoint = runtime.stage(path, {**made_with, "weights": dict(made_with["weights"])}, kind, train)
        logs[name], seconds[name] = checkpoint["log"], checkpoint["seconds"]
        if kind == "rollouts":
            return checkpoint
        if kind != "refiner":
            made_with["weights"][kind] = runtime.fingerprint(checkpoint["model"])
        return evaluate.load_model(kind, checkpoint, device, path)

    # 1. The tokenizer
    run, made_with["vqgan"] = (device, dtype, seed), asdict(config["vqgan"])
    tokenizer = stage("tokenizer", lambda p: train_tokenizer(config["vqgan"], sentences, *run, p))
    codebook = tokenizer.codebook.vectors
    if sentences.folder is not None and runtime.is_first():  # what follows can be no better than this
        decibels = vqgan.score_tokenizer(tokenizer, sentences, "val", autocast)["psnr_source"]
        evaluate.save_reconstructions(out / "reconstructions.png", tokenizer, sentences, "val", autocast)
        print(f"tokenizer: rebuilds held-out pictures at {decibels:.1f} dB (the toy: 29, photographs: 33, "
              f"clip art: 25, stamps: 23); look at {out / 'reconstructions.png'}. If that is too coarse, stop"
              " here and give a larger --vqgan-codebook-size, or more --vqgan-steps")  # fmt: skip

    # 2. The backbone, on sentences of tokens
    began, tokens = time.perf_counter(), {}
    for split, total in (("train", config["data"].train_sentences), ("val", config["data"].eval_sentences)):
        tokens[split] = evaluate.encode_sentences(tokenizer, sentences, split, total, device, autocast)
        made_with[f"{split}_sentences"] = total
    seconds["sentences"] = time.perf_counter() - began
    made_with["gpt"] = asdict(config["gpt"])
    given = (config["gpt"], tokens["train"], tokens["val"], len(codebook), *run, compile)
    backbone = stage("backbone", lambda p: train_backbone(*given, progress=p))
    if (step := turned_at(logs["backbone"])) is not None:
        print(f"backbone: the validation loss has risen since step {step}. It learns its pictures by heart, "
              "and a refiner sees too few of its mistakes: stop here and give more pictures, or "
              f"--gpt-steps {step} --fresh backbone")  # fmt: skip

    # 3. Its rollouts
    made_with |= {"rollouts": config["refiner"].rollouts, "rollout_batch": config["refiner"].rollout_batch}
    n = config["refiner"].rollouts
    known = {"train": tokens["train"][:n], "val": tokens["val"]}
    every = torch.cat(list(known.values()))

    def write_rollouts(progress):
        y, log = make_rollouts(backbone, every, autocast, config["refiner"].rollout_batch, progress)
        return {"train": y[:n], "val": y[n:]}, log

    generated = stage("rollouts", write_rollouts)

    # 4. The refiners
    began, needed = time.perf_counter(), {source for reading in readings for source in reading.split("+")}
    generated = {split: generated[split] for split in known}
    rollouts, targets = {}, {split: known[split][:, -1] for split in known}
    if fresh == "refiner" or not all((out / f"refiner_{reading}.pt").is_file() for reading in readings):
        for split in known:
            rollouts[split] = replay_rollouts(backbone, known[split], generated[split], needed, autocast)
        seconds["states"] = time.perf_counter() - began
    made_with["refiner"], refiners = asdict(config["refiner"]), {}
    for reading in readings:
        made_with["reads"] = reading
        given = (config["refiner"], reading.split("+"), codebook, tokenizer.grid, rollouts, targets, *run)
        refiners[reading] = stage(f"refiner_{reading}", lambda p, k=given: train_refiner(*k, progress=p))
    return Trained(tokenizer, backbone, refiners, tokens, generated, logs, seconds)


def parse_arguments():
    parser = runtime.Parser(description="Train tokenizer, backbone and refiners; measure what they do.")
    parser.add_argument("--preset", choices=PRESETS, default="toy", help="sizes of everything (default: toy)")
    parser.add_argument("--out", default="runs/PRESET", help="folder of the run (default: runs/PRESET)")
    parser.add_argument("--seed", type=runtime.seed, default=0, help="of data, initialisation and batches")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="auto: bfloat16 where the hardware is fast at it, else float32")  # fmt: skip
    parser.add_argument("--reads", dest="readings", nargs="+", type=evaluate.reading, default=READINGS,
                        metavar="READING", help="refiners, by what each reads: tokens, states and query, "
                        f"joined by + (default: {' '.join(READINGS)})")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone's training")
    parser.add_argument("--fresh", nargs="?", const="tokenizer", choices=STAGES, help="train again from here")
    parser.add_argument("--weights", metavar="FILE.pt", help="also write all models into this file, halved")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, train nothing")
    for name, config_class in CONFIGS.items():
        parser.add_config(config_class, "" if name == "data" else f"{name}_")
    args = parser.parse_args()
    args.readings, args.out = dict.fromkeys(args.readings), Path(args.out.replace("PRESET", args.preset))
    return args


def check_sizes(config: dict, readings) -> dict:
    """Print and return the parameter counts of all models. Raises UserError if the sizes do not fit."""
    refiner, plain = config["refiner"], {name: asdict(part) for name, part in config.items()}
    if refiner.rollouts > config["data"].train_sentences:
        raise UserError(f"--refiner-rollouts {refiner.rollouts}: more than there are --train-sentences")
    if refiner.heads > refiner.width:
        raise UserError(f"--refiner-heads {refiner.heads}: more than --refiner-width {refiner.width}")
    params, kinds = {}, {"tokenizer": "", "backbone": "", **{f"refiner_{name}": name for name in readings}}
    for name, reading in kinds.items():
        try:
            with torch.device("meta"):
                model = evaluate.make_model(name.split("_")[0], {**plain, "reads": reading})
        except ValueError as error:
            raise UserError(f"--vqgan-factor, --image-size: {error}") from None
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{name.split('_')[0]}: its sizes are too large ({reason})") from None
        params[name] = sum(p.numel() for p in model.parameters())
        print(f"{name:24}{params[name] / 1e6:10.3f} M parameters")
    return params


def main():
    args = parse_arguments()
    config = runtime.configs_from_flags(args, CONFIGS, PRESETS[args.preset])
    batch_sizes = {f"--{name}-batch-size": config[name].batch_size for name in ("vqgan", "gpt", "refiner")}
    device = runtime.start_processes(args.device, batch_sizes)
    first_stage = [args.out / f"tokenizer.{ending}" for ending in ("pt", "progress")]
    dtype = runtime.pick_dtype(args.dtype, device, () if args.fresh == "tokenizer" else first_stage)
    params = check_sizes(config, args.readings)
    if args.dry_run:
        return
    runtime.check_writable(args.out)
    if args.compile:
        runtime.check_compile(device)
    if args.weights:
        if Path(args.weights).suffix != ".pt" or Path(args.weights).resolve().parent == args.out.resolve():
            raise UserError(f"--weights {args.weights}: expected a file that ends in .pt, outside of --out")
        runtime.check_writable(Path(args.weights).parent, "--weights")
    sentences = data.Sentences(config["data"], args.seed)
    total = config["data"].eval_sentences
    _, task = next(iter(sentences.batches("test", total)))
    if len(task.unique()) < len(data.TASKS):
        raise UserError(f"--eval-sentences {total}: too few, a task does not come up; give more")

    run = (device, dtype, args.seed)
    with runtime.locked(args.out) if runtime.is_first() else contextlib.nullcontext():
        trained = train_models(args.out, config, args.readings, sentences, *run, args.fresh, args.compile)
        if runtime.end_processes():
            setting = {"seed": args.seed, "dtype": str(dtype).removeprefix("torch."), "device": str(device)}
            setting |= {"preset": args.preset, **{name: asdict(part) for name, part in config.items()}}
            print(evaluate.evaluate_run(args.out, trained, sentences, setting, params))
            if args.weights:
                evaluate.save_weights(args.weights, args.out, args.readings)
                print(f"wrote {args.weights}")


if __name__ == "__main__":
    kept = "Finished stages and saved steps are kept; the same command, without --fresh, goes on from there"
    runtime.run_command(main, kept, divides=True)
