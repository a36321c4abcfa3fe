"""What every method writes for held-out sentences, how good it is, its table and pictures; loading of runs.

    vqgan_limit         the true tokens, decoded: what the tokenizer alone loses
    teacher_forced      the backbone with the true tokens before each position: no accumulated error
    ar_greedy           the backbone on its own, the likeliest token each time
    ar_sampled          the same, drawn at temperature 1
    expected_embedding  hedging: the code nearest to the mean embedding under the backbone's softmax
    refined_...         what a refiner makes of the greedy image, by what it reads
    parallel            the same network reading the query's states alone, without the written image

Models are frozen; `autocast` is the context to run them in (`runtime.autocast`).
"""

import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import data
import runtime
import vqgan
import vsr
from data import TASKS
from runtime import UserError
from vqgan import VQGAN, VQGANConfig
from vsr import GPT, GPTConfig, Refiner, RefinerConfig

COLOURS = {
    "teacher_forced": "#2a9d4a",
    "ar_greedy": "#d1495b",
    "ar_sampled": "#edae49",
    "expected_embedding": "#8d99ae",
    "refined_tokens": "#66a5e0",
    "refined_tokens+states": "#4a7fc1",
    "refined_tokens+query": "#1d4e9e",
    "refined_tokens+states+query": "#5e3c99",
    "refined_states": "#3aa6a0",
    "refined_states+query": "#147a74",
    "parallel": "#c77dba",
}
OF_FORCED = " of teacher_forced"  # ends the names of what was made of the teacher-forced output


def reading(text: str) -> str:
    """The name of what a refiner reads, "tokens+query" for instance, in the order of `vsr.SOURCES`."""
    if not set(text.split("+")) <= set(vsr.SOURCES):
        raise UserError(f"{text}: expected one or more of {', '.join(vsr.SOURCES)}, joined by +")
    return "+".join(source for source in vsr.SOURCES if source in text.split("+"))


def method_name(reading: str) -> str:
    """The row of a refiner, by what it reads. One that reads nothing of what was written is `parallel`."""
    return "parallel" if reading == "query" else f"refined_{reading}"


def by_method(refiners: dict) -> dict:
    """{reading: refiner} -> {row: refiner}."""
    return {method_name(reading): refiner for reading, refiner in refiners.items()}


