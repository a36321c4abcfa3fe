"""Does it survive a good backbone? What is left to repair when the backbone has been trained for long.

The backbones of the toy see each sentence about twice. Here every step has sentences that nobody has had
before, for 700, 2,800 and 11,200 steps of 16, and refiners learn from rollouts on further sentences. Rivals
spend what the refiner costs, in operations, on the backbone itself: further pretraining, a wider backbone,
and tuning (LoRA, or all weights) on its own rollouts as prefix with the true targets. Stated before it was
run:

    for refinement      at every maturity it leaves less error than greedy decoding and than the rivals, and
                        removes exposure error, not only error that is made on the true prefix too
    against it          its gain vanishes with the backbone's training, or a rival at the same cost does as
                        well: then it repairs undertraining
"""

import copy
import time
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F

import data
import evaluate
import runtime
import train_refiner
import vsr
from evaluate import method_name
from studies import report
from studies.decoding import TEMPERATURES, consensus, likeliest, samples_of
from studies.lora import add_lora, merge_lora
from studies.report import estimate, values_of
from studies.runner import READS, Setup, count, fit, generate_all, models_of, score_refiners
from studies.stages import flops_per_token
from vsr import GPT, Rollout

MINUTES = 70
SETTINGS = [{"steps": steps} for steps in (700, 2800, 11200)]

BATCH = 16  # half of the default: what can be trained to its plateau within hours
RATES = (1.0, 0.3, 0.1)  # of the pretraining's peak, for what is tuned further; the best on validation
READINGS = {method_name(reading): tuple(reading.split("+")) for reading in train_refiner.READINGS}
TUNED = ("pretrained further", "LoRA, own rollouts", "all weights, own rollouts")
SAMPLED = ("likeliest of n", "consensus of n")
METHODS = (*READINGS, *TUNED, "wider backbone", *SAMPLED)


class Fresh:
    """Sentences without end, for `train_refiner.train_backbone`: whatever rows are asked for are new ones."""

    def __init__(self, setup: Setup, models, sentences, first: int = 0):
        self.setup, self.tokenizer = setup, models.trained.tokenizer
        self.sentences, self.first = sentences, first
        self.shape = (2**40, *models.test["tokens"].shape[1:])  # (rows, 2K+2, N)

    def __len__(self) -> int:
        return self.shape[0]

    @torch.no_grad()
    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        images, _ = self.sentences("train", 2**41 + self.first + int(rows[0]), len(rows))
        with self.setup.autocast:
            tokens = self.tokenizer.encode(images.flatten(0, 1).to(self.setup.device))
        return tokens.view(len(rows), *self.shape[1:]).cpu()


