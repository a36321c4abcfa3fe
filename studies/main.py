"""Is refinement worth more than whatever else could be done with the same backbone?

All methods write the last image of the same test sentences. For the claim speaks that the refiner
is better than every control at a like cost; against it, that one of them does as well:

    best_of_n            n samples, the one that the backbone itself finds likeliest: more compute
    expected_embedding   the code nearest to the mean embedding: hedging, without training
    lora                 low-rank adapters of the backbone, trained on true sentences
    longer_backbone      pretraining goes on: was the backbone undertrained?
    no_attention         `refined_tokens+query` with each position alone: is context needed?
    no_attention_tokens  the same of `refined_tokens`
    parallel             the same network reads the query's states alone: is what was written needed?

First edition: of the gap, the refiner that reads tokens and states closed 0.94, longer
pretraining 0.75, the refiner that reads tokens alone 0.46, the first without attention 0.33, LoRA
0.22, best of 8 samples 0.13, hedging 0.08 (five seeds; `parallel` was not measured).
"""

import functools
import statistics
import time

import torch

import evaluate
import vsr
from data import TASKS
from evaluate import method_name
from studies import report
from studies.decoding import likeliest, samples_of
from studies.lora import tuned_by_lora, tuned_for_longer
from studies.report import GROUPS, mean_sd
from studies.runner import (
    OURS,
    SeedModels,
    Setup,
    count,
    fit,
    generate_all,
    models_of,
    part_of,
    refine_all,
    replay,
    score,
)
from studies.timing import median_seconds

MINUTES = 27
SETTINGS = [{}]

READINGS = ("tokens", "tokens+states", OURS, "query")
CONTROLS = ("best_of_n", "expected_embedding", "lora", "longer_backbone", "no_attention", "parallel")
BASELINES = ("vqgan_limit", "teacher_forced", "ar_greedy", "ar_sampled")
REFINED = tuple(method_name(reading) for reading in READINGS if reading != "query")
ROWS = (*BASELINES, *CONTROLS, "no_attention_tokens", *REFINED)
BEST = method_name(OURS)
PAIRS = (
    ("ar_greedy", BEST),
    *((control, BEST) for control in CONTROLS),
    ("ar_greedy", "refined_tokens"),
    ("no_attention_tokens", "refined_tokens"),
    ("refined_tokens+states", BEST),
)


def best_of_n(setup: Setup, models: SeedModels, n: int, seed: int) -> torch.Tensor:
    """Of n samples at temperature 1, the one that the backbone itself finds likeliest: tokens (S, N)."""
    return likeliest(*samples_of(setup, models.trained.backbone, models.test["tokens"], n, 1.0, seed))


def run(setup: Setup, seed: int) -> dict:
    """What every method writes, its scores, what it trains, how long, and what it adds to generation."""
    models = models_of(setup, seed, READINGS)
    trained, tokens, study = models.trained, models.test["tokens"], setup.config["study"]
    written = evaluate.decode_methods(
        trained.tokenizer, trained.backbone, trained.refiners, tokens, setup.autocast, seed
    )
    began = time.perf_counter()
    rollouts, targets = replay(setup, models, vsr.READS)
    replaying, cost = time.perf_counter() - began, {}

    def note_refiner(method: str, refiner, seconds: float) -> None:
        """The cost of a refiner, with what it needs before its first step (replaying: at most)."""
        seconds += trained.seconds["rollouts"] if set(refiner.reads) != {"query"} else 0
        seconds += replaying if set(refiner.reads) != {"tokens"} else 0
        cost[method] = {"params": count(refiner), "seconds": seconds}

    for reading, refiner in trained.refiners.items():
        note_refiner(method_name(reading), refiner, trained.seconds[f"refiner_{reading}"])
    rollout = generate_all(setup, trained.backbone, tokens)
    for method, reading in (("no_attention", OURS), ("no_attention_tokens", "tokens")):
        refiner, _, seconds = fit(
            setup, models, method, rollouts, targets, seed, reading.split("+"), attention=False
        )
        written[method] = refine_all(setup, models, refiner, rollout)
        note_refiner(method, refiner, seconds)
    del rollouts

    # The backbone itself, tuned for as long or sampled more often
    for method, tuning in (("lora", tuned_by_lora), ("longer_backbone", tuned_for_longer)):
        tuned = tuning(setup, models, seed)
        written[method] = generate_all(setup, tuned.backbone, tokens).tokens
        cost[method] = {"params": tuned.params, "seconds": tuned.seconds}
    written["best_of_n"] = best_of_n(setup, models, study.samples, seed)
    cost["best_of_n"] = {"params": 0, "seconds": 0.0, "overhead": study.samples - 1.0}

    # One refining pass against the generation of the same images
    few, prompt = part_of(rollout, slice(64)), tokens[:64, :-1].flatten(1).long().to(setup.device)
    few = [values.to(setup.device) for values in few]
    timed = {"generation": functools.partial(trained.backbone.generate, prompt, tokens.shape[2])}
    for reading, refiner in trained.refiners.items():
        timed[reading] = functools.partial(vsr.refine, refiner, models.codebook, *few)
    with setup.autocast:
        seconds = median_seconds(timed, setup.device, study.rounds)
    for reading in trained.refiners:
        cost[method_name(reading)]["overhead"] = seconds[reading] / seconds["generation"]
    params = count(trained.backbone)
    return {**score(setup, models, written), "cost": cost, "backbone_params": params}


