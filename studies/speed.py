"""What does all this cost, and is the code as fast as what others use?

Every stage against something: training against a textbook, against a GPT-2 of `transformers` and
against the machine's products of large matrices; generation against loops without a cache,
against `transformers` and against reading memory; the refining pass against generation; training
loops against their bare steps; and how all of it grows with the tokens of an image and the
demonstrations. For refinement speaks a pass that costs a few percent of generation; against it,
one that costs as much as generating again.

First edition: training was 1.2 times as fast as the textbook, generation at batch 256 24 times as
fast as without a cache, and the pass (reading tokens and states) took 2.6 % of the generation of
one image and 8 % at batches of 64 and more (one seed, 2 cores, bfloat16).
"""

import statistics

import torch

from studies import report, stages
from studies.gpt2 import GPT2, why_not
from studies.runner import Setup, count

MINUTES = 8
SETTINGS = [{}]

BLUE, RED, GREY = "#1d4e9e", "#d1495b", "#8d99ae"


def run(setup: Setup, seed: int) -> dict:
    """All seconds are lists, one entry a round."""
    torch.manual_seed(seed)
    config, rounds, few = setup.config, setup.config["study"].rounds, max(1, setup.config["study"].rounds - 2)
    size, demos = config["data"].image_size, config["data"].num_demos
    models = stages.new_models(setup, size, demos)
    batch = config["gpt"].batch_size
    tokens = torch.randint(config["vqgan"].codebook_size, (batch, models.T), device=setup.device)
    images = torch.rand(config["vqgan"].batch_size, 3, size, size, device=setup.device) * 2 - 1
    images = images.contiguous(memory_format=torch.channels_last)

    gpt2, about = None, {"skipped": why_not(config["gpt"])}
    if about["skipped"] is None:
        gpt2 = GPT2(models.backbone).to(setup.device)
        about |= {"version": gpt2.version, "params": count(gpt2), "our_params": count(models.backbone)}
    sizes = [(size, 1), (2 * size, 1), (4 * size, 1), (size, 2), (size, 3)]
    return {
        "transformers": about,
        "tokens_per_image": models.N,
        "training": stages.training(setup, models, tokens, gpt2, rounds),
        "reading": stages.reading_seconds(setup, models, rounds),
        "generation": stages.generation(setup, models, gpt2, few),
        "tokenizer": stages.tokenizer(setup, models, images, rounds),
        "tokenizer_images": len(images),
        "loops": stages.loops(setup, seed, models, images, tokens, few),
        "growth": [stages.growth(setup, image_size, K, few) for image_size, K in sizes],
    }


def rounds_of(cells: list, *keys) -> list:
    """The seconds of all rounds of all cells, at a place in their results."""
    values = []
    for place in cells:
        for key in keys:
            place = place[key]
        values += place
    return values


def median_of(cells: list, *keys) -> float:
    return statistics.median(rounds_of(cells, *keys))


def ratio(above: list, below: list) -> str:
    """`1.23 (1.20 to 1.31)`: median and range of the ratios of two lists of seconds, round by round."""
    values = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def show(cells: list) -> str:
    parts = (show_training, show_generation, show_loops, show_growth)
    return "\n\n".join("\n".join(part(cells)) for part in parts)


def show_training(cells: list) -> list:
    first, about = cells[0]["training"], cells[0]["transformers"]
    columns = (("tokens/s", 12), (f"of the product of {stages.PRODUCT}", 28), ("times the textbook", 24))
    columns += (("times GPT-2", 24),) if about["skipped"] is None else ()
    lines = ["training the backbone, steps with optimizers; medians, and ranges over rounds that alternate"]
    lines.append(f"{'':28}" + "".join(f"{head:>{width}}" for head, width in columns))
    for dtype, kinds in first["seconds"].items():
        seconds = {kind: rounds_of(cells, "training", "seconds", dtype, kind) for kind in kinds}
        for kind in kinds:
            if kind == "product":
                continue
            row = f"{f'{kind}, {dtype}':28}{first['tokens'] / statistics.median(seconds[kind]):12,.0f}"
            both = zip(seconds["product"], seconds[kind], strict=True)
            reached = statistics.median(product / step for product, step in both)
            reached *= first["flops"] / first["product_flops"]
            row += f"{'' if kind.startswith('GPT-2') else format(reached, '.0%'):>28}"
            row += f"{ratio(seconds['textbook'], seconds[kind]):>24}"
            if about["skipped"] is None:
                row += f"{ratio(seconds['GPT-2, AdamW'], seconds[kind]):>24}"
            lines.append(row)
    if about["skipped"] is None:
        sizes = f"{about['params'] / 1e6:.3f} M parameters, ours {about['our_params'] / 1e6:.3f} M"
        return [*lines, f"GPT-2: that of transformers {about['version']}, {sizes}"]
    return [*lines, f"GPT-2: skipped, {about['skipped']}"]


