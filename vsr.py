"""Visual self-refinement: a frozen autoregressive backbone writes, a small Transformer corrects.

An autoregressive model f_AR writes an image token by token; each mistake becomes the context of the next
token, so errors accumulate. After pretraining, with everything else frozen, the refiner g_phi reads the
whole generated sequence at once and moves every token's embedding towards the true one:

    y_q    = f_AR(prompt)                      N tokens, generated free-running     `GPT.generate`
    e_seq  = codebook[y_q]                     their embeddings, (N, D) unit norm
    e'_seq = normalize(e_seq + g_phi(e_seq))   all positions at once                `Refiner`
    loss   = mean_t (1 - cos(e'_t, e*_t))      e* = codebook[y*], the true tokens   `cosine_loss`
    y'_t   = argmax_v <e'_t, codebook_v>       the refined tokens                   `nearest_code`

A worked example: K = 1 demonstration, images of N = 4 tokens, so a visual sentence of 16 tokens.

    image      src_1      dst_1      src_q      dst_q
    tokens     7 7 2 2    0 0 5 5    7 2 2 7    0 5 5 0   <- y*, the truth
    generated                                   0 5 4 4   <- y_q: one mistake leads to the next
    refined                                     0 5 5 0   <- y': all four positions read at once

Pretraining puts cross-entropy on all 16 tokens. The refiner's loss is on the last 4 only.

*Visual Self-Refinement for Autoregressive Models* (arXiv 2510.00993). For a backbone of your own you need
`Refiner`, `cosine_loss`, `refine`, and torch alone.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

SOURCES = ("tokens", "states", "query")  # the sources that a refiner can read at each position


class Rollout(NamedTuple):
    """What the frozen backbone wrote for a batch of prompts, and its hidden states meanwhile."""

    tokens: torch.Tensor | None  # (B, N) long: y_q
    states: torch.Tensor | None = None  # (B, N, C): the last hidden state that predicted each token
    query: torch.Tensor | None = None  # (B, N, C): the last hidden states over src_q


@dataclass
class RefinerConfig:
    """The refiner and its training."""

    layers: Annotated[int, "bidirectional Transformer blocks"] = 3
    heads: Annotated[int, "attention heads, of width // heads numbers each (8 is fast)"] = 7
    width: Annotated[int, "size of a hidden state"] = 56
    dropout: Annotated[float, "dropout in the blocks while training", (0, 0.99)] = 0.0
    attention: Annotated[bool, "let positions see each other; without it: a control"] = True
    rollouts: Annotated[int, "sentences that the frozen backbone generates for training"] = 20480
    rollout_batch: Annotated[int, "sentences generated at once; each needs a KV cache"] = 256
    steps: Annotated[int, "training steps"] = 1500
    batch_size: Annotated[int, "rollouts a step"] = 64
    learning_rate: Annotated[float, "peak learning rate", (1e-12, math.inf)] = 2e-2


class Refiner(nn.Module):
    """A small bidirectional Transformer over all N positions of a generated image at once.

        e'_seq = normalize(e_seq + g_phi(e_seq, ...)),   g_phi = 0 before training

    reads: which sources it sees at each position, any of
        "tokens"  codebook[y_q], what was written. ("tokens",) is the paper's reading
        "states"  the backbone's hidden state that predicted the token (ours)
        "query"   the backbone's hidden state at the same place of src_q. ("tokens", "query") is ours;
                  ("query",) reads no rollout: a parallel predictor, the control
    Without "tokens" there is no e_seq to add to, and no identity at the start.
    grid: (h, w) of the tokens, N = h * w. state_dim: C, size of the backbone's hidden states. Raises
    ValueError for unknown sources, or if states are read and their size is not given.
    """

    def __init__(self, config: RefinerConfig, reads, grid: tuple[int, int], code_dim: int, state_dim=0):
        super().__init__()
        if not reads or not set(reads) <= set(SOURCES):
            raise ValueError(f"reads {reads!r}: expected one or more of {SOURCES}")
        if state_dim < 1 and set(reads) != {"tokens"}:
            raise ValueError(f"reads {reads!r}: needs state_dim, the size of the hidden states")
        self.reads, self.grid = tuple(name for name in SOURCES if name in reads), grid
        self.read = nn.ModuleDict()
        for name in self.reads:
            size = code_dim if name == "tokens" else state_dim
            norm = nn.Identity() if name == "tokens" else nn.LayerNorm(size)
            self.read[name] = nn.Sequential(norm, nn.Linear(size, config.width))
        self.row_embedding = nn.Embedding(grid[0], config.width)
        self.column_embedding = nn.Embedding(grid[1], config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.dropout, grid, config.attention)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.to_code = nn.Linear(config.width, code_dim)
        self.apply(init_weights)
        if "tokens" in self.reads:  # the identity at the start; without e_seq, e' would be 0
            nn.init.zeros_(self.to_code.weight)

    def forward(self, embeddings=None, states=None, query=None) -> torch.Tensor:
        """Refine embeddings (B, N, D) with states and query (B, N, C): e'_seq (B, N, D), unit norm.

        What is not read may be None. Raises ValueError for what is missing, or has another shape.
        """
        e_seq = 0.0  # nothing to add to
        if "tokens" in self.reads and embeddings is not None:  # if it is, `change` says so
            embeddings = e_seq = F.normalize(embeddings.float(), dim=-1)  # (B, N, D)
        return F.normalize(e_seq + self.change(embeddings, states, query), dim=-1)  # (B, N, D)

    def change(self, embeddings, states, query) -> torch.Tensor:
        """g_phi: by how much to move each unit-norm embedding, all positions at once -> (B, N, D)."""
        x = (self.row_embedding.weight[:, None] + self.column_embedding.weight).flatten(0, 1)  # (N, W)
        given = dict(zip(SOURCES, (embeddings, states, query), strict=True))
        for name in self.reads:
            if given[name] is None:
                raise ValueError(f"this refiner reads {self.reads}, and was given no {name}")
            shape = (len(given[self.reads[0]]), self.grid[0] * self.grid[1], self.read[name][1].in_features)
            if given[name].shape != shape:  # (B, 1, C) would be broadcast without a word
                raise ValueError(f"{name} {tuple(given[name].shape)}: this refiner expects {shape}")
            x = x + self.read[name](given[name].to(self.to_code.weight.dtype))  # (B, N, W)
        for block in self.blocks:
            x = block(x)  # (B, N, W)
        return self.to_code(self.norm(x)).float()  # (B, N, D)


def cosine_loss(refined: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over positions of 1 - cos(e'_t, e*_t), both (B, N, D): in [0, 2]. ValueError if shapes differ."""
    require_same_shape(refined, target)
    return (1 - F.cosine_similarity(refined.float(), target.float(), dim=-1)).mean()


