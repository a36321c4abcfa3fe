"""Does it survive a good backbone? What is left to repair when the backbone has been trained for long.

The backbones of the toy see each sentence about twice. Here every step has sentences that nobody has had
before, for 700, 2,800 and 11,200 steps of 16, and refiners learn from rollouts on further sentences. (Their
scenes may come again: some 0.6 million are possible.) Rivals spend what the refiner costs, in operations, on
the backbone itself: further pretraining, a wider backbone (after 700 steps only: on a CPU it would take
hours), and tuning (LoRA, or all weights) on its own rollouts as prefix with the true targets. That of the
best rate is counted, not the search for it. Stated before it was run:

    for refinement      at every maturity it leaves less error than greedy decoding and than the rivals, and
                        removes exposure error, not only error that is made on the true prefix too
    against it          its gain vanishes with the backbone's training, or a rival at the same cost does as
                        well: then it repairs undertraining
"""

import statistics
import time
from dataclasses import asdict, replace

import torch

import data
import evaluate
import runtime
import train_refiner
import vsr
from evaluate import method_name
from studies import report, runner
from studies.decoding import TEMPERATURES, consensus, likeliest, samples_of
from studies.runner import OURS, Setup, count, fit, force_all, generate_all, models_of, score_refiners
from studies.stages import flops_per_token
from studies.tuning import TUNED, equal_steps, tuned_at_best
from vsr import GPT, Rollout

MINUTES = 70
SETTINGS = [{"steps": steps} for steps in (700, 2800, 11200)]

BATCH = 16  # half of the default: what can be trained to its plateau within hours
WIDER_UP_TO = 700
SAMPLED = ("likeliest of n", "consensus of n")
METHODS = (*runner.READ_BY, *TUNED, "wider backbone", *SAMPLED)
COMPARED = [(method_name(OURS), rival) for rival in ("parallel", *TUNED[1:], SAMPLED[0])]


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
    made_with = {"gpt": asdict(config), "tokenizer": runtime.fingerprint(fresh.tokenizer.state_dict())}
    progress = setup.progress(name, made_with)
    return train_refiner.train_backbone(config, fresh, val, V, *run, progress=progress)


def wider_config(backbone: GPT, refiner, steps: int, shape: tuple):
    """Of a backbone as large as backbone and refiner together, for the operations of `steps` steps."""
    width, wanted = backbone.config.width, count(backbone) + count(refiner)
    while count(larger := GPT(replace(backbone.config, width=width), *shape)) < wanted:
        width += 1
    steps = round(steps * flops_per_token(backbone) / flops_per_token(larger))
    return replace(larger.config, steps=steps)


def of_samples(setup: Setup, backbone: GPT, tokens, n: int, temperature: float, seed: int, codebook) -> dict:
    """What is made of the same n samples: {way of `SAMPLED`: tokens (S, N)}."""
    samples, likelihoods = samples_of(setup, backbone, tokens, n, temperature, seed)
    return dict(zip(SAMPLED, (likeliest(samples, likelihoods), consensus(samples, codebook)), strict=True))


