"""Does it survive a good backbone? What is left to repair when the backbone has been trained for long.

The backbones of the toy see each sentence about twice. Here every step has sentences that nobody has had
before, for 700, 2,800 and 11,200 steps of 16, and refiners learn from rollouts on further sentences. Rivals
spend what the refiner costs, in operations, on the backbone itself: further pretraining, a wider backbone
(not after 11,200 steps: it would take hours), and tuning (LoRA, or all weights) on its own rollouts as prefix
with the true targets. Stated before it was run:

    for refinement      at every maturity it leaves less error than greedy decoding and than the rivals, and
                        removes exposure error, not only error that is made on the true prefix too
    against it          its gain vanishes with the backbone's training, or a rival at the same cost does as
                        well: then it repairs undertraining
"""

import time
from dataclasses import asdict, replace

import torch

import data
import evaluate
import train_refiner
import vsr
from evaluate import method_name
from studies import report
from studies.decoding import TEMPERATURES, consensus, likeliest, samples_of
from studies.report import values_of
from studies.runner import READS, Setup, count, fit, generate_all, models_of, score_refiners
from studies.stages import flops_per_token
from studies.tuning import TUNED, tuned_at_best
from vsr import GPT, Rollout

MINUTES = 70
SETTINGS = [{"steps": steps} for steps in (700, 2800, 11200)]

BATCH = 16  # half of the default: what can be trained to its plateau within hours
WIDER_UP_TO = 2800
READINGS = {method_name(reading): tuple(reading.split("+")) for reading in train_refiner.READINGS}
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


def pretrained(setup: Setup, name: str, config, fresh: Fresh, val: torch.Tensor, V: int, seed: int):
    """A backbone after `config.steps` steps on fresh sentences -> (frozen backbone, log)."""
    run = (setup.device, setup.dtype, seed)
    progress = setup.progress(name, {"gpt": asdict(config)})
    return train_refiner.train_backbone(config, fresh, val, V, *run, progress=progress)


def equal_steps(setup: Setup, backbone: GPT) -> int:
    """How many training steps of the backbone cost what a refiner does: rollouts, query states, training."""
    config, study, N = setup.config["refiner"], setup.config["study"], backbone.tokens_per_image
    forward, tokens = flops_per_token(backbone) / 3, backbone.max_tokens  # a third of a training step's
    # Each sentence is written once, and its prompt read again for the states
    generation = study.rollouts * (tokens + tokens - N) * forward
    grid = (round(N**0.5),) * 2
    refiner = vsr.Refiner(config, READS, grid, setup.config["vqgan"].code_dim, backbone.config.width)
    training = study.steps * config.batch_size * N * 6 * count(refiner)
    return max(1, round((generation + training) / (3 * forward * tokens * BATCH)))


def of_samples(setup: Setup, backbone: GPT, tokens, n: int, temperature: float, seed: int, codebook) -> dict:
    """What is made of the same n samples: {way of `SAMPLED`: tokens (S, N)}."""
    samples, likelihoods = samples_of(setup, backbone, tokens, n, temperature, seed)
    return dict(zip(SAMPLED, (likeliest(samples, likelihoods), consensus(samples, codebook)), strict=True))


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
    further, total = Fresh(setup, base, sentences, first=2**50), setup.config["study"].rollouts
    parts = [further[torch.arange(64 * i, 64 * i + 64)] for i in range(-(-total // 64))]
    tokens = {"train": torch.cat(parts)[:total].short(), "val": val}
    began, rollouts, targets = time.perf_counter(), {}, {}
    for split, known in tokens.items():
        rollout = generate_all(setup, backbone, known)
        rollouts[split] = Rollout(rollout.tokens, None, rollout.query.bfloat16())
        targets[split] = known[:, -1]
    refiners = {}
    for method, reads in READINGS.items():
        options = {"steps": setup.config["study"].steps}
        refiners[method], _, _ = fit(setup, models, method, rollouts, targets, seed, reads, **options)
    seconds["refiners"] = time.perf_counter() - began

    # The rivals, each at the rate or temperature with the least error on validation sentences
    def error_of(y: torch.Tensor) -> float:
        return vsr.cosine_error(y.long(), val[:, -1].long(), codebook).mean().item()

    budget, test, others, chosen = equal_steps(setup, backbone), base.test["tokens"], {}, {}
    prefixes = (tokens["train"], rollouts["train"].tokens)
    for kind in TUNED:
        model, chosen[kind], seconds[kind] = tuned_at_best(setup, kind, models, prefixes, budget, BATCH, seed)
        others[kind] = generate_all(setup, model, test).tokens

    if steps <= WIDER_UP_TO:  # as large as backbone and refiner together, trained for as long and as much
        extra = count(refiners[method_name("tokens+query")])
        width = round(config.width * (1 + extra / count(backbone)) ** 0.5)
        wider, began = replace(config, width=width, steps=steps + budget), time.perf_counter()
        model, _ = pretrained(setup, "wider", wider, Fresh(setup, base, sentences), val, V, seed)
        others["wider backbone"] = generate_all(setup, model, test).tokens
        seconds["wider backbone"] = time.perf_counter() - began

    n, tried = setup.config["study"].samples, {way: {} for way in SAMPLED}
    for temperature in TEMPERATURES:
        for way, y in of_samples(setup, backbone, val, n, temperature, seed, codebook).items():
            tried[way][temperature] = error_of(y)
    for way in SAMPLED:
        chosen[way] = min(tried[way], key=tried[way].get)
        others[way] = of_samples(setup, backbone, test, n, chosen[way], seed, codebook)[way]
    result = score_refiners(setup, models, refiners, seed, others)
    losses = {name: log[name][-1] for name in ("val_loss", "val_target_loss", "val_target_accuracy")}
    more = {"budget": budget, "chosen": chosen, "seconds": seconds, "backbone": losses}
    return {**result, **more, "val_loss": dict(zip(log["val_step"], log["val_loss"], strict=True))}


def show(cells: list) -> str:
    lines = []
    for steps, group in report.by_setting(cells, "steps").items():
        methods = [method for method in METHODS if method in group[0]["scores"]]
        lines += [
            f"{steps:,} steps: {report.backbone_line(group)}; refiners cost {group[0]['budget']} steps more"
        ]
        lines += [report.measures_table(group, methods), ""]
    return "\n".join(lines[:-1])


def plot(path, cells: list) -> None:
    groups = report.by_setting(cells, "steps")
    figure = report.new_figure(3, 4.2)
    for axis, measure in zip(figure.axes, ("cosine_error", "token_accuracy", "psnr"), strict=True):
        for method in ("teacher_forced", "ar_greedy", *READINGS, TUNED[0], TUNED[2], "wider backbone"):
            having = {steps: group for steps, group in groups.items() if method in group[0]["scores"]}
            values = [values_of(group, method, "all", measure) for group in having.values()]
            options = {"label": method, "linewidth": 1, "markersize": 3}
            report.curve(axis, list(having), values, color=evaluate.COLOURS.get(method), **options)
        report.log_x(axis, list(groups))
        axis.set(xlabel="pretraining steps", ylabel=measure.replace("_", " "))
    report.legend(figure.axes[0])
    report.save(figure, path)
