"""When is the written image needed? When the prompt leaves a choice.

With one truth, the best answer is a function of the prompt, and nobody needs to know what was written. Here
nothing tells the hue of a scene (`studies/hues.py`), but both objects have the same one: six answers
are valid, and the backbone chooses one while it writes. Every image is compared with the valid answer nearest
to it. Stated before it was run (the kept hue, and greedy decoding as a rival: before the second run):

    sampled                     chooses among the hues, and sometimes changes its mind within an image
    greedy                      chooses too, and is coherent more often
    parallel, true hue          cannot know what was chosen: it gives a mean of the hues, far from all of them
    refined, true hue           the single truth as target, the hue that the scene happened to have: it says
                                nothing about the one that was written, so this hedges as well
    refined, nearest valid      the same refiner and loss, its target the valid answer nearest to what was
                                written: keeps the choice and repairs the rest
    parallel, nearest valid     has the same target, and does not know what was written: hedges

For refining the written image speaks that `refined, nearest valid` is nearer to a valid answer and more often
coherent than what was written, keeps its hue, and beats `parallel`, whatever its target. Against it, that it
does not, or that greedy decoding is all that one needs; against the single truth as target, that `refined,
true hue` is further from a valid answer than what was written.

`tokens` alone is also the case of a backbone behind an interface that gives no states.
"""

import base64
import io
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import vqgan
import vsr
from studies import report, runner
from studies.hues import HUES, OneHue, even_palette
from studies.runner import SeedModels, Setup, at_most, fit, generate_all, models_of, refine_all, replay

MINUTES = 28
SETTINGS = [{}]

SIZES = {"data": {"train_sentences": 10240}, "gpt": {"steps": 700}, "refiner": {"rollouts": 10240}}

TARGETS = ("true hue", "nearest valid")
SHOWN = (  # beside the query and the valid answer nearest to the sample
    "greedy",
    "sampled",
    "parallel, true hue, of sampled",
    "refined_tokens, true hue, of sampled",
    "parallel, nearest valid, of sampled",
    "refined_tokens, nearest valid, of sampled",
    "refined_tokens+query, nearest valid, of sampled",
)
MEASURES = {  # and their digits
    "cosine error": 3, "tokens right": 3, "PSNR": 1,
    "coherent": 3, "hue kept": 3, "colour": 2, "hues used": 1,
}  # fmt: skip


