"""What can be had by decoding with more care? Each of the backbone's own ways of writing, at its best.

A repair of greedy decoding is worth little if another way of decoding does as well. Samples at several
temperatures, with and without nucleus sampling; the likeliest of n samples; their consensus, the code
nearest to the mean embedding; beam search. The setting of each is chosen on validation sentences and measured
on test sentences. Stated before it was run: for the refiner speaks that it leaves less error than the best of
these at its best setting; against it, that one of them does as well.
"""

import torch
import torch.nn.functional as F

import train_refiner
import vsr
from evaluate import by_method
from studies import report
from studies.report import GROUPS
from studies.runner import READ_BY, SeedModels, Setup, generate_all, models_of, score_refiners

MINUTES = 20
SETTINGS = [{}]

TEMPERATURES = (0.3, 0.5, 0.7, 1.0)
TOP_P = (0.8, 1.0)
WIDTHS = (2, 4, 8)


@torch.no_grad()
def samples_of(setup: Setup, backbone, tokens, n: int, temperature: float, seed: int, top_p=1.0):
    """n samples of each last image: tokens (n, S, N), and the backbone's log-likelihood of each (n, S)."""
    generator, samples, likelihoods = torch.Generator().manual_seed(seed), [], []
    for _ in range(n):
        rollout = generate_all(setup, backbone, tokens, temperature, generator, top_p)
        logits = backbone.logits(rollout.states.to(setup.device)).cpu()  # (S, N, V)
        chosen = logits.log_softmax(-1).gather(-1, rollout.tokens[..., None])[..., 0]  # (S, N)
        samples.append(rollout.tokens)
        likelihoods.append(chosen.sum(1))
    return torch.stack(samples), torch.stack(likelihoods)


def likeliest(samples: torch.Tensor, likelihoods: torch.Tensor) -> torch.Tensor:
    """Of samples (n, S, N), the one that the backbone finds likeliest: (S, N)."""
    return samples[likelihoods.argmax(0), torch.arange(samples.shape[1])]


def consensus(samples: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The code nearest to the mean embedding of samples (n, S, N): hedging over many paths. (S, N)."""
    return vsr.nearest_code(F.normalize(codebook, dim=-1)[samples].mean(0), codebook)


@torch.no_grad()
def beam_search(backbone: vsr.GPT, prompt: torch.Tensor, N: int, width: int) -> torch.Tensor:
    """The likeliest of the sequences that a beam of `width` finds: prompts (B, P) -> tokens (B, N)."""
    B, P, config = *prompt.shape, backbone.config
    shape = (config.layers, 2, B * width, config.heads, P + N, config.head_width)
    cache = torch.zeros(shape, device=prompt.device)
    inputs = F.pad(prompt, (1, 0), value=backbone.start_token).repeat_interleave(width, 0)  # (B W, P+1)
    state = backbone.hidden(inputs, cache)[:, -1]  # (B W, C)
    total = torch.full((B, width), -torch.inf, device=prompt.device)
    total[:, 0] = 0  # at first all beams are one and the same
    tokens = torch.empty(B, width, 0, dtype=torch.long, device=prompt.device)
    for t in range(N):
        step = backbone.logits(state).log_softmax(-1).view(B, width, -1)  # (B, W, V)
        total, chosen = (total[..., None] + step).flatten(1).topk(width)  # (B, W)
        beam, token = chosen // step.shape[-1], chosen % step.shape[-1]
        rows = (torch.arange(B, device=beam.device)[:, None] * width + beam).flatten()  # (B W,)
        tokens = torch.cat([tokens.gather(1, beam[..., None].expand_as(tokens)), token[..., None]], dim=-1)
        if t + 1 < N:
            cache = cache[:, :, rows]
            state = backbone.hidden(token.view(-1, 1), cache, start=P + 1 + t)[:, 0]
    return tokens[:, 0]


def ways(setup: Setup, models: SeedModels, tokens: torch.Tensor, n: int, seed: int, chosen=None) -> dict:
    """What every way of decoding writes with every setting: {way: {setting: (S, N)}}.

    chosen: {way: setting}, if no others are needed.
    """
    backbone, codebook, N = models.trained.backbone, models.codebook.cpu(), tokens.shape[2]
    written = {"sampled": {}, "likeliest of n": {}, "consensus of n": {}, "beam search": {}}
    for temperature in TEMPERATURES:
        for top_p in TOP_P:
            name = f"temperature {temperature}, top-p {top_p}"
            if chosen and name not in chosen.values():
                continue
            samples = samples_of(setup, backbone, tokens, n, temperature, seed, top_p)
            written["sampled"][name] = samples[0][0]
            written["likeliest of n"][name] = likeliest(*samples)
            written["consensus of n"][name] = consensus(samples[0], codebook)
    for width in WIDTHS:
        if chosen and chosen["beam search"] != f"width {width}":
            continue
        parts = tokens[:, :-1].flatten(1).long().split(64)
        with setup.autocast:
            found = [beam_search(backbone, part.to(setup.device), N, width).cpu() for part in parts]
        written["beam search"][f"width {width}"] = torch.cat(found)
    return written


def run(setup: Setup, seed: int) -> dict:
    models = models_of(setup, seed, train_refiner.READINGS)
    n, val, codebook = setup.config["study"].samples, models.trained.tokens["val"], models.codebook.cpu()
    chosen, errors = {}, {}
    for way, settings in ways(setup, models, val, n, seed).items():
        errors[way] = {
            name: vsr.cosine_error(y, val[:, -1].long(), codebook).mean().item()
            for name, y in settings.items()
        }
        chosen[way] = min(errors[way], key=errors[way].get)
    test = ways(setup, models, models.test["tokens"], n, seed, chosen)
    others = {way: test[way][name] for way, name in chosen.items()}
    refiners = by_method(models.trained.refiners)
    result = score_refiners(setup, models, refiners, seed, others)
    return {**result, "chosen": chosen, "validation": errors}


def show(cells: list) -> str:
    names = [*cells[0]["chosen"], "expected_embedding", *READ_BY]
    lines = [report.measures_table(cells, names, GROUPS), "", "chosen on validation, by seed"]
    lines += [f"{way:24}" + "; ".join(cell["chosen"][way] for cell in cells) for way in cells[0]["chosen"]]
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    names = ["ar_greedy", *cells[0]["chosen"], "expected_embedding", *READ_BY]
    figure = report.new_figure(3, 4.0, 3.4)
    colours = ["#1d4e9e" if name in READ_BY else "#b8b8b8" for name in names]
    for axis, head in zip(figure.axes, ("gap closed", "tokens right, gained", "dB gained"), strict=True):
        values = [report.MEASURES[head](cells, name, "all") for name in names]
        report.bars(axis, names if axis is figure.axes[0] else [""] * len(names), values, colours)
        axis.set_xlabel(head)
    report.save(figure, path)
