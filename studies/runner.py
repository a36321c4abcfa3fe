"""What the studies share: the trained models of a seed, one more refiner, what it writes, how good
that is.

Every comparison is paired: all methods of a seed have its tokenizer, its backbone and its test
sentences.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn as nn

import data
import evaluate
import runtime
import train_refiner
import vsr
from runtime import UserError
from vsr import Refiner, Rollout

OURS = "tokens+query"  # what the project's own refiner reads
READS = tuple(OURS.split("+"))
READINGS = ("tokens", OURS)  # the paper's and ours: those that read what was written
# {row of a table: what its refiner reads}
READ_BY = {evaluate.method_name(name): tuple(name.split("+")) for name in train_refiner.READINGS}


@dataclass
class StudyConfig:
    """Sizes of the studies."""

    lora_rank: Annotated[int, "rank of LoRA's low-rank adapters"] = 64
    samples: Annotated[int, "n of the likeliest of n samples, and of their consensus"] = 8
    steps: Annotated[int, "steps of each refiner, where it is not the default one that is asked about"] = 1000
    window_steps: Annotated[int, "steps of each refiner in window"] = 600
    rollouts: Annotated[int, "rollouts of each backbone in maturity and backbones"] = 8192
    probed: Annotated[int, "sentences in probe", (2, 10**9)] = 256
    rounds: Annotated[int, "rounds of each timing in speed and size"] = 5


# For --preset smoke
SMOKE = {
    "lora_rank": 2,
    "samples": 2,
    "steps": 8,
    "window_steps": 4,
    "rollouts": 64,
    "probed": 16,
    "rounds": 1,
}


@dataclass(frozen=True)
class Setup:
    """What every cell needs: the configurations, where models are kept, and on what to compute."""

    config: dict  # {"data", "vqgan", "gpt", "refiner", "study": a config dataclass}
    work: Path  # a folder with the models of each seed, which many studies use
    unfinished: Path  # a folder for what the present cell has trained so far
    device: torch.device
    dtype: torch.dtype

    @property
    def autocast(self) -> torch.autocast:
        return runtime.autocast(self.device, self.dtype)

    def progress(self, name: str, made_with: dict) -> tuple[Path, dict]:
        """Where this cell's training `name` is kept while it goes on, and what a kept one must agree with.

        This is what `runtime.training_steps` calls `progress`.
        """
        everywhere = {"dtype": str(self.dtype), "data": asdict(self.config["data"])}
        return self.unfinished / f"{name}.progress", {**everywhere, **made_with}


class SeedModels(NamedTuple):
    """The trained models of a seed, and the test sentences to measure them on."""

    trained: train_refiner.Trained
    test: dict  # {"tokens": (S, 2K+2, N), "images": (S, 3, H, W) the true targets, "task": (S,)}

    @property
    def codebook(self) -> torch.Tensor:
        return self.trained.tokenizer.codebook.vectors

    @property
    def grid(self) -> tuple[int, int]:
        return self.trained.tokenizer.grid


def at_most(sizes: dict, config: dict) -> dict:
    """{component: {field: size}} as changes of a configuration that may already be below them."""
    return {
        part: {name: min(size, getattr(config[part], name)) for name, size in fields.items()}
        for part, fields in sizes.items()
    }


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


# Models and rollouts


def models_of(
    setup: Setup, seed: int, readings=(), label="base", changes=None, test_data=None, make=data.Sentences
) -> SeedModels:
    """Train what is missing of a seed's models, and make its test sentences.

    readings: of the refiners to train with the default configuration. changes: {component: {field:
    value}}, with a label of their own for the folder. test_data: a DataConfig for the test sentences, if
    they are not those of the training. make: a class of sentences, of (DataConfig, seed).
    """
    changes = changes or {}
    config = {name: replace(part, **changes.get(name, {})) for name, part in setup.config.items()}
    sentences = make(config["data"], seed)
    folder = setup.work / f"{label}-{seed}"
    with runtime.locked(folder, "--work", wait=True):
        run = (setup.device, setup.dtype, seed)
        trained = train_refiner.train_models(folder, config, readings, sentences, *run)
    if test_data is not None:
        sentences = make(test_data, seed)
    total = config["data"].eval_sentences
    images, task = data.joined(sentences.batches("test", total))
    tokens = evaluate.encode_sentences(
        trained.tokenizer, sentences, "test", total, setup.device, setup.autocast
    )
    return SeedModels(trained, {"tokens": tokens, "images": images[:, -1], "task": task})


def replay(setup: Setup, models: SeedModels, reads=READS, first: int | None = None) -> tuple[dict, dict]:
    """Rollouts of a seed's training and validation sentences with the states that are read, and their
    target tokens.

    first: how many of each split, if not all.
    """
    trained, rollouts, target_tokens = models.trained, {}, {}
    for split, generated in trained.generated.items():
        known = trained.written_for(split)[:first], generated[:first]
        rollouts[split] = train_refiner.replay_rollouts(trained.backbone, *known, reads, setup.autocast)
        target_tokens[split] = known[0][:, -1]
    return rollouts, target_tokens


def with_backbone(
    setup: Setup, models: SeedModels, config: vsr.GPTConfig, seed: int, make=vsr.GPT
) -> SeedModels:
    """A seed's models with another backbone, pretrained on the same sentences, and what that writes."""
    trained, study, generated = models.trained, setup.config["study"], {}
    train, val = trained.tokens["train"], trained.tokens["val"]
    made_with = {"gpt": asdict(config), "codebook": runtime.fingerprint({"codebook": models.codebook})}
    backbone, _ = train_refiner.train_backbone(
        config, train, val, len(models.codebook), setup.device, setup.dtype, seed, make=make,
        progress=setup.progress("backbone", {**made_with, "images": train.shape[1]}),
    )  # fmt: skip
    for split, tokens in trained.tokens.items():
        known = tokens[: study.rollouts], setup.autocast, setup.config["refiner"].rollout_batch
        generated[split], _ = train_refiner.make_rollouts(backbone, *known)
    return models._replace(trained=trained._replace(backbone=backbone, generated=generated))