def differences(cells: list, a: str, b: str, group: str) -> torch.Tensor:
    """Cosine error of method a minus that of b, of each test sentence of all seeds: (seeds * S,)."""
    parts = []
    for cell in cells:
        difference = torch.tensor(cell["by_sentence"][a]) - torch.tensor(cell["by_sentence"][b])
        if group != "all":
            difference = difference[torch.tensor(cell["task"]) == TASKS.index(group)]
        parts.append(difference)
    return torch.cat(parts)


def attention_share(cells: list, method: str, control: str) -> list:
    """The part of what a refiner closes that the same refiner without attention does not, in each cell."""
    both = zip(report.gaps(cells, method, "all"), report.gaps(cells, control, "all"), strict=True)
    return [report.share(full - alone, full) for full, alone in both]


def numbers(cells: list) -> dict:
    """Differences between methods with their intervals, and attention's share of what a refiner closes."""
    intervals = {}
    for a, b in PAIRS:
        pair = intervals[f"{a} - {b}"] = {}
        for group in GROUPS:
            difference = differences(cells, a, b, group)
            pair[group] = [difference.mean().item(), *report.interval(difference)]
    shares = {
        BEST: attention_share(cells, BEST, "no_attention"),
        "refined_tokens": attention_share(cells, "refined_tokens", "no_attention_tokens"),
    }
    return {"intervals": intervals, "attention_share": shares}


def show(cells: list) -> str:
    sentences = len(cells[0]["task"])
    columns = [("cosine error", 18), *((task, 10) for task in TASKS), ("gap closed", 16), ("tokens", 8)]
    columns += [("PSNR", 7), ("SSIM", 7), ("trained", 9), ("seconds", 9), ("overhead", 10)]
    lines = [
        f"mean (± standard deviation) over {len(cells)} seeds, {sentences} test sentences each; "
        "costs are medians",
        f"{'':30}" + "".join(f"{head:>{width}}" for head, width in columns),
    ]
    for method in ROWS:
        row = f"{method:30}{mean_sd(report.values_of(cells, method, 'all', 'cosine_error'), 4):>18}"
        for task in TASKS:
            row += f"{statistics.fmean(report.values_of(cells, method, task, 'cosine_error')):10.4f}"
        row += f"{'' if method in BASELINES else mean_sd(report.gaps(cells, method, 'all')):>16}"
        for measure, form in (("token_accuracy", "8.3f"), ("psnr", "7.2f"), ("ssim", "7.3f")):
            row += f"{statistics.fmean(report.values_of(cells, method, 'all', measure)):{form}}"
        costs = [cell["cost"][method] for cell in cells if method in cell["cost"]]
        if costs:
            seconds = statistics.median(cost["seconds"] for cost in costs)
            row += f"{costs[0]['params'] / 1e6:8.2f}M{seconds:9.0f}"
        if costs and "overhead" in costs[0]:
            row += f"{statistics.median(cost['overhead'] for cost in costs):10.1%}"
        lines.append(row.rstrip())

    more = numbers(cells)
    lines += ["", f"{'gained over ar_greedy':46}" + "".join(f"{group + ', dB':>27}" for group in GROUPS)]
    for method in ROWS[len(BASELINES) :]:
        gains = [mean_sd(report.psnr_gains(cells, method, group), 2) for group in GROUPS]
        lines.append(f"{method:46}" + "".join(f"{gain:>27}" for gain in gains))
    lines += ["", f"{'cosine error, a - b (95 % interval)':46}" + "".join(f"{group:>27}" for group in GROUPS)]
    for pair, groups in more["intervals"].items():
        values = [f"{mean:9.4f} ({low:7.4f}, {high:7.4f})" for mean, low, high in groups.values()]
        lines.append(f"{pair:46}" + "".join(values))
    lines.append("")
    for method, shares in more["attention_share"].items():
        lines.append(f"attention's share of what {method} closes: {mean_sd(shares)}")
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    rows = [method for method in ROWS if method != "vqgan_limit"]
    figure = report.new_figure(len(GROUPS), 3.6, 4.4)
    colours = [evaluate.COLOURS.get(method, "#b8b8b8") for method in rows]
    for axis, group in zip(figure.axes, GROUPS, strict=True):
        values = [report.values_of(cells, method, group, "cosine_error") for method in rows]
        report.bars(axis, rows if axis is figure.axes[0] else [""] * len(rows), values, colours)
        axis.axvline(statistics.fmean(values[0]), color=colours[0], linewidth=0.8, linestyle=":")
        axis.set(title=group, xlabel="cosine error", xlim=(0, None))
    report.save(figure, path)
