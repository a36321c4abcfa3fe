"""Where along the sequence does the error arise, and where is it taken back? The paper's Figure 2.

Cosine error by token position, at the toy's own length and at the paper's: pictures of twice the side have
256 tokens. The backbone makes errors on the true prefix too; what accumulates is what it makes beyond those,
its error minus the teacher-forced one at the same place. What is left of that after refining is the error
minus that of the refined teacher-forced output. LoRA is trained on own rollouts, with as many operations as
our refiner. Stated before it was run:

    for accumulation    that difference rises along the raster
    for its repair      the refined curve takes it back, and most where it is largest: late
    against             a difference that does not rise; or a refined curve that is lower by as much early as
                        late: then it is not the accumulated part that is repaired
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

import evaluate
import train_refiner
from evaluate import by_method, method_name
from studies import report
from studies.report import GROUPS, estimate
from studies.runner import OURS, READ_BY, Setup, at_most, force_all, generate_all, models_of, score_refiners
from studies.tuning import TUNED, equal_steps, tuned_at_best

MINUTES = 40
SETTINGS = [{"scale": 1}, {"scale": 2}]  # of the side of the pictures

LARGER = {
    "data": {"train_sentences": 8192, "eval_sentences": 256},
    "vqgan": {"batch_size": 32},
    "gpt": {"batch_size": 8},
    "refiner": {"rollouts": 4096, "rollout_batch": 64, "steps": 500, "batch_size": 32},
}
LORA = TUNED[1]
ROWS = ("ar_greedy", LORA, *READ_BY)
COMPARED = [(method_name(OURS), rival) for rival in (LORA, "parallel")] + [(method_name("tokens"), LORA)]
LATE = 160 / 256  # of the sequence: where the paper sees errors grow


def run(setup: Setup, seed: int, scale: int) -> dict:
    config, changes = setup.config, None
    if scale > 1:
        changes = at_most(LARGER, config)
        changes["data"]["image_size"] = scale * config["data"].image_size
        config = {name: replace(part, **changes.get(name, {})) for name, part in config.items()}
    label = "base" if scale == 1 else f"scale{scale}"
    models = models_of(setup, seed, train_refiner.READINGS, label, changes)
    setup = replace(setup, config=config)
    trained = models.trained
    known = (trained.written_for("train"), trained.generated["train"])
    batch_size, refiner = config["gpt"].batch_size, config["refiner"]
    budget = equal_steps(setup, models, refiner.rollouts, refiner.steps, batch_size)
    lora, tried, _ = tuned_at_best(setup, LORA, models, known, budget[LORA], batch_size, seed)
    others = {
        LORA: generate_all(setup, lora, models.test["tokens"]).tokens,
        LORA + evaluate.OF_FORCED: force_all(setup, lora, models.test["tokens"]),
    }
    refiners = by_method(trained.refiners)
    result = score_refiners(setup, models, refiners, seed, others)
    return {**result, "tried": tried, "steps": budget[LORA]}


def curves(cells: list, method: str, group: str) -> torch.Tensor:
    """Cosine error by position: (seeds, N)."""
    return torch.tensor(report.values_of(cells, method, group, "cosine_error_by_position"))


def accumulated(cells: list, method: str, group: str) -> torch.Tensor:
    """What a method has beyond its own error after the true prefix, at the same place: (seeds, N)."""
    forced = "teacher_forced" if method == "ar_greedy" else method + evaluate.OF_FORCED
    return curves(cells, method, group) - curves(cells, forced, group)


def show(cells: list) -> str:
    """By thirds of the raster, as shares of what greedy decoding accumulates over all of it; all measures."""
    lines = ["error that has accumulated, as a share of what greedy decoding has over the whole raster"]
    for group in report.by_setting(cells, "scale").values():
        greedy = accumulated(group, "ar_greedy", "all")  # (seeds, N)
        N, whole = greedy.shape[1], greedy.sum(1).tolist()
        late = round(LATE * N)
        parts = {
            "all": slice(0, N), "first third": slice(0, N // 3), "second": slice(N // 3, 2 * N // 3),
            "last third": slice(2 * N // 3, N), f"from {late} on": slice(late, N),
        }  # fmt: skip
        lines += ["", f"{f'{N} tokens':26}" + "".join(f"{name:>26}" for name in parts)]
        for method in ROWS:
            more = accumulated(group, method, "all")
            sums = [more[:, part].sum(1).tolist() for part in parts.values()]
            row = [estimate(list(map(report.share, values, whole))) for values in sums]
            lines.append(f"{method:26}" + "".join(f"{text:>26}" for text in row))
        lines += ["", f"{N} tokens: {report.backbone_line(group)}"]
        lines.append(report.measures_table(group, ROWS[1:], differences=COMPARED))
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    """A row for each length: the error over all tasks, then the accumulated part alone, by group."""
    groups = report.by_setting(cells, "scale")
    panels = [(curves, "all"), *((accumulated, name) for name in GROUPS)]
    figure = report.new_figure(len(panels), 3.0, 2.6, rows=len(groups))
    for i, group in enumerate(groups.values()):
        for j, (values_of, name) in enumerate(panels):
            axis = figure.axes[i * len(panels) + j]
            for method in ("teacher_forced", *ROWS) if j == 0 else ROWS:
                by_seed = values_of(group, method, name)
                width = by_seed.shape[1] // 16 * 2 + 1  # of the moving average
                padded = F.pad(by_seed[:, None], (width // 2, width // 2), mode="replicate")
                smooth = F.avg_pool1d(padded, width, 1)[:, 0]  # (seeds, N)
                colour = evaluate.COLOURS.get(method, "#9b5de5")
                axis.plot(smooth.mean(0), color=colour, label=method, linewidth=1)
            axis.axhline(0, color="#888888", linewidth=0.6)
            what = "cosine error" if j == 0 else "accumulated"
            axis.set_title(f"{what}, {name}, {by_seed.shape[1]} tokens", fontsize=9)
            axis.set_xlabel("token position t (raster order)")
    report.legend_outside(figure, "upper center", ncols=1 + len(ROWS))
    report.save(figure, path)