@torch.no_grad()
def encode_sentences(tokenizer: VQGAN, sentences: data.Sentences, split: str, total: int, device, autocast):
    """Turn `total` sentences of a split into tokens: (total, 2K+2, N) int16 or int32 on the CPU."""
    small = torch.int16 if tokenizer.config.codebook_size < 2**15 else torch.int32
    tokens, batches = [], sentences.batches(split, total)
    for images, _ in tqdm(batches, f"encode {split}", -(-total // 64), mininterval=1, leave=None):
        with autocast:
            encoded = tokenizer.encode(images.flatten(0, 1).to(device))
        tokens.append(encoded.view(*images.shape[:2], -1).to("cpu", small))
    return torch.cat(tokens)


@torch.no_grad()
def decode_methods(tokenizer: VQGAN, backbone: GPT, refiners: dict, tokens, autocast, seed: int = 0) -> dict:
    """What each method writes for the last image of sentences: tokens (S, 2K+2, N) -> {method: (S, N)}.

    refiners: {method: refiner}.
    """
    device, codebook, N = backbone.head.weight.device, tokenizer.codebook.vectors, tokens.shape[2]
    generator, written = torch.Generator().manual_seed(seed), {}
    for part in tokens.split(64):
        prompt = part[:, :-1].flatten(1).long().to(device)  # (B, P)
        target_tokens = part[:, -1].long().to(device)  # (B, N)
        with autocast:
            rollout = backbone.generate(prompt, N)
            forced = backbone.replay(prompt, target_tokens)  # its states: (B, N, C)
            forced = forced._replace(tokens=backbone.logits(forced.states).argmax(-1))
            sampled = backbone.generate(prompt, N, 1.0, generator=generator)
            now = {"vqgan_limit": target_tokens, "teacher_forced": forced.tokens}
            now |= {"ar_greedy": rollout.tokens, "ar_sampled": sampled.tokens}
            for of, given in (("", rollout), (OF_FORCED, forced)):
                logits = backbone.logits(given.states)
                now["expected_embedding" + of] = vsr.expected_embedding(logits, codebook)
                for method, refiner in refiners.items():
                    now[method + of], _ = vsr.refine(refiner, codebook, *given)
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
    """Measure each method on all sentences and by task, against the true images (S, 3, H, W)."""
    codebook, target_tokens, scores = tokenizer.codebook.vectors.cpu(), written["vqgan_limit"], {}
    groups = {"all": task >= 0, **{name: task == number for number, name in enumerate(TASKS)}}  # {name: (S,)}
    for method, y in written.items():
        error = vsr.cosine_error(y, target_tokens, codebook)  # (S, N)
        images = decode_images(tokenizer, y, autocast)
        psnr, ssim = vqgan.psnr(images, truth), vqgan.ssim(images, truth)  # (S,)
        scores[method] = {}
        for name, rows in groups.items():
            by_position = error[rows].mean(0)  # (N,)
            scores[method][name] = {
                "cosine_error": by_position.mean().item(),
                "auc": by_position.sum().item(),
                "token_accuracy": (y == target_tokens)[rows].float().mean().item(),
                "psnr": psnr[rows].mean().item(),
                "ssim": ssim[rows].mean().item(),
                "cosine_error_by_position": by_position.tolist(),
            }
    return scores


def gap_closed(scores: dict, method: str, name: str) -> float:
    """`vsr.gap_closed` of a method, over all sentences or a task."""
    rows = ("ar_greedy", method, "teacher_forced")
    return vsr.gap_closed(*(scores[row][name]["cosine_error"] for row in rows))


def exposure_removed(scores: dict, method: str, name: str) -> float:
    """`vsr.exposure_removed` of a method, over all sentences or a task."""
    rows = ("ar_greedy", method, "teacher_forced", method + OF_FORCED)
    return vsr.exposure_removed(*(scores[row][name]["cosine_error"] for row in rows))


def format_table(scores: dict) -> str:
    """The results as text, one line a method."""
    names, methods = ("all", *TASKS), [method for method in scores if not method.endswith(OF_FORCED)]
    wide = max(22, *(len(method) + 1 for method in methods))
    head = f"{'':{wide}}{'cosine error (lower is better)':^40}{'gap':>8}{'exposure':>10}{'token':>7}"
    below = " " * wide + "".join(f"{name:>10}" for name in names) + f"{'closed':>8}{'removed':>10}{'acc.':>7}"
    below += "".join(f"{name:>8}" for name in ("all", "color", *TASKS[1:]))
    lines = [head + f"{'PSNR in dB':^32}", below]
    for method in methods:
        score, shares = scores[method], [""] * 2
        if has_gap(method):
            shares = [f"{share(scores, method, 'all'):.2f}" for share in (gap_closed, exposure_removed)]
        row = f"{method:{wide}}" + "".join(f"{score[name]['cosine_error']:10.4f}" for name in names)
        row += f"{shares[0]:>8}{shares[1]:>10}{score['all']['token_accuracy']:7.3f}"
        lines.append(row + "".join(f"{score[name]['psnr']:8.2f}" for name in names))
    return "\n".join(lines)


def has_gap(method: str) -> bool:
    """Whether a method is measured by the gap that it closes: whatever repairs what greedy decoding wrote."""
    repairs = method.startswith(("refined_", "parallel", "expected_embedding"))
    return repairs and not method.endswith(OF_FORCED)


def evaluate_run(out: Path, trained, sentences, setting: dict, params: dict) -> str:
    """Stage 5: measure a run on test sentences, write metrics.json and pictures; returns what to print.

    trained: `train_refiner.Trained`. setting: its configuration.
    """
    began, tokenizer, log = time.perf_counter(), trained.tokenizer, trained.logs["backbone"]
    device = tokenizer.codebook.weight.device
    autocast = runtime.autocast(device, getattr(torch, setting["dtype"]))
    total = sentences.config.eval_sentences
    images, task = data.joined(sentences.batches("test", total))  # (S, 2K+2, 3, H, W), (S,)
    tokens = encode_sentences(tokenizer, sentences, "test", total, device, autocast)
    models = (tokenizer, trained.backbone, by_method(trained.refiners))
    written = decode_methods(*models, tokens, autocast, setting["seed"])
    scores = score_methods(tokenizer, written, images[:, -1], task, autocast)
    plot_error_by_position(out / "error_by_position.png", scores)
    plot_training(out / "training.png", trained.logs)
    save_samples(out / "samples.png", tokenizer, written, images, task, autocast)
    save_reconstructions(out / "reconstructions.png", tokenizer, sentences, "test", autocast)
    losses = {name: log[name][-1] for name in ("loss", "val_loss", "val_target_loss", "val_target_accuracy")}
    quality = vqgan.score_tokenizer(tokenizer, sentences, "val", autocast)
    seconds = {**trained.seconds, "evaluation": time.perf_counter() - began}
    metrics = {"config": setting, "seconds": seconds, "params": params, "tokenizer": quality}
    runtime.save(out / "metrics.json", {**metrics, "backbone": losses, "methods": scores})
    lines = [f"\n{total} test sentences\n", format_table(scores), ""]
    for name, values in (("tokenizer", quality), ("backbone", losses), ("seconds", seconds)):
        lines.append(f"{name:12}" + ", ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None))
    lines.append(f"\nall {sum(seconds.values()):.0f} seconds; metrics and pictures are in {out}")
    return "\n".join(lines)


def new_figure(panels: int, width: float = 3.4, height: float = 3.4, rows: int = 1) -> Figure:
    """A figure with panels side by side, in one row or more: `figure.axes`."""
    figure = Figure(figsize=(width * panels, rows * height), layout="constrained", dpi=120)
    for axis in figure.subplots(rows, panels, squeeze=False).flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def plot_error_by_position(path, scores: dict) -> None:
    """The paper's Figure 2 on the toy: cosine error by token position, a moving mean of 7, by task.

    AUC, in the legend, is the sum over all positions, for all tasks together.
    """
    figure = new_figure(4, 3.25, 3.6)
    for axis, name in zip(figure.axes, ("all", *TASKS), strict=True):
        for method, colour in COLOURS.items():
            if method in scores and method != "ar_sampled":
                error = torch.tensor(scores[method][name]["cosine_error_by_position"])
                smooth = F.avg_pool1d(F.pad(error[None, None], (3, 3), mode="replicate"), 7, 1)[0, 0]
                axis.plot(smooth, color=colour, label=f"{method}  AUC {error.sum():.2f}")
        axis.set(title=name, ylim=(0, None), xlabel="token position t (raster order)")
    figure.axes[0].set_ylabel("cosine error")
    lines = figure.axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside right center", fontsize=7, frameon=False)
    runtime.write_whole(path, figure.savefig)


def plot_training(path, logs: dict) -> None:
    """The losses of all stages: lines for training, dots for validation."""
    figure = new_figure(4, 3.25, 3.6)
    losses, codes, cross_entropy, cosine = figure.axes
    log = logs["tokenizer"]
    for name in ("reconstruction", "gradient", "commitment", "generator", "discriminator"):
        if any(log[name]):
            label = name if min(log[name]) >= 0 else f"|{name}|"
            losses.plot(log["step"], [abs(value) for value in log[name]], label=label)
    losses.set(title="tokenizer", yscale="log", ylabel="loss")
    codes.plot(log["step"], log["codes_in_use"], label="codes used by the batch")
    codes.set(title="tokenizer", ylim=(0, None), ylabel="codes")
    log = logs["backbone"]
    cross_entropy.plot(log["step"], log["loss"], label="training", linewidth=0.8)
    for name, label in (("val_loss", "validation"), ("val_target_loss", "validation, last image")):
        cross_entropy.plot(log["val_step"], log[name], "o-", markersize=3, label=label)
    cross_entropy.set(title="backbone", ylabel="cross-entropy in nats per token")
    for name in (name for name in logs if name.startswith("refiner_")):
        method, log = method_name(name.removeprefix("refiner_")), logs[name]
        cosine.plot(log["step"], log["loss"], color=COLOURS[method], linewidth=0.6, alpha=0.6)
        cosine.plot(log["val_step"], log["val_loss"], "o-", color=COLOURS[method], markersize=3, label=method)
    cosine.set(title="refiners", ylabel="cosine loss", yscale="log")
    for axis in figure.axes:
        axis.set_xlabel("step")
        axis.legend(fontsize=7, frameon=False)
    runtime.write_whole(path, figure.savefig)


def median_and_largest(errors: torch.Tensor, task: torch.Tensor, first: int = 64) -> list[tuple[str, int]]:
    """The rule by which sentences are chosen to be shown: no one has picked them.

    errors: (S,), of greedy decoding. Of the first 64 sentences of each task the one with the median error,
    and the one with the largest: [("colorize, median", row), ("colorize, largest", row), ...].
    """
    chosen = []
    for number, name in enumerate(TASKS):
        rows = (task == number).nonzero().flatten()[:first]
        ordered = rows[errors[rows].argsort(stable=True)].tolist()
        chosen += [(f"{name}, median", ordered[len(ordered) // 2]), (f"{name}, largest", ordered[-1])]
    return chosen


def save_samples(path, tokenizer: VQGAN, written: dict, images, task, autocast) -> None:
    """Rows of test sentences: the prompt, greedy, each refiner, the truth, and where tokens are wrong.

    The rows are chosen by `median_and_largest`. images: (S, 2K+2, 3, H, W).
    """
    codebook, target_tokens = tokenizer.codebook.vectors.cpu(), written["vqgan_limit"]
    shown = ["ar_greedy", *(m for m in written if has_gap(m) and m != "expected_embedding")]
    chosen = median_and_largest(vsr.cosine_error(written["ar_greedy"], target_tokens, codebook).mean(1), task)
    rows = []
    for _, i in chosen:
        tokens = torch.stack([written[method][i] for method in shown])  # (methods, N)
        error = vsr.cosine_error(tokens, target_tokens[i].expand_as(tokens), codebook)
        made = decode_images(tokenizer, tokens, autocast)
        rows.append([*images[i, :-1], *made, images[i, -1], *error.unflatten(1, tokenizer.grid)])
    titles = [*data.prompt_titles(images.shape[1]), *shown, "truth", *(f"error of {m}" for m in shown)]
    data.save_picture(path, rows, [label.replace(", ", "\n") for label, _ in chosen], titles)


def save_reconstructions(path, model: VQGAN, sentences: data.Sentences, split: str, autocast) -> None:
    """Sources and targets of each task, above what the tokenizer makes of them."""
    images, task = sentences(split, 0, 64)
    rows, labels = [], []
    for number, name in enumerate(TASKS):
        pairs = images[task == number][:4, -2:].flatten(0, 1)  # (8, 3, H, W) source, target, ...
        with torch.no_grad(), autocast:
            tokens = model.encode(pairs.to(model.codebook.weight.device))
        rows += [list(pairs), list(decode_images(model, tokens, autocast))]
        labels += [name, "rebuilt"]
    data.save_picture(path, rows, labels, ["source", "target"] * 4)


# The models of a finished run


def make_model(kind: str, config: dict) -> nn.Module:
    """An untrained tokenizer, backbone or refiner from the configuration in a checkpoint: plain types."""
    side = config["data"]["image_size"] // config["vqgan"]["factor"]
    tokenizer = VQGANConfig(**config["vqgan"])
    if kind == "tokenizer":
        return VQGAN(tokenizer, config["data"]["image_size"])
    backbone = GPTConfig(**config["gpt"])
    if kind == "backbone":
        return GPT(backbone, tokenizer.codebook_size, side * side, 2 * config["data"]["num_demos"] + 2)
    reads, refiner = config["reads"].split("+"), RefinerConfig(**config["refiner"])
    return Refiner(refiner, reads, (side, side), tokenizer.code_dim, backbone.width)


def load_model(kind: str, checkpoint: dict, device, path) -> nn.Module:
    """The frozen model of a checkpoint. Raises UserError, naming the file, if it holds something else."""
    try:
        model = make_model(kind, checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError):  # another model, or a field that is gone
        raise UserError(f"{path}: the checkpoint of another model or another version") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path}: weights that are not finite; remove it, and train again")
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load_run(path, device) -> tuple[VQGAN, GPT, dict, dict]:
    """All models of a finished run: tokenizer, backbone, {reading: refiner}, and their configuration.

    path: the folder of a run, or a file that `save_weights` wrote. Raises UserError for anything else.
    """
    path = Path(path)
    if path.is_dir():
        names = ["tokenizer.pt", "backbone.pt", *(file.name for file in path.glob("refiner_*.pt"))]
        checkpoints = {name: runtime.load_checkpoint(path / name) for name in names}
    else:
        checkpoints = runtime.load_checkpoint(path).get("checkpoints")
        if checkpoints is None:
            raise UserError(f"--run {path}: a single stage; give its folder, or a file that --weights wrote")
    models, weights = {}, {}
    for name, checkpoint in checkpoints.items():  # each after those that it was trained on
        kind, _, reading = name.removesuffix(".pt").partition("_")
        models[reading or kind] = load_model(kind, checkpoint, device, path / name)
        made_of = checkpoint["config"].get("weights")
        if made_of is None or any(weights.get(earlier) != digest for earlier, digest in made_of.items()):
            advice = f"`python train_refiner.py --out {path} --fresh` trains again"
            raise UserError(f"{path / name}: trained with other models than those beside it; {advice}")
        weights[kind] = runtime.fingerprint(checkpoint["model"])
    if len(models) < 3:
        raise UserError(f"--run {path}: no refiner in it; `python train_refiner.py --out {path}` goes on")
    tokenizer, backbone = models.pop("tokenizer"), models.pop("backbone")
    refiners = dict(sorted(models.items(), key=lambda item: ("tokens" not in item[0], len(item[0]))))
    return tokenizer, backbone, refiners, checkpoints["backbone.pt"]["config"]


def save_weights(path, out: Path, readings) -> None:
    """Put all models of the run in `out` into one file, in half precision."""
    small = {}
    for name in ("tokenizer.pt", "backbone.pt", *(f"refiner_{reading}.pt" for reading in readings)):
        checkpoint = runtime.load_checkpoint(out / name)
        weights = {key: x.half() if x.is_floating_point() else x for key, x in checkpoint["model"].items()}
        config = {key: value for key, value in checkpoint["config"].items() if key != "found_in"}
        small[name] = {"config": config, "model": weights}
    runtime.save(path, {"config": small["backbone.pt"]["config"], "checkpoints": small})