def show_generation(cells: list) -> list:
    first, N = cells[0], cells[0]["tokens_per_image"]
    reading = {name: statistics.median(cell["reading"][name] for cell in cells) for name in first["reading"]}
    columns = (("batch", 8), ("tokens/s", 12), ("no cache", 12), ("ratio", 8), ("GPT-2", 12), ("ratio", 8))
    columns += (("a step", 12), ("reading memory", 16), ("pass, tokens", 24), ("pass, tokens+query", 24))
    lines = ["generation; the refining pass as a share of it, median and range"]
    lines.append("".join(f"{head:>{width}}" for head, width in columns))
    for batch, kinds in first["generation"].items():
        seconds = {kind: rounds_of(cells, "generation", batch, kind) for kind in kinds}
        median = {kind: statistics.median(values) for kind, values in seconds.items()}
        row = f"{batch:>8}{int(batch) * N / median['cached']:12,.0f}"
        for other in ("uncached", "GPT-2"):
            if other in median:
                row += f"{int(batch) * N / median[other]:12,.0f}{median[other] / median['cached']:8.1f}"
            else:
                row += f"{'-':>12}{'-':>8}"
        step = (median["cached"] - median["prompt"]) / max(1, N - 1)
        row += f"{1e3 * step:9.2f} ms{1e3 * (reading['weights'] + int(batch) * reading['cache']):13.2f} ms"
        for kind in ("refine tokens", "refine tokens+query"):
            shares = [a / b for a, b in zip(seconds[kind], seconds["cached"], strict=True)]
            text = f"{statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"
            row += f"{text:>24}"
        lines.append(row)
    for kind in ("encode", "decode"):
        speed = first["tokenizer_images"] / median_of(cells, "tokenizer", kind)
        lines.append(f"tokenizer: {speed:,.0f} images/s {kind}d")
    return lines


def show_loops(cells: list) -> list:
    lines = [f"{'training loop':16}{'ms a step':>12}{'the model alone':>17}{'loop / model':>26}"]
    for name in cells[0]["loops"]:
        loop, model = (rounds_of(cells, "loops", name, part) for part in ("loop", "model"))
        times = f"{1e3 * statistics.median(loop):12.1f}{1e3 * statistics.median(model):17.1f}"
        lines.append(f"{name:16}{times}{ratio(loop, model):>26}")
    return lines


def show_growth(cells: list) -> list:
    names = ("train", "generate", "refine")
    lines = ["ms per sentence at batch 4: to train on it, to generate its last image, to refine that"]
    lines.append(f"{'':14}{'K':>4}" + "".join(f"{name:>12}" for name in names))
    for i, row in enumerate(cells[0]["growth"]):
        times = [1e3 * median_of(cells, "growth", i, "seconds_per_sentence", name) for name in names]
        label = f"N = {row['tokens']}"
        lines.append(f"{label:>14}{row['num_demos']:4}" + "".join(f"{time:12.2f}" for time in times))
    return lines


def plot(path, cells: list) -> None:
    figure, first = report.new_figure(4, 3.6, 3.6), cells[0]
    training, by_batch, by_tokens, by_demos = figure.axes
    speeds = {}
    for dtype, kinds in first["training"]["seconds"].items():
        for kind in kinds:
            seconds = rounds_of(cells, "training", "seconds", dtype, kind)
            speeds[f"{kind}\n{dtype}"] = [first["training"]["tokens"] / s for s in seconds]
    speeds = {name: values for name, values in speeds.items() if not name.startswith("product")}
    colours = ["#66a5e0" if name.startswith("ours") else "#b8b8b8" for name in speeds]
    report.bars(training, list(speeds), list(speeds.values()), colours)
    training.set(xlabel="tokens/s", title="training the backbone")

    batches = [int(batch) for batch in first["generation"]]
    lines = {"uncached": ("generate, no cache", GREY), "GPT-2": ("generate, GPT-2", "#edae49")}
    lines |= {"cached": ("generate", RED), "refine tokens+query": ("refine", BLUE)}
    for kind, (label, colour) in lines.items():
        if kind in first["generation"]["1"]:
            times = [1e3 * median_of(cells, "generation", str(batch), kind) / batch for batch in batches]
            by_batch.loglog(batches, times, "o-", color=colour, label=label)
    by_batch.set(xlabel="batch", ylabel="ms per image", title="by batch")
    by_batch.set_xticks(batches, batches)

    tokens = first["tokens_per_image"]
    chosen = {by_tokens: ("tokens", "num_demos", 1), by_demos: ("num_demos", "tokens", tokens)}
    for axis, (key, fixed, value) in chosen.items():
        rows = [i for i, row in enumerate(first["growth"]) if row[fixed] == value]
        x = [first["growth"][i][key] for i in rows]
        for name, colour in (("train", GREY), ("generate", RED), ("refine", BLUE)):
            times = [1e3 * median_of(cells, "growth", i, "seconds_per_sentence", name) for i in rows]
            axis.loglog(x, times, "o-", color=colour, label=name)
        axis.set_xticks(x, x)
        axis.set_ylabel("ms per sentence")
    by_tokens.set(xlabel="N", title="by tokens of an image")
    by_demos.set(xlabel="K", title="by demonstrations")
    for axis in (by_batch, by_tokens, by_demos):
        axis.minorticks_off()
        axis.margins(y=0.25)
        axis.legend(fontsize=7, frameon=False)
    report.save(figure, path)
