"""The tokenizer: a small VQGAN that turns an image into N tokens and back.

    image x --encoder--> z (unit norm) --nearest code--> token k --codebook--> e_k --decoder--> image x'

    pixels  (B, 3, H, W) in [-1, 1]    tokens  (B, N) long, N = (H/f)(W/f), raster order
    embeddings  (B, N, D) unit norm

    model.encode(images) -> tokens          model.embed(tokens) -> embeddings
    model.decode(tokens) -> images          model.decode_embeddings(embeddings) -> images

After Esser et al., *Taming Transformers for High-Resolution Image Synthesis* (2021), with the unit-norm
codebook of Yu et al., *Vector-quantized Image Modeling with Improved VQGAN* (2022).
Deviations, on purpose:
- No perceptual (LPIPS) loss: it needs a pretrained network, and nothing is downloaded here. A loss on the
  image's gradients takes its place (`gradient_weight`).
- No normalisation layers and no attention in encoder and decoder. GroupNorm lets every token depend on the
  statistics of the whole image; without it the same patch gets the same token wherever it stands.
- The adversarial loss is complete but off by default (`gan_weight 0`): `python -m studies adversarial`.

Stage 1 of `train_refiner.py` trains it. This file needs torch and nothing else.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class VQGANConfig:
    """The tokenizer and its training."""

    factor: Annotated[int, "f, pixels of the image's side per token (a power of 2)", (2, 64)] = 4
    codebook_size: Annotated[int, "V, number of codes"] = 128
    code_dim: Annotated[int, "D, size of a code"] = 16
    channels: Annotated[int, "channels at the tokens' resolution"] = 96
    res_blocks: Annotated[int, "residual blocks in the encoder, and in the decoder", (0, 99)] = 2
    beta: Annotated[float, "weight of the commitment loss relative to the codebook loss"] = 0.25
    gradient_weight: Annotated[float, "weight of the loss on image gradients"] = 1.0
    revive_every: Annotated[int, "steps after which a code that was not used is revived"] = 20
    gan_weight: Annotated[float, "weight of the adversarial loss; 0 turns it off"] = 0.0
    gan_start: Annotated[float, "share of the training before the adversarial loss", (0, 1)] = 0.6
    steps: Annotated[int, "training steps"] = 700
    batch_size: Annotated[int, "images a step"] = 64
    learning_rate: Annotated[float, "peak learning rate of AdamW", (1e-12, math.inf)] = 4e-3


class Codebook(nn.Module):
    """V unit-norm vectors of size D, and the nearest-neighbour lookup with its straight-through gradient."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(size, dim), dim=-1))  # normalised at every use
        self.register_buffer("unused", torch.zeros(size))  # steps since a code was last used

    @property
    def vectors(self) -> torch.Tensor:
        return F.normalize(self.weight, dim=-1)  # (V, D)

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Unit-norm z (..., D) -> tokens (...): the code with the largest dot product. Always in float32."""
        with torch.autocast(z.device.type, enabled=False):
            return (z.detach().float() @ self.vectors.detach().float().T).argmax(-1)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit-norm z (..., D) -> quantized (..., D), whose gradient goes straight to z; tokens (...);
        and the two terms of van den Oord et al. (2017), eq. 3, `sg` being the stop-gradient:

            codebook loss ||sg[z] - e||^2   moves the codes          (weight 0.1)
            commitment    ||z - sg[e]||^2   moves the encoder        (weight 0.1 * beta)
        """
        tokens = self.nearest(z)  # (...)
        e = F.embedding(tokens, self.vectors)  # (..., D); plain indexing adds its gradients in any order
        codebook_loss = (z.detach() - e).square().sum(-1).mean()
        commitment_loss = (z - e.detach()).square().sum(-1).mean()
        quantized = z + (e - z).detach()  # straight-through: forward e, backward the identity on z
        return quantized, tokens, codebook_loss, commitment_loss

    @torch.no_grad()
    def count_use(self, tokens: torch.Tensor) -> None:
        self.unused += 1
        self.unused[tokens.flatten()] = 0

    @torch.no_grad()
    def revive(self, z: torch.Tensor, for_steps: int, generator: torch.Generator) -> int:
        """Put codes unused for `for_steps` steps onto random encoder outputs z (n, D); returns how many."""
        dead = (self.unused >= for_steps).nonzero().flatten()
        chosen = torch.randint(len(z), (len(dead),), generator=generator).to(z.device)
        self.weight[dead] = z[chosen].to(self.weight.dtype)
        self.unused[dead] = 0
        return len(dead)


