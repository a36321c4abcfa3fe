"""Visual self-refinement: a frozen autoregressive backbone writes, a small bidirectional Transformer corrects.

An autoregressive model f_AR writes an image token by token; each mistake becomes the context of the next
token, so errors accumulate. After pretraining, with everything else frozen, the refiner g_phi reads the whole
generated sequence at once and moves every token's embedding towards the true one:

    y_q   = f_AR(prompt)                       N tokens, generated free-running            `GPT.generate`
    e_seq = codebook[y_q]                      their embeddings, (N, D) unit norm
    e'_seq = g_phi(e_seq)                      all positions at once                       `Refiner`
    loss  = mean_t (1 - cos(e'_t, e*_t))       e* = codebook[y*], the true tokens          `cosine_loss`
    y'_t  = argmax_v <e'_t, codebook_v>        the refined tokens                          `nearest_code`

A worked example: K = 1 demonstration, images of N = 4 tokens, so a visual sentence of 16 tokens.

    image      src_1        dst_1        src_q        dst_q
    tokens     7 7 2 2      0 0 5 5      7 2 2 7      0 5 5 0      <- y*, the truth
    generated                                         0 5 4 4      <- y_q: one mistake, and the next one after it
    refined                                           0 5 5 0      <- y': all four positions are read at once

Pretraining puts cross-entropy on all 16 tokens. The refiner's loss is on the last 4 only.

*Visual Self-Refinement for Autoregressive Models* (arXiv 2510.00993). This file needs torch and nothing else.
Tokens are long (B, N); embeddings are float (B, N, D). To put the refiner on a backbone of your own you need
`Refiner`, `cosine_loss` and `refine`.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

INPUTS = ("tokens", "hidden", "context")


@dataclass
class GPTConfig:
    """The autoregressive backbone and its pretraining."""

    layers: Annotated[int, "Transformer blocks"] = 4
    heads: Annotated[int, "attention heads"] = 2
    width: Annotated[int, "size of a hidden state"] = 128
    head_width: Annotated[int, "size of a head; heads * head_width below width makes the KV cache smaller"] = 32
    dropout: Annotated[float, "dropout in the blocks while training"] = 0.0
    steps: Annotated[int, "training steps"] = 700
    batch_size: Annotated[int, "sentences a step"] = 32
    learning_rate: Annotated[float, "peak learning rate of Muon and AdamW"] = 8e-3

    def __post_init__(self):
        check_sizes("gpt", self)


@dataclass
class RefinerConfig:
    """The refiner and its training."""

    layers: Annotated[int, "bidirectional Transformer blocks"] = 2
    heads: Annotated[int, "attention heads"] = 16
    width: Annotated[int, "size of a hidden state"] = 128
    dropout: Annotated[float, "dropout in the blocks while training"] = 0.0
    attention: Annotated[bool, "let positions see each other; without, each is alone (a control)"] = True
    rollouts: Annotated[int, "sentences the frozen backbone generates to train the refiners on"] = 20480
    rollout_batch: Annotated[int, "sentences generated at once; each needs memory for its KV cache"] = 256
    steps: Annotated[int, "training steps"] = 1800
    batch_size: Annotated[int, "rollouts a step"] = 64
    learning_rate: Annotated[float, "peak learning rate of Muon and AdamW"] = 1e-2

    def __post_init__(self):
        check_sizes("refiner", self)


def check_sizes(prefix: str, config) -> None:
    """Raise ValueError, naming the flag, for a configuration that cannot be built or trained."""
    for name in ("layers", "heads", "width", "head_width", "steps", "batch_size", "rollouts", "rollout_batch"):
        if getattr(config, name, 1) < 1:
            raise ValueError(f"--{prefix}-{name.replace('_', '-')} {getattr(config, name)}: expected at least 1")
    if config.width % config.heads and prefix == "refiner":  # the backbone has --gpt-head-width
        raise ValueError(f"--{prefix}-heads {config.heads}: does not divide --{prefix}-width {config.width}")
    if not config.learning_rate > 0:
        raise ValueError(f"--{prefix}-learning-rate {config.learning_rate}: expected a number above 0")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"--{prefix}-dropout {config.dropout}: expected a number from 0 to below 1")


# --------------------------------------------------------------------------------------------------
# Transformer blocks, shared by the causal backbone and the bidirectional refiner
# --------------------------------------------------------------------------------------------------


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    length: int | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for q (B, H, T, d) and k, v (B, H, S, d) -> (B, H, T, d).

    causal: query t sees the keys 0..t only (T = S). length: all queries see the first `length` keys only.
    bias: (H, T, S), added to the scores. At most one of the three.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # PyTorch's own kernel has no fast bfloat16 on CPUs: on an AVX512-BF16 machine the backbone trains at
        # 57,000 tokens/s like this and at 36,000 with it. In float32 and on GPUs PyTorch's own is the faster.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, S)
        if causal:
            scores += torch.full(scores.shape[-2:], -torch.inf, dtype=q.dtype).triu(1)
        if length is not None:
            scores[..., length:] = -torch.inf
        if bias is not None:
            scores += bias.to(q.dtype)
        return scores.softmax(-1) @ v
    mask = None if bias is None else bias.to(q.dtype)
    if length is not None:
        mask = (torch.arange(k.shape[2], device=k.device) < length)[None, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class RelativeBias(nn.Module):
    """What a head adds to the score of a key, by where it lies from the query on the grid: a learnt table a head.

        bias[head, t, s] = table[head, row_s - row_t, column_s - column_t]

    As in Swin (Liu et al., 2021). At the start each head looks at one neighbour, the nearest ones first, as in ConViT
    (d'Ascoli et al., 2021): attention then begins as a convolution, and learns from few examples to look further.
    """

    def __init__(self, heads: int, grid: tuple[int, int]):
        super().__init__()
        h, w = grid
        self.table = nn.Parameter(torch.zeros(heads, (2 * h - 1) * (2 * w - 1)))
        around = [(y, x) for y in range(1 - h, h) for x in range(1 - w, w) if (y, x) != (0, 0)]
        around.sort(key=lambda offset: offset[0] ** 2 + offset[1] ** 2)
        with torch.no_grad():
            for head, (y, x) in zip(range(heads), itertools.cycle(around or [(0, 0)])):
                self.table[head, (y + h - 1) * (2 * w - 1) + x + w - 1] = 5.0
        row, column = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)  # (N,) each, raster order
        y, x = row[None, :] - row[:, None], column[None, :] - column[:, None]  # (N, N): from query t to key s
        self.register_buffer("place", (y + h - 1) * (2 * w - 1) + x + w - 1, persistent=False)  # (N, N) into the table

    def forward(self) -> torch.Tensor:
        """-> (H, N, N)"""
        return F.embedding(self.place, self.table.T).permute(2, 0, 1).contiguous()


class Attention(nn.Module):
    """Multi-head self-attention: causal, or, with a grid, over all positions of an image at once."""

    def __init__(self, width: int, heads: int, grid: tuple[int, int] | None = None, head_width: int | None = None):
        super().__init__()
        self.heads, self.head_width = heads, head_width or width // heads
        self.qkv = nn.Linear(width, 3 * heads * self.head_width)
        self.out = nn.Linear(heads * self.head_width, width)
        self.relative = None if grid is None else RelativeBias(heads, grid)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None, start: int = 0) -> torch.Tensor:
        """x: (B, T, C) at positions start .. start+T-1 of the sequence -> (B, T, C).

        With a KV cache (2, B, H, T_max, d) the keys and values of x are kept in it. Either the whole prompt
        comes at once (start = 0), or one position (T = 1), which then sees all that the cache holds.
        """
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)  # each (B, H, T, d)
        length = None
        if cache is not None:
            assert T == 1 or start == 0, "several positions at once only at the start of the sequence"
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            if T == 1:  # The whole cache goes in, masked: slices of it would be copied at every step.
                k, v, length = *cache.unbind(0), start + 1  # (B, H, T_max, d)
        bias = None if self.relative is None else self.relative()  # (H, T, T)
        y = attend(q, k, v, causal=bias is None and T > 1, length=length, bias=bias)  # (B, H, T, d)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm Transformer block: x + attention(norm(x)), then x + MLP(norm(x)). Without attention: the MLP alone."""

    def __init__(
        self, width: int, heads: int, dropout: float, grid: tuple[int, int] | None = None, attention: bool = True,
        head_width: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(width) if attention else None
        self.attention = Attention(width, heads, grid, head_width) if attention else None
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None, start: int = 0) -> torch.Tensor:
        if self.attention is not None:
            x = x + self.dropout(self.attention(self.norm1(x), cache, start))  # (B, T, C)
        return x + self.dropout(self.mlp(self.norm2(x)))


def init_weights(module: nn.Module) -> None:
    """GPT-2's initialisation: normal(0, 0.02) for weights, zero for biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------
# The backbone f_AR
# --------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """What the frozen backbone wrote for a batch of prompts, and what it knew when it wrote it."""

    tokens: torch.Tensor  # (B, N) long: y_q
    hidden: torch.Tensor  # (B, N, C): the last hidden state at the position that predicted each token
    context: torch.Tensor  # (B, N, C): the last hidden states over the query source src_q, after reading each token


class GPT(nn.Module):
    """A causal Transformer over visual sentences of `num_images` images, N tokens each.

    The vocabulary is the codebook, 0 .. V-1. The start token is V: outside the codebook, never predicted.
    Input i is token i-1 (the start token for i = 0) and predicts token i. Its position embedding is that of
    the token to be predicted: the place in its image, plus the number of its image in the sentence. So the
    same place in the source and in the target share an embedding, and matching them is easily learnt.
    """

    def __init__(self, config: GPTConfig, codebook_size: int, tokens_per_image: int, num_images: int):
        super().__init__()
        self.config = config
        self.start_token, self.tokens_per_image = codebook_size, tokens_per_image
        self.max_tokens = num_images * tokens_per_image
        self.token_embedding = nn.Embedding(codebook_size + 1, config.width)
        self.place_embedding = nn.Embedding(tokens_per_image, config.width)
        self.image_embedding = nn.Embedding(num_images, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.dropout, head_width=config.head_width) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, codebook_size, bias=False)
        self.apply(init_weights)
        for block in self.blocks:  # GPT-2: keep the residual stream's variance independent of the depth
            for layer in (block.attention.out, block.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02 / (2 * config.layers) ** 0.5)

    def states(self, inputs: torch.Tensor, cache: torch.Tensor | None = None, start: int = 0) -> torch.Tensor:
        """Inputs (B, T), the start token and then tokens, from position `start` on -> last hidden states (B, T, C)."""
        position = torch.arange(start, start + inputs.shape[1], device=inputs.device)  # (T,)
        place, image = position % self.tokens_per_image, position // self.tokens_per_image
        x = self.token_embedding(inputs) + self.place_embedding(place) + self.image_embedding(image)  # (B, T, C)
        for number, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[number], start)
        return self.norm(x)

    def shifted(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) -> inputs (B, T): the start token in front, the last token left out (teacher forcing)."""
        return F.pad(tokens[:, :-1], (1, 0), value=self.start_token)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) -> logits (B, T, V); logits[:, t] predict tokens[:, t] from tokens[:, :t] alone."""
        return self.head(self.states(self.shifted(tokens)))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., C) -> logits (..., V) for decoding, in float32: rounded ones often tie for the largest."""
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.float())

    @torch.no_grad()
    def read(self, prompt: torch.Tensor, tokens: torch.Tensor) -> Rollout:
        """The states of `generate` for tokens that are known already, in one parallel pass.

        prompt: (B, P), at least N tokens; tokens: (B, N). With tokens = y_q these are the states of the rollout
        (up to rounding); with tokens = y* they are the teacher-forced ones.
        """
        P, N = prompt.shape[1], tokens.shape[1]
        states = self.states(self.shifted(torch.cat([prompt, tokens], dim=1)))  # (B, P+N, C)
        return Rollout(tokens, states[:, P:], states[:, P - N + 1 : P + 1])

    @torch.no_grad()
    def generate(
        self,
        prompt: torch.Tensor,
        num_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Rollout:
        """Continue prompts (B, P) by num_tokens tokens each, free-running, with a KV cache.

        temperature 0 is greedy; otherwise tokens are drawn (see `sample`). The cache lives in this call only.
        Raises ValueError if prompt and continuation are longer than the sentences the model was made for.
        """
        B, P = prompt.shape
        if P + num_tokens > self.max_tokens:
            raise ValueError(f"{P} + {num_tokens} tokens: the backbone was made for at most {self.max_tokens}")
        inputs = F.pad(prompt, (1, 0), value=self.start_token)  # (B, P+1)
        device = prompt.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.head.weight.dtype
        shape = (len(self.blocks), 2, B, self.config.heads, P + num_tokens, self.config.head_width)
        cache = torch.zeros(shape, dtype=dtype, device=prompt.device)
        states = self.states(inputs, cache)  # (B, P+1, C)
        context, state = states[:, max(0, P + 1 - num_tokens) :], states[:, -1:]
        tokens, hidden = [], []
        for t in range(num_tokens):
            hidden.append(state)
            tokens.append(sample(self.logits(state[:, 0]), temperature, top_k, top_p, generator))  # (B,)
            if t + 1 < num_tokens:
                state = self.states(tokens[-1][:, None], cache, start=P + 1 + t)  # (B, 1, C)
        return Rollout(torch.stack(tokens, dim=1), torch.cat(hidden, dim=1), context)


class LoRA(nn.Module):
    """Low-rank adaptation of a frozen weight (out, in): W + B A, with A (rank, in) and B (out, rank), B = 0 at the start.

    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models* (2021). The scale alpha / rank of the paper is
    left out: with B at zero and a learning rate chosen on validation data it says nothing new.
    """

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) / weight.shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.B @ self.A


