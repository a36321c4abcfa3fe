"""The backbone as a textbook has it, formula by formula: what `vsr.GPT` must equal,
and what `speed` times beside it.

    head_i = softmax(mask(Q_i K_i^T / sqrt(d))) V_i,   Q_i = x W_i^Q, K_i = x W_i^K, V_i = x W_i^V
    attention(x) = concat(head_1, ..., head_H) W^O

One matrix for each projection of each head, all scores written out, no KV cache (Vaswani et al.,
2017, with the norms in front, as in GPT-2). A test holds that both give the same logits and
gradients.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import vsr


class TextbookHead(nn.Module):
    """One head: x (B, T, C) -> (B, T, d)."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, head_width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        T = x.shape[1]
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, d)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])  # (B, T, T)
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


class TextbookBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): (B, T, C) -> (B, T, C)."""

    def __init__(self, config: vsr.GPTConfig):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.heads = nn.ModuleList(TextbookHead(config.width, config.head_width) for _ in range(config.heads))
        self.out = nn.Linear(config.heads * config.head_width, config.width)
        self.wide, self.narrow = (
            nn.Linear(config.width, 4 * config.width),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.out(torch.cat([head(y) for head in self.heads], dim=-1))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class TextbookGPT(nn.Module):
    """Made of copies of a `vsr.GPT`'s weights, it computes the same: tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, gpt: vsr.GPT):
        super().__init__()
        config, self.start_token, self.tokens_per_image = gpt.config, gpt.start_token, gpt.tokens_per_image
        self.token_embedding = nn.Embedding(*gpt.token_embedding.weight.shape)
        self.place_embedding = nn.Embedding(*gpt.place_embedding.weight.shape)
        self.image_embedding = nn.Embedding(*gpt.image_embedding.weight.shape)
        self.blocks = nn.ModuleList(TextbookBlock(config) for _ in range(config.layers))
        self.norm, self.head = (
            nn.LayerNorm(config.width),
            nn.Linear(config.width, gpt.start_token, bias=False),
        )
        with torch.no_grad():
            for name in ("token_embedding", "place_embedding", "image_embedding", "norm", "head"):
                getattr(self, name).load_state_dict(getattr(gpt, name).state_dict())
            for mine, theirs in zip(self.blocks, gpt.blocks, strict=True):
                pairs = [
                    (mine.norm1, theirs.norm1),
                    (mine.norm2, theirs.norm2),
                    (mine.out, theirs.attention.out),
                ]
                for a, b in [*pairs, (mine.wide, theirs.mlp[0]), (mine.narrow, theirs.mlp[2])]:
                    a.load_state_dict(b.state_dict())
                qkv = theirs.attention.qkv
                rows = [
                    part.view(3, config.heads, config.head_width, *part.shape[1:])
                    for part in (qkv.weight, qkv.bias)
                ]
                for i, head in enumerate(mine.heads):
                    for j, layer in enumerate((head.query, head.key, head.value)):
                        layer.weight.copy_(rows[0][j, i])
                        layer.bias.copy_(rows[1][j, i])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat(
            [torch.full_like(tokens[:, :1], self.start_token), tokens[:, :-1]], dim=1
        )  # (B, T)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        places = self.place_embedding(position % self.tokens_per_image)
        x = (
            self.token_embedding(inputs) + places + self.image_embedding(position // self.tokens_per_image)
        )  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
