"""What `speed` times: every stage, on models that are untrained, since speed does not depend on the
weights.

Every function gives lists of seconds, one entry a round; what is to be compared alternates within
a round.
"""

import copy
import functools
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import runtime
import train_refiner
import vqgan
import vsr
from studies.gpt2 import GPT2
from studies.runner import OURS, READS, Setup
from studies.textbook import TextbookGPT
from studies.timing import median_seconds, side_by_side
from vsr import Refiner, Rollout

PRODUCT = 2048  # the matrices of the product that training is compared with


class Models(NamedTuple):
    """Untrained models of one size."""

    tokenizer: vqgan.VQGAN
    backbone: vsr.GPT
    refiners: dict  # {"tokens", "tokens+query": Refiner}
    N: int  # tokens of an image
    T: int  # tokens of a sentence


def new_models(setup: Setup, image_size: int, num_demos: int) -> Models:
    config, device = setup.config, setup.device
    tokenizer = vqgan.VQGAN(config["vqgan"], image_size).to(device, memory_format=torch.channels_last)
    N, images = tokenizer.tokens_per_image, 2 * num_demos + 2
    backbone = vsr.GPT(config["gpt"], config["vqgan"].codebook_size, N, images).to(device)
    dims = config["vqgan"].code_dim, config["gpt"].width
    refiners = {}
    for reads in (("tokens",), READS):
        refiners["+".join(reads)] = Refiner(config["refiner"], reads, tokenizer.grid, *dims).to(device)
    return Models(tokenizer, backbone, refiners, N, images * N)


def flops_per_token(model: vsr.GPT) -> float:
    """Operations of a training step for each token of whole sentences: 6 a weight of a matrix product, and
    the products of attention, 12 layers * H * d * T (Chowdhery et al., 2022, appendix B). The causal half
    counts as done."""
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    config = model.config
    return 6 * weights + 12 * config.layers * config.heads * config.head_width * model.max_tokens


def training_step(model, loss_function, optimizers: list, clip: float | None = 1.0):
    """A step on a batch that lies ready: the model's work, and nothing else of a training loop."""
    return lambda: train_refiner.optimizer_step(loss_function(), model, optimizers, 1e-4, clip)


def backbone_step(setup: Setup, model, tokens: torch.Tensor, dtype, optimizers=None):
    """`training_step` of a backbone on sentences (B, T), with the optimizers of the pretraining or others."""

    def loss():
        with runtime.autocast(setup.device, dtype):
            logits = model(tokens)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    return training_step(model, loss, optimizers or train_refiner.make_optimizers(model, 1e-4, dtype))


def training(setup: Setup, models: Models, tokens: torch.Tensor, gpt2: GPT2 | None, rounds: int) -> dict:
    """{dtype: {who: seconds}}: training steps on the same batch, and products of large matrices."""
    device, backbone = setup.device, models.backbone
    products = 1 if device.type == "cpu" else 100  # on a GPU one is over before the next call
    with_adamw, plain = copy.deepcopy(backbone), TextbookGPT(backbone).to(device)
    result = {"tokens": tokens.numel(), "flops": flops_per_token(backbone) * tokens.numel()}
    result |= {"product_flops": products * 2 * PRODUCT**3, "seconds": {}}

    def adamw(model):
        return [torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)]

    for dtype in dict.fromkeys((torch.float32, setup.dtype)):
        large = torch.randn(PRODUCT, PRODUCT, device=device, dtype=dtype)
        steps = {
            "ours": backbone_step(setup, backbone, tokens, dtype),
            "textbook": backbone_step(setup, plain, tokens, dtype),
            "ours, AdamW": backbone_step(setup, with_adamw, tokens, dtype, adamw(with_adamw)),
        }
        if gpt2 is not None:
            steps["GPT-2, AdamW"] = backbone_step(setup, gpt2, tokens, dtype, adamw(gpt2))
        steps["product"] = lambda large=large: [large @ large for _ in range(products)]
        name = str(dtype).removeprefix("torch.")
        result["seconds"][name] = side_by_side(steps, device, rounds)
    return result


def uncached(backbone, sentences: torch.Tensor, N: int, device) -> float:
    """Seconds of a loop without a KV cache for the last N tokens of sentences (B, T), all of them given.

    Every eighth of its N steps is timed, and stands for the others.
    """
    steps = {}
    for t in range(0, N, 8):
        inputs = backbone.shifted(sentences[:, : sentences.shape[1] - N + t + 1])  # (B, P+t+1)
        steps[t] = lambda inputs=inputs: backbone.logits(backbone.hidden(inputs)[:, -1]).argmax(-1)
    return sum(median_seconds(steps, device, 1).values()) * N / len(steps)


@torch.no_grad()
def generation(setup: Setup, models: Models, gpt2: GPT2 | None, rounds: int) -> dict:
    """{batch: {what: seconds}}: generating, reading the prompt alone, the refining passes, no cache."""
    N, backbone, device = models.N, models.backbone, setup.device
    codebook, result = models.tokenizer.codebook.vectors, {}
    for batch in (1, 16, 64, 256):
        sentences = torch.randint(len(codebook), (batch, models.T), device=device)
        prompt = sentences[:, :-N]
        with setup.autocast:
            rollout = backbone.replay(prompt, sentences[:, -N:])
            timed = {
                "cached": functools.partial(backbone.generate, prompt, N),
                "prompt": functools.partial(backbone.generate, prompt, 1),
            }
            for reading, refiner in models.refiners.items():
                timed[f"refine {reading}"] = functools.partial(vsr.refine, refiner, codebook, *rollout)
            if gpt2 is not None:
                timed["GPT-2"] = functools.partial(gpt2.generate, prompt, N)
            seconds = side_by_side(timed, device, rounds)
            seconds["uncached"] = [uncached(backbone, sentences, N, device)]
        result[str(batch)] = seconds
    return result