class ResBlock(nn.Module):
    """x + conv(gelu(conv(gelu(x)))); the last weights start at zero, so it starts as x plus a constant."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.gelu(self.conv1(F.gelu(x))))


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. Raises ValueError if the factor does not fit the image size."""

    def __init__(self, config: VQGANConfig, image_size: int):
        super().__init__()
        if config.factor & (config.factor - 1) or image_size % config.factor:
            raise ValueError(f"factor {config.factor}: no power of 2 that divides the size {image_size}")
        self.config = config
        self.grid = (image_size // config.factor,) * 2  # (h, w)
        levels = config.factor.bit_length() - 1
        widths = [max(config.channels >> (levels - i), 16) for i in range(levels + 1)]  # 24, 48, 96
        down = []
        for i in range(levels):
            # Each halving is one convolution of stride 2; most of the work is done at the tokens' resolution.
            down += [nn.Conv2d(3 if i == 0 else widths[i], widths[i + 1], 4, stride=2, padding=1)]
            down += [nn.GELU()] if i + 1 < levels else []
        self.encoder = nn.Sequential(
            *down,
            *[ResBlock(widths[-1], kernel=1) for _ in range(config.res_blocks)],
            nn.GELU(),
            nn.Conv2d(widths[-1], config.code_dim, 1),
        )
        self.codebook = Codebook(config.codebook_size, config.code_dim)
        up = []
        for i in reversed(range(levels)):
            up += [nn.GELU(), nn.Conv2d(widths[i + 1], widths[i] * 4, 3, padding=1), nn.PixelShuffle(2)]
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_dim, widths[-1], 3, padding=1),
            *[ResBlock(widths[-1], kernel=3) for _ in range(config.res_blocks)],
            *up,
            nn.GELU(),
            nn.Conv2d(widths[0], 3, 3, padding=1),
        )

    @property
    def tokens_per_image(self) -> int:
        return self.grid[0] * self.grid[1]

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> unit-norm encoder outputs z, (B, N, D)."""
        images = images.to(self.codebook.weight.dtype, memory_format=torch.channels_last)
        z = self.encoder(images).flatten(2).transpose(1, 2)  # (B, N, D)
        return F.normalize(z.float(), dim=-1)  # (B, N, D)

    def decode_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, N, D), on or off the codebook -> images (B, 3, H, W), about [-1, 1], not clipped."""
        grid = embeddings.transpose(1, 2).unflatten(2, self.grid)  # (B, D, h, w)
        grid = grid.to(self.codebook.weight.dtype, memory_format=torch.channels_last)
        return self.decoder(grid).float()

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N) of any integer type, in [0, V) -> embeddings (B, N, D), unit norm."""
        return F.embedding(tokens.long(), self.codebook.vectors)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> tokens (B, N) long, raster order.

        Raises ValueError for latents that are not finite: argmax would make them token 0.
        """
        z = self.latents(images)
        if not z.sum().isfinite():
            raise ValueError("not finite: the images, or the tokenizer's weights")
        return self.codebook.nearest(z)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N) long -> images (B, 3, H, W) in [-1, 1]."""
        return self.decode_embeddings(self.embed(tokens)).clamp(-1, 1)

    def forward(self, images: torch.Tensor):
        """Images (B, 3, H, W) -> rebuilt, tokens (B, N), latents (B, N, D), codebook and commitment loss."""
        z = self.latents(images)
        quantized, tokens, codebook_loss, commitment_loss = self.codebook(z)
        return self.decode_embeddings(quantized), tokens, z, codebook_loss, commitment_loss


class Discriminator(nn.Sequential):
    """Patch discriminator: (B, 3, H, W) -> (B, 1, H/4, W/4) logits, high for real (Isola et al., 2017)."""

    def __init__(self, channels: int = 32):
        super().__init__(
            nn.Conv2d(3, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 1, 3, padding=1),
        )


def discriminator_loss(discriminator, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Hinge loss: mean max(0, 1 - D(x)) + mean max(0, 1 + D(x')), halved. No gradient reaches `fake`."""
    return 0.5 * (F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake.detach())).mean())