def part_of(rollout: Rollout, rows) -> Rollout:
    """Some rows of a rollout; rows: whatever indexes a tensor."""
    return Rollout(*[None if values is None else values[rows] for values in rollout])


@torch.no_grad()
def generate_all(setup: Setup, backbone, tokens, temperature=0.0, generator=None, top_p=1.0) -> Rollout:
    """Rollouts (S, N) of the last images of sentences (S, 2K+2, N), with states, on the CPU."""
    written, states, query = [], [], []
    for part in tokens.split(setup.config["refiner"].rollout_batch):
        prompt = part[:, :-1].flatten(1).long().to(setup.device)
        with setup.autocast:
            rollout = backbone.generate(prompt, part.shape[2], temperature, 0, top_p, generator)
        written.append(rollout.tokens.cpu())
        states.append(rollout.states.cpu())
        query.append(rollout.query.cpu())
    return Rollout(torch.cat(written), torch.cat(states), torch.cat(query))


@torch.no_grad()
def force_all(setup: Setup, backbone, tokens) -> torch.Tensor:
    """The teacher-forced output (S, N) for the last images of sentences (S, 2K+2, N), on the CPU."""
    written = []
    for part in tokens.split(64):
        part = part.long().to(setup.device)
        with setup.autocast:
            states = backbone.replay(part[:, :-1].flatten(1), part[:, -1]).states
            written.append(backbone.logits(states).argmax(-1).cpu())
    return torch.cat(written)


# Refiners


def fit(
    setup: Setup, models: SeedModels, name: str, rollouts: dict, target_tokens: dict, seed: int, reads=READS,
    rows=slice(None), loss_function=vsr.cosine_loss, make=Refiner, **changes,
):  # fmt: skip
    """Train one more refiner -> (refiner, log).

    name: of the setting, another one for each refiner of a cell; an interrupted training goes on where it
    was. rows: which of the training rollouts it may see. changes: fields of `RefinerConfig`.
    """
    config = replace(setup.config["refiner"], **changes)
    if config.heads > config.width:
        problem = f"{config.heads} heads in a width of {config.width}"
        raise UserError(f"{name}: {problem}; change --refiner-heads or --refiner-width")
    rollouts = {**rollouts, "train": part_of(rollouts["train"], rows)}
    target_tokens = {**target_tokens, "train": target_tokens["train"][rows]}
    made_with = {"refiner": asdict(config), "reads": "+".join(reads), "rollouts": len(target_tokens["train"])}
    made_with["backbone"] = runtime.fingerprint(models.trained.backbone.state_dict())
    return train_refiner.train_refiner(
        config, reads, models.codebook, models.grid, rollouts, target_tokens, setup.device, setup.dtype, seed,
        loss_function, make, setup.progress(name, made_with),
    )  # fmt: skip