def reading_seconds(setup: Setup, models: Models, rounds: int) -> dict:
    """Seconds to read all weights, and the KV cache of one sentence, at the speed of a copy.

    A decoding step has to read both: that is the least it can take.
    """
    block = torch.ones(2**25, device=setup.device)  # 128 MiB
    other = torch.ones_like(block)
    seconds = median_seconds({"copy": lambda: other.copy_(block)}, setup.device, rounds)["copy"]
    per_byte = seconds / (2 * block.numel() * block.element_size())
    config = models.backbone.config
    weights = sum(p.numel() * p.element_size() for p in models.backbone.parameters())
    cache = 2 * config.layers * models.T * config.heads * config.head_width * setup.dtype.itemsize
    return {"weights": weights * per_byte, "cache": cache * per_byte}


@torch.no_grad()
def tokenizer(setup: Setup, models: Models, images: torch.Tensor, rounds: int) -> dict:
    """{"encode", "decode": seconds} of a batch of images."""
    with setup.autocast:
        codes = models.tokenizer.encode(images)
        timed = {
            "encode": functools.partial(models.tokenizer.encode, images),
            "decode": functools.partial(models.tokenizer.decode, codes),
        }
        return side_by_side(timed, setup.device, rounds)


def loops(setup: Setup, seed: int, models: Models, images, tokens: torch.Tensor, rounds: int) -> dict:
    """{stage: {"loop", "model": seconds a step}}: a real training loop, and `training_step` alone.

    The loop draws its batches, moves them, logs and shows its bar. It validates on one sentence, and saves
    nothing.
    """
    config, device, steps = setup.config, setup.device, min(40, setup.config["study"].steps)
    sentences = data.Sentences(config["data"], seed)
    codebook, refiner = models.tokenizer.codebook.vectors.detach(), models.refiners[OURS]
    train = tokens.view(len(tokens), -1, models.N).cpu().short()  # (S, 2K+2, N)
    query = torch.randn(len(train), models.N, config["gpt"].width).bfloat16()
    rollout, target_tokens = Rollout(train[:, -1], None, query), train[:, -2]
    few = Rollout(train[:1, -1], None, query[:1])
    rows = torch.randint(len(train), (config["refiner"].batch_size,))
    y, states, true = (x[rows].to(device) for x in (rollout.tokens.long(), query, target_tokens.long()))

    def tokenizer_loss():
        with setup.autocast:
            rebuilt, _, _, codebook_loss, commitment_loss = models.tokenizer(images)
        loss = F.mse_loss(rebuilt, images) + vqgan.gradient_loss(rebuilt, images)
        return loss + 0.1 * (codebook_loss + commitment_loss)

    def refiner_loss():
        with setup.autocast:
            refined = refiner(codebook[y], None, states)
        return vsr.cosine_loss(refined, codebook[true])

    adamw = torch.optim.AdamW(models.tokenizer.parameters())
    bare = {
        "tokenizer": training_step(models.tokenizer, tokenizer_loss, [adamw], clip=None),
        "backbone": backbone_step(setup, models.backbone, tokens, setup.dtype),
        "refiner": training_step(
            refiner, refiner_loss, train_refiner.make_optimizers(refiner, 1e-4, setup.dtype)
        ),
    }
    short = {name: replace(config[name], steps=steps) for name in ("vqgan", "gpt", "refiner")}
    where = (device, setup.dtype, seed)
    whole = {
        "tokenizer": lambda: train_refiner.train_tokenizer(short["vqgan"], sentences, *where),
        "backbone": lambda: train_refiner.train_backbone(
            short["gpt"], train, train[:1], len(codebook), *where
        ),
        "refiner": lambda: train_refiner.train_refiner(
            short["refiner"], READS, codebook, models.tokenizer.grid, {"train": rollout, "val": few},
            {"train": target_tokens, "val": target_tokens[:1]}, *where
        ),
    }  # fmt: skip
    result = {}
    for name, loop in whole.items():

        def model(step=bare[name]):
            for _ in range(steps):
                step()

        seconds = side_by_side({"loop": loop, "model": model}, device, rounds)
        result[name] = {key: [s / steps for s in values] for key, values in seconds.items()}
    return result


def growth(setup: Setup, image_size: int, num_demos: int, rounds: int, batch: int = 4) -> dict:
    """Seconds a sentence to train on it, to generate its last image, to refine that, at one size."""
    models = new_models(setup, image_size, num_demos)
    codebook, N = models.tokenizer.codebook.vectors.detach(), models.N
    sentences = torch.randint(len(codebook), (batch, models.T), device=setup.device)
    with setup.autocast:
        rollout = models.backbone.replay(sentences[:, :-N], sentences[:, -N:])

    def generate():
        with torch.no_grad(), setup.autocast:
            models.backbone.generate(sentences[:, :-N], N)

    def refine():
        with setup.autocast:
            vsr.refine(models.refiners[OURS], codebook, *rollout)

    train = backbone_step(setup, models.backbone, sentences, setup.dtype)
    timed = {"train": train, "generate": generate, "refine": refine}
    seconds = side_by_side(timed, setup.device, rounds)
    per_sentence = {name: [s / batch for s in values] for name, values in seconds.items()}
    return {"tokens": N, "num_demos": num_demos, "seconds_per_sentence": per_sentence}