def generator_loss(discriminator, fake: torch.Tensor) -> torch.Tensor:
    """-mean D(x'), with the discriminator's parameters held fixed: the gradient goes to `fake` only."""
    frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
    return -torch.func.functional_call(discriminator, frozen, (fake,)).mean()


def adaptive_weight(reconstruction, adversarial, last_layer, average=lambda gradient: gradient):
    """Esser et al. (2021), eq. 7: |grad of reconstruction| / (|grad of adversarial| + 1e-4), in [0, 1e4].

    The gradients are those at the decoder's last layer, so both losses pull equally hard at the decoder,
    whatever their scales. average: over processes, if there are several.
    """
    (g_rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (g_adv,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (average(g_rec).norm() / (average(g_adv).norm() + 1e-4)).clamp(0, 1e4)


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the horizontal and vertical image gradients of a and b, (B, 3, H, W)."""
    error = a - b
    return error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()


def psnr(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB: (B, 3, H, W) in [-1, 1] -> (B,). Capped at 60 dB."""
    mse = (images.float() - truth.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(4e-6))


def ssim(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image (Wang et al., 2004): (B, 3, H, W) in [-1, 1] -> (B,), 1 if equal.

    The mean over channels and over all places of a Gaussian window of 11 x 11 pixels, sigma 1.5:

        (2 m_x m_y + C1)(2 s_xy + C2) / ((m_x^2 + m_y^2 + C1)(s_x^2 + s_y^2 + C2)),   C1 = 0.01^2, C2 = 0.03^2

    on the usual range, [0, 1]: its first factor depends on where black lies. Raises RuntimeError for images
    smaller than the window.
    """
    window = torch.exp(-torch.arange(-5.0, 6.0, device=images.device).square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x):  # (B, 3, H, W) -> (B, 3, H-10, W-10)
        x = F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, 11, 1))
        return F.conv2d(x, window.view(1, 1, 1, 11))[:, 0].unflatten(0, images.shape[:2])

    x, y = (images.float() + 1) / 2, (truth.float() + 1) / 2
    m_x, m_y = blur(x), blur(y)
    s_x, s_y, s_xy = blur(x * x) - m_x**2, blur(y * y) - m_y**2, blur(x * y) - m_x * m_y
    luminance = (2 * m_x * m_y + 0.01**2) / (m_x**2 + m_y**2 + 0.01**2)
    structure = (2 * s_xy + 0.03**2) / (s_x + s_y + 0.03**2)
    return (luminance * structure).flatten(1).mean(1)


@torch.no_grad()
def score_tokenizer(model: VQGAN, sentences, split: str, autocast) -> dict:
    """Measure the tokenizer over a whole split of `data.Sentences`. Without edge maps, None for them.

    PSNR is in dB. `perplexity` is exp of the entropy of code frequencies: V if all are used equally often.
    `edge_sharpness` is |gradient of x'| / |gradient of x| over edge maps: 1 is as sharp as the truth.
    """
    device, counts = model.codebook.weight.device, torch.zeros(model.config.codebook_size)
    quality, is_edges, steepness = [], [], torch.zeros(2)
    for images, task in sentences.batches(split, sentences.config.eval_sentences):
        with autocast:
            tokens = model.encode(images.flatten(0, 1).to(device))
            rebuilt = model.decode(tokens).cpu().view(images.shape)
        counts += torch.bincount(tokens.flatten().cpu(), minlength=len(counts))
        quality.append(psnr(rebuilt.flatten(0, 1), images.flatten(0, 1)).view(task.shape[0], -1))
        is_edges.append(task == sentences.tasks.index("edges"))
        maps = torch.stack([rebuilt, images])[:, is_edges[-1], 1::2]  # (2, n, K+1, 3, H, W)
        steepness += maps.diff(dim=-1).abs().flatten(1).sum(1) + maps.diff(dim=-2).abs().flatten(1).sum(1)
    quality, is_edges, share = torch.cat(quality), torch.cat(is_edges), counts / counts.sum()
    any_edges = bool(is_edges.any())
    return {
        "psnr_source": quality[:, 0::2].mean().item(),
        "psnr_target": quality[:, 1::2].mean().item(),
        "psnr_edges": quality[is_edges, 1::2].mean().item() if any_edges else None,
        "codes_used": int((counts > 0).sum()),
        "perplexity": torch.special.entr(share).sum().exp().item(),
        "edge_sharpness": (steepness[0] / steepness[1]).item() if any_edges else None,
    }