def whole_loss(setup: Setup, backbone: GPT, tokens: torch.Tensor, written=None) -> torch.Tensor:
    """Next-token cross-entropy on whole sentences (B, 2K+2, N), as in pretraining."""
    tokens = tokens.flatten(1).long().to(setup.device)
    with setup.autocast:
        logits = backbone(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def own_prefix_loss(setup: Setup, backbone: GPT, tokens: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the true last image (B, N), behind what the backbone wrote before each position."""
    tokens, y = tokens.long().to(setup.device), written.long().to(setup.device)
    prompt = tokens[:, :-1].flatten(1)  # (B, P)
    inputs = F.pad(torch.cat([prompt, y[:, :-1]], dim=1), (1, 0), value=backbone.start_token)
    with setup.autocast:
        logits = backbone.head(backbone.hidden(inputs)[:, prompt.shape[1] :])  # (B, N, V)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, -1].flatten())


def tuned(setup: Setup, kind: str, backbone: GPT, steps: int, rate: float, batch_of, seed: int):
    """A copy of the backbone that was tuned for some steps of one cycle -> (backbone, trained parameters)."""
    torch.manual_seed(seed)
    backbone, peak = copy.deepcopy(backbone).requires_grad_(True), setup.config["gpt"].learning_rate * rate
    if kind.startswith("LoRA"):
        adapters = add_lora(backbone, setup.config["study"].lora_rank)
        optimizers = [torch.optim.AdamW(adapters, betas=(0.9, 0.98), weight_decay=0.0)]
    else:
        adapters, optimizers = [], train_refiner.make_optimizers(backbone, peak, setup.dtype)
    loss_of = whole_loss if kind == TUNED[0] else own_prefix_loss
    generator, name = torch.Generator().manual_seed(seed), f"{kind}, rate {rate}"
    parts = {"model": backbone, "generator": generator}
    parts |= {f"optimizer {number}": optimizer for number, optimizer in enumerate(optimizers)}
    progress = setup.progress(name, {"steps": steps, "rate": rate})
    for step in runtime.training_steps(name, steps, {}, parts, progress):
        loss = loss_of(setup, backbone.train(), *batch_of(generator))
        train_refiner.optimizer_step(
            loss, backbone, optimizers, train_refiner.scheduled_rate(step, steps, peak)
        )
    merge_lora(backbone)
    return backbone.eval(), sum(p.numel() for p in adapters) or count(backbone)


def pretrained(setup: Setup, name: str, config, fresh: Fresh, val: torch.Tensor, V: int, seed: int):
    """A backbone after `config.steps` steps on fresh sentences -> (frozen backbone, log)."""
    run = (setup.device, setup.dtype, seed)
    progress = setup.progress(name, {"gpt": asdict(config)})
    return train_refiner.train_backbone(config, fresh, val, V, *run, progress=progress)


def equal_steps(setup: Setup, backbone: GPT, rollouts: int) -> int:
    """How many training steps of the backbone cost what a refiner does: rollouts, query states, training."""
    config, N = setup.config["refiner"], backbone.tokens_per_image
    forward, tokens = flops_per_token(backbone) / 3, backbone.max_tokens  # a third of a training step's
    # Each sentence is written once, and its prompt read again for the states
    generation = rollouts * (tokens + tokens - N) * forward
    grid = (round(N**0.5),) * 2
    refiner = vsr.Refiner(config, READS, grid, setup.config["vqgan"].code_dim, backbone.config.width)
    training = config.steps * config.batch_size * N * 6 * count(refiner)
    return round((generation + training) / (3 * forward * tokens * BATCH))


def run(setup: Setup, seed: int, steps: int) -> dict:
    base, seconds = models_of(setup, seed), {}  # its tokenizer and its test sentences
    sentences, V = data.Sentences(setup.config["data"], seed), len(base.codebook)
    config = replace(setup.config["gpt"], steps=steps, batch_size=BATCH)
    val, codebook = base.trained.tokens["val"], base.codebook.cpu()
    began = time.perf_counter()
    backbone, log = pretrained(setup, "pretraining", config, Fresh(setup, base, sentences), val, V, seed)
    seconds["pretraining"] = time.perf_counter() - began
    models = base._replace(trained=base.trained._replace(backbone=backbone))

    # Rollouts on sentences that it has not seen, and the refiners
    further, total = Fresh(setup, base, sentences, first=2**50), setup.config["refiner"].rollouts
    parts = [further[torch.arange(64 * i, 64 * i + 64)] for i in range(-(-total // 64))]
    tokens = {"train": torch.cat(parts)[:total].short(), "val": val}
    began, rollouts, targets = time.perf_counter(), {}, {}
    for split, known in tokens.items():
        rollout = generate_all(setup, backbone, known)
        rollouts[split] = Rollout(rollout.tokens, None, rollout.query.bfloat16())
        targets[split] = known[:, -1]
    refiners = {}
    for method, reads in READINGS.items():
        refiners[method], _, _ = fit(setup, models, method, rollouts, targets, seed, reads)
    seconds["refiners"] = time.perf_counter() - began

    # The rivals, each at the rate with the least error on validation sentences
    def error_of(y: torch.Tensor) -> float:
        return vsr.cosine_error(y.long(), val[:, -1].long(), codebook).mean().item()

    def batch_of(generator: torch.Generator):
        rows = torch.randint(total, (BATCH,), generator=generator)
        return tokens["train"][rows], rollouts["train"].tokens[rows]

    budget, others, chosen = equal_steps(setup, backbone, total), {}, {}
    for kind in TUNED:
        began, best = time.perf_counter(), (float("inf"), None, None)
        for rate in RATES:
            model, _ = tuned(setup, kind, backbone, budget, rate, batch_of, seed)
            error = error_of(generate_all(setup, model, val).tokens)
            best = min(best, (error, rate, model), key=lambda entry: entry[0])
        others[kind], chosen[kind] = generate_all(setup, best[2], base.test["tokens"]).tokens, best[1]
        seconds[kind] = (time.perf_counter() - began) / len(RATES)

    # A backbone as large as backbone and refiner together, trained for as long and as much as both
    extra = count(refiners[method_name("tokens+query")])
    width = round(config.width * (1 + extra / count(backbone)) ** 0.5)
    wider = replace(config, width=width, steps=steps + budget)
    began = time.perf_counter()
    model, _ = pretrained(setup, "wider", wider, Fresh(setup, base, sentences), val, V, seed)
    others["wider backbone"] = generate_all(setup, model, base.test["tokens"]).tokens
    seconds["wider backbone"] = time.perf_counter() - began

    # More samples of the same backbone, at the temperature with the least error on validation sentences
    for way, write in zip(SAMPLED, (likeliest, lambda samples, _: consensus(samples, codebook)), strict=True):
        n, tried = setup.config["study"].samples, {}
        for temperature in TEMPERATURES:
            tried[temperature] = error_of(write(*samples_of(setup, backbone, val, n, temperature, seed)))
        chosen[way] = min(tried, key=tried.get)
        others[way] = write(*samples_of(setup, backbone, base.test["tokens"], n, chosen[way], seed))
    result = score_refiners(setup, models, refiners, seed, others)
    losses = {name: log[name][-1] for name in ("val_loss", "val_target_loss", "val_target_accuracy")}
    more = {"budget": budget, "width": width, "chosen": chosen, "seconds": seconds, "backbone": losses}
    return {**result, **more, "val_loss": dict(zip(log["val_step"], log["val_loss"], strict=True))}


def show(cells: list) -> str:
    lines, heads = [], ("gap closed", "exposure removed", "tokens right, gained", "dB gained")
    groups = report.by_setting(cells, "steps")
    lines.append(f"mean over {len(next(iter(groups.values())))} seeds, with a 95 % t interval")
    for steps, group in groups.items():
        known = {
            name: estimate(values_of(group, name, "all", "cosine_error"), 4)
            for name in ("teacher_forced", "ar_greedy")
        }
        right = estimate(values_of(group, "ar_greedy", "all", "token_accuracy"), 3)
        budget = group[0]["budget"]
        lines += [
            "",
            f"{steps:,} steps; a refiner costs {budget} more. Cosine error: "
            + ", ".join(f"{k} {v}" for k, v in known.items())
            + f"; tokens right {right}",
        ]
        lines.append(f"{'':28}" + "".join(f"{head:>26}" for head in heads))
        for method in METHODS:
            row = []
            for head in heads:
                if head == "exposure removed" and method not in READINGS:
                    row.append("")
                    continue
                row.append(
                    estimate(
                        report.MEASURES[head](group, method, "all"), 3 if head.startswith("tokens") else 2
                    )
                )
            lines.append(f"{method:28}" + "".join(f"{text:>26}" for text in row))
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    groups = report.by_setting(cells, "steps")
    figure = report.new_figure(3, 4.2)
    for axis, measure in zip(figure.axes, ("cosine_error", "token_accuracy", "psnr"), strict=True):
        for method in ("teacher_forced", "ar_greedy", *READINGS, TUNED[0], TUNED[2], "wider backbone"):
            values = [values_of(group, method, "all", measure) for group in groups.values()]
            colour = evaluate.COLOURS.get(method)
            report.curve(
                axis,
                list(groups),
                values,
                label=method,
                linewidth=1,
                markersize=3,
                **({"color": colour} if colour else {}),
            )
        report.log_x(axis, list(groups))
        axis.set(xlabel="pretraining steps", ylabel=measure.replace("_", " "))
    report.legend(figure.axes[0])
    report.save(figure, path)