def add_lora(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Freeze `model` and put low-rank adapters on every Linear layer of its blocks; returns the parameters to train.

    The model computes the same until they are trained.
    """
    model.requires_grad_(False)
    adapters = []
    for layer in [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]:
        adapter = LoRA(layer.weight, rank)
        parametrize.register_parametrization(layer, "weight", adapter)
        adapters += [adapter.A, adapter.B]
    return adapters


def merge_lora(model: nn.Module) -> None:
    """Write trained adapters into the weights they adapt: an ordinary model again, as fast as before."""
    for layer in [layer for layer in model.modules() if parametrize.is_parametrized(layer, "weight")]:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    model.requires_grad_(False)


def sample(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """Draw one token for each row of logits (B, V) -> (B,) long.

    temperature: 0 takes the likeliest, 1 the model's own distribution. top_k: keep the k likeliest (0, or more
    than there are: keep all). top_p: keep the likeliest tokens up to and with the one that reaches this
    probability (1: keep all; the likeliest is always kept).
    """
    if temperature <= 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # probability of all likelier tokens: below top_p, the token is kept
        ordered = ordered.masked_fill((before >= top_p) & (before > 0), -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    probabilities = logits.softmax(-1)
    if generator is not None and generator.device != probabilities.device:
        return torch.multinomial(probabilities.to(generator.device), 1, generator=generator)[:, 0].to(logits.device)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


# --------------------------------------------------------------------------------------------------
# The refiner g_phi
# --------------------------------------------------------------------------------------------------


class Refiner(nn.Module):
    """A small bidirectional Transformer that moves all N embeddings at once, and starts at the identity.

        e'_seq = normalize(e_seq + g_phi(e_seq, ...)),   g_phi = 0 before training

    inputs: what it reads at each position.
        "tokens"   codebook[y_q] alone: the paper's reading
        "hidden"   and the backbone's last hidden state at the position that predicted the token (ours)
        "context"  and its hidden state at the same place of src_q, the query source (ours)
    With `config.attention = False` each position is alone: the control without global context.
    grid: (h, w) of the tokens, N = h * w. hidden_dim: size of the backbone's states (unused for "tokens").
    """

    def __init__(self, config: RefinerConfig, inputs: str, grid: tuple[int, int], code_dim: int, hidden_dim: int = 0):
        super().__init__()
        if inputs not in INPUTS:
            raise ValueError(f"inputs {inputs!r}: expected one of {', '.join(INPUTS)}")
        if inputs != "tokens" and hidden_dim < 1:
            raise ValueError(f"inputs {inputs!r} needs hidden_dim, the size of the backbone's hidden states")
        self.inputs, self.grid = inputs, grid
        self.read_code = nn.Linear(code_dim, config.width)
        if inputs != "tokens":
            self.read_hidden = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, config.width))
        if inputs == "context":
            self.read_context = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, config.width))
        self.row_embedding = nn.Embedding(grid[0], config.width)
        self.column_embedding = nn.Embedding(grid[1], config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.dropout, grid, config.attention) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.move = nn.Linear(config.width, code_dim)
        self.apply(init_weights)
        nn.init.zeros_(self.move.weight)  # with the zero bias: the identity at the start

    def forward(
        self, embeddings: torch.Tensor, hidden: torch.Tensor | None = None, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        """embeddings (B, N, D), hidden (B, N, C), context (B, N, C) -> refined e'_seq (B, N, D), unit norm.

        Raises ValueError if what `inputs` needs is missing, or N is not the grid's.
        """
        embeddings = F.normalize(embeddings.float(), dim=-1)  # (B, N, D)
        return F.normalize(embeddings + self.moves(embeddings, hidden, context), dim=-1)

    def moves(self, embeddings: torch.Tensor, hidden: torch.Tensor | None, context: torch.Tensor | None) -> torch.Tensor:
        """g_phi: by how much to move each of the unit-norm embeddings (B, N, D), all positions at once -> (B, N, D)."""
        N, (h, w) = embeddings.shape[1], self.grid
        if h * w != N:
            raise ValueError(f"{N} embeddings a sequence, but the refiner's grid is {h} x {w} = {h * w}")
        if (hidden is None and self.inputs != "tokens") or (context is None and self.inputs == "context"):
            raise ValueError(f"a refiner with inputs {self.inputs!r} needs the backbone's hidden states as well")
        place = (self.row_embedding.weight[:, None] + self.column_embedding.weight[None]).flatten(0, 1)  # (N, C)
        x = self.read_code(embeddings) + place  # (B, N, C)
        if self.inputs != "tokens":
            x = x + self.read_hidden(hidden.float())
        if self.inputs == "context":
            x = x + self.read_context(context.float())
        for block in self.blocks:
            x = block(x)  # (B, N, C)
        return self.move(self.norm(x)).float()


def cosine_loss(refined: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over positions of 1 - cos(e'_t, e*_t); refined, target: (B, N, D). In [0, 2]."""
    return (1 - F.cosine_similarity(refined.float(), target.float(), dim=-1)).mean()


