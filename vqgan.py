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
- The adversarial loss is complete but off by default (`gan_weight 0`): `python vqgan.py --compare` shows why.

    python vqgan.py --out runs/tokenizer     # trains it alone, writes a picture of reconstructions
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

import data


@dataclass
class VQGANConfig:
    """The tokenizer and its training."""

    factor: Annotated[int, "f, pixels of the image's side per token (a power of 2)"] = 4
    codebook_size: Annotated[int, "V, number of codes"] = 128
    code_dim: Annotated[int, "D, size of a code"] = 16
    channels: Annotated[int, "channels at the tokens' resolution"] = 96
    res_blocks: Annotated[int, "residual blocks at the tokens' resolution, in encoder and in decoder"] = 2
    beta: Annotated[float, "weight of the commitment loss (the encoder's term) relative to the codebook loss"] = 0.25
    gradient_weight: Annotated[float, "weight of the loss on image gradients"] = 1.0
    revive_every: Annotated[int, "steps after which a code that was not used is revived"] = 20
    gan_weight: Annotated[float, "weight of the adversarial loss; 0 turns it off"] = 0.0
    gan_start: Annotated[float, "share of the training after which the adversarial loss starts"] = 0.6
    steps: Annotated[int, "training steps"] = 700
    batch_size: Annotated[int, "images a step"] = 64
    learning_rate: Annotated[float, "peak learning rate of AdamW"] = 4e-3

    def __post_init__(self):
        if self.factor < 2 or self.factor & (self.factor - 1):
            raise data.UserError(f"--vqgan-factor {self.factor}: expected a power of 2, at least 2")
        for name in ("codebook_size", "code_dim", "channels", "steps", "batch_size", "revive_every"):
            if getattr(self, name) < 1:
                raise data.UserError(f"--vqgan-{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        for name in ("res_blocks", "beta", "gradient_weight", "gan_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise data.UserError(f"--vqgan-{name.replace('_', '-')} {getattr(self, name)}: expected a number, at least 0")
        if not 0 <= self.gan_start <= 1:
            raise data.UserError(f"--vqgan-gan-start {self.gan_start}: expected a share from 0 to 1")
        if not self.learning_rate > 0:
            raise data.UserError(f"--vqgan-learning-rate {self.learning_rate}: expected a number above 0")


class Codebook(nn.Module):
    """V unit-norm vectors of size D, and the nearest-neighbour lookup with its straight-through gradient."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(size, dim), dim=-1))  # normalised again at every use
        self.register_buffer("unused", torch.zeros(size), persistent=False)  # steps since a code was last used

    @property
    def vectors(self) -> torch.Tensor:
        return F.normalize(self.weight, dim=-1)  # (V, D)

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Unit-norm z (..., D) -> tokens (...): the code with the largest dot product. Always in float32."""
        with torch.autocast(z.device.type, enabled=False):
            return (z.detach().float() @ self.vectors.detach().T).argmax(-1)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize unit-norm encoder outputs.

        z: (..., D). Returns quantized (..., D), whose gradient goes straight to z; tokens (...) long;
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
    def revive(self, z: torch.Tensor, longer_than: int, generator: torch.Generator) -> int:
        """Put codes unused for `longer_than` steps onto random encoder outputs z (n, D); returns how many."""
        dead = (self.unused >= longer_than).nonzero().flatten()
        chosen = torch.randint(len(z), (len(dead),), generator=generator).to(z.device)
        self.weight[dead] = z[chosen].to(self.weight.dtype)
        self.unused[dead] = 0
        return len(dead)


class ResBlock(nn.Module):
    """x + conv(gelu(conv(gelu(x)))); the last weights start at zero, so the block starts as x plus a constant."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.gelu(self.conv1(F.gelu(x))))


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. `image_size` must be a multiple of the configuration's `factor`."""

    def __init__(self, config: VQGANConfig, image_size: int):
        super().__init__()
        if image_size % config.factor:
            raise data.UserError(f"--image-size {image_size}: not a multiple of --vqgan-factor {config.factor}")
        self.config = config
        self.grid = (image_size // config.factor,) * 2  # (h, w)
        levels = config.factor.bit_length() - 1
        widths = [max(config.channels >> (levels - i), 16) for i in range(levels + 1)]  # 24, 48, 96 by default
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
        z = self.encoder(images.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)
        return F.normalize(z.float(), dim=-1)  # (B, N, D)

    def decode_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, N, D), on or off the codebook -> images (B, 3, H, W), about [-1, 1], not clipped."""
        grid = embeddings.transpose(1, 2).unflatten(2, self.grid)  # (B, D, h, w)
        return self.decoder(grid.contiguous(memory_format=torch.channels_last)).float()

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N) long in [0, V) -> embeddings (B, N, D) unit norm."""
        return self.codebook.vectors[tokens]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> tokens (B, N) long, raster order."""
        return self.codebook.nearest(self.latents(images))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N) long -> images (B, 3, H, W) in [-1, 1]."""
        return self.decode_embeddings(self.embed(tokens)).clamp(-1, 1)

    def forward(self, images: torch.Tensor):
        """Reconstruct: returns images (B, 3, H, W), tokens (B, N), latents (B, N, D), codebook and commitment loss."""
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


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """Esser et al. (2021), eq. 7: |grad of reconstruction| / (|grad of adversarial| + 1e-4) at the decoder's last layer.

    With it both losses pull equally hard at the decoder, whatever their scales. In [0, 1e4], no gradient.
    """
    (g_rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (g_adv,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    g_rec, g_adv = data.mean_of_all(g_rec), data.mean_of_all(g_adv)
    return (g_rec.norm() / (g_adv.norm() + 1e-4)).clamp(0, 1e4)


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the horizontal and vertical image gradients of a and b, (B, 3, H, W)."""
    error = a - b
    return error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()


def psnr(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB: (B, 3, H, W) in [-1, 1] -> (B,). Capped at 60 dB."""
    mse = (images.float() - truth.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(4e-6))


def ssim(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image (Wang et al., 2004): (B, 3, H, W) in [-1, 1] -> (B,), 1 for equal images.

    The mean over channels and over all places of a Gaussian window of 11 x 11 pixels, sigma 1.5:

        (2 m_x m_y + C1)(2 s_xy + C2) / ((m_x^2 + m_y^2 + C1)(s_x^2 + s_y^2 + C2)),   C1 = 0.02^2, C2 = 0.06^2

    with C1 and C2 for a range of 2. Raises RuntimeError for images smaller than the window.
    """
    window = torch.exp(-torch.arange(-5.0, 6.0, device=images.device).square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x):  # (B, 3, H, W) -> (B, 3, H-10, W-10)
        x = F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, 11, 1))
        return F.conv2d(x, window.view(1, 1, 1, 11)).view(*images.shape[:2], *[size - 10 for size in images.shape[2:]])

    x, y = images.float(), truth.float()
    m_x, m_y = blur(x), blur(y)
    s_x, s_y, s_xy = blur(x * x) - m_x**2, blur(y * y) - m_y**2, blur(x * y) - m_x * m_y
    luminance = (2 * m_x * m_y + 0.02**2) / (m_x**2 + m_y**2 + 0.02**2)
    structure = (2 * s_xy + 0.06**2) / (s_x + s_y + 0.06**2)
    return (luminance * structure).flatten(1).mean(1)


@torch.no_grad()
def evaluate(model: VQGAN, sentences: data.Sentences, split: str, autocast) -> dict:
    """Measure the tokenizer over a whole split: PSNR (dB), code use and edge sharpness.

    `psnr_source` and `psnr_target` go over all tasks' images, `psnr_edges` over edge maps alone.
    `perplexity` is exp of the entropy of code frequencies (V if all codes are used equally often).
    `edge_sharpness` is |gradient of x'| / |gradient of x| over edge maps: 1 is as sharp as the truth.
    """
    device = model.codebook.weight.device
    scores = {"psnr_source": [], "psnr_target": [], "psnr_edges": []}
    counts = torch.zeros(model.config.codebook_size)
    steep = torch.zeros(2)
    for images, task in sentences.batches(split, sentences.config.eval_sentences):
        with autocast:
            tokens = model.encode(images.flatten(0, 1).to(device))
            rebuilt = model.decode(tokens).cpu().view(images.shape)
        counts += torch.bincount(tokens.flatten().cpu(), minlength=len(counts))
        scores["psnr_source"].append(psnr(rebuilt[:, 0::2].flatten(0, 1), images[:, 0::2].flatten(0, 1)))
        scores["psnr_target"].append(psnr(rebuilt[:, 1::2].flatten(0, 1), images[:, 1::2].flatten(0, 1)))
        maps = task == data.TASKS.index("edges")
        if maps.any():
            pair = torch.stack([rebuilt[maps, 1::2].flatten(0, 1), images[maps, 1::2].flatten(0, 1)])
            scores["psnr_edges"].append(psnr(pair[0], pair[1]))
            steep += pair.diff(dim=-1).abs().flatten(1).sum(1) + pair.diff(dim=-2).abs().flatten(1).sum(1)
    share = counts / counts.sum()
    return {
        **{name: torch.cat(values).mean().item() if values else None for name, values in scores.items()},
        "codes_used": int((counts > 0).sum()),
        "perplexity": torch.special.entr(share).sum().exp().item(),
        "edge_sharpness": (steep[0] / steep[1]).item() if steep[1] > 0 else None,
    }


def scheduled_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of the steps (100 at most), then a cosine down to 2 % of the peak."""
    warmup = min(100, max(1, steps // 20))
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(step / steps, 1))).item())
    return peak * min(1, (step + 1) / warmup) * max(0.02, cosine)


def train_tokenizer(config: VQGANConfig, sentences: data.Sentences, device, dtype, seed: int = 0, progress=None):
    """Train a VQGAN on the sources and targets of training sentences, drawn afresh at each step.

    progress: where an unfinished training is kept, see `data.training_steps`. Returns the model and the log,
    {"step": [...], "reconstruction": [...], ...}.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = VQGAN(config, sentences.config.image_size).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
    discriminator = Discriminator().to(device, memory_format=torch.channels_last)
    d_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=5e-4, betas=(0.5, 0.9))
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    step_model, step_discriminator = data.parallel(model), data.parallel(discriminator)
    gan_from = round(config.gan_start * config.steps) if config.gan_weight > 0 else config.steps
    last_layer = model.decoder[-1].weight
    per_sentence = 2 * sentences.config.num_demos + 2
    names = ("reconstruction", "gradient", "commitment", "generator", "discriminator", "codes_in_use")
    log = {"step": [], **{name: [] for name in names}}

    parts = {"model": model, "unused": model.codebook.unused, "optimizer": optimizer, "generator": generator}
    parts |= {"discriminator": discriminator, "d_optimizer": d_optimizer}
    bar = data.training_steps("tokenizer", config.steps, log, parts, progress)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(step, config.steps, config.learning_rate)
        images, _ = sentences("train", step, -(-config.batch_size // per_sentence))
        images = images.flatten(0, 1)[: config.batch_size][data.own_rows(config.batch_size)]
        images = images.to(device, memory_format=torch.channels_last)

        with autocast:
            rebuilt, tokens, z, codebook_loss, commitment_loss = step_model(images)
        pixels, slopes = F.mse_loss(rebuilt, images), gradient_loss(rebuilt, images)
        reconstruction = pixels + config.gradient_weight * slopes
        loss = reconstruction + 0.1 * (codebook_loss + config.beta * commitment_loss)
        adversarial = d_loss = torch.zeros((), device=device)
        if step >= gan_from:
            with autocast:
                adversarial = generator_loss(discriminator, rebuilt)
            loss = loss + config.gan_weight * adaptive_weight(reconstruction, adversarial, last_layer) * adversarial
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        if step >= gan_from:
            with autocast:
                d_loss = discriminator_loss(step_discriminator, images, rebuilt)
            d_optimizer.zero_grad(set_to_none=True)
            d_loss.backward()
            d_optimizer.step()

        tokens = data.all_rows(tokens, config.batch_size)
        model.codebook.count_use(tokens)
        if step % config.revive_every == config.revive_every - 1 and step < 0.8 * config.steps:
            # Not in the last fifth: by then every revived code has had time to find its place.
            z = data.all_rows(z.detach(), config.batch_size)
            model.codebook.revive(z.flatten(0, 1), config.revive_every, generator)
        if step % 20 == 0 or step == config.steps - 1:
            data.check_finite(data.mean_of_all(loss), "tokenizer", step, "--vqgan-learning-rate", optimizer.param_groups[0]["lr"])
            in_use = len(tokens.unique())
            values = [data.mean_of_all(x).item() for x in (pixels, slopes, commitment_loss, adversarial, d_loss)] + [in_use]
            log["step"].append(step)
            for name, value in zip(names, values, strict=True):
                log[name].append(value)
            bar.set_postfix(mse=f"{values[0]:.4f}", codes=f"{in_use}/{config.codebook_size}", refresh=False)
    return model.eval().requires_grad_(False), log


def save_reconstructions(path, model: VQGAN, sentences: data.Sentences, split: str, autocast) -> None:
    """A picture of sources and targets of each task, above what the tokenizer makes of them."""
    device = model.codebook.weight.device
    images, task = sentences(split, 0, 64)
    rows, labels = [], []
    for number, name in enumerate(data.TASKS):
        pairs = images[task == number][:4, -2:].flatten(0, 1)  # (8, 3, H, W) source, target, source, ...
        with torch.no_grad(), autocast:
            rebuilt = model.decode(model.encode(pairs.to(device))).cpu()
        rows += [list(pairs), list(rebuilt)]
        labels += [name, "rebuilt"]
    data.save_picture(path, rows, labels, ["source", "target"] * 4)


def compare_adversarial(path, config: VQGANConfig, sentences: data.Sentences, device, dtype, seeds, autocast) -> dict:
    """Train without and with the adversarial loss, the same seeds for both; write PATH.json and PATH.png.

    Returns {"without", "with": a list of `evaluate` results, one for each seed}.
    """
    results, shown = {"without": [], "with": []}, {}
    for name, weight in (("without", 0.0), ("with", config.gan_weight or 0.5)):
        for seed in seeds:
            began = time.perf_counter()
            model, _ = train_tokenizer(replace(config, gan_weight=weight), sentences, device, dtype, seed)
            seconds = time.perf_counter() - began
            results[name].append({"seed": seed, "seconds": seconds, **evaluate(model, sentences, "val", autocast)})
            shown.setdefault(name, model)
    images, task = sentences("val", 0, 64)
    chosen = torch.cat([images[task == number][:3, -1] for number in range(len(data.TASKS))])  # nine targets
    rows = [list(chosen)]
    for model in shown.values():
        with torch.no_grad(), autocast:
            rows.append(list(model.decode(model.encode(chosen.to(device))).cpu()))
    data.save_picture(
        f"{path}.png", rows, ["truth", *(f"{name} GAN" for name in shown)], [t for t in data.TASKS for _ in range(3)]
    )
    data.save_json(f"{path}.json", {"config": {**asdict(config), "gan_weight": config.gan_weight or 0.5}, **results})
    return results


def build_tokenizer(checkpoint: dict, device) -> VQGAN:
    """Rebuild the frozen tokenizer from the configuration and the weights in its checkpoint."""
    model = VQGAN(VQGANConfig(**checkpoint["config"]["vqgan"]), checkpoint["config"]["data"]["image_size"])
    model.load_state_dict(checkpoint["model"])
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def main():
    parser = data.Parser(description="Train the tokenizer alone and write a picture of its reconstructions.")
    parser.add_argument("--out", default="runs/tokenizer", help="folder for checkpoint and pictures")
    parser.add_argument("--seed", type=data.seed, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16")
    parser.add_argument("--compare", action="store_true", help="without and with the adversarial loss, three seeds each")
    parser.add_config(data.DataConfig, skip=("train_sentences",))
    parser.add_config(VQGANConfig, "vqgan_")
    args = parser.parse_args()
    device = data.pick_device(args.device)
    dtype = data.pick_dtype(args.dtype, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    config = data.config_from_flags(args, VQGANConfig, "vqgan_")
    sentences = data.Sentences(data.config_from_flags(args, data.DataConfig), args.seed)
    data.check_one_process()
    data.check_writable(args.out)
    if args.compare:
        seeds = range(args.seed, args.seed + 3)
        results = compare_adversarial(Path(args.out) / "adversarial", config, sentences, device, dtype, seeds, autocast)
        for name in results["with"][0]:
            if name != "seed" and None not in [run[name] for side in results.values() for run in side]:
                ranges = [sorted(run[name] for run in results[side]) for side in ("without", "with")]
                print(f"{name:>16}" + "".join(f"{v[1]:10.3f} ({v[0]:.3f} to {v[-1]:.3f})" for v in ranges))
        print("median (range) of three seeds, without and with the adversarial loss")
        return
    began = time.perf_counter()
    model, log = train_tokenizer(config, sentences, device, dtype, args.seed)
    seconds = time.perf_counter() - began
    metrics = {"seconds": seconds, **evaluate(model, sentences, "val", autocast)}
    out = Path(args.out)
    data.save_checkpoint(
        out / "tokenizer.pt",
        {"config": {"data": asdict(sentences.config), "vqgan": asdict(config)}, "model": model.state_dict(), "log": log},
    )
    save_reconstructions(out / "reconstructions.png", model, sentences, "val", autocast)
    for name, value in metrics.items():
        if value is not None:  # no sentence of the edge task in a very small validation split
            print(f"{name:>16} {value:10.3f}")


if __name__ == "__main__":
    data.run_command(main)