@torch.no_grad()
def refine_all(setup: Setup, models: SeedModels, refiner: Refiner, rollout: Rollout) -> torch.Tensor:
    """Refined tokens (S, N) of rollouts that are on the CPU."""
    refined = []
    for rows in torch.arange(len(rollout.tokens)).split(128):
        part = [None if values is None else values.to(setup.device) for values in part_of(rollout, rows)]
        with setup.autocast:
            tokens, _ = vsr.refine(refiner, models.codebook, *part)
        refined.append(tokens.cpu())
    return torch.cat(refined)


def fit_each(setup: Setup, seed: int, settings: dict) -> dict:
    """Train one refiner for each of {name: options of `fit`} on a seed's rollouts, and score them all."""
    models = models_of(setup, seed)
    rollouts, target_tokens = replay(setup, models)
    refiners, cost, steps = {}, {}, setup.config["study"].steps
    for name, options in settings.items():
        options = {"steps": steps, **options}
        refiners[name], log = fit(setup, models, name, rollouts, target_tokens, seed, **options)
        cost[name] = {
            "params": count(refiners[name]),
            "seconds": log["seconds"],
            "train_loss": log["loss"][-1],
            "val_loss": log["val_loss"][-1],
        }
    params = count(models.trained.backbone)
    result = score_refiners(setup, models, refiners, seed)
    return {**result, "cost": cost, "steps": steps, "backbone_params": params}


def fit_readings(setup: Setup, models: SeedModels, seed: int) -> dict:
    """Train the refiners of `READ_BY` for a seed's backbone, and score them."""
    study, refiners = setup.config["study"], {}
    known = replay(setup, models, first=study.rollouts)
    for name, reads in READ_BY.items():
        refiners[name], _ = fit(setup, models, name, *known, seed, reads, steps=study.steps)
    return score_refiners(setup, models, refiners, seed)


# Scores


def score_refiners(setup: Setup, models: SeedModels, refiners: dict, seed: int, others=None) -> dict:
    """Scores of the backbone, and of refiners {name: refiner} over its greedy and teacher-forced output.

    others: what more was written, {method: (S, N)}.
    """
    tokenizer, backbone, tokens = models.trained.tokenizer, models.trained.backbone, models.test["tokens"]
    written = evaluate.decode_methods(tokenizer, backbone, refiners, tokens, setup.autocast, seed)
    written |= others or {}
    test = models.test
    scores = evaluate.score_methods(tokenizer, written, test["images"], test["task"], setup.autocast)
    return {"scores": scores, "agreement": agreement(written, test)}


def agreement(written: dict, test: dict) -> dict:
    """How many tokens are right under greedy decoding, under a method, and under `parallel`, if it is there.

    {method: {task: [[[n, n], [n, n]], [[n, n], [n, n]]]}}, indexed by right (1) or wrong (0) of the three.
    """
    target_tokens, result = test["tokens"][:, -1].long(), {}
    for method in written if "parallel" in written else ():
        if evaluate.has_gap(method):
            three = (written[name].long() == target_tokens for name in ("ar_greedy", method, "parallel"))
            case = sum(4 // 2**i * right.long() for i, right in enumerate(three))  # (S, N), 0 to 7
            by_task = {task: case[test["task"] == i] for i, task in enumerate(data.TASKS)}
            counts = {task: torch.bincount(x.flatten(), minlength=8) for task, x in by_task.items()}
            result[method] = {task: n.view(2, 2, 2).tolist() for task, n in counts.items()}
    return result