def nearest_code(embeddings: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """argmax_v <e'_t, codebook_v> under cosine: embeddings (..., D), codebook (V, D) -> tokens (...) long.

    The length of an embedding does not change its nearest code, so only the codebook has to be normalised.
    Always in float32, under autocast too: near codes are one and the same number in bfloat16.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        return (embeddings.float() @ F.normalize(codebook.float(), dim=-1).T).argmax(-1)


@torch.no_grad()
def refine(
    refiner: Refiner,
    codebook: torch.Tensor,
    tokens: torch.Tensor | None = None,
    embeddings: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    context: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One refining pass over what any backbone generated.

    refiner: a `Refiner` made with the tokens' grid shape. codebook: (V, D), of any norm.
    Give either tokens (B, N) long or embeddings (B, N, D); hidden, context: (B, N, C) if the refiner reads them.
    Returns the refined tokens y' (B, N) and the refined embeddings e'_seq (B, N, D).
    Raises ValueError if not exactly one of tokens and embeddings is given.
    """
    if (tokens is None) == (embeddings is None):
        raise ValueError("refine needs either tokens or embeddings")
    if embeddings is None:
        embeddings = codebook[tokens]
    was_training = refiner.training
    try:
        refined = refiner.eval()(embeddings, hidden, context)
    finally:
        refiner.train(was_training)
    return nearest_code(refined, codebook), refined


# --------------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------------


def expected_embedding(logits: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The control without training: the code nearest to sum_v p(v) codebook_v. logits (B, N, V) -> tokens (B, N)."""
    with torch.autocast(logits.device.type, enabled=False):
        return nearest_code(logits.float().softmax(-1) @ F.normalize(codebook.float(), dim=-1), codebook)


def cosine_error(tokens: torch.Tensor, target_tokens: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """1 - cos(codebook[y_t], codebook[y*_t]) of each position: tokens, target_tokens (B, N) -> (B, N) in [0, 2].

    Exactly 0 where the token is right. Its mean over sentences, summed over t, is the area (`auc`) of Figure 2.
    """
    vectors = F.normalize(codebook.float(), dim=-1)
    error = 1 - (vectors[tokens] * vectors[target_tokens]).sum(-1)
    return error.masked_fill(tokens == target_tokens, 0.0)


def gap_closed(free_running: float, refined: float, teacher_forced: float) -> float:
    """(free-running - refined) / (free-running - teacher-forced): the share of the accumulated error that is repaired.

    0 repairs nothing, 1 repairs all that accumulation cost; above 1 is possible, below 0 makes it worse.
    NaN where nothing has accumulated, or where the backbone does better on its own than on the true prefix.
    """
    accumulated = free_running - teacher_forced
    return (free_running - refined) / accumulated if accumulated > 0 else math.nan