def nearest_code(embeddings: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """argmax_v <e'_t, codebook_v> under cosine: (..., D) and codebook (V, D) -> tokens (...) long.

    The length of an embedding makes no difference. Raises ValueError for numbers that are not finite.
    """
    with torch.autocast(embeddings.device.type, enabled=False):  # near codes are one number in bfloat16
        largest, tokens = (embeddings.float() @ F.normalize(codebook.float(), dim=-1).T).max(-1)  # (...)
    require_finite(largest, embeddings=embeddings, codebook=codebook)
    return tokens


@torch.no_grad()
def refine(refiner: Refiner, codebook, tokens=None, states=None, query=None, embeddings=None):
    """One refining pass over what any backbone generated: `refine(refiner, codebook, *rollout)`.

    codebook: (V, D), of any norm. tokens: (B, N), or embeddings (B, N, D) in their place. states, query:
    (B, N, C). What the refiner does not read may be None. Returns the refined tokens y' (B, N) and embeddings
    e'_seq (B, N, D), unit norm. Raises ValueError if tokens and embeddings are both given, what is read is
    missing or has another shape, or something is not finite.
    """
    if tokens is not None and embeddings is not None:
        raise ValueError("refine: give tokens or embeddings, not both")
    if tokens is not None:
        embeddings = embed(tokens, codebook)  # (B, N, D)
    was_training = refiner.training
    try:
        refined = refiner.eval()(embeddings, states, query)
    finally:
        refiner.train(was_training)
    require_finite(refined, codebook=codebook, embeddings=embeddings, states=states, query=query)
    return nearest_code(refined, codebook), refined


def embed(tokens: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """codebook[y]: tokens (B, N) of any integer type, codebook (V, D) -> (B, N, D). ValueError for others."""
    integers, index = not (tokens.is_floating_point() or tokens.dtype == torch.bool), tokens.long()
    # Checked here: on a GPU a wrong index does not raise, it makes the GPU unusable for this process
    if index.numel() and not (integers and index.min() >= 0 and index.max() < len(codebook)):
        found = f"{index.min()} to {index.max()} ({tokens.dtype})"
        raise ValueError(f"tokens from {found}: expected integers from 0 to {len(codebook) - 1}")
    return F.embedding(index, codebook)


def require_same_shape(a: torch.Tensor, b: torch.Tensor) -> None:
    """Raise ValueError, with both shapes, where PyTorch would broadcast."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")


def require_finite(result: torch.Tensor, **made_of) -> None:
    """Raise ValueError, naming what it was made of, for NaN or infinity: argmax would make it token 0."""
    if not result.sum(dtype=torch.float32).isfinite():
        bad = [name for name, x in made_of.items() if x is not None and not x.isfinite().all()]
        raise ValueError(f"not finite: {', '.join(bad) or 'the weights, or what they make'}")


# What is measured


def cosine_error(tokens, target_tokens, codebook: torch.Tensor) -> torch.Tensor:
    """1 - cos(codebook[y_t], codebook[y*_t]) at each position: (B, N), (B, N) -> (B, N) in [0, 2].

    Exactly 0 where the token is right. ValueError if shapes differ, and for what is no token.
    """
    require_same_shape(tokens, target_tokens)
    vectors = F.normalize(codebook.float(), dim=-1)
    error = 1 - (embed(tokens, vectors) * embed(target_tokens, vectors)).sum(-1)  # (B, N)
    return error.masked_fill(tokens.long() == target_tokens.long(), 0.0)


def gap_closed(free_running: float, refined: float, teacher_forced: float) -> float:
    """(free-running - refined) / (free-running - teacher-forced), of cosine errors; NaN without a gap.

    0 gains nothing, 1 as much as the true prefix would, below 0 is harm. More than 1 is possible: what is
    wrong on the true prefix too counts as well.
    """
    accumulated = free_running - teacher_forced
    return (free_running - refined) / accumulated if accumulated > 0 else math.nan


def exposure_removed(free_running: float, refined: float, teacher_forced: float, refined_forced: float):
    """1 - (refined - refined_forced) / (free-running - teacher-forced): the accumulated error that is gone.

    refined_forced: the error after refining the teacher-forced output. So what a refiner does for tokens that
    are wrong on the true prefix too does not count. NaN if nothing accumulated.
    """
    accumulated = free_running - teacher_forced
    return 1 - (refined - refined_forced) / accumulated if accumulated > 0 else math.nan


def expected_embedding(logits: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Hedging, without training: the code nearest to sum_v p(v) codebook_v. (B, N, V) -> tokens (B, N)."""
    with torch.autocast(logits.device.type, enabled=False):
        mean = logits.float().softmax(-1) @ F.normalize(codebook.float(), dim=-1)  # (B, N, D)
        return nearest_code(mean, codebook)


# Transformer blocks, shared by the causal backbone and the bidirectional refiner


def attend(q, k, v, causal: bool = False, length: int | None = None, bias=None) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v: q (B, H, T, d) and k, v (B, H, S, d) -> (B, H, T, d).

    At most one of causal: query t sees the keys 0..t only (T = S); length: all queries see the
    first `length` keys only; bias: (H, T, S), added to the scores.
    """
    mask = None if bias is None else bias[None]  # (1, H, T, S): fast kernels want four dimensions
    if length is not None:
        seen = torch.arange(k.shape[2], device=k.device) < length
        mask = torch.where(seen, 0.0, -torch.inf)[None]  # (1, S)
    learns = bias is not None and bias.requires_grad
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or learns):
        # PyTorch's own kernel has no fast bfloat16 on CPUs: on an AVX512-BF16 machine the backbone
        # trains at 57,000 tokens/s like this and at 36,000 with it. Nor has it one for a bias that learns.
        if causal:
            mask = torch.full((q.shape[2], k.shape[2]), -torch.inf).triu(1)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, S)
        if mask is not None:
            scores += mask.to(q.dtype)
        return scores.softmax(-1) @ v
    mask = None if mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class RelativeBias(nn.Module):
    """What a head adds to the score of a key, by where on the grid it lies from the query.

        bias[head, t, s] = table[head, row_s - row_t, column_s - column_t]

    As in Swin (Liu et al., 2021). At the start each head looks at one neighbour, the nearest ones first: a
    convolution, as in ConViT (d'Ascoli et al., 2021).
    """

    def __init__(self, heads: int, grid: tuple[int, int]):
        super().__init__()
        h, w = grid
        table = torch.zeros(heads, (2 * h - 1) * (2 * w - 1))
        y, x = torch.arange(1 - h, h)[:, None], torch.arange(1 - w, w)
        nearest = (y * y + x * x).flatten().argsort(stable=True)[h * w > 1 :]  # without its own place
        table[range(heads), nearest[torch.arange(heads) % len(nearest)]] = 5.0
        self.table, self.grid = nn.Parameter(table), grid

    def forward(self) -> torch.Tensor:
        h, w = self.grid
        table = self.table.unflatten(1, (2 * h - 1, 2 * w - 1))
        seen = table.unfold(1, h, 1).unfold(2, w, 1)  # (H, h, w, h, w), the last query's window first
        return seen.flip(1, 2).flatten(3, 4).flatten(1, 2)  # (H, N, N)


class Attention(nn.Module):
    """Multi-head self-attention: causal, or, with a grid, over all positions of an image at once."""

    def __init__(self, width: int, heads: int, grid=None, head_width: int | None = None):
        super().__init__()
        self.heads, self.head_width = heads, head_width or width // heads
        self.qkv = nn.Linear(width, 3 * heads * self.head_width)
        self.out = nn.Linear(heads * self.head_width, width)
        self.relative = None if grid is None else RelativeBias(heads, grid)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None, start: int = 0):
        """x: (B, T, C) at positions start .. start+T-1 of the sequence -> (B, T, C).

        The KV cache (2, B, H, T_max, d) takes the keys and values of x: the whole prompt at once (start = 0),
        or one position (T = 1), which sees all that is in it.
        """
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, d)
        length = None
        if cache is not None:
            assert T == 1 or start == 0, "several positions at once only at the start of the sequence"
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            if T == 1:  # The whole cache goes in, masked: slices of it would be copied at every step.
                k, v, length = cache[0], cache[1], start + 1  # (B, H, T_max, d)
        bias = None if self.relative is None else self.relative()  # (H, T, T)
        y = attend(q, k, v, bias is None and T > 1, length, bias)  # (B, H, T, d)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), bidirectional with a grid, then x + MLP(norm(x))."""

    def __init__(self, width: int, heads: int, dropout, grid=None, attention=True, head_width=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width) if attention else None
        self.attention = Attention(width, heads, grid, head_width) if attention else None
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None, start: int = 0):
        if self.attention is not None:
            x = x + self.dropout(self.attention(self.norm1(x), cache, start))  # (B, T, C)
        return x + self.dropout(self.mlp(self.norm2(x)))


def init_weights(module: nn.Module) -> None:
    """GPT-2's initialisation: normal(0, 0.02) for weights, zero for biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# The backbone f_AR


@dataclass
class GPTConfig:
    """The autoregressive backbone and its pretraining."""

    layers: Annotated[int, "Transformer blocks"] = 4
    heads: Annotated[int, "attention heads"] = 2
    width: Annotated[int, "size of a hidden state"] = 128
    head_width: Annotated[int, "size of a head; heads * head_width sets the size of the cache"] = 32
    dropout: Annotated[float, "dropout in the blocks while training", (0, 0.99)] = 0.0
    steps: Annotated[int, "training steps"] = 1400
    batch_size: Annotated[int, "sentences a step"] = 32
    learning_rate: Annotated[float, "peak learning rate", (1e-12, math.inf)] = 8e-3


class GPT(nn.Module):
    """A causal Transformer over visual sentences of `num_images` images, N tokens each.

    The vocabulary is the codebook, 0 .. V-1, and the start token V, which is never predicted. Input i is
    token i-1 (the start token for i = 0) and predicts token i. Its position embedding is that of token i:
    the place in its image plus the number of its image. So source and target are easily matched.
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
            Block(config.width, config.heads, config.dropout, head_width=config.head_width)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, codebook_size, bias=False)
        self.apply(init_weights)
        for block in self.blocks:  # GPT-2: the residual stream's variance does not grow with the depth
            for layer in (block.attention.out, block.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02 / (2 * config.layers) ** 0.5)

    def hidden(self, inputs: torch.Tensor, cache: torch.Tensor | None = None, start: int = 0):
        """Inputs (B, T), from position `start` on -> the last hidden states (B, T, C)."""
        position = torch.arange(start, start + inputs.shape[1], device=inputs.device)  # (T,)
        place, image = position % self.tokens_per_image, position // self.tokens_per_image
        x = self.token_embedding(inputs) + self.place_embedding(place) + self.image_embedding(image)
        for number, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[number], start)  # (B, T, C)
        return self.norm(x)

    def shifted(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) -> inputs (B, T): the start token in front, the last token left out."""
        return F.pad(tokens[:, :-1], (1, 0), value=self.start_token)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) -> logits (B, T, V); logits[:, t] predict tokens[:, t] from those before."""
        return self.head(self.hidden(self.shifted(tokens)))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., C) -> logits (..., V), in float32: rounded ones often tie for the top."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), self.head.weight.float())

    @torch.no_grad()
    def replay(self, prompt: torch.Tensor, tokens: torch.Tensor | None = None) -> Rollout:
        """The hidden states of `generate` for tokens that are known, in one parallel pass.

        prompt: (B, P); tokens: (B, N). With y_q these are the states of the rollout (up to rounding), with y*
        the teacher-forced ones, with None those of the query alone.
        """
        N, P = self.tokens_per_image, prompt.shape[1]
        known = prompt if tokens is None else torch.cat([prompt, tokens[:, :-1]], dim=1)
        hidden = self.hidden(F.pad(known, (1, 0), value=self.start_token))  # (B, P+1 or P+N, C)
        query = hidden[:, P - N + 1 : P + 1]  # (B, N, C)
        return Rollout(tokens, None if tokens is None else hidden[:, P:], query)

    @torch.no_grad()
    def generate(self, prompt, num_tokens: int, temperature=0.0, top_k=0, top_p=1.0, generator=None):
        """Continue prompts (B, P) by num_tokens tokens each, free-running, with a KV cache -> Rollout.

        Its `query` are the states over the query's source if num_tokens is that of an image. temperature,
        top_k, top_p: see `sample`. Raises ValueError if the whole is longer than the model's sentences, or
        states are not finite.
        """
        B, P = prompt.shape
        if P + num_tokens > self.max_tokens:
            raise ValueError(f"{P} + {num_tokens} tokens: the backbone was made for {self.max_tokens}")
        device, config = prompt.device.type, self.config
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.head.weight.dtype
        shape = (config.layers, 2, B, config.heads, P + num_tokens, config.head_width)
        cache = torch.zeros(shape, dtype=dtype, device=prompt.device)
        inputs = F.pad(prompt, (1, 0), value=self.start_token)  # (B, P+1)
        rows = 32 if device == "cpu" else B  # the activations of more do not fit into a CPU's caches
        parts = zip(inputs.split(rows), cache.split(rows, dim=2), strict=True)
        query = torch.cat([self.hidden(part, kept)[:, -num_tokens:] for part, kept in parts])  # (B, N, C)
        require_finite(query, query=query)  # before anything is drawn from it
        state = query[:, -1:]  # (B, 1, C)
        tokens, states = [], []
        for t in range(num_tokens):
            states.append(state)
            tokens.append(sample(self.logits(state[:, 0]), temperature, top_k, top_p, generator))  # (B,)
            if t + 1 < num_tokens:
                state = self.hidden(tokens[-1][:, None], cache, start=P + 1 + t)  # (B, 1, C)
        states = torch.cat(states, dim=1)  # (B, N, C)
        require_finite(states)
        return Rollout(torch.stack(tokens, dim=1), states, query)


def sample(logits, temperature: float, top_k: int, top_p: float, generator=None) -> torch.Tensor:
    """Draw one token for each row of logits (B, V) -> (B,) long.

    temperature: 0 is greedy, 1 the model's own distribution. top_k: keep the k likeliest (0: all). top_p:
    keep the likeliest up to and with the one that reaches this probability.
    """
    if temperature <= 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)  # (B, V)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # probability of all likelier tokens: below top_p, the token is kept
        ordered = ordered.masked_fill((before >= top_p) & (before > 0), -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    probabilities = logits.softmax(-1)
    if generator is not None:  # a CPU generator draws for any device
        probabilities = probabilities.to(generator.device)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