def run(setup: Setup, seed: int, steps: int) -> dict:
    base, seconds = models_of(setup, seed), {}  # its tokenizer and its test sentences
    sentences, V = data.Sentences(setup.config["data"], seed), len(base.codebook)
    config = replace(setup.config["gpt"], steps=steps, batch_size=BATCH)
    val, codebook = base.trained.tokens["val"], base.codebook.cpu()
    known = (Fresh(setup, base, sentences), val, V, seed)
    backbone, log = pretrained(setup, "pretraining", config, *known)
    seconds["pretraining"] = log["seconds"]
    models = base._replace(trained=base.trained._replace(backbone=backbone))

    # Rollouts on sentences that it has not seen, and the refiners
    study, further = setup.config["study"], Fresh(setup, base, sentences, first=2**50)
    total = study.rollouts
    parts = [further[torch.arange(64 * i, 64 * i + 64)] for i in range(-(-total // 64))]
    tokens = {"train": torch.cat(parts)[:total].to(val.dtype), "val": val}
    began, rollouts, target_tokens = time.perf_counter(), {}, {}
    for split, part in tokens.items():
        rollout = generate_all(setup, backbone, part)
        rollouts[split] = Rollout(rollout.tokens, None, rollout.query.bfloat16())
        target_tokens[split] = part[:, -1]
    refiners, seconds["rollouts"] = {}, time.perf_counter() - began
    for method, reads in runner.READ_BY.items():
        known = (rollouts, target_tokens, seed, reads)
        refiners[method], fit_log = fit(setup, models, method, *known, steps=study.steps)
        seconds[method] = fit_log["seconds"]

    def error_of(y: torch.Tensor, split: str = "val") -> float:
        return vsr.cosine_error(y.long(), target_tokens[split].long(), codebook).mean().item()

    # The rivals, each at the rate or temperature with the least error on validation sentences
    test, others = base.test["tokens"], {}
    tried = {name: {} for name in (*TUNED, *SAMPLED)}  # {rate or temperature: error}
    budget = equal_steps(setup, models, study.rollouts, study.steps, BATCH)
    prefixes = (tokens["train"], rollouts["train"].tokens)

    def use(name: str, model: GPT) -> None:
        others[name] = generate_all(setup, model, test).tokens
        others[name + evaluate.OF_FORCED] = force_all(setup, model, test)

    for kind in TUNED:
        known = (models, prefixes, budget[kind], BATCH, seed)
        model, tried[kind], seconds[kind] = tuned_at_best(setup, kind, *known)
        use(kind, model)

    if steps <= WIDER_UP_TO:
        shape = (V, *val.shape[:0:-1])
        config = wider_config(backbone, refiners[method_name(OURS)], steps + budget[TUNED[0]], shape)
        known = (Fresh(setup, base, sentences), val, V, seed)
        model, wider_log = pretrained(setup, "wider", config, *known)
        seconds["wider backbone"] = wider_log["seconds"]
        use("wider backbone", model)

    for temperature in TEMPERATURES:
        for way, y in of_samples(setup, backbone, val, study.samples, temperature, seed, codebook).items():
            tried[way][temperature] = error_of(y)
    for way in SAMPLED:
        best = min(tried[way], key=tried[way].get)
        others[way] = of_samples(setup, backbone, test, study.samples, best, seed, codebook)[way]

    result = score_refiners(setup, models, refiners, seed, others)
    losses = {name: log[name][-1] for name in ("val_loss", "val_target_loss", "val_target_accuracy")}
    result |= {"budget": budget, "tried": tried, "seconds": seconds, "backbone": losses}
    result["rollout_error"] = {split: error_of(rollout.tokens, split) for split, rollout in rollouts.items()}
    return {**result, "val_loss": dict(zip(log["val_step"], log["val_loss"], strict=True))}


def seconds_lines(cells: list) -> list:
    """The seconds of each stage, medians over the seeds of a device."""
    lines = []
    for device in dict.fromkeys(cell["device"] for cell in cells):
        seeds = [cell["seconds"] for cell in cells if cell["device"] == device]
        middle = {name: statistics.median(seconds[name] for seconds in seeds) for name in seeds[0]}
        stages = ", ".join(f"{name} {value:,.0f}" for name, value in middle.items())
        lines.append(f"seconds, {device}: {stages}")
    return lines


def errors_tried(cells: list) -> dict:
    """{rival: the errors of its rates or temperatures on validation sentences, by seed; - if not tried}."""
    texts = {}
    for name in cells[0]["tried"]:
        by_seed = [{float(x): error for x, error in cell["tried"][name].items()} for cell in cells]
        settings = sorted(set().union(*by_seed))
        found = {x: [f"{tried[x]:.4f}" if x in tried else "-" for tried in by_seed] for x in settings}
        texts[name] = "; ".join(f"{x:.2g}: {', '.join(errors)}" for x, errors in found.items())
    return texts


def show(cells: list) -> str:
    lines = []
    for steps, group in report.by_setting(cells, "steps").items():
        methods = [method for method in METHODS if method in group[0]["scores"]]
        own = [
            ", ".join(f"{cell['rollout_error'][split]:.4f}" for cell in group) for split in ("train", "val")
        ]
        lines += [
            f"{steps:,} steps: {report.backbone_line(group)}",
            f"error of rollouts that refiners learn from {own[0]}; of validation {own[1]}",
            *(f"validation errors, {name}: {errors}" for name, errors in errors_tried(group).items()),
            "steps of rivals: " + ", ".join(f"{kind} {n}" for kind, n in group[0]["budget"].items()),
            *seconds_lines(group),
            report.measures_table(group, methods, differences=COMPARED),
            "",
        ]
    return "\n".join(lines[:-1])


def plot(path, cells: list) -> None:
    """What refiners and, dashed, their rivals gain over greedy decoding, by the backbone's training."""
    groups = report.by_setting(cells, "steps")
    figure = report.new_figure(3, 3.6)
    rivals = (*TUNED, "wider backbone", SAMPLED[0])
    colours = dict(zip(rivals, ("#8d99ae", "#9b5de5", "#d1495b", "#edae49", "#2a9d4a"), strict=True))
    for axis, measure in zip(figure.axes, ("gap closed", "tokens right, gained", "dB gained"), strict=True):
        for method in (*runner.READ_BY, *rivals):
            having = {steps: group for steps, group in groups.items() if method in group[0]["scores"]}
            values = [report.MEASURES[measure](group, method, "all") for group in having.values()]
            options = {"linestyle": "--"} if method in rivals else {}
            options |= {"color": colours.get(method) or evaluate.COLOURS[method], "label": method}
            report.curve(axis, list(having), values, linewidth=1, markersize=4, **options)
        axis.axhline(0, color="#888888", linewidth=0.6)
        report.log_x(axis, list(groups))
        axis.set_xticks(list(groups), [f"{steps:,}" for steps in groups])
        axis.set(xlabel="pretraining steps", ylabel=measure)
    report.legend_outside(figure, "right center", fontsize=8)
    report.save(figure, path)
