"""The evidence: is it self-refinement? The paper's figures and tables on the toy, and the controls.

    python study.py main --seeds 5         # one study: results/main.json, results/main.png, a table
    python study.py all --seeds 5          # all of them; finished cells are kept, so it can be stopped and repeated

A *study* is a list of *cells*; a cell trains or measures something for one seed and one setting, and gives a
dictionary of plain numbers. Models that several cells need (tokenizer, backbone, rollouts, refiners of a seed) are
trained once, by `train_refiner.train_models`, and kept in --work. Every comparison is paired: the same test sentences
for every method. `interval` gives 95 % bootstrap intervals over sentences; spread over seeds is a standard deviation.

    main         every method and every control, by task                        table, 5 seeds
    positions    cosine error by token position (Figure 2)                      5 seeds, read from `main`
    lora         rank and learning rate of the LoRA control, by validation loss
    demos        K = 1, 2, 3 demonstrations (Figure 3)
    backbones    two GPTs, a LLaMA, a GRU under the same refiner
    data         gap closed against rollouts, and against training time
    size         depth and width of the refiner
    reading      what the refiner reads, each with and without attention
    passes       the refiner over its own output again
    loss         cosine, MSE, cross-entropy, their sum; with and without the residual
    probe        one token forced wrong: how far does the damage run, how much is taken back
    generalize   a task, or a dataset, that the refiner has not seen
    speed        every stage against a textbook, the machine's limits, and by N, K and batch
"""

import contextlib
import copy
import importlib.util
import io
import json
import math
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import train_refiner
import vqgan
import vsr
from data import TASKS, UserError
from vsr import Refiner, Rollout


@dataclass
class StudyConfig:
    """Sizes of the controls."""

    lora_rank: Annotated[int, "rank of the low-rank adapters"] = 64
    lora_steps: Annotated[int, "steps of LoRA's training; at least the time of the rollouts and the refiner"] = 2000
    lora_learning_rate: Annotated[float, "peak learning rate of LoRA (AdamW)"] = 1e-3
    longer_steps: Annotated[int, "further steps of the backbone's pretraining; at least that time"] = 2000
    samples: Annotated[int, "n of best_of_n"] = 8
    steps: Annotated[int, "training steps of each refiner in `data`, `size`, `reading`, `loss` and `generalize`"] = 1000
    rollouts: Annotated[int, "rollouts of the other backbones in `backbones`"] = 8192
    probed: Annotated[int, "sentences in `probe`"] = 256

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not value > 0:
                raise UserError(f"--study-{name.replace('_', '-')} {value}: expected a number above 0")


class Lab(NamedTuple):
    """What every cell needs: configurations of all components, where models are kept, and on what to compute."""

    config: dict  # {"data", "vqgan", "gpt", "refiner", "study": a config dataclass}
    work: Path
    unfinished: Path  # folder for what the present cell has trained so far
    device: torch.device
    dtype: torch.dtype

    @property
    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


class Bench(NamedTuple):
    """The trained models of a seed, and the sentences to measure on."""

    trained: train_refiner.Trained
    test: dict  # {"tokens": (S, 2K+2, N), "images": (S, 3, H, W) the true targets, "task": (S,)}

    @property
    def codebook(self):
        return self.trained.tokenizer.codebook.vectors

    @property
    def grid(self):
        return self.trained.tokenizer.grid


# --------------------------------------------------------------------------------------------------
# Shared by the studies
# --------------------------------------------------------------------------------------------------


def bench(lab: Lab, seed: int, inputs=("hidden",), label: str = "base", changes: dict | None = None, test_data=None) -> Bench:
    """Train what is missing of a seed's models, and make the test sentences.

    changes: {component: {field: value}}, with a label of their own for the folder. test_data: a DataConfig for the
    test sentences if they are not those of the training.
    """
    config = {name: replace(part, **(changes or {}).get(name, {})) for name, part in lab.config.items()}
    sentences = data.Sentences(config["data"], seed)
    folder = lab.work / f"{label}-{seed}"
    trained = train_refiner.train_models(folder, config, inputs, sentences, lab.device, lab.dtype, seed)
    if test_data is not None:
        sentences = data.Sentences(test_data, seed)
    images, task = data.joined(sentences.batches("test", config["data"].eval_sentences))
    tokens = train_refiner.encode_sentences(
        trained.tokenizer, sentences, "test", config["data"].eval_sentences, lab.device, lab.autocast
    )
    return Bench(trained, {"tokens": tokens, "images": images[:, -1], "task": task})


def states_of(lab: Lab, bench: Bench) -> tuple[dict, dict]:
    """Rollouts with hidden states, and their targets, of the training and validation sentences of a bench."""
    backbone, tokens, generated = bench.trained.backbone, bench.trained.tokens, bench.trained.generated
    rollouts = {s: train_refiner.read_states(backbone, tokens[s], generated[s], lab.autocast) for s in tokens}
    return rollouts, {s: tokens[s][:, -1] for s in tokens}


def fit(lab: Lab, bench: Bench, name: str, rollouts, targets, seed: int, inputs="hidden", **options):
    """Train one more refiner; options change its configuration, or name its class or its loss. -> refiner, log, seconds

    name: of the setting, another one for each refiner of a cell. An interrupted training goes on where it was.
    """
    extra = {key: options.pop(key) for key in ("loss_function", "make") if key in options}
    began = time.perf_counter()
    try:
        config = replace(lab.config["refiner"], **options)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    made_with = {"refiner": asdict(config), "inputs": inputs, "rollouts": len(targets["train"])}
    refiner, log = train_refiner.train_refiner(
        *(config, inputs, bench.codebook, bench.grid, rollouts, targets, lab.device, lab.dtype, seed),
        **extra,
        progress=(lab.unfinished / f"{name}.progress", made_with),
    )
    return refiner, log, log["earlier_seconds"] + time.perf_counter() - began


@torch.no_grad()
def refine_all(lab: Lab, bench: Bench, refiner: Refiner, rollout: Rollout) -> torch.Tensor:
    """Refined tokens (S, N) of rollouts whose states are on the CPU."""
    refined = []
    for rows in torch.arange(len(rollout.tokens)).split(128):
        part = [x[rows].to(lab.device) for x in rollout]
        with lab.autocast:
            tokens, _ = vsr.refine(refiner, bench.codebook, part[0].long(), hidden=part[1], context=part[2])
        refined.append(tokens.cpu())
    return torch.cat(refined)


def score(lab: Lab, bench: Bench, written: dict) -> dict:
    """Scores of `train_refiner.score_methods`, and for each method the cosine error of each test sentence."""
    test = bench.test
    scores = train_refiner.score_methods(bench.trained.tokenizer, written, test["images"], test["task"], lab.autocast)
    y_true, codebook = test["tokens"][:, -1].long(), bench.codebook.cpu()
    by_sentence = {
        method: [round(e, 5) for e in vsr.cosine_error(y.long(), y_true, codebook).mean(1).tolist()]
        for method, y in written.items()
    }
    return {"scores": scores, "by_sentence": by_sentence, "task": test["task"].tolist()}


