"""Does it work on other backbones: a smaller GPT, a LLaMA, a GRU?

Four frozen backbones on a seed's tokenizer and sentences, the refiners and their training always the same.
Stated before it was run: for the claim speaks that each gap is closed and that tokens get better, by reading
what was written; against it, a backbone where they do not, or where `parallel` does as well in both.
"""

from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import evaluate
import vsr
from runtime import UserError
from studies import report
from studies.runner import READ_BY, Setup, count, fit_readings, models_of, with_backbone
from vsr import GPTConfig, Rollout

MINUTES = 25


class LlamaBlock(nn.Module):
    """A block of LLaMA's family: RMSNorm, rotary positions, SwiGLU, no biases (Touvron et al., 2023)."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        inner = 8 * width // 3
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x, turn: torch.Tensor, cache: torch.Tensor | None, start: int) -> torch.Tensor:
        """x: (B, T, C); turn: (T, d/2) complex, to rotate queries and keys; cache as in `vsr.Attention`."""
        B, T, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, d)

        def rotate(y):
            pairs = torch.view_as_complex(y.float().unflatten(-1, (-1, 2)).contiguous())  # (B, H, T, d/2)
            return torch.view_as_real(pairs * turn).flatten(-2).to(v.dtype)

        q, k, length = rotate(q), rotate(k), None
        if cache is not None:
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            if T == 1:
                k, v, length = cache[0], cache[1], start + 1
        y = vsr.attend(q, k, v, causal=T > 1, length=length)  # (B, H, T, d)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(vsr.GPT):
    """`vsr.GPT` with the blocks of LLaMA, rotary instead of learnt positions: the family of LVM."""

    def __init__(self, config: GPTConfig, codebook_size: int, tokens_per_image: int, num_images: int):
        super().__init__(config, codebook_size, tokens_per_image, num_images)
        del self.place_embedding, self.image_embedding
        blocks = [LlamaBlock(config.width, config.heads, config.head_width) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks).apply(vsr.init_weights)
        self.norm = nn.RMSNorm(config.width)

    def hidden(self, inputs: torch.Tensor, cache: torch.Tensor | None = None, start: int = 0):
        half = self.config.head_width // 2
        rate = 10000 ** (-torch.arange(half, device=inputs.device) / half)  # (d/2,)
        position = torch.arange(start, start + inputs.shape[1], device=inputs.device)  # (T,)
        turn = torch.polar(torch.ones(()).to(rate), position[:, None] * rate)  # (T, d/2)
        x = self.token_embedding(inputs)  # (B, T, C)
        for number, block in enumerate(self.blocks):
            x = block(x, turn, None if cache is None else cache[number], start)
        return self.norm(x)


class Recurrent(vsr.GPT):
    """A backbone that is no Transformer: a GRU over the sentence, with a memory in place of a cache."""

    def __init__(self, config: GPTConfig, codebook_size: int, tokens_per_image: int, num_images: int):
        nn.Module.__init__(self)
        self.config, self.start_token, self.tokens_per_image = config, codebook_size, tokens_per_image
        self.token_embedding = nn.Embedding(codebook_size + 1, config.width)
        self.place_embedding = nn.Embedding(num_images * tokens_per_image, config.width)
        self.blocks = nn.GRU(config.width, config.width, config.layers, batch_first=True)
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, codebook_size, bias=False)

    def advance(self, inputs: torch.Tensor, memory: torch.Tensor | None = None, start: int = 0):
        """Inputs (B, T) from position `start` on, and the memory so far -> states (B, T, C), memory."""
        place = torch.arange(start, start + inputs.shape[1], device=inputs.device)
        with torch.autocast(inputs.device.type, enabled=False):
            x, memory = self.blocks(self.token_embedding(inputs) + self.place_embedding(place), memory)
            return self.norm(x), memory

    def hidden(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.advance(inputs)[0]

    @torch.no_grad()
    def generate(self, prompt, num_tokens, temperature=0.0, top_k=0, top_p=1.0, generator=None) -> Rollout:
        hidden, memory = self.advance(F.pad(prompt, (1, 0), value=self.start_token))
        query, state, tokens, states = hidden[:, -num_tokens:], hidden[:, -1:], [], []
        for t in range(num_tokens):
            states.append(state)
            tokens.append(vsr.sample(self.logits(state[:, 0]), temperature, top_k, top_p, generator))
            if t + 1 < num_tokens:
                state, memory = self.advance(tokens[-1][:, None], memory, prompt.shape[1] + 1 + t)
        return Rollout(torch.stack(tokens, dim=1), torch.cat(states, dim=1), query)


# The study

BACKBONES = {
    "gpt_small": (vsr.GPT, {"layers": 2, "width": 96}),
    "gpt": (vsr.GPT, {}),
    "llama": (Llama, {}),
    "gru": (Recurrent, {"layers": 2, "width": 256}),
}
SETTINGS = [{"backbone": name} for name in BACKBONES]


def run(setup: Setup, seed: int, backbone: str) -> dict:
    make, changes = BACKBONES[backbone]
    if (width := setup.config["gpt"].head_width) % 2:
        raise UserError(f"--gpt-head-width {width}: rotary positions turn pairs of numbers; give an even one")
    models = models_of(setup, seed)
    if backbone != "gpt":
        models = with_backbone(setup, models, replace(setup.config["gpt"], **changes), seed, make)
    return {**fit_readings(setup, models, seed), "backbone_params": count(models.trained.backbone)}


def show(cells: list) -> str:
    lines = []
    for name, group in report.by_setting(cells, "backbone").items():
        lines += [
            f"{name}, {group[0]['backbone_params'] / 1e6:.2f} M parameters: {report.backbone_line(group)}"
        ]
        lines += [report.measures_table(group, tuple(READ_BY)), ""]
    return "\n".join(lines[:-1])


def plot(path, cells: list) -> None:
    groups = report.by_setting(cells, "backbone")
    figure = report.new_figure(3, 4.2)
    names = [f"{name}: {method}" for name in groups for method in READ_BY]
    colours = [evaluate.COLOURS[method] for _ in groups for method in READ_BY]
    for axis, measure in zip(figure.axes, ("gap closed", "tokens right, gained", "dB gained"), strict=True):
        values = [
            report.MEASURES[measure](cells, method, "all") for cells in groups.values() for method in READ_BY
        ]
        report.bars(axis, names if axis is figure.axes[0] else [""] * len(names), values, colours)
        axis.set_xlabel(measure)
    report.save(figure, path)
