"""How far does one wrong token run, and how much of the damage is taken back?

Two kinds of mistakes. `forced`: a wrong token is put at position t of the greedy rollout, what another
sentence has there, and the backbone goes on from there; its damage is what it adds behind it, in cosine error
and in tokens that are wrong. That is a grosser mistake than most that a backbone makes. `natural`: the first
token that greedy decoding gets wrong, against the rollout that goes on from the true token in its place.
Stated before it was run: for repair speaks damage that is smaller after refining, for both kinds and in both
measures; against it, damage that stays, or that is taken back for forced tokens only, or in error only: then
it is hedging. (The second measure, and this last clause, came after notebook 2.)
"""

import statistics

import torch

import evaluate
import vsr
from evaluate import method_name
from runtime import UserError
from studies import report
from studies.report import estimate
from studies.runner import READINGS, Setup, generate_all, models_of, refine_all

MINUTES = 2
SETTINGS = [{}]

READ_WRITTEN = tuple(map(method_name, READINGS))
MEASURES = ("cosine error", "wrong tokens")
COLOURS = {"backbone": evaluate.COLOURS["ar_greedy"]}
COLOURS |= {name: evaluate.COLOURS[name] for name in READ_WRITTEN}


def forced_at(t: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (S, N) with a wrong one at t -> forced tokens, and which sentences have got one (S,).

    The wrong token is that of the nearest sentence, in the order of the rows, that has another one there.
    """
    shifted = [tokens[:, t].roll(shift) for shift in range(1, len(tokens))]
    strangers = torch.stack(shifted)  # (S-1, S)
    differs = strangers != tokens[:, t]
    nearest = differs.long().argmax(0)  # (S,)
    forced = tokens.clone()
    forced[:, t] = strangers.gather(0, nearest[None])[0]
    return forced, differs.any(0)


def first_wrong(tokens: torch.Tensor, target_tokens: torch.Tensor) -> torch.Tensor:
    """The position of the first token that is wrong, N where none is: (S, N), (S, N) -> (S,)."""
    wrong = tokens != target_tokens
    return torch.where(wrong.any(1), wrong.long().argmax(1), tokens.shape[1])


def run(setup: Setup, seed: int) -> dict:
    """For each of `MEASURES`: `forced[who][i][s]`, by how much it grows at position s if t_i was forced.

    `natural[who][d]`: the same d tokens behind the first mistake that the backbone makes by itself.
    """
    models = models_of(setup, seed, READINGS)
    backbone = models.trained.backbone
    tokens = models.test["tokens"][: setup.config["study"].probed]
    prompt, target_tokens = tokens[:, :-1].flatten(1).long(), tokens[:, -1].long()
    N, codebook = target_tokens.shape[1], models.codebook.cpu()
    if N < 3:
        raise UserError(f"--vqgan-factor: {N} tokens an image leave no place for a wrong one; give less")
    greedy = generate_all(setup, backbone, tokens)

    def goes_on(y: torch.Tensor, t: int, rows: torch.Tensor) -> torch.Tensor:
        """What the backbone writes behind the tokens up to t, in rows of y (S, N): (len(rows), N)."""
        written = y[rows].clone()
        if t + 1 < N:
            start = torch.cat([prompt[rows], written[:, : t + 1]], dim=1).to(setup.device)
            with setup.autocast:
                written[:, t + 1 :] = backbone.generate(start, N - t - 1).tokens.cpu()
        return written

    def measured(y: torch.Tensor) -> torch.Tensor:
        """`MEASURES` of the backbone's images (S, N) and of each refiner's: (measure, who, S, N)."""
        rollout, images = greedy._replace(tokens=y), [y]
        images += [
            refine_all(setup, models, refiner, rollout) for refiner in models.trained.refiners.values()
        ]
        error = torch.stack([vsr.cosine_error(image, target_tokens, codebook) for image in images])
        return torch.stack([error, (torch.stack(images) != target_tokens).float()])

    clean, positions, forced = measured(greedy.tokens), list(range(min(4, N // 2), N - 1, 8)), []
    for t in positions:
        y, wrong = forced_at(t, greedy.tokens)
        y = torch.cat([goes_on(y, t, rows) for rows in torch.arange(len(y)).split(64)])
        forced.append((measured(y) - clean)[:, :, wrong].sum(2) / max(1, wrong.sum()))  # (measure, who, N)

    first, mended = first_wrong(greedy.tokens, target_tokens), greedy.tokens.clone()
    for t in sorted(set(first.tolist()) - {N}):
        rows = (first == t).nonzero().flatten()
        mended[rows] = goes_on(target_tokens, t, rows)  # all before t is true as well
    damage, place = clean - measured(mended), torch.arange(N)
    natural = [damage[:, :, first + d < N, (first + d)[first + d < N]].mean(2) for d in range(N // 2)]
    behind = (damage * (place > first[:, None])).sum(3)[:, :, first < N].mean(2)  # (measure, who)
    result = {"positions": positions, "with_a_mistake": (first < N).float().mean().item()}
    for measure, *kinds in zip(
        MEASURES, torch.stack(forced, dim=2), torch.stack(natural, dim=2), behind, strict=True
    ):
        names = ("forced", "natural", "natural_behind")  # of each who: (t, N), (d,), a number
        by_who = (dict(zip(COLOURS, kind.tolist(), strict=True)) for kind in kinds)
        result[measure] = dict(zip(names, by_who, strict=True))
    return result


def summed_after(cell: dict, measure: str, name: str) -> list:
    """The summed damage behind each of the forced positions."""
    rows = zip(cell["positions"], cell[measure]["forced"][name], strict=True)
    return [sum(row[t + 1 :]) for t, row in rows]


def taken_back(cells: list, name: str, value_of) -> list:
    """The part of the backbone's damage that a refiner takes back, in each cell."""
    both = [(value_of(cell, "backbone"), value_of(cell, name)) for cell in cells]
    return [report.share(before - after, before) for before, after in both]


def show(cells: list) -> str:
    lines = [
        "what one wrong token adds behind it (cosine error by seed), and the part taken back; "
        f"{report.of_seeds(cells)}"
    ]
    for measure in MEASURES:
        lines += ["", f"{measure:26}" + "".join(f"{name:>26}" for name in COLOURS)]
        kinds = {"natural, the first one": lambda cell, name, m=measure: cell[m]["natural_behind"][name]}
        for i, t in enumerate(cells[0]["positions"]):
            kinds[f"forced at {t}"] = lambda cell, name, m=measure, i=i: summed_after(cell, m, name)[i]
        for kind, value_of in kinds.items():
            added = [value_of(cell, "backbone") for cell in cells]
            by_seed = measure == "cosine error"  # of another codebook each
            row = [", ".join(f"{value:.2f}" for value in added) if by_seed else estimate(added)]
            row += [estimate(taken_back(cells, name, value_of)) for name in READ_WRITTEN]
            lines.append(f"{kind:26}" + "".join(f"{text:>26}" for text in row))
    with_one = estimate([cell["with_a_mistake"] for cell in cells])
    return "\n".join([*lines, f"sentences with a mistake: {with_one}"])


def plot(path, cells: list) -> None:
    figure = report.new_figure(4, 3.4)
    for measure, by_position, behind in zip(MEASURES, figure.axes[::2], figure.axes[1::2], strict=True):
        for name, colour in COLOURS.items():
            sums = zip(*(summed_after(cell, measure, name) for cell in cells), strict=True)
            means = [statistics.fmean(values) for values in sums]
            by_position.plot(cells[0]["positions"], means, "o-", color=colour, label=name)
            rows = zip(*(cell[measure]["natural"][name] for cell in cells), strict=True)
            behind.plot([statistics.fmean(values) for values in rows], color=colour, label=name)
        by_position.set(xlabel="position t of the forced token", ylabel=f"{measure} added behind it")
        behind.set(xlabel="tokens after the first natural mistake", ylabel=f"{measure} added")
    for axis in figure.axes:
        axis.axhline(0, color="#888888", linewidth=0.6)
    report.legend(figure.axes[0])
    report.save(figure, path)