def interval(differences: torch.Tensor, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of paired differences (n,), by drawing sentences with replacement."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(differences), (draws, len(differences)), generator=generator)
    means = differences[chosen].mean(1).sort().values
    return means[int(0.025 * draws)].item(), means[int(0.975 * draws) - 1].item()


def sd(values: list) -> float:
    """Standard deviation of a sample; 0 for a single value."""
    return torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else 0.0


def mean_sd(values: list, digits: int = 3) -> str:
    """`0.123 ± 0.004`: mean and standard deviation over seeds."""
    return f"{statistics.fmean(values):.{digits}f} ± {sd(values):.{digits}f}"


# --------------------------------------------------------------------------------------------------
# The controls that train or sample from the backbone
# --------------------------------------------------------------------------------------------------


def tune_backbone(
    lab: Lab, name: str, backbone, tokens: dict, optimizers: list, steps: int, rate: float, seed: int, target_only: bool
):
    """Continue training a copy of the backbone, or its adapters, with teacher-forced cross-entropy.

    name: of the setting; an interrupted training goes on where it was. optimizers: of what is trained. target_only: the
    loss is on the last image, the one that is generated, alone; otherwise on whole sentences, as in pretraining.
    Returns the validation loss on the last image, and seconds.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    began, N = time.perf_counter(), tokens["train"].shape[-1]
    batch_size = lab.config["gpt"].batch_size

    parts = {"model": backbone, "generator": generator, **{f"optimizer {i}": part for i, part in enumerate(optimizers)}}
    log, progress = {}, (lab.unfinished / f"{name}.progress", {"steps": steps, "rate": rate, "target_only": target_only})
    backbone.train()
    for step in data.training_steps(name, steps, log, parts, progress):
        for group in groups:
            group["lr"] = vqgan.scheduled_rate(step, steps, rate)
        chosen = torch.randint(len(tokens["train"]), (batch_size,), generator=generator)
        loss = next_token_loss(lab, backbone, tokens["train"][chosen], N if target_only else 0)
        backbone.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
    seconds = log["earlier_seconds"] + time.perf_counter() - began
    return target_loss(lab, backbone.eval(), tokens["val"]), seconds


def next_token_loss(lab: Lab, backbone, sentences: torch.Tensor, last: int) -> torch.Tensor:
    """Cross-entropy on the last `last` tokens (0: on all) of sentences (B, 2K+2, N)."""
    tokens = sentences.flatten(1).long().to(lab.device)  # (B, T)
    with lab.autocast:
        logits = backbone(tokens)[:, -last:]  # (B, last or T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, -last:].flatten())


@torch.no_grad()
def target_loss(lab: Lab, backbone, sentences: torch.Tensor) -> float:
    """Cross-entropy on the last image of held-out sentences."""
    parts = sentences.split(32)
    return sum(next_token_loss(lab, backbone, part, part.shape[2]).item() * len(part) for part in parts) / len(sentences)


def lora(lab: Lab, bench: Bench, seed: int, target_only: bool = False, **changes):
    """LoRA on the frozen backbone: the paper's own baseline. -> the merged backbone, number of adapter weights, ..."""
    config = replace(lab.config["study"], **changes)
    torch.manual_seed(seed)
    backbone = copy.deepcopy(bench.trained.backbone)
    adapters = vsr.add_lora(backbone, config.lora_rank)
    steps, rate = config.lora_steps, config.lora_learning_rate
    optimizers = [torch.optim.AdamW(adapters, betas=(0.9, 0.98), weight_decay=0.0)]
    name = f"lora, rank {config.lora_rank}, rate {rate:g}, {'last image' if target_only else 'whole sentences'}"
    val_loss, seconds = tune_backbone(lab, name, backbone, bench.trained.tokens, optimizers, steps, rate, seed, target_only)
    vsr.merge_lora(backbone)
    return backbone, sum(p.numel() for p in adapters), val_loss, seconds


def run_lora(lab: Lab, seed: int) -> dict:
    """Rank, learning rate and loss of LoRA by validation loss, in a tenth of its steps: how the defaults were chosen."""
    b, steps = bench(lab, seed), max(1, lab.config["study"].lora_steps // 10)
    val_loss = {}
    for rank in (4, 16, 64):
        for rate in (1e-3, 3e-3, 1e-2):
            for target_only in (True, False):
                name = f"rank {rank}, rate {rate:g}, {'last image' if target_only else 'whole sentences'}"
                changes = {"lora_rank": rank, "lora_learning_rate": rate, "lora_steps": steps}
                _, _, val_loss[name], _ = lora(lab, b, seed, target_only, **changes)
    return {"val_loss": val_loss, "before": target_loss(lab, b.trained.backbone, b.trained.tokens["val"])}


def longer_backbone(lab: Lab, bench: Bench, seed: int):
    """Pretraining continued with a new cycle of its schedule, for the time of rollouts and refiner: was it undertrained?"""
    steps, rate = lab.config["study"].longer_steps, lab.config["gpt"].learning_rate
    backbone = copy.deepcopy(bench.trained.backbone).requires_grad_(True)
    optimizers = train_refiner.make_optimizers(backbone, rate)
    tokens = bench.trained.tokens
    val_loss, seconds = tune_backbone(lab, "longer_backbone", backbone, tokens, optimizers, steps, rate, seed, False)
    return backbone.requires_grad_(False), count(backbone), val_loss, seconds


@torch.no_grad()
def generate_all(lab: Lab, backbone, tokens: torch.Tensor, temperature: float = 0.0, generator=None) -> Rollout:
    """Rollouts (S, N) of the last images of sentences (S, 2K+2, N), with states, on the CPU."""
    parts = []
    for part in tokens.split(lab.config["refiner"].rollout_batch):
        prompt = part[:, :-1].flatten(1).long().to(lab.device)
        with lab.autocast:
            rollout = backbone.generate(prompt, part.shape[2], temperature, generator=generator)
        parts.append([x.cpu() for x in rollout])
    return Rollout(*[torch.cat(x) for x in zip(*parts, strict=True)])


@torch.no_grad()
def best_of_n(lab: Lab, bench: Bench, n: int, seed: int) -> torch.Tensor:
    """Of n samples at temperature 1, the one that the backbone itself finds likeliest: tokens (S, N)."""
    backbone, tokens = bench.trained.backbone, bench.test["tokens"]
    generator = torch.Generator().manual_seed(seed)
    best, best_score = None, None
    for _ in range(n):
        rollout = generate_all(lab, backbone, tokens, 1.0, generator)
        logits = backbone.logits(rollout.hidden.to(lab.device)).cpu()  # (S, N, V)
        likelihood = logits.log_softmax(-1).gather(-1, rollout.tokens[..., None])[..., 0].sum(1)  # (S,)
        if best is None:
            best, best_score = rollout.tokens, likelihood
        better = likelihood > best_score
        best, best_score = torch.where(better[:, None], rollout.tokens, best), torch.maximum(likelihood, best_score)
    return best


# --------------------------------------------------------------------------------------------------
# 1. and 2. Every method and every control; the error by position
# --------------------------------------------------------------------------------------------------

CONTROLS = ("best_of_n", "expected_embedding", "lora", "longer_backbone", "no_attention", "shuffled")
MAIN_ROWS = ("vqgan_limit", "teacher_forced", "ar_greedy", "ar_sampled", *CONTROLS,
             "no_attention_tokens", "refined_tokens", "refined_hidden", "refined_context")  # fmt: skip


def run_main(lab: Lab, seed: int) -> dict:
    """All methods of a seed, on the same test sentences."""
    b = bench(lab, seed, vsr.INPUTS)
    trained, tokens = b.trained, b.test["tokens"]
    written = train_refiner.decode_methods(trained.tokenizer, trained.backbone, trained.refiners, tokens, lab.autocast, seed)
    began = time.perf_counter()
    rollouts, targets = states_of(lab, b)
    before = trained.seconds["rollouts"] + time.perf_counter() - began  # what any refiner needs before its first step
    rollout = generate_all(lab, trained.backbone, tokens)
    cost = {}  # {method: {"params", "seconds", "overhead"}}
    for inputs, refiner in trained.refiners.items():
        seconds = before + trained.seconds[f"refiner_{inputs}"]
        cost[f"refined_{inputs}"] = {"params": count(refiner), "seconds": seconds}

    # The same refiner with each position alone; and with the targets of other sentences
    for method, inputs in (("no_attention", "hidden"), ("no_attention_tokens", "tokens")):
        refiner, _, seconds = fit(lab, b, method, rollouts, targets, seed, inputs, attention=False)
        written[method] = refine_all(lab, b, refiner, rollout)
        cost[method] = {"params": count(refiner), "seconds": before + seconds}
    strangers = {split: y.roll(1, 0) for split, y in targets.items()}
    refiner, _, seconds = fit(lab, b, "shuffled", rollouts, strangers, seed)
    written["shuffled"] = refine_all(lab, b, refiner, rollout)
    cost["shuffled"] = {"params": count(refiner), "seconds": before + seconds}
    del rollouts

    # The backbone itself, tuned for as long or sampled more often
    for method, tune in (("lora", lora), ("longer_backbone", longer_backbone)):
        backbone, params, _, seconds = tune(lab, b, seed)
        written[method] = generate_all(lab, backbone, tokens).tokens
        cost[method] = {"params": params, "seconds": seconds}
    written["best_of_n"] = best_of_n(lab, b, lab.config["study"].samples, seed)

    prompt = tokens[:64, :-1].flatten(1).long().to(lab.device)
    with torch.no_grad(), lab.autocast:
        generation = train_refiner.seconds_of(lambda: trained.backbone.generate(prompt, tokens.shape[2]), lab.device)
        part = Rollout(*[x[:64].to(lab.device) for x in rollout])
        for inputs, refiner in trained.refiners.items():
            seconds = train_refiner.seconds_of(
                lambda: vsr.refine(refiner, b.codebook, part.tokens, hidden=part.hidden, context=part.context),  # noqa: B023
                lab.device,
            )
            cost[f"refined_{inputs}"]["overhead"] = seconds / generation
    cost["best_of_n"] = {"params": 0, "seconds": 0.0, "overhead": lab.config["study"].samples - 1.0}
    return {**score(lab, b, written), "cost": cost, "backbone_params": count(trained.backbone)}


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def pooled_difference(cells: list, a: str, b: str, name: str) -> torch.Tensor:
    """Cosine error of method a minus that of method b, of each test sentence of all seeds: (seeds * S,)."""
    parts = []
    for cell in cells:
        difference = torch.tensor(cell["by_sentence"][a]) - torch.tensor(cell["by_sentence"][b])
        task = torch.tensor(cell["task"])
        parts.append(difference if name == "all" else difference[task == TASKS.index(name)])
    return torch.cat(parts)


def show_main(cells: list) -> tuple[str, dict]:
    """The main table; PSNR gained by task; and how much worse than the refiner each control is, with intervals."""
    lines = [
        f"mean (± standard deviation) over {len(cells)} seeds, {len(cells[0]['task'])} test sentences each; costs are medians",
        f"{'':20}{'cosine error':>18}" + "".join(f"{task:>10}" for task in TASKS)
        + f"{'gap closed':>16}{'tokens':>8}{'PSNR':>7}{'SSIM':>7}{'trained':>9}{'seconds':>9}{'overhead':>10}",
    ]  # fmt: skip
    for method in MAIN_ROWS:
        scores = [cell["scores"][method] for cell in cells]
        row = f"{method:20}{mean_sd([s['all']['cosine_error'] for s in scores], 4):>18}"
        row += "".join(f"{statistics.fmean(s[task]['cosine_error'] for s in scores):10.4f}" for task in TASKS)
        gaps = [gap_of(cell, method, "all") for cell in cells]
        row += f"{'' if method in MAIN_ROWS[:4] else mean_sd(gaps):>16}"
        row += f"{statistics.fmean(s['all']['token_accuracy'] for s in scores):8.3f}"
        row += (
            f"{statistics.fmean(s['all']['psnr'] for s in scores):7.2f}{statistics.fmean(s['all']['ssim'] for s in scores):7.3f}"
        )
        costs = [cell["cost"].get(method, {}) for cell in cells]
        if costs[0]:
            row += f"{costs[0]['params'] / 1e6:8.2f}M{statistics.median(c['seconds'] for c in costs):9.0f}"
            overheads = [c["overhead"] for c in costs if "overhead" in c]
            row += f"{statistics.median(overheads):10.1%}" if overheads else ""
        lines.append(row.rstrip())

    lines += ["", f"{'gained over ar_greedy':36}" + "".join(f"{name + ', dB':>27}" for name in ("all", *TASKS))]
    for method in MAIN_ROWS[4:]:
        row = f"{method:36}"
        for name in ("all", *TASKS):
            row += f"{mean_sd([psnr_gain(cell, method, name) for cell in cells], 2):>27}"
        lines.append(row)

    lines += ["", f"{'cosine error, a - b (95 % interval)':36}" + "".join(f"{name:>27}" for name in ("all", *TASKS))]
    intervals = {}
    pairs = [(control, "refined_hidden") for control in ("ar_greedy", *CONTROLS)]
    pairs += [("ar_greedy", "refined_tokens"), ("no_attention_tokens", "refined_tokens"), ("refined_hidden", "refined_context")]
    for a, b in pairs:
        intervals[f"{a} - {b}"] = {}
        row = f"{a + ' - ' + b:36}"
        for name in ("all", *TASKS):
            difference = pooled_difference(cells, a, b, name)
            low, high = interval(difference)
            intervals[f"{a} - {b}"][name] = [difference.mean().item(), low, high]
            row += f"{difference.mean():9.4f} ({low:7.4f}, {high:7.4f})"
        lines.append(row)
    lines.append("")
    shares = {}
    for inputs, control in (("hidden", "no_attention"), ("tokens", "no_attention_tokens")):
        shares[inputs] = [attention_share(cell, f"refined_{inputs}", control) for cell in cells]
        lines.append(f"attention's share of what refined_{inputs} closes: {mean_sd(shares[inputs])}")
    return "\n".join(lines), {"intervals": intervals, "attention_share": shares}


def gap_of(cell: dict, method: str, name: str) -> float:
    """`gap_closed` of a method in a cell."""
    return train_refiner.gap_of(cell["scores"], method, name)


def psnr_gain(cell: dict, method: str, name: str) -> float:
    """By how many dB the images of a method are better than those of greedy decoding, in a cell."""
    return cell["scores"][method][name]["psnr"] - cell["scores"]["ar_greedy"][name]["psnr"]


def attention_share(cell: dict, method: str, control: str) -> float:
    """The part of what a refiner closes that the same refiner without attention does not."""
    full = gap_of(cell, method, "all")
    return (full - gap_of(cell, control, "all")) / full if full else math.nan


def show_positions(cells: list) -> tuple[str, dict]:
    """AUC of each curve of Figure 2, over the raster and over its halves; and the curves, as means over seeds."""
    lines = [f"AUC of the cosine error by position, mean ± standard deviation over {len(cells)} seeds"]
    lines.append(f"{'':20}{'all positions':>16}{'first half':>16}{'second half':>16}")
    means = {}
    for method in POSITION_ROWS:
        curves = torch.tensor([cell["scores"][method]["all"]["cosine_error_by_position"] for cell in cells])  # (seeds, N)
        half = curves.shape[1] // 2
        parts = [part.sum(1).tolist() for part in (curves, curves[:, :half], curves[:, half:])]
        lines.append(f"{method:20}" + "".join(f"{mean_sd(part):>16}" for part in parts))
        means[method] = curves.mean(0).tolist()
    return "\n".join(lines), {"curves": means}


POSITION_ROWS = ("teacher_forced", "ar_greedy", "lora", "refined_tokens", "refined_hidden")


# --------------------------------------------------------------------------------------------------
# 3. Demonstrations (Figure 3)
# --------------------------------------------------------------------------------------------------


def quick_scores(lab: Lab, b: Bench, refiners: dict, seed: int) -> dict:
    """Scores of the backbone and of refiners {name: refiner}, all reading hidden states."""
    trained = b.trained
    written = train_refiner.decode_methods(trained.tokenizer, trained.backbone, {}, b.test["tokens"], lab.autocast, seed)
    rollout = generate_all(lab, trained.backbone, b.test["tokens"])
    for name, refiner in refiners.items():
        written[name] = refine_all(lab, b, refiner, rollout)
    return score(lab, b, written)


def run_demos(lab: Lab, seed: int, num_demos: int) -> dict:
    """Sentences with a palette of their own, which only the demonstrations tell, and K of these."""
    changes = {"data": {"num_demos": num_demos, "palette": "sentence"}}
    b = bench(lab, seed, ("hidden",), f"demos{num_demos}", changes)
    return quick_scores(lab, b, {"refined_hidden": b.trained.refiners["hidden"]}, seed)


# --------------------------------------------------------------------------------------------------
# 4. Backbones
# --------------------------------------------------------------------------------------------------


class LlamaBlock(nn.Module):
    """A block of LLaMA's family: RMSNorm, rotary positions, SwiGLU, no biases (Touvron et al., 2023)."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        inner = 8 * width // 3
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor, turn: torch.Tensor, cache: torch.Tensor | None, start: int) -> torch.Tensor:
        """x: (B, T, C); turn: (T, d/2) complex, by which to rotate queries and keys; cache as in `vsr.Attention`."""
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, d)

        def rotate(y):
            pairs = torch.view_as_complex(y.float().unflatten(-1, (-1, 2)).contiguous())  # (B, H, T, d/2)
            return torch.view_as_real(pairs * turn).flatten(-2).to(v.dtype)

        q, k, length = rotate(q), rotate(k), None
        if cache is not None:
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            if T == 1:
                k, v, length = *cache.unbind(0), start + 1
        y = vsr.attend(q, k, v, causal=T > 1, length=length)  # (B, H, T, d)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(vsr.GPT):
    """`vsr.GPT` with the blocks of LLaMA, rotary instead of learnt positions: the family of LVM."""

    def __init__(self, config: vsr.GPTConfig, codebook_size: int, tokens_per_image: int, num_images: int):
        super().__init__(config, codebook_size, tokens_per_image, num_images)
        del self.place_embedding, self.image_embedding
        self.blocks = nn.ModuleList(LlamaBlock(config.width, config.heads, config.head_width) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.blocks.apply(vsr.init_weights)

    def states(self, inputs: torch.Tensor, cache: torch.Tensor | None = None, start: int = 0) -> torch.Tensor:
        half = self.config.head_width // 2
        rate = 10000 ** (-torch.arange(half, device=inputs.device) / half)  # (d/2,)
        position = torch.arange(start, start + inputs.shape[1], device=inputs.device)  # (T,)
        turn = torch.polar(torch.ones(()).to(rate), position[:, None] * rate)  # (T, d/2)
        x = self.token_embedding(inputs)  # (B, T, C)
        for number, block in enumerate(self.blocks):
            x = block(x, turn, None if cache is None else cache[number], start)
        return self.norm(x)


class Recurrent(nn.Module):
    """A backbone that is no Transformer: a GRU over the sentence. It has what the refiner's users need to have.

    `generate` gives tokens and the states that predicted them, `read` the same for known tokens, `logits` the
    predictions. Nothing else of `vsr.GPT` is used.
    """

    def __init__(self, config: vsr.GPTConfig, codebook_size: int, tokens_per_image: int, num_images: int):
        super().__init__()
        self.config, self.start_token, self.tokens_per_image = config, codebook_size, tokens_per_image
        self.token_embedding = nn.Embedding(codebook_size + 1, config.width)
        self.place_embedding = nn.Embedding(num_images * tokens_per_image, config.width)
        self.blocks = nn.GRU(config.width, config.width, config.layers, batch_first=True)
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, codebook_size, bias=False)

    def states(self, inputs: torch.Tensor, memory: torch.Tensor | None = None, start: int = 0):
        """Inputs (B, T) from position `start` on, and the memory before them -> states (B, T, C), memory after them."""
        place = torch.arange(start, start + inputs.shape[1], device=inputs.device)
        with torch.autocast(inputs.device.type, enabled=False):
            x, memory = self.blocks(self.token_embedding(inputs) + self.place_embedding(place), memory)
            return self.norm(x), memory

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.states(F.pad(tokens[:, :-1], (1, 0), value=self.start_token))[0])

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.float())

    @torch.no_grad()
    def read(self, prompt: torch.Tensor, tokens: torch.Tensor) -> Rollout:
        P, N = prompt.shape[1], tokens.shape[1]
        sentence = torch.cat([prompt, tokens], dim=1)
        states, _ = self.states(F.pad(sentence[:, :-1], (1, 0), value=self.start_token))
        return Rollout(tokens, states[:, P:], states[:, P - N + 1 : P + 1])

    @torch.no_grad()
    def generate(self, prompt, num_tokens, temperature=0.0, top_k=0, top_p=1.0, generator=None) -> Rollout:
        states, memory = self.states(F.pad(prompt, (1, 0), value=self.start_token))
        context, state, tokens, hidden = states[:, -num_tokens:], states[:, -1:], [], []
        for t in range(num_tokens):
            hidden.append(state)
            tokens.append(vsr.sample(self.logits(state[:, 0]), temperature, top_k, top_p, generator))
            if t + 1 < num_tokens:
                state, memory = self.states(tokens[-1][:, None], memory, prompt.shape[1] + 1 + t)
        return Rollout(torch.stack(tokens, dim=1), torch.cat(hidden, dim=1), context)


BACKBONES = {
    "gpt_small": (vsr.GPT, {"layers": 2, "width": 96}),
    "gpt": (vsr.GPT, {}),
    "llama": (Llama, {}),
    "gru": (Recurrent, {"layers": 2, "width": 256}),
}


def run_backbones(lab: Lab, seed: int, backbone: str) -> dict:
    """Another frozen backbone on the seed's tokenizer and sentences; the refiner and its training are the same."""
    make, changes = BACKBONES[backbone]
    b = bench(lab, seed)
    tokens = {"train": b.trained.tokens["train"][: lab.config["study"].rollouts], "val": b.trained.tokens["val"]}
    if backbone == "gpt":
        model, generated = b.trained.backbone, {split: b.trained.generated[split][: len(tokens[split])] for split in tokens}
    else:
        config, sentences = replace(lab.config["gpt"], **changes), b.trained.tokens
        progress = lab.unfinished / "backbone.progress", {"gpt": asdict(config)}
        model, _ = train_refiner.train_backbone(
            *(config, sentences["train"], sentences["val"], len(b.codebook), lab.device, lab.dtype, seed),
            make=make,
            progress=progress,
        )
        batch = lab.config["refiner"].rollout_batch
        generated = {split: train_refiner.make_rollouts(model, part, lab.autocast, batch)[0] for split, part in tokens.items()}
    b = b._replace(trained=b.trained._replace(backbone=model, tokens=tokens, generated=generated))
    rollouts, targets = states_of(lab, b)
    refiner, _, _ = fit(lab, b, "refiner", rollouts, targets, seed)
    result = quick_scores(lab, b, {"refined_hidden": refiner}, seed)
    return {**result, "backbone_params": count(b.trained.backbone), "refiner_params": count(refiner)}


# --------------------------------------------------------------------------------------------------
# 5. to 7. Data and time, size, reading, loss: one cell a seed, all settings on the same rollouts
# --------------------------------------------------------------------------------------------------


def fit_each(lab: Lab, seed: int, settings: dict, cut=None) -> dict:
    """Train one refiner for each of {name: options of `fit`} on a seed's rollouts, and score them all.

    cut: {name: number of rollouts}, for the settings that have fewer.
    """
    b = bench(lab, seed)
    rollouts, targets = states_of(lab, b)
    refiners, cost = {}, {}
    for name, options in settings.items():
        n = (cut or {}).get(name, len(targets["train"]))
        few = {**rollouts, "train": Rollout(*[x[:n] for x in rollouts["train"]])}
        options = {"steps": lab.config["study"].steps, **options}
        refiner, log, seconds = fit(lab, b, name, few, {**targets, "train": targets["train"][:n]}, seed, **options)
        refiners[name] = refiner
        cost[name] = {
            "params": count(refiner),
            "seconds": seconds,
            "train_loss": log["loss"][-1],
            "val_loss": log["val_loss"][-1],
        }
    return {**quick_scores(lab, b, refiners, seed), "cost": cost, "backbone_params": count(b.trained.backbone)}


def run_data(lab: Lab, seed: int) -> dict:
    """Fewer rollouts for the same number of steps; and fewer steps on all rollouts."""
    most, steps = lab.config["refiner"].rollouts, lab.config["study"].steps
    cut = {f"{n} rollouts": n for n in (64, 256, 1024, 4096, 16384) if n <= most}
    settings = {name: {} for name in cut}
    settings |= {f"{steps // part} steps": {"steps": steps // part} for part in (8, 4, 2, 1) if steps >= part}
    return fit_each(lab, seed, settings, cut)


def run_size(lab: Lab, seed: int) -> dict:
    """Depth and width of the refiner."""
    width = lab.config["refiner"].width
    shapes = [(1, width // 2), (2, width // 2), (1, width), (2, width), (3, width), (2, 2 * width)]
    return fit_each(lab, seed, {f"{layers} x {width}": {"layers": layers, "width": width} for layers, width in shapes})


class Anywhere(Refiner):
    """A refiner whose heads start without a place to look at: relative biases are learnt from zero."""

    def __init__(self, *args):
        super().__init__(*args)
        for block in self.blocks:
            nn.init.zeros_(block.attention.relative.table)


class MorePositions(Refiner):
    """A refiner that reads the states over src_q as N more positions, for keys and values only, not at its own ones.

    Their keys have relative biases of their own, and every head starts by looking at its own place among them too.
    """

    def __init__(self, config, inputs, grid, *dims):
        super().__init__(config, inputs, grid, *dims)
        self.relative = nn.ModuleList(vsr.RelativeBias(config.heads, grid) for _ in self.blocks)
        for relative in self.relative:
            nn.init.zeros_(relative.table)
            nn.init.constant_(relative.table[:, relative.place[0, 0]], 5.0)

    def moves(self, embeddings, hidden, context):
        N = embeddings.shape[1]
        place = (self.row_embedding.weight[:, None] + self.column_embedding.weight[None]).flatten(0, 1)  # (N, C)
        x = self.read_code(embeddings) + place + self.read_hidden(hidden.float())  # (B, N, C)
        more = self.read_context(context.float()) + place  # (B, N, C)
        for block, relative in zip(self.blocks, self.relative, strict=True):
            attention, both = block.attention, block.norm1(torch.cat([x, more], dim=1))  # (B, 2N, C)
            q, k, v = attention.qkv(both).view(len(x), 2 * N, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
            bias = torch.cat([attention.relative(), relative()], dim=-1)  # (H, N, 2N)
            read = vsr.attend(q[:, :, :N], k, v, bias=bias)  # (B, H, N, d)
            x = x + block.dropout(attention.out(read.transpose(1, 2).flatten(2)))
            x = x + block.dropout(block.mlp(block.norm2(x)))
        return self.move(self.norm(x)).float()


def run_reading(lab: Lab, seed: int) -> dict:
    """What the refiner reads, with and without attention; states of the query elsewhere; heads without a first place."""
    settings = {}
    for inputs in vsr.INPUTS:
        settings[inputs] = {"inputs": inputs}
        settings[f"{inputs}, no attention"] = {"inputs": inputs, "attention": False}
    settings["context as more positions"] = {"inputs": "context", "make": MorePositions}
    settings["hidden, heads start anywhere"] = {"make": Anywhere}
    return fit_each(lab, seed, settings)


class Absolute(Refiner):
    """A refiner without the residual: it says where an embedding should be, not by how much to move it."""

    def __init__(self, *args):
        super().__init__(*args)
        nn.init.normal_(self.move.weight, std=0.02)

    def forward(self, embeddings, hidden=None, context=None):
        return F.normalize(self.moves(F.normalize(embeddings.float(), dim=-1), hidden, context), dim=-1)


class Unnormalised(Refiner):
    """A refiner whose output keeps its length: for the squared error, which on unit vectors is the cosine loss again."""

    def forward(self, embeddings, hidden=None, context=None):
        embeddings = F.normalize(embeddings.float(), dim=-1)
        return embeddings + self.moves(embeddings, hidden, context)


def run_loss(lab: Lab, seed: int) -> dict:
    """Other losses, and the cosine loss without the residual."""
    codebook = bench(lab, seed).codebook

    def cross_entropy(refined, target):  # the logits are cosines, times 10
        return F.cross_entropy((10 * refined @ codebook.T).flatten(0, 1), vsr.nearest_code(target, codebook).flatten())

    def both(refined, target):
        return vsr.cosine_loss(refined, target) + 0.1 * cross_entropy(refined, target)

    settings = {
        "cosine": {},
        "squared error": {"loss_function": F.mse_loss, "make": Unnormalised},
        "cross-entropy": {"loss_function": cross_entropy},
        "cosine + cross-entropy": {"loss_function": both},
        "cosine, no residual": {"make": Absolute},
    }
    return fit_each(lab, seed, settings)


def run_passes(lab: Lab, seed: int) -> dict:
    """The default refiner over its own output again: the states are read again, on what the pass before has written."""
    b = bench(lab, seed)
    backbone, tokens = b.trained.backbone, b.test["tokens"]
    rollout, refined = generate_all(lab, backbone, tokens), {}
    for number in range(1, 5):
        y = refine_all(lab, b, b.trained.refiners["hidden"], rollout)
        refined[f"pass {number}"] = y
        rollout = train_refiner.read_states(backbone, tokens, y, lab.autocast)
    written = train_refiner.decode_methods(b.trained.tokenizer, backbone, {}, tokens, lab.autocast, seed)
    return score(lab, b, {**written, **refined})


def show_passes(cells: list) -> str:
    names = [f"pass {number}" for number in range(1, 5)]
    lines = [gap_table(cells, names, "after each pass"), "", "dB gained over ar_greedy"]
    for method in names:
        gains = [[psnr_gain(cell, method, name) for cell in cells] for name in ("all", *TASKS)]
        lines.append(f"{method:29}" + "".join(f"{mean_sd(gain, 2):>18}" for gain in gains))
    return "\n".join(lines)


def plot_passes(figure_path, cells: list) -> None:
    figure, axes = new_figure(1, 4.6)
    for name in ("all", *TASKS):
        values = [[gap_of(c, f"pass {number}", name) for c in cells] for number in range(1, 5)]
        axes[0].errorbar(range(1, 5), [statistics.fmean(v) for v in values], [sd(v) for v in values], marker="o", label=name)
    axes[0].set(xlabel="refining passes", ylabel="gap closed", xticks=range(1, 5))
    axes[0].legend(fontsize=8, frameon=False)
    data.write_whole(figure_path, figure.savefig)


# --------------------------------------------------------------------------------------------------
# 8. One wrong token
# --------------------------------------------------------------------------------------------------


def run_probe(lab: Lab, seed: int) -> dict:
    """Force one wrong token at position t of the greedy rollout, let the backbone go on, and refine what it wrote.

    The wrong token is what another sentence has at that place. `damage`[i][s]: by how much the cosine error at
    position s grows if position t_i was forced, in the backbone's image and in the refined one.
    """
    b = bench(lab, seed)
    backbone, refiner = b.trained.backbone, b.trained.refiners["hidden"]
    tokens = b.test["tokens"][: lab.config["study"].probed]
    prompt, y_true = tokens[:, :-1].flatten(1).long(), tokens[:, -1].long()
    N, codebook = y_true.shape[1], b.codebook.cpu()
    greedy = generate_all(lab, backbone, tokens)

    def errors(rollout):
        refined = refine_all(lab, b, refiner, rollout)
        return torch.stack([vsr.cosine_error(y, y_true, codebook) for y in (rollout.tokens, refined)])  # (2, S, N)

    clean, positions, damage = errors(greedy), list(range(4, N - 1, 8)), {"backbone": [], "refined": []}
    for t in positions:
        forced = greedy.tokens.clone()
        strangers = torch.stack([greedy.tokens[:, t].roll(shift) for shift in range(1, len(forced))])  # (S-1, S)
        differs = strangers != greedy.tokens[:, t]
        first = differs.long().argmax(0)  # the nearest sentence that has another token there
        forced[:, t] = strangers.gather(0, first[None])[0]
        wrong = differs.any(0)  # sentences for which there is one
        for rows in torch.arange(len(forced)).split(64):
            start = torch.cat([prompt[rows], forced[rows, : t + 1]], dim=1).to(lab.device)
            with lab.autocast:
                forced[rows, t + 1 :] = backbone.generate(start, N - t - 1).tokens.cpu()
        rollout = train_refiner.read_states(backbone, tokens, forced, lab.autocast)
        more = (errors(rollout) - clean)[:, wrong].mean(1)  # (2, N)
        for name, row in zip(damage, more.tolist(), strict=True):
            damage[name].append([round(e, 5) for e in row])
    return {"positions": positions, "damage": damage}


# --------------------------------------------------------------------------------------------------
# 9. What the refiner has not seen
# --------------------------------------------------------------------------------------------------


def run_generalize(lab: Lab, seed: int) -> dict:
    """Refiners that have not seen one of the tasks, and the default refiner on a dataset that nothing was trained on."""
    b = bench(lab, seed)
    rollouts, targets = states_of(lab, b)
    task = data.joined(data.Sentences(lab.config["data"], seed).batches("train", len(targets["train"])))[1]
    refiners, steps = {}, lab.config["study"].steps
    for name in ("none", *TASKS):
        rows = torch.arange(len(task)) if name == "none" else (task != TASKS.index(name)).nonzero().flatten()
        seen = {**rollouts, "train": Rollout(*[x[rows] for x in rollouts["train"]])}
        name = f"without {name}"
        refiners[name], _, _ = fit(lab, b, name, seen, {**targets, "train": targets["train"][rows]}, seed, steps=steps)
    result = quick_scores(lab, b, refiners, seed)
    other = "glyphs" if lab.config["data"].data == "shapes" else "shapes"
    b = bench(lab, seed, test_data=replace(lab.config["data"], data=other))
    return {**result, "other": quick_scores(lab, b, {"refined_hidden": b.trained.refiners["hidden"]}, seed)}


# --------------------------------------------------------------------------------------------------
# 10. Speed
# --------------------------------------------------------------------------------------------------


def side_by_side(functions: dict, device, rounds: int = 5) -> dict:
    """{name: function} -> {name: seconds of each round}. Every round calls them all, after one round to warm up."""
    seconds = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def training_step(model, loss_function, optimizers: list, clip: bool = True):
    """A step of a training on a batch that lies ready: the model's work, and nothing else of a training loop."""

    def step():
        loss = loss_function()
        model.zero_grad(set_to_none=True)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    return step


def backbone_step(lab: Lab, model, tokens: torch.Tensor, dtype):
    """`training_step` of a backbone on sentences (B, T), with the optimizers of the pretraining."""
    autocast = torch.autocast(lab.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def loss():
        with autocast:
            logits = model(tokens)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    return training_step(model, loss, train_refiner.make_optimizers(model, 1e-4))


def textbook(gpt: vsr.GPT) -> nn.Module:
    """The same backbone written as in a textbook: tests/textbook.py, which the tests hold against `vsr.GPT`."""
    spec = importlib.util.spec_from_file_location("textbook", Path(__file__).parent / "tests" / "textbook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TextbookGPT(gpt).to(gpt.head.weight.device)


def flops_per_token(model: vsr.GPT) -> float:
    """Floating-point operations of a training step for each token, sentences whole: 6 a weight of a matrix product, and
    the products of attention, 12 layers * H * d * T (Chowdhery et al., 2022, appendix B). The causal half counts as done."""
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    config = model.config
    return 6 * weights + 12 * config.layers * config.heads * config.head_width * model.max_tokens


def new_models(lab: Lab, image_size: int, num_demos: int):
    """Untrained models, since speed does not depend on what the weights are. -> tokenizer, backbone, refiner, N, T"""
    config = lab.config
    tokenizer = vqgan.VQGAN(config["vqgan"], image_size).to(lab.device, memory_format=torch.channels_last)
    N, images = tokenizer.tokens_per_image, 2 * num_demos + 2
    backbone = vsr.GPT(config["gpt"], config["vqgan"].codebook_size, N, images).to(lab.device)
    dims = config["vqgan"].code_dim, config["gpt"].width
    refiner = Refiner(config["refiner"], "hidden", tokenizer.grid, *dims).to(lab.device)
    return tokenizer, backbone, refiner, N, images * N


def run_speed(lab: Lab, seed: int) -> dict:
    """How fast every stage is, and against what: all seconds are lists, one entry a round."""
    torch.manual_seed(seed)
    config, device, size, K = lab.config, lab.device, lab.config["data"].image_size, lab.config["data"].num_demos
    tokenizer, backbone, refiner, N, T = new_models(lab, size, K)
    V, B, result = config["vqgan"].codebook_size, config["gpt"].batch_size, {}

    # Training the backbone, against the textbook and against the products of large matrices
    plain, tokens, steps = textbook(backbone), torch.randint(V, (B, T), device=device), {}
    products = 1 if device.type == "cpu" else 100  # on a GPU one of them is over before the next call
    for dtype in dict.fromkeys((torch.float32, lab.dtype)):
        name = str(dtype).removeprefix("torch.")
        large = torch.randn(2048, 2048, device=device, dtype=dtype)
        steps[f"ours, {name}"] = backbone_step(lab, backbone, tokens, dtype)
        steps[f"textbook, {name}"] = backbone_step(lab, plain, tokens, dtype)
        steps[f"product, {name}"] = lambda large=large: [large @ large for _ in range(products)]
    result["training"] = side_by_side(steps, device)
    result["training_flops"], result["product_flops"] = flops_per_token(backbone) * B * T, products * 2 * 2048**3
    result["training_tokens"] = B * T

    # Generation with and without a KV cache, and the refining pass after it. A decoding step has to read all weights and the
    # cache: at the speed of a copy that is the least it can take.
    codebook, block = tokenizer.codebook.vectors.detach(), torch.ones(2**25, device=device)
    other = torch.ones_like(block)
    copying = statistics.median(side_by_side({"copy": lambda: other.copy_(block)}, device)["copy"])  # 128 MiB, twice
    read = {"weights": sum(p.numel() * p.element_size() for p in backbone.parameters())}
    gpt = backbone.config
    read["cache"] = 2 * gpt.layers * T * gpt.heads * gpt.head_width * lab.dtype.itemsize  # of one sentence
    seconds_per_byte = copying / (2 * block.numel() * block.element_size())
    result["reading"] = {name: size * seconds_per_byte for name, size in read.items()}
    result["generation"], result["tokens_per_image"] = {}, N
    for batch in (1, 16, 64, 256):
        sentences = torch.randint(V, (batch, T), device=device)
        with torch.no_grad(), lab.autocast:
            rollout = backbone.read(sentences[:, :-N], sentences[:, -N:])
            result["generation"][str(batch)] = side_by_side(
                {
                    "cached": lambda: backbone.generate(sentences[:, :-N], N),  # noqa: B023
                    "prompt": lambda: backbone.generate(sentences[:, :-N], 1),  # noqa: B023
                    "refined": lambda: vsr.refine(refiner, codebook, rollout.tokens, hidden=rollout.hidden),  # noqa: B023
                },
                device,
                rounds=3,
            )
            result["generation"][str(batch)]["uncached"] = [train_refiner.uncached_seconds(backbone, sentences, N, device)]

    # The tokenizer and the refiner
    images = torch.rand(config["vqgan"].batch_size, 3, size, size, device=device) * 2 - 1
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), lab.autocast:
        codes = tokenizer.encode(images)
        result["tokenizer"] = side_by_side(
            {"encode": lambda: tokenizer.encode(images), "decode": lambda: tokenizer.decode(codes)}, device
        )
    result["tokenizer_images"] = len(images)

    # The loops of the trainings as they are, against their models' work on a batch that lies ready
    result["loops"] = loop_seconds(lab, seed, tokenizer, backbone, refiner, images, tokens)

    # How it grows with the tokens of an image, and with the demonstrations
    result["growth"], batch = [], 4
    for image_size, num_demos in ((size, 1), (2 * size, 1), (4 * size, 1), (size, 2), (size, 3)):
        _, model, g, n, t = new_models(lab, image_size, num_demos)
        sentences = torch.randint(V, (batch, t), device=device)
        step = backbone_step(lab, model, sentences, lab.dtype)
        with torch.no_grad(), lab.autocast:
            rollout = model.read(sentences[:, :-n], sentences[:, -n:])

        def generate(model=model, sentences=sentences, n=n):
            with torch.no_grad(), lab.autocast:
                model.generate(sentences[:, :-n], n)

        def refine(g=g, rollout=rollout):
            with lab.autocast:
                vsr.refine(g, codebook, rollout.tokens, hidden=rollout.hidden)

        seconds = side_by_side({"train": step, "generate": generate, "refine": refine}, device, rounds=3)
        per_sentence = {name: [s / batch for s in values] for name, values in seconds.items()}
        result["growth"].append({"tokens": n, "num_demos": num_demos, "seconds_per_sentence": per_sentence})
    return result


def loop_seconds(lab: Lab, seed: int, tokenizer, backbone, refiner, images, tokens) -> dict:
    """{stage: {"loop", "model": seconds a step in each round}}: a real training loop, and `training_step` alone.

    The loop draws its batches, moves them, logs and shows its bar. It validates on one sentence, and saves nothing.
    """
    config, device, steps = lab.config, lab.device, min(40, lab.config["study"].steps)
    K, N = config["data"].num_demos, tokenizer.tokens_per_image
    sentences, codebook = data.Sentences(config["data"], seed), tokenizer.codebook.vectors.detach()
    train = tokens.view(len(tokens), 2 * K + 2, N).cpu().short()
    hidden = torch.randn(len(train), N, config["gpt"].width).bfloat16()
    rollout, few = Rollout(train[:, -1], hidden, hidden), Rollout(train[:1, -1], hidden[:1], hidden[:1])
    rows = torch.randint(len(train), (config["refiner"].batch_size,))
    y, states, truth = (x[rows].to(device) for x in (rollout.tokens.long(), hidden, train[:, -2].long()))

    def tokenizer_loss():
        with lab.autocast:
            rebuilt, _, _, codebook_loss, commitment_loss = tokenizer(images)
        loss = F.mse_loss(rebuilt, images) + vqgan.gradient_loss(rebuilt, images)
        return loss + 0.1 * (codebook_loss + commitment_loss)

    def refiner_loss():
        with lab.autocast:
            refined = refiner(codebook[y], states)
        return vsr.cosine_loss(refined, codebook[truth])

    bare = {
        "tokenizer": training_step(tokenizer, tokenizer_loss, [torch.optim.AdamW(tokenizer.parameters(), lr=1e-4)], clip=False),
        "backbone": backbone_step(lab, backbone, tokens, lab.dtype),
        "refiner": training_step(refiner, refiner_loss, train_refiner.make_optimizers(refiner, 1e-4)),
    }
    short = {
        name: replace(config[key], steps=steps)
        for name, key in (("tokenizer", "vqgan"), ("backbone", "gpt"), ("refiner", "refiner"))
    }
    run = (device, lab.dtype, seed)
    whole = {
        "tokenizer": lambda: vqgan.train_tokenizer(short["tokenizer"], sentences, *run),
        "backbone": lambda: train_refiner.train_backbone(short["backbone"], train, train[:1], len(codebook), *run),
        "refiner": lambda: train_refiner.train_refiner(
            *(short["refiner"], "hidden", codebook, tokenizer.grid, {"train": rollout, "val": few}),
            *({"train": train[:, -2], "val": train[:1, -2]}, *run),
        ),
    }
    result = {}
    for name, loop in whole.items():

        def model(name=name):
            for _ in range(steps):
                bare[name]()

        seconds = side_by_side({"loop": loop, "model": model}, device, rounds=3)
        result[name] = {key: [s / steps for s in values] for key, values in seconds.items()}
    return result


# --------------------------------------------------------------------------------------------------
# Tables and pictures
# --------------------------------------------------------------------------------------------------


def gap_table(cells: list, methods, title: str) -> str:
    """Gap closed by each method, over all and by task, mean ± standard deviation over the cells."""
    lines = [f"gap closed, {title}, mean ± sd over {len(cells)} seeds", f"{'':29}" + "".join(f"{n:>18}" for n in ("all", *TASKS))]
    for method in methods:
        row = "".join(f"{mean_sd([gap_of(cell, method, name) for cell in cells]):>18}" for name in ("all", *TASKS))
        lines.append(f"{method:29}{row}")
    return "\n".join(lines)


def by_setting(cells: list, field: str) -> dict:
    """Cells of a study with settings, grouped: {setting: [cell of each seed]}."""
    grouped = {}
    for cell in cells:
        grouped.setdefault(cell["cell"][field], []).append(cell)
    return grouped


def new_figure(panels: int, width: float = 3.4, height: float = 3.4):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained", dpi=120)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def bars(axis, names, values, colours=None) -> None:
    """Horizontal bars: the mean over seeds, a whisker of one standard deviation, the seeds as dots."""
    means = [statistics.fmean(v) for v in values]
    spread = [sd(v) for v in values]
    place = list(range(len(names)))[::-1]
    axis.barh(place, means, xerr=spread, color=colours or "#66a5e0", height=0.7, ecolor="#444444", error_kw={"linewidth": 1})
    for y, v in zip(place, values, strict=True):
        axis.plot(v, [y] * len(v), ".", color="#222222", markersize=3)
    axis.set_yticks(place, names, fontsize=8)


def plot_main(figure_path, cells: list) -> None:
    rows = [method for method in MAIN_ROWS if method != "vqgan_limit"]
    figure, axes = new_figure(4, 3.6, 4.2)
    colours = [train_refiner.COLOURS.get(method, "#b8b8b8") for method in rows]
    for axis, name in zip(axes, ("all", *TASKS), strict=True):
        values = [[c["scores"][method][name]["cosine_error"] for c in cells] for method in rows]
        bars(axis, rows if axis is axes[0] else [""] * len(rows), values, colours)
        axis.axvline(statistics.fmean(values[0]), color=colours[0], linewidth=0.8, linestyle=":")
        axis.set(title=name, xlabel="cosine error")
        largest = max(statistics.fmean(v) for m, v in zip(rows, values, strict=True) if m != "shuffled")
        axis.set_xlim(0, 1.25 * largest)  # `shuffled` runs off the picture
    data.write_whole(figure_path, figure.savefig)


def plot_positions(figure_path, cells: list) -> None:
    figure, axes = new_figure(4)
    for axis, name in zip(axes, ("all", *TASKS), strict=True):
        for method in POSITION_ROWS:
            curves = torch.tensor([c["scores"][method][name]["cosine_error_by_position"] for c in cells])  # (seeds, N)
            smooth = F.avg_pool1d(F.pad(curves[:, None], (3, 3), mode="replicate"), 7, 1)[:, 0]
            mean, spread = smooth.mean(0), smooth.std(0) if len(cells) > 1 else 0 * smooth[0]
            colour = train_refiner.COLOURS.get(method, "#9b5de5")
            axis.plot(mean, color=colour, label=f"{method}  AUC {curves.sum(1).mean():.2f}")
            axis.fill_between(range(len(mean)), mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        axis.set(title=name, xlabel="token position t (raster order)", ylim=(0, 1.4 * axis.get_ylim()[1]))  # room for the legend
        axis.legend(fontsize=6.5, edgecolor="none", framealpha=0.85)
    axes[0].set_ylabel(f"cosine error, mean ± sd of {len(cells)} seeds")
    data.write_whole(figure_path, figure.savefig)


def show_lora(cells: list) -> str:
    """Validation loss on the last image after a tenth of the steps, by setting, the best first."""
    losses = {name: [c["val_loss"][name] for c in cells] for name in cells[0]["val_loss"]}
    lines = [f"{'before':44}{mean_sd([c['before'] for c in cells])}"]
    lines += [
        f"{name:44}{mean_sd(values)}" for name, values in sorted(losses.items(), key=lambda item: statistics.fmean(item[1]))
    ]
    return "\n".join(lines)


def plot_lora(figure_path, cells: list) -> None:
    figure, axes = new_figure(1, 6.5, 4.5)
    names = list(cells[0]["val_loss"])
    bars(axes[0], names, [[c["val_loss"][name] for c in cells] for name in names])
    axes[0].axvline(statistics.fmean(c["before"] for c in cells), color="#d1495b", linewidth=1, label="before")
    axes[0].set_xlabel("validation cross-entropy on the last image")
    axes[0].legend(fontsize=8, frameon=False)
    data.write_whole(figure_path, figure.savefig)


def show_demos(cells: list) -> str:
    lines = ["cosine error, mean ± sd over seeds; sentences with a palette of their own"]
    for K, group in sorted(by_setting(cells, "num_demos").items()):
        for method in ("teacher_forced", "ar_greedy", "refined_hidden"):
            errors = [[c["scores"][method][name]["cosine_error"] for c in group] for name in ("all", *TASKS)]
            row = "".join(f"{mean_sd(e, 4):>18}" for e in errors)
            gap = mean_sd([gap_of(c, method, "all") for c in group]) if method == "refined_hidden" else ""
            lines.append(f"K = {K}  {method:18}{row}{gap:>18}")
    lines.insert(1, f"{'':25}" + "".join(f"{n:>18}" for n in ("all", *TASKS)) + f"{'gap closed':>18}")
    return "\n".join(lines)


def plot_demos(figure_path, cells: list) -> None:
    groups = dict(sorted(by_setting(cells, "num_demos").items()))
    figure, axes = new_figure(4)
    for axis, name in zip(axes, ("all", *TASKS), strict=True):
        for method in ("ar_greedy", "refined_hidden", "teacher_forced"):
            values = [[c["scores"][method][name]["cosine_error"] for c in group] for group in groups.values()]
            spread = [sd(v) for v in values]
            means, colour = [statistics.fmean(v) for v in values], train_refiner.COLOURS[method]
            axis.errorbar(list(groups), means, spread, color=colour, marker="o", capsize=3, label=method)
        axis.set(title=name, xlabel="K, demonstration pairs", xticks=list(groups), ylim=(0, None))
    axes[0].set_ylabel("cosine error")
    axes[0].legend(fontsize=8, frameon=False)
    data.write_whole(figure_path, figure.savefig)


def show_backbones(cells: list) -> str:
    lines = [f"{'':12}{'backbone':>12}{'refiner':>10}{'teacher-forced':>18}{'greedy':>18}{'refined':>18}{'gap closed':>18}"]
    for name, group in by_setting(cells, "backbone").items():
        row = f"{name:12}{group[0]['backbone_params'] / 1e6:11.2f}M{group[0]['refiner_params'] / 1e6:9.2f}M"
        for method in ("teacher_forced", "ar_greedy", "refined_hidden"):
            row += f"{mean_sd([c['scores'][method]['all']['cosine_error'] for c in group], 4):>18}"
        lines.append(row + f"{mean_sd([gap_of(c, 'refined_hidden', 'all') for c in group]):>18}")
    return "\n".join(lines)


def plot_backbones(figure_path, cells: list) -> None:
    groups = by_setting(cells, "backbone")
    figure, axes = new_figure(2, 5.0)
    methods = ("teacher_forced", "ar_greedy", "refined_hidden")
    names = [f"{name}: {method}" for name in groups for method in methods]
    values = [[c["scores"][m]["all"]["cosine_error"] for c in group] for group in groups.values() for m in methods]
    bars(axes[0], names, values, [train_refiner.COLOURS[m] for _ in groups for m in methods])
    axes[0].set_xlabel("cosine error")
    bars(axes[1], list(groups), [[gap_of(c, "refined_hidden", "all") for c in group] for group in groups.values()])
    axes[1].set_xlabel("gap closed")
    data.write_whole(figure_path, figure.savefig)


def show_settings(cells: list) -> str:
    """Gap closed, parameters, seconds and losses of the settings of `data`, `size`, `reading` and `loss`.

    Seconds are medians over the seeds: a machine that had other work during one seed does not spoil them.
    """
    cost = cells[0]["cost"]
    text = gap_table(cells, list(cost), "by setting")
    lines = ["", f"{'':29}{'parameters':>12}{'of backbone':>12}{'seconds':>9}{'train loss':>12}{'val loss':>10}"]
    for name, first in cost.items():
        share = first["params"] / cells[0]["backbone_params"]
        row = f"{name:29}{first['params']:12,}{share:12.0%}"
        costs = {value: [c["cost"][name][value] for c in cells] for value in ("seconds", "train_loss", "val_loss")}
        row += f"{statistics.median(costs['seconds']):9.0f}"
        row += f"{statistics.fmean(costs['train_loss']):12.4f}{statistics.fmean(costs['val_loss']):10.4f}"
        lines.append(row)
    return text + "\n" + "\n".join(lines)


def plot_curve(axis, x: list, values: list) -> None:
    axis.errorbar(
        x,
        [statistics.fmean(v) for v in values],
        [sd(v) for v in values],
        color=train_refiner.COLOURS["refined_hidden"],
        marker="o",
        capsize=3,
    )
    axis.axhline(0, color="#888888", linewidth=0.6)
    axis.set_ylabel("gap closed")


def plot_data(figure_path, cells: list) -> None:
    figure, axes = new_figure(2, 4.2)
    for axis, kind in zip(axes, ("rollouts", "steps"), strict=True):
        names = [name for name in cells[0]["cost"] if name.endswith(kind)]
        values = [[gap_of(c, name, "all") for c in cells] for name in names]
        if kind == "rollouts":
            axis.set_xscale("log")
            plot_curve(axis, [int(name.split()[0]) for name in names], values)
            axis.set(xlabel="rollouts to train on (the same number of steps)")
        else:
            plot_curve(axis, [statistics.median(c["cost"][name]["seconds"] for c in cells) for name in names], values)
            axis.set_xlabel("seconds of training, all rollouts")
    data.write_whole(figure_path, figure.savefig)


def plot_size(figure_path, cells: list) -> None:
    figure, axes = new_figure(1, 5.0)
    axes[0].set_xscale("log")
    for name, cost in cells[0]["cost"].items():
        values = [gap_of(c, name, "all") for c in cells]
        plot_curve(axes[0], [cost["params"] / cells[0]["backbone_params"]], [values])
        point = (cost["params"] / cells[0]["backbone_params"], statistics.fmean(values))
        axes[0].annotate(f"{name}", point, xytext=(6, -10), textcoords="offset points", fontsize=8)
    axes[0].set(xlabel="refiner's parameters / backbone's (layers x width)")
    data.write_whole(figure_path, figure.savefig)


def plot_bars(figure_path, cells: list) -> None:
    figure, axes = new_figure(1, 6.0, 2.6)
    names = list(cells[0]["cost"])
    bars(axes[0], names, [[gap_of(c, name, "all") for c in cells] for name in names])
    axes[0].set_xlabel("gap closed")
    data.write_whole(figure_path, figure.savefig)


def damage_after(cell: dict, name: str) -> tuple[list, list]:
    """Summed damage after each probed position, and the mean damage by the distance from it (None where unseen)."""
    rows = [row[t + 1 :] for t, row in zip(cell["positions"], cell["damage"][name], strict=True)]
    longest = max(len(row) for row in rows)
    by_distance = [statistics.fmean(row[i] for row in rows if i < len(row)) for i in range(longest)]
    return [sum(row) for row in rows], by_distance


def show_probe(cells: list) -> str:
    lines = [f"summed growth of the cosine error after one wrong token at t, mean ± sd over {len(cells)} seeds"]
    lines.append(f"{'t':>6}{'backbone':>18}{'refined':>18}{'taken back':>12}")
    sums = {name: [damage_after(c, name)[0] for c in cells] for name in ("backbone", "refined")}
    for i, t in enumerate(cells[0]["positions"]):
        before, after = ([seed[i] for seed in sums[name]] for name in ("backbone", "refined"))
        share = 1 - statistics.fmean(after) / statistics.fmean(before) if statistics.fmean(before) else float("nan")
        lines.append(f"{t:6}{mean_sd(before):>18}{mean_sd(after):>18}{share:12.0%}")
    at = {
        name: [statistics.fmean(row[t] for t, row in zip(c["positions"], c["damage"][name], strict=True)) for c in cells]
        for name in sums
    }
    lines.append(f"at t itself: backbone {mean_sd(at['backbone'])}, refined {mean_sd(at['refined'])}")
    return "\n".join(lines)


def plot_probe(figure_path, cells: list) -> None:
    figure, axes = new_figure(2, 4.6)
    for name, method in (("backbone", "ar_greedy"), ("refined", "refined_hidden")):
        colour, both = train_refiner.COLOURS[method], [damage_after(c, name) for c in cells]
        axes[0].plot(
            cells[0]["positions"],
            [statistics.fmean(v) for v in zip(*(b[0] for b in both), strict=True)],
            "o-",
            color=colour,
            label=name,
        )
        by_distance = [statistics.fmean(v) for v in zip(*(b[1] for b in both), strict=True)]
        axes[1].plot(range(1, len(by_distance) + 1), by_distance, color=colour, label=name)
    axes[0].set(xlabel="position t of the wrong token", ylabel="growth of the error, summed", ylim=(0, None))
    axes[1].set(xlabel="tokens after the wrong one", ylabel="growth of the error")
    axes[0].legend(fontsize=8, frameon=False)
    data.write_whole(figure_path, figure.savefig)


def show_generalize(cells: list) -> str:
    text = gap_table(cells, ["without none", *(f"without {task}" for task in TASKS)], "refiner trained without a task")
    other = [c["other"] for c in cells]
    text += "\n\n" + gap_table(other, ["expected_embedding", "refined_hidden"], "on a dataset that no model was trained on")
    for method in ("teacher_forced", "ar_greedy", "refined_hidden"):
        text += f"\n{method:20} cosine error {mean_sd([c['scores'][method]['all']['cosine_error'] for c in other], 4)}"
    return text


def plot_generalize(figure_path, cells: list) -> None:
    figure, axes = new_figure(2, 4.6)
    names, values = [], []
    for task in TASKS:
        for name, method in (("backbone", "ar_greedy"), ("trained with it", "without none"), ("without it", f"without {task}")):
            names.append(f"{task}: {name}")
            values.append([c["scores"][method][task]["cosine_error"] for c in cells])
    bars(axes[0], names, values, ["#d1495b", "#1d4e9e", "#66a5e0"] * len(TASKS))
    axes[0].set(xlabel="cosine error", title="a task that the refiner has not seen")
    methods = ("teacher_forced", "ar_greedy", "refined_hidden")
    values = [[c["other"]["scores"][m]["all"]["cosine_error"] for c in cells] for m in methods]
    bars(axes[1], methods, values, [train_refiner.COLOURS[m] for m in methods])
    axes[1].set(xlabel="cosine error", title="a dataset that no model has seen")
    data.write_whole(figure_path, figure.savefig)


def rounds(cells: list, *keys) -> list:
    """The seconds of all rounds of all cells at a place in their results."""
    values = []
    for cell in cells:
        for key in keys:
            cell = cell[key]
        values += cell
    return values


def ratio(above: list, below: list) -> str:
    """`1.23 (1.20 to 1.31)`: median and range of the ratios of two lists of seconds, round by round."""
    values = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def show_speed(cells: list) -> str:
    first, median = cells[0], statistics.median
    lines = ["training the backbone, steps with optimizers; medians, and ranges over rounds that alternate"]
    lines.append(f"{'':24}{'tokens/s':>12}{'of the product of 2048 x 2048':>32}{'against the textbook':>26}")
    for name in first["training"]:
        kind, dtype = name.split(", ")
        if kind != "product":
            seconds = rounds(cells, "training", name)
            product = rounds(cells, "training", f"product, {dtype}")
            reached = (
                first["training_flops"] / first["product_flops"] * median(p / t for p, t in zip(product, seconds, strict=True))
            )
            row = f"{name:24}{first['training_tokens'] / median(seconds):12,.0f}{reached:32.0%}"
            lines.append(row + f"{ratio(rounds(cells, 'training', f'textbook, {dtype}'), seconds):>26}")

    N = first["tokens_per_image"]
    reading = {name: median(cell["reading"][name] for cell in cells) for name in first["reading"]}
    lines += ["", "generation", f"{'batch':>8}{'tokens/s':>12}{'without a cache':>17}{'ratio':>8}"]
    lines[-1] += f"{'a decoding step':>17}{'reading weights and cache':>27}{'refining pass':>24}"
    for batch in first["generation"]:
        cached, prompt, uncached, refined = (
            rounds(cells, "generation", batch, name) for name in ("cached", "prompt", "uncached", "refined")
        )
        step = (median(cached) - median(prompt)) / max(1, N - 1)
        row = f"{batch:>8}{int(batch) * N / median(cached):12,.0f}{int(batch) * N / median(uncached):17,.0f}"
        row += f"{median(uncached) / median(cached):8.1f}{1e3 * step:14.2f} ms"
        row += f"{1e3 * (reading['weights'] + int(batch) * reading['cache']):24.2f} ms"
        shares = [a / b for a, b in zip(refined, cached, strict=True)]
        lines.append(f"{row}{median(shares):9.1%} ({min(shares):.1%} to {max(shares):.1%})")

    images = {name: first["tokenizer_images"] / median(rounds(cells, "tokenizer", name)) for name in ("encode", "decode")}
    lines += ["", f"tokenizer: {images['encode']:,.0f} images/s encoded, {images['decode']:,.0f} images/s decoded"]
    refined = median(rounds(cells, "generation", "64", "refined"))
    lines.append(f"refiner:   {64 / refined:,.0f} images/s at batch 64")

    lines += ["", f"{'training loop':16}{'ms a step':>12}{'the model alone':>17}{'loop / model':>26}"]
    for name, parts in first["loops"].items():
        loop, model = (rounds(cells, "loops", name, part) for part in parts)
        lines.append(f"{name:16}{1e3 * median(loop):12.1f}{1e3 * median(model):17.1f}{ratio(loop, model):>26}")

    lines += ["", "ms per sentence at batch 4: to train on it, to generate its last image, to refine that"]
    lines.append(f"{'':14}{'K':>4}" + "".join(f"{name:>12}" for name in ("train", "generate", "refine")))
    for i, row in enumerate(first["growth"]):
        times = [1e3 * median(rounds(cells, "growth", i, "seconds_per_sentence", name)) for name in row["seconds_per_sentence"]]
        lines.append(f"{'N = ' + str(row['tokens']):>14}{row['num_demos']:4}" + "".join(f"{t:12.2f}" for t in times))
    return "\n".join(lines)


def plot_speed(figure_path, cells: list) -> None:
    figure, axes = new_figure(4, 3.6, 3.6)
    first, median, colours = cells[0], statistics.median, ("#8d99ae", "#d1495b", "#1d4e9e")
    names = [name for name in first["training"] if not name.startswith("product")]
    speeds = [[first["training_tokens"] / s for s in rounds(cells, "training", name)] for name in names]
    bars(axes[0], names, speeds, ["#66a5e0" if name.startswith("ours") else "#b8b8b8" for name in names])
    axes[0].set(xlabel="tokens/s", title="training the backbone")

    batches = [int(batch) for batch in first["generation"]]
    for name, colour in (("uncached", "#8d99ae"), ("cached", "#d1495b"), ("refined", "#1d4e9e")):
        times = [1e3 * median(rounds(cells, "generation", str(b), name)) / b for b in batches]
        label = {"uncached": "generate, no cache", "cached": "generate", "refined": "refine"}[name]
        axes[1].loglog(batches, times, "o-", color=colour, label=label)
    axes[1].set(xlabel="batch", ylabel="ms per image", title="by batch", xticks=batches, xticklabels=batches)

    for axis, key, title in ((axes[2], "tokens", "by tokens of an image"), (axes[3], "num_demos", "by demonstrations")):
        other, value = ("num_demos", 1) if key == "tokens" else ("tokens", first["tokens_per_image"])
        chosen = [i for i, row in enumerate(first["growth"]) if row[other] == value]
        x = [first["growth"][i][key] for i in chosen]
        for name, colour in zip(("train", "generate", "refine"), colours, strict=True):
            times = [1e3 * median(rounds(cells, "growth", i, "seconds_per_sentence", name)) for i in chosen]
            axis.loglog(x, times, "o-", color=colour, label=name)
        axis.set(xlabel={"tokens": "N", "num_demos": "K"}[key], ylabel="ms per sentence", title=title, xticks=x, xticklabels=x)
    for axis in axes[1:]:
        axis.minorticks_off()
        axis.margins(y=0.25)
        axis.legend(fontsize=7, frameon=False)
    data.write_whole(figure_path, figure.savefig)


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """How to run a study and how to show it."""

    run: object  # (lab, seed, **setting) -> dict
    settings: list  # of dictionaries: a cell for each, for each seed
    show: object  # cells -> text, or (text, more to keep in the JSON)
    plot: object  # (path, cells)
    minutes: float  # of a cell on 2 CPU cores, about: for the time left


STUDIES = {
    "main": Study(run_main, [{}], show_main, plot_main, 25),
    "positions": Study(run_main, [{}], show_positions, plot_positions, 0),
    "lora": Study(run_lora, [{}], show_lora, plot_lora, 8),
    "demos": Study(run_demos, [{"num_demos": K} for K in (1, 2, 3)], show_demos, plot_demos, 14),
    "backbones": Study(run_backbones, [{"backbone": name} for name in BACKBONES], show_backbones, plot_backbones, 6),
    "data": Study(run_data, [{}], show_settings, plot_data, 9),
    "size": Study(run_size, [{}], show_settings, plot_size, 8),
    "reading": Study(run_reading, [{}], show_settings, plot_bars, 8),
    "passes": Study(run_passes, [{}], show_passes, plot_passes, 1),
    "loss": Study(run_loss, [{}], show_settings, plot_bars, 7),
    "probe": Study(run_probe, [{}], show_probe, plot_probe, 1),
    "generalize": Study(run_generalize, [{}], show_generalize, plot_generalize, 6),
    "speed": Study(run_speed, [{}], show_speed, plot_speed, 5),
}
SMOKE = {
    "lora_rank": 2, "lora_steps": 4, "longer_steps": 4, "samples": 2, "steps": 8, "rollouts": 64, "probed": 16,
}  # fmt: skip


def rounded(value):
    """Floats with 6 digits after the point, small ones with 6 in all, in nested lists and dictionaries: the files stay small."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < 0.1 else round(value, 6)
    return value


def read_cells(path: Path, config: dict) -> list:
    """The finished cells in a result file. Raises UserError if they were made with another configuration."""
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text())
        made_with, cells = content["config"], content["cells"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(f"{path}: not a result of study.py; move it away or give another --out") from None
    difference = data.first_difference(made_with, config)
    if difference:
        raise UserError(f"{path} was made with {difference}: give another --out, or move the file away to start again")
    return cells


def main():
    parser = data.Parser(description="The evidence: controls, the paper's figures and tables on the toy.")
    parser.add_argument("studies", nargs="+", choices=["all", *STUDIES], metavar="STUDY", help=f"all, {', '.join(STUDIES)}")
    parser.add_argument("--preset", choices=("smoke", "toy"), default="toy", help="sizes of everything (default: toy)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. n-1 (default: 5)")
    parser.add_argument("--out", default="results", help="folder for tables and pictures (default: results)")
    parser.add_argument("--work", default="runs/study", help="folder for the models (default: runs/study)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 (default: auto)")
    classes = {**train_refiner.CONFIGS, "study": StudyConfig}
    for name, config_class in classes.items():
        parser.add_config(config_class, "" if name == "data" else f"{name}_")
    args = parser.parse_args()
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: expected at least 1")
    preset = {**train_refiner.PRESETS["smoke"], "study": SMOKE} if args.preset == "smoke" else {}
    config = train_refiner.configs_from_flags(args, classes, preset)
    data.check_one_process()
    device = data.pick_device(args.device)
    dtype = data.pick_dtype(args.dtype, device)
    lab = Lab(config, Path(args.work), Path(args.work), device, dtype)
    out = Path(args.out)
    data.check_writable(out)
    data.check_writable(args.work, "--work")
    made_with = {"dtype": str(dtype).removeprefix("torch."), **{name: asdict(part) for name, part in config.items()}}

    machine = {"device": str(device), "threads": torch.get_num_threads()}  # speed depends on it

    def config_of(name: str) -> dict:
        return {**made_with, "machine": machine} if name == "speed" else made_with

    chosen = list(STUDIES) if "all" in args.studies else [name for name in STUDIES if name in args.studies]
    todo = []
    for name in chosen:
        kept = [cell["cell"] for cell in read_cells(out / f"{source(name)}.json", config_of(name))]
        cells = [{"seed": seed, **setting} for seed in range(args.seeds) for setting in STUDIES[name].settings]
        todo += [(name, cell) for cell in cells if cell not in kept and name != "positions"]
        if name == "positions" and "main" not in chosen and not kept:
            raise UserError("positions: reads what `python study.py main` has measured; run that first")
    bar = tqdm(total=sum(STUDIES[name].minutes for name, _ in todo), unit="min", desc="study", bar_format=BAR)
    for name, cell in todo:
        bar.set_postfix_str(f"{name} {cell}", refresh=True)
        lab = lab._replace(unfinished=lab.work / "-".join(["unfinished", name, *map(str, cell.values())]))
        with contextlib.redirect_stdout(io.StringIO()):  # which stages are reused
            result = STUDIES[name].run(lab, **cell)
        cells = [kept for kept in read_cells(out / f"{name}.json", config_of(name)) if kept["cell"] != cell]
        save(out, name, config_of(name), [*cells, {"cell": cell, **rounded(result)}])
        shutil.rmtree(lab.unfinished, ignore_errors=True)
        bar.update(STUDIES[name].minutes)
    bar.close()
    for name in chosen:
        cells = read_cells(out / f"{source(name)}.json", config_of(name))
        shown = STUDIES[name].show(cells)
        text, more = shown if isinstance(shown, tuple) else (shown, {})
        STUDIES[name].plot(out / f"{name}.png", cells)
        save(out, name, config_of(name), [] if name == "positions" else cells, table=text.splitlines(), **rounded(more))
        print(f"\n{name}\n\n{text}\n\nwrote {out / f'{name}.json'} and .png")


BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def source(name: str) -> str:
    """The study whose cells a study shows: `positions` reads those of `main`."""
    return "main" if name == "positions" else name


def save(out: Path, name: str, config: dict, cells: list, **more) -> None:
    cells = sorted(cells, key=lambda cell: json.dumps(cell["cell"]))
    content = {"study": name, "config": config, **more, "cells": cells}
    data.write_whole(out / f"{name}.json", lambda path: path.write_text(json.dumps(content) + "\n"))


if __name__ == "__main__":
    data.run_command(main, "Finished cells and saved steps are kept; the same command goes on from there")