def nearest_valid(tokens: torch.Tensor, valid: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Which of the valid answers, tokens (S, HUES, N), has the least cosine error to tokens (S, N): (S,)."""
    errors = [vsr.cosine_error(tokens.long(), answer.long(), codebook).mean(1) for answer in valid.unbind(1)]
    return torch.stack(errors, dim=1).argmin(1)


def hues_of(images: torch.Tensor, objects: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The hue of each pixel by its nearest direction from grey, and how colourful it is.

    images: (S, 3, H, W). objects: (S, 2, H, W) bool. Returns shares (S, 2, HUES) of each object's pixels,
    and the chroma of each object as a part of the chroma it should have, (S, 2).
    """
    chroma = images - data.grey(images)  # (S, 3, H, W)
    wanted = even_palette() - data.grey(even_palette().movedim(2, 0)[None]).movedim(1, 3)[0]  # (HUES, 2, 3)
    shares, colour = [], []
    for number, seen in enumerate(objects.unbind(1)):  # (S, H, W)
        directions = F.normalize(wanted[:, number], dim=-1)  # (HUES, 3)
        nearest = torch.einsum("schw,kc->skhw", chroma, directions).argmax(1)  # (S, H, W)
        counts = F.one_hot(nearest, HUES) * seen[..., None]  # (S, H, W, HUES)
        pixels = seen.flatten(1).sum(1).clamp_min(1)  # (S,)
        shares.append(counts.flatten(1, 2).sum(1) / pixels[:, None])  # (S, HUES)
        strength = (chroma.norm(dim=1) * seen).flatten(1).sum(1) / pixels
        colour.append(strength / wanted[:, number].norm(dim=-1)[shares[-1].argmax(-1)])
    return torch.stack(shares, dim=1), torch.stack(colour, dim=1)


def is_coherent(shares: torch.Tensor) -> torch.Tensor:
    """Whether both objects have one hue, and the same: shares (S, 2, HUES) of `hues_of` -> (S,) bool."""
    return (shares[:, 0].argmax(-1) == shares[:, 1].argmax(-1)) & (shares.amax(-1).amin(1) > 0.9)


def score(setup: Setup, models, written: dict, valid: dict, objects: torch.Tensor) -> dict:
    """{method: {measure: value}}, each sentence against the valid answer nearest to it.

    A method ", of sampled" keeps the hue if that answer is also the one nearest to what was sampled.
    """
    result, tokenizer, codebook = {}, models.trained.tokenizer, models.codebook.cpu()
    chosen = {method: nearest_valid(y, valid["tokens"], codebook) for method, y in written.items()}
    for method, y in written.items():
        rows = torch.arange(len(y)), chosen[method]
        target_tokens, before = valid["tokens"][rows].long(), chosen[method.rpartition(", of ")[2]]
        images = evaluate.decode_images(tokenizer, y, setup.autocast)
        shares, colour = hues_of(images, objects)
        used = torch.bincount(chosen[method], minlength=HUES) / len(y)
        values = (
            vsr.cosine_error(y.long(), target_tokens, codebook).mean().item(),
            (y == target_tokens).float().mean().item(),
            vqgan.psnr(images, valid["images"][rows]).mean().item(),
            is_coherent(shares).float().mean().item(),
            (chosen[method] == before).float().mean().item(),
            colour.mean().item(),
            torch.special.entr(used).sum().exp().item(),
        )
        result[method] = dict(zip(MEASURES, values, strict=True))
    return result


class Choice(NamedTuple):
    """A seed's models, what they wrote, half of it greedy and half sampled, and the valid answers."""

    models: SeedModels
    sentences: OneHue
    rollouts: dict  # {"train", "val": Rollout}
    targets: dict  # {target: {"train", "val": (S, N)}}
    tests: dict  # {"greedy", "sampled": Rollout} of the test sentences
    valid: dict  # of these: {"tokens": (S, HUES, N), "images": (S, HUES, 3, H, W)}
    objects: torch.Tensor  # (S, 2, H, W) bool


def prepare(setup: Setup, seed: int) -> Choice:
    models = models_of(setup, seed, label="choice", changes=at_most(SIZES, setup.config), make=OneHue)
    tokenizer, backbone, codebook = models.trained.tokenizer, models.trained.backbone, models.codebook.cpu()
    sentences = OneHue(setup.config["data"], seed)

    def valid_answers(split: str, total: int) -> torch.Tensor:
        parts = sentences.valid(split, total).split(256)
        with torch.no_grad(), setup.autocast:
            found = [tokenizer.encode(part.flatten(0, 1).to(setup.device)) for part in parts]
        return torch.cat(found).view(total, HUES, -1).cpu()  # (S, HUES, N)

    rollouts, target_tokens = replay(setup, models, ("query",))
    targets = {TARGETS[0]: target_tokens, TARGETS[1]: {}}
    for split, rollout in rollouts.items():
        tokens = models.trained.written_for(split)
        half, generator = len(tokens) // 2, torch.Generator().manual_seed(seed)
        sampled = generate_all(setup, backbone, tokens[half:], 1.0, generator).tokens
        y, valid = torch.cat([rollout.tokens[:half], sampled]), valid_answers(split, len(tokens))
        rollouts[split] = rollout._replace(tokens=y)
        targets[TARGETS[1]][split] = valid[torch.arange(len(y)), nearest_valid(y, valid, codebook)]

    total, tests = len(models.test["tokens"]), {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        generator = torch.Generator().manual_seed(seed)
        tests[name] = generate_all(setup, backbone, models.test["tokens"], temperature, generator)
    valid = {"tokens": valid_answers("test", total), "images": sentences.valid("test", total)}
    return Choice(models, sentences, rollouts, targets, tests, valid, sentences.objects("test", total))


def run(setup: Setup, seed: int) -> dict:
    models, sentences, rollouts, targets, tests, valid, objects = prepare(setup, seed)
    tokenizer, codebook = models.trained.tokenizer, models.codebook.cpu()
    written = {name: rollout.tokens for name, rollout in tests.items()}
    for method, reads in runner.READ_BY.items():
        for target in TARGETS:
            name, steps = f"{method}, {target}", setup.config["study"].steps
            refiner, _ = fit(setup, models, name, rollouts, targets[target], seed, reads, steps=steps)
            for of, rollout in tests.items():
                written[f"{name}, of {of}"] = refine_all(setup, models, refiner, rollout)
    written["truth"] = models.test["tokens"][:, -1]  # what the tokenizer leaves of it
    result = {"scores": score(setup, models, written, valid, objects)}
    if seed == 0:
        # The first four samples that are coherent, and the first four that are not
        images = evaluate.decode_images(tokenizer, written["sampled"], setup.autocast)
        coherent = is_coherent(hues_of(images, objects)[0])
        kinds = [(coherent == wanted).nonzero().flatten()[:4] for wanted in (True, False)]
        rows = torch.cat(kinds)
        chosen = nearest_valid(written["sampled"][rows], valid["tokens"][rows], codebook)
        shown = [evaluate.decode_images(tokenizer, written[name][rows], setup.autocast) for name in SHOWN]
        query = data.joined(sentences.batches("test", len(coherent)))[0][rows, -2]
        columns = torch.stack([query, *shown, valid["images"][rows, chosen]])  # (columns, rows, 3, S, S)
        result["coherent_samples"] = len(kinds[0])
        result["samples"] = png_text(columns.permute(2, 1, 3, 0, 4).flatten(3).flatten(1, 2))
    return result


def png_text(image: torch.Tensor) -> str:
    """An image (3, H, W) as the text of a PNG file: samples are kept beside their numbers."""
    file = io.BytesIO()
    Image.fromarray(data.to_uint8(image).permute(1, 2, 0).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def show(cells: list) -> str:
    """Each method's measures; cosine errors as differences to sampling, within a seed."""
    heads = ["cosine error - sampled", *list(MEASURES)[1:]]
    lines = [
        f"against the nearest valid answer; {report.of_seeds(cells)}",
        f"{'':50}" + "".join(f"{head:>26}" for head in heads),
    ]
    for name in cells[0]["scores"]:
        row = []
        for measure, digits in MEASURES.items():
            values = [cell["scores"][name][measure] for cell in cells]
            if measure == "cosine error":
                base = [cell["scores"]["sampled"][measure] for cell in cells]
                values = [a - b for a, b in zip(values, base, strict=True)]
            row.append(report.estimate(values, digits))
        lines.append(f"{name:50}" + "".join(f"{text:>26}" for text in row))
    return "\n".join(lines)


def plot(path, cells: list) -> None:
    names = [name for name in cells[0]["scores"] if not name.endswith("of greedy")]
    shown = [measure for measure in MEASURES if measure != "hues used"]
    figure = report.new_figure(len(shown), 2.6, 0.8 + 0.32 * len(names))
    colours = [evaluate.COLOURS.get(name.split(",")[0], evaluate.COLOURS["ar_greedy"]) for name in names]
    labels = [name.removesuffix(", of sampled") for name in names]
    for axis, measure in zip(figure.axes, shown, strict=True):
        values = [[cell["scores"][name][measure] for cell in cells] for name in names]
        report.bars(axis, labels if axis is figure.axes[0] else [""] * len(names), values, colours)
        axis.set_xlabel(measure)
    report.save(figure, path)

    first = next((cell for cell in cells if "samples" in cell), None)  # of seed 0
    if first is None:
        return  # another process is at it
    image = Image.open(io.BytesIO(base64.b64decode(first["samples"])))
    pixels = data.to_float(image)  # (3, rows S, columns S)
    size = pixels.shape[2] // (len(SHOWN) + 2)
    rows = [list(row.split(size, dim=2)) for row in pixels.split(size, dim=1)]
    names = (name.removeprefix("refined_").removesuffix(", of sampled") for name in SHOWN)
    titles = ["query", *names, "nearest valid"]
    coherent = first["coherent_samples"]
    labels = ["coherent"] * coherent + ["incoherent"] * (len(rows) - coherent)
    data.save_picture(path.with_name(f"{path.stem}_samples.png"), rows, labels, titles)
