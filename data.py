"""Toy datasets, tasks and visual sentences: everything that goes into the models, and out of them to disk.

A *scene* is an RGB image. A *task* turns a scene into a (source, target) pair. A *visual sentence* is K
demonstration pairs and one query pair of the same task, each pair from a scene of its own:

    [src_1, dst_1, ..., src_K, dst_K, src_q, dst_q]        2K+2 images

Nothing but the demonstrations tells which task is meant. For K = 1 and edge detection:

    photo A   edges of A   photo B   edges of B   <- the last image is what the model has to generate

Three datasets: `shapes` and `glyphs` are drawn by the code below, `folder:PATH` reads your own images.
Everywhere inside the project images are float tensors (B, 3, H, W) in [-1, 1].

    python data.py --out contact_sheets      # a picture of every dataset and task
"""

import argparse
import colorsys
import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

SPLITS = ("train", "val", "test")
TASKS = ("colorize", "inpaint", "edges")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class UserError(ValueError):
    """Something the user can put right. Commands print its one line and exit with status 2."""


@dataclass
class DataConfig:
    """What the visual sentences are made of."""

    data: Annotated[str, "shapes, glyphs or folder:PATH"] = "shapes"
    image_size: Annotated[int, "height and width of every image in pixels"] = 32
    num_demos: Annotated[int, "K, the demonstration pairs before the query pair (1 to 3)"] = 1
    palette: Annotated[str, "hues of the drawn objects: fixed, or a rotation that belongs to the sentence"] = "fixed"
    train_sentences: Annotated[int, "sentences the backbone is pretrained on"] = 20480
    eval_sentences: Annotated[int, "sentences of the validation split, and again of the test split"] = 512

    def __post_init__(self):
        if self.data not in ("shapes", "glyphs") and not self.data.startswith("folder:"):
            raise UserError(f"--data {self.data}: expected shapes, glyphs or folder:PATH")
        if self.palette not in ("fixed", "sentence"):
            raise UserError(f"--palette {self.palette}: expected fixed or sentence")
        if self.palette == "sentence" and self.data.startswith("folder:"):
            raise UserError("--palette sentence: photographs have no palette; use it with shapes or glyphs")
        if not 1 <= self.num_demos <= 3:
            raise UserError(f"--num-demos {self.num_demos}: expected 1, 2 or 3")
        if self.image_size < 16 or self.image_size % 8:
            raise UserError(f"--image-size {self.image_size}: expected a multiple of 8, at least 16")
        for name in ("train_sentences", "eval_sentences"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if self.eval_sentences < 16:
            raise UserError(f"--eval-sentences {self.eval_sentences}: expected at least 16")


# --------------------------------------------------------------------------------------------------
# Scenes drawn by code
# --------------------------------------------------------------------------------------------------

BACKGROUNDS = torch.tensor([[250, 244, 234], [200, 216, 236], [40, 56, 42], [24, 28, 40]]) / 127.5 - 1  # (4, 3)
SHAPES = ("disc", "square", "triangle", "ring", "cross", "diamond")
GLYPHS = "ABCDEFGHJKLMNPRSTUVWXYZ23456789"


def palette(kinds: int) -> torch.Tensor:
    """Two shades of one hue for each kind of object: (kinds, 2 shades, 3 channels) in [-1, 1].

    The hue is fixed by the kind, the shade is free. So the grey value alone does not give the colour away:
    to colorize an object, a model has to recognise it. Each shape's grey differs by 19 of 255 or more from
    every background's, so none vanishes in the grey image.
    """
    rgb = [[colorsys.hsv_to_rgb((k + 0.5) / kinds, 0.75, v) for v in (0.65, 0.95)] for k in range(kinds)]
    return (torch.tensor(rgb) * 255).round() / 127.5 - 1


def shape_masks(size: int) -> torch.Tensor:
    """Coverage masks of all shapes at two sizes: (kinds, sizes, S, S) in [0, 1], centred.

    Every inside test is exact in float32 (the coordinates are multiples of 1/8 pixel), so the scenes are
    bit-identical on every machine. The 4 x 4 sub-pixels of a pixel are averaged against jagged edges.
    """
    axis = (torch.arange(size * 4) - size * 2 + 0.5) / 4  # (4S,) sub-pixel centres, in pixels from the middle
    y, x = axis[:, None], axis[None, :]
    masks = []
    for r in (size * 6 / 32, size * 8 / 32):
        d2 = x * x + y * y
        inside = (
            d2 <= r * r,
            torch.maximum(x.abs(), y.abs()) <= r * 0.875,
            (y <= r * 0.875) & (2 * x.abs() <= y + r),
            (d2 <= r * r) & (d2 >= r * r * 0.25),
            (torch.minimum(x.abs(), y.abs()) <= r * 0.375) & (torch.maximum(x.abs(), y.abs()) <= r),
            x.abs() + y.abs() <= r * 1.125,
        )
        masks.append(torch.stack(inside).float().view(len(SHAPES), size, 4, size, 4).mean((2, 4)))
    return torch.stack(masks, dim=1)


def glyph_masks(size: int) -> torch.Tensor:
    """Coverage masks of letters and digits, three scales by three rotations: (kinds, 9, S, S) in [0, 1]."""
    masks = []
    for character in GLYPHS:
        for scale in (0.45, 0.55, 0.65):
            font = ImageFont.load_default(size=size * scale * 4)
            for angle in (-20, 0, 20):
                canvas = Image.new("L", (size * 4, size * 4))
                ImageDraw.Draw(canvas).text((size * 2, size * 2), character, fill=255, font=font, anchor="mm")
                canvas = canvas.rotate(angle, Image.Resampling.BILINEAR).resize((size, size), Image.Resampling.BOX)
                masks.append(np.asarray(canvas, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(masks)).view(len(GLYPHS), 9, size, size)


def draw_scenes(masks: torch.Tensor, turn: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw n random scenes: a flat background and two objects, the second over the first.

    masks: (kinds, variants, S, S), from `shape_masks` or `glyph_masks`. turn: (n,) long, how far each scene's hues
    are rotated: an object of kind k has the hue of kind k + turn. Returns (n, 3, S, S) in [-1, 1].
    Objects stand on a grid of S/8 pixels (4 pixels at S = 32), which keeps the scenes learnable.
    """
    n, (kinds, variants, size, _) = len(turn), masks.shape
    colours = palette(kinds)

    def pick(high):
        return torch.randint(high, (n,), generator=generator)

    image = BACKGROUNDS[pick(4)][:, :, None, None].expand(n, 3, size, size)
    steps = torch.arange(-2, 3)
    places = torch.cartesian_prod(steps, steps, steps, steps).view(-1, 2, 2)  # (625, 2 objects, row and column)
    places = places[(places[:, 0] - places[:, 1]).abs().amax(1) >= 2]  # none hides the other: (456, 2, 2)
    place = places[pick(len(places))]  # (n, 2, 2)
    for number in range(2):
        kind, variant, shade = pick(kinds), pick(variants), pick(2)
        read = torch.arange(size) - place[:, number, :, None] * (size // 8)  # (n, 2, S) where to read the mask
        rows, columns = read.clamp(0, size - 1).unbind(1)  # the masks' borders are empty
        alpha = masks.flatten(0, 1)[(kind * variants + variant)[:, None, None], rows[:, :, None], columns[:, None, :]]
        image = image + alpha[:, None] * (colours[(kind + turn) % kinds, shade][:, :, None, None] - image)
    return image


def split_of(images: torch.Tensor) -> torch.Tensor:
    """The split a scene belongs to, for ever: 0 train (80 %), 1 val (10 %), 2 test (10 %).

    images: (n, 3, S, S) in [-1, 1]. Decided by a hash of the pixels, so that no picture, however it
    came about, can be in two splits. Returns (n,) long.
    """
    pixels = to_uint8(images).flatten(1).long()  # (n, 3*S*S)
    weights = (torch.arange(pixels.shape[1]) * 0x9E3779B97F4A7C1 + 0x2545F4914F6CDD1) | 1
    mixed = (pixels * weights).sum(1)  # int64, wraps around
    bucket = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B >> 33) % 10
    return (bucket >= 8).long() + (bucket >= 9).long()


# --------------------------------------------------------------------------------------------------
# Scenes from a folder
# --------------------------------------------------------------------------------------------------


def load_image(path, size: int) -> torch.Tensor:
    """Read one image file as (3, size, size) in [-1, 1]: upright, on white, centre-cropped, resized.

    Raises UserError, naming the file, if it is missing or cannot be read as an image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode in ("I", "F"):
                raise ValueError("32 bits a pixel have no known range; save it with 8 or 16")
            if image.mode.startswith("I;16"):  # 16 bits a pixel: Pillow would clip, not scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{path}: cannot be read as an image ({error})") from None
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    shrinks = min(image.size) >= 2 * size
    return to_float(ImageOps.fit(image, (size, size), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC))


def load_folder(folder: str, size: int) -> dict[str, torch.Tensor]:
    """Read every image below `folder`; a file that cannot be read is named and skipped, a copy is left out.

    Returns {"train", "val", "test": (n, 3, size, size) uint8}, held in memory (3 KB an image at 32 x 32).
    If `folder` has sub-folders train, val and test, they are the splits. Otherwise each image's content
    decides (`split_of`), so that the split is the same on every machine and for every order of the files.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"--data folder:{folder}: no such folder")
    given = all((root / split).is_dir() for split in SPLITS)
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
    if not files:
        raise UserError(f"--data folder:{folder}: no image files ({', '.join(IMAGE_ENDINGS)}) in it")
    found, seen = {split: [] for split in SPLITS}, set()
    for path in files:
        try:
            image = load_image(path, size)
        except UserError as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        split = path.relative_to(root).parts[0] if given else SPLITS[split_of(image[None])]
        pixels = to_uint8(image)
        key = hashlib.sha256(pixels.numpy().tobytes()).digest()
        if split in found and key not in seen:  # a copy could be demonstration and query at once
            seen.add(key)
            found[split].append(pixels)
    counts = ", ".join(f"{len(images)} {split}" for split, images in found.items())
    if min(len(images) for images in found.values()) < 4:
        raise UserError(f"--data folder:{folder}: too few images ({counts}); each split needs at least 4, so add more")
    print(f"folder:{folder}: {counts} images")
    return {split: torch.stack(images) for split, images in found.items()}


# --------------------------------------------------------------------------------------------------
# Tasks: scene -> (source, target)
# --------------------------------------------------------------------------------------------------


def grey(images: torch.Tensor) -> torch.Tensor:
    """Luma (ITU-R BT.601) of (B, 3, H, W) images, as three equal channels."""
    luma = 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]
    return luma.repeat(1, 3, 1, 1)


def colorize(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey image -> the RGB image. `generator` is unused: all tasks are called alike."""
    return grey(images), images


def inpaint(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Image with a black square hole, a quarter of its side, at a random place -> the whole RGB image."""
    n, _, size, _ = images.shape
    hole = size // 4
    corner = torch.randint(size - hole + 1, (2, n, 1), generator=generator)  # rows and columns
    offset = torch.arange(size) - corner  # (2, n, S)
    rows, columns = (offset >= 0) & (offset < hole)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], -1.0, images), images


def edges(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """RGB image -> its edge map: the Sobel gradient's length, the largest over the three channels.

        g_x = I * [1 0 -1; 2 0 -2; 1 0 -1] / 4,   g_y = g_x transposed,   edge = min(1, |g|)

    The map is white (1) on black (-1), three equal channels. `generator` is unused. The filter is written
    with shifted sums: a convolution may add in another order on another machine.
    """
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    across = padded[..., :, 2:] - padded[..., :, :-2]  # (B, 3, S+2, S)
    down = padded[..., 2:, :] - padded[..., :-2, :]  # (B, 3, S, S+2)
    g_x = (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 4  # (B, 3, S, S)
    g_y = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 4
    length = (g_x * g_x + g_y * g_y).sqrt().amax(1, keepdim=True).clamp(max=1)  # (B, 1, S, S)
    return images, (2 * length - 1).repeat(1, 3, 1, 1)


TASK_FUNCTIONS = {"colorize": colorize, "inpaint": inpaint, "edges": edges}


# --------------------------------------------------------------------------------------------------
# Visual sentences
# --------------------------------------------------------------------------------------------------


class Sentences:
    """Visual sentences of one dataset, made on demand.

    `sentences(split, index, n)` always gives the same sentences for the same (seed, split, index, n), on
    every machine, in any order: there is no state to save, and a training step can make its own batch.
    """

    def __init__(self, config: DataConfig, seed: int = 0):
        self.config, self.seed = config, seed
        self.folder, self.masks, self.fingerprint = None, None, None
        if config.data == "shapes":
            self.masks = shape_masks(config.image_size)
        elif config.data == "glyphs":
            self.masks = glyph_masks(config.image_size)
        else:
            self.folder = load_folder(config.data.removeprefix("folder:"), config.image_size)
            # Another picture changes which ones are drawn: what was made of the old ones does not fit the new.
            digest = hashlib.sha256(b"".join(images.numpy().tobytes() for images in self.folder.values()))
            self.fingerprint = digest.hexdigest()[:16]

    def scenes(self, split: str, n: int, generator: torch.Generator) -> torch.Tensor:
        """n sets of K+1 scenes of `split`: (n, K+1, 3, S, S) in [-1, 1]; in a set from a folder, no image comes twice."""
        per_sentence = self.config.num_demos + 1
        if self.folder is not None:
            images = self.folder[split]
            # A scene that were both demonstration and query would give the answer away: draw without replacement.
            chosen = torch.rand(n, len(images), generator=generator).topk(per_sentence, dim=1).indices
            picked = to_float(images[chosen])  # (n, K+1, 3, S, S)
            mirrored = torch.randint(2, (n, per_sentence, 1, 1, 1), generator=generator).bool()
            return torch.where(mirrored, picked.flip(-1), picked)
        kinds, size = len(self.masks), self.config.image_size
        turns = kinds if self.config.palette == "sentence" else 1
        turn = torch.randint(turns, (n, 1), generator=generator).expand(n, per_sentence).flatten()
        scenes, missing = torch.empty(len(turn), 3, size, size), torch.arange(len(turn))
        while len(missing) > 0:
            images = draw_scenes(self.masks, turn[missing], generator)
            right = split_of(images) == SPLITS.index(split)
            scenes[missing[right]] = images[right]
            missing = missing[~right]
        return scenes.view(n, per_sentence, 3, size, size)

    def __call__(self, split: str, index: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the index-th batch of n sentences of a split.

        Returns images (n, 2K+2, 3, S, S) in [-1, 1], and the task of each sentence, (n,) long into `TASKS`.
        """
        digest = hashlib.sha256(f"{self.seed}/{split}/{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        scenes = self.scenes(split, n, generator)  # (n, K+1, 3, S, S)
        task = torch.randint(len(TASKS), (n,), generator=generator)
        images = torch.empty(n, 2 * scenes.shape[1], *scenes.shape[2:])
        for number, name in enumerate(TASKS):
            members = (task == number).nonzero().flatten()
            source, target = TASK_FUNCTIONS[name](scenes[members].flatten(0, 1), generator)
            images[members, 0::2] = source.view(len(members), *scenes.shape[1:])
            images[members, 1::2] = target.view(len(members), *scenes.shape[1:])
        return images, task

    def batches(self, split: str, total: int):
        """Go through the first `total` sentences of a split, 64 at a time; the same ones for every `total`."""
        for index, start in enumerate(range(0, total, 64)):
            images, task = self(split, index, 64)
            yield images[: total - start], task[: total - start]


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Put batches of (images, task) together: images (total, 2K+2, 3, S, S), task (total,)."""
    images, task = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(task)


# --------------------------------------------------------------------------------------------------
# More than one process (`torchrun`); with one, each of these functions hands back what it was given
# --------------------------------------------------------------------------------------------------


def start_processes(device: torch.device) -> torch.device:
    """Join the processes that `torchrun` has started, if it has; returns the device of this one.

    All processes draw the same batches from the same seeds, each works on its rows of them (`own_rows`), and
    DistributedDataParallel averages the gradients: the batch is the same for any number of processes. The first
    process writes and prints. Raises UserError if there are more processes than GPUs.
    """
    if not dist.is_torchelastic_launched():
        return device
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device.type}: more than one process needs CPU or CUDA devices")
    if device.index is not None:
        raise UserError(f"--device {device}: with torchrun each process takes a GPU of its own; say --device cuda")
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"torchrun started process {local + 1} here, but there are {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    return device


def check_one_process() -> None:
    """Raise UserError if `torchrun` has started a command that does not divide its work."""
    if dist.is_torchelastic_launched():
        raise UserError("torchrun: only train_refiner.py works in more than one process; start this command without it")


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def end_processes() -> bool:
    """Part from the other processes, when all have come here; returns whether this is the first, which goes on alone."""
    first = is_first()
    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()
    return first


def check_divides(batch_size: int, flag: str) -> None:
    """Raise UserError if a batch cannot be divided equally among the processes."""
    if dist.is_initialized() and batch_size % dist.get_world_size():
        raise UserError(f"{flag} {batch_size}: not a multiple of the {dist.get_world_size()} processes")


def own_rows(total: int) -> slice:
    """The rows of a batch of `total` that this process works on."""
    if not dist.is_initialized():
        return slice(total)
    rank, size = dist.get_rank(), dist.get_world_size()
    return slice(rank * total // size, (rank + 1) * total // size)


def all_rows(own: torch.Tensor, total: int) -> torch.Tensor:
    """What all processes made of their `own_rows`, put together: (own, ...) -> (total, ...), the same on each."""
    if not dist.is_initialized():
        return own
    rows = own.new_zeros(total, *own.shape[1:])
    rows[own_rows(total)] = own
    dist.all_reduce(rows)  # a sum, in which each row is not zero once
    return rows


def mean_of_all(own: torch.Tensor) -> torch.Tensor:
    """The mean over all processes, without a gradient: of losses to log, and wherever a whole batch's gradient is needed."""
    if not dist.is_initialized():
        return own.detach()
    mean = own.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def parallel(model: torch.nn.Module) -> torch.nn.Module:
    """The model to call in a training step: its gradients become the mean over all processes."""
    return torch.nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False) if dist.is_initialized() else model


# --------------------------------------------------------------------------------------------------
# The edges of the program: pixels, pictures, checkpoints, devices and flags, shared by every command
# --------------------------------------------------------------------------------------------------


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images in [-1, 1] (values outside are clipped) -> uint8 in [0, 255], same shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images) -> torch.Tensor:
    """uint8 images in [0, 255] -> float in [-1, 1]; a Pillow image becomes (3, H, W)."""
    if isinstance(images, Image.Image):
        images = torch.from_numpy(np.array(images)).permute(2, 0, 1)
    return images.float() / 127.5 - 1


def write_whole(path, write) -> None:
    """Call `write(temporary_path)`, then put the file in place: the file is whole or is not there."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or str(error).splitlines()[0]})"
        ) from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def save_picture(path, rows: list, row_labels=(), column_labels=(), title: str = "") -> None:
    """Write a labelled grid of pictures.

    rows: a list of lists; a cell is an image (3, H, W) in [-1, 1], a map (H, W) in [0, 1].
    """
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(columns + 0.9, len(rows) + 0.5), layout="constrained", dpi=130)
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
    for r, row in enumerate(rows):
        for c in range(columns):
            axis, cell = axes[r][c], row[c] if c < len(row) else None
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if r == 0 and c < len(column_labels):
                axis.set_title(column_labels[c], fontsize=8)
            if c == 0 and r < len(row_labels):
                axis.set_ylabel(row_labels[r], fontsize=8, rotation=0, ha="right", va="center")
            if cell is not None and cell.ndim == 3:
                axis.imshow(to_uint8(cell).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            elif cell is not None:
                axis.imshow(cell.float().cpu().numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    if title:
        figure.suptitle(title, fontsize=9)
    write_whole(path, figure.savefig)


def save_json(path, content: dict) -> None:
    """Write a dictionary as readable JSON, whole or not at all."""
    write_whole(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))


def save_checkpoint(path, content: dict) -> None:
    """Write tensors and plain types with `torch.save`, whole or not at all."""
    write_whole(path, lambda p: torch.save(content, p))


def load_checkpoint(path) -> dict:
    """Read what `save_checkpoint` wrote. Raises UserError, naming the file, for anything else."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train one with `python train_refiner.py`")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated file, another format, a pickle with code in it
        raise UserError(f"{path}: not a checkpoint of this project ({type(error).__name__})") from None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise UserError(f"{path}: not a checkpoint of this project (no configuration in it)")
    return content


def first_difference(old: dict, new: dict, prefix: str = "") -> str | None:
    """Name the first field in which two nested configurations differ, with both values; None if they agree."""
    for name in new:
        if isinstance(new[name], dict):
            found = first_difference(old.get(name, {}), new[name], f"{prefix}{name}.")
            if found:
                return found
        elif old.get(name) != new[name]:
            return f"{prefix}{name} = {old.get(name)}, now {new[name]}"
    return None


def training_steps(name: str, steps: int, log: dict, parts: dict, progress=None, every: int = 100, unit: str = "step") -> tqdm:
    """The steps of a training, as a bar to loop over. Killed at any moment, the training goes on where it was.

    progress: None, or (file, configuration). After every `every` steps the file gets all that the loop changes: `parts`
    ({name: module, optimizer, generator or tensor}), the log and torch's own random state. If the file is there at the
    start, all of it is put back and its steps are left out. So at most `every` steps are lost, and the weights at the
    end are those of a training that was not interrupted (with dropout, on a CPU only: a GPU's random state is not kept).
    The first Ctrl-C lets the step end, saves, and then raises KeyboardInterrupt. Weights that are no numbers are not
    saved. `log["earlier_seconds"]` is what earlier attempts took.
    Raises UserError if the file was made with another configuration.
    """
    log["earlier_seconds"], first = 0.0, 0
    if progress and progress[0].is_file():
        path, config = progress
        saved = load_checkpoint(path)
        if difference := first_difference(saved["config"], config):
            raise UserError(f"{path} was made with {difference}: give another --out, or remove the file to begin again")
        try:
            for key, part in parts.items():
                if isinstance(part, torch.Tensor):
                    part.copy_(saved["parts"][key])
                elif isinstance(part, torch.Generator):
                    part.set_state(saved["parts"][key])
                else:
                    part.load_state_dict(saved["parts"][key])
            torch.set_rng_state(saved["random"])
            log.update(saved["log"])
            first = saved["step"]
        except (KeyError, TypeError, ValueError, RuntimeError):  # of another version
            raise UserError(f"{path}: not what this version of {name} keeps; remove the file to begin again") from None
        print(f"{name}: goes on at {unit} {first} of {steps}")
    began, earlier, interrupts, saved_steps = time.perf_counter(), log["earlier_seconds"], [], [first]

    def save(step: int) -> None:
        states = {key: part.state_dict() if hasattr(part, "state_dict") else part for key, part in parts.items()}
        states |= {key: part.get_state() for key, part in parts.items() if isinstance(part, torch.Generator)}
        content = {"config": progress[1], "step": step, "parts": states, "random": torch.get_rng_state()}
        seconds = earlier + time.perf_counter() - began
        save_checkpoint(progress[0], {**content, "log": {**log, "earlier_seconds": seconds}})
        saved_steps.append(step)

    def interrupt(*_) -> None:
        interrupts.append(True)
        if len(interrupts) > 1:  # impatient: what was saved before still counts
            raise KeyboardInterrupt

    def run():
        listens = progress is not None and threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGINT, interrupt) if listens else None
        try:
            for step in range(first, steps):
                yield step  # here the loop does its work
                if progress and is_first() and (interrupts or step % every == every - 1):
                    modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
                    if all(p.isfinite().all() for module in modules for p in module.parameters()):
                        save(step + 1)
                if interrupts and is_first():  # the others end when it is gone; one that left earlier would keep it from saving
                    raise KeyboardInterrupt(f"{name}: {unit} {saved_steps[-1]} of {steps} is saved")
        finally:
            if listens:
                signal.signal(signal.SIGINT, handler)

    return tqdm(run(), desc=name, total=steps, initial=first, unit=unit, mininterval=1, leave=None)


def check_finite(loss: torch.Tensor, stage: str, step: int, flag: str, rate: float) -> None:
    """Raise UserError, with what to try, if a training's loss is no longer a number."""
    if not torch.isfinite(loss):
        raise UserError(f"{stage}: the loss is {loss.item()} at step {step}, learning rate {rate:.2g}; try a lower {flag}")


def check_writable(folder, flag: str = "--out") -> None:
    """Make `folder` if need be; raises UserError, before any work is done, if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror})") from None


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensor (Linux, glibc), rather than return it at every step.

    Otherwise the system clears each large temporary tensor anew: on a CPU a refiner's training step took 105 ms so,
    and 87 ms with the memory kept (one core), and its attention in a refining pass 4.6 and 2.8 ms (two cores).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows, another C library
        return
    # M_MMAP_THRESHOLD: what is larger than 32 MB, data and not temporary, is still given back. It is the most that older
    # glibc takes; M_TRIM_THRESHOLD alone would freeze the first at 128 KB, which is ten times as slow.
    if mallopt(-3, 2**25):
        mallopt(-1, 2**30)


def peak_memory(device: torch.device) -> float | None:
    """The most memory that this process has used so far in GiB: by tensors on a CUDA device, otherwise resident memory.

    None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:  # Linux: `resource` would tell the memory of the process that started this one, if that was larger
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
    except (OSError, TypeError):
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`, ... -> a device that is there. Raises UserError otherwise."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or mps")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`, `float32` or `bfloat16` -> the precision of autocast.

    `auto` takes bfloat16 where the hardware multiplies it faster than float32: GPUs that support it, and
    CPUs with AVX512-BF16 or AMX (there a training step takes a half to a third of the time).
    """
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        name = "bfloat16" if fast else "float32"
    if name not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {name}: expected auto, float32 or bfloat16")
    return getattr(torch, name)


class Parser(argparse.ArgumentParser):
    """argparse, but a bad flag gets one line."""

    def error(self, message):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def add_config(self, config_class, prefix: str = "", skip: tuple = ()) -> None:
        """Add one flag per field of a config dataclass; its annotation is the help text."""
        group = self.add_argument_group(f"{config_class.__name__}: {config_class.__doc__.splitlines()[0]}")
        hints = typing.get_type_hints(config_class, include_extras=True)
        for item in dataclasses.fields(config_class):
            if item.name not in skip:
                kind, text = typing.get_args(hints[item.name])
                flag = f"--{prefix}{item.name}".replace("_", "-")
                if kind is bool:  # --flag and --no-flag
                    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
                else:
                    group.add_argument(flag, type=kind, default=None, metavar=kind.__name__.upper(), help=text)


def config_from_flags(args, config_class, prefix: str = "", preset: dict | None = None):
    """Make a config dataclass from its defaults, a preset's values over them, and the flags given over both."""
    values = dict(preset or {})
    for item in dataclasses.fields(config_class):
        if (value := getattr(args, f"{prefix}{item.name}", None)) is not None:
            values[item.name] = value
    try:
        return config_class(**values)
    except ValueError as error:  # the dataclasses check their fields
        raise UserError(str(error)) from None


def seed(text: str) -> int:
    """A seed from a flag, 0 to 2^63 - 1; argparse names the flag for any other."""
    if not 0 <= int(text) < 2**63:
        raise ValueError
    return int(text)


def run_command(main, kept: str = "") -> None:
    """Run a command's `main`; what the user can put right becomes one line and exit status 2.

    kept: what to say after Ctrl-C about what has been done so far.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print("\ninterrupted. " + ". ".join(part for part in (str(interrupt), kept) if part), file=sys.stderr)
        sys.exit(130)


def main():
    parser = Parser(description="Write a contact sheet of each toy dataset and task.")
    parser.add_argument("--out", default="contact_sheets", help="folder for the pictures")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_config(DataConfig, skip=("data", "train_sentences", "eval_sentences"))
    parser.add_argument("--data", dest="names", nargs="+", default=["shapes", "glyphs"], help="datasets to draw")
    args = parser.parse_args()
    check_writable(args.out)
    for name in args.names:
        config = config_from_flags(args, DataConfig, preset={"data": name})
        sentences = Sentences(config, args.seed)
        images, task = sentences("train", 0, 256)
        rows = [list(images[task == number][i]) for number in range(len(TASKS)) for i in range(3)]
        roles = [f"{role} {k + 1}" for k in range(config.num_demos) for role in ("source", "target")]
        labels = [task_name if i == 1 else "" for task_name in TASKS for i in range(3)]
        path = Path(args.out) / f"{Path(name.removeprefix('folder:')).name}.png"
        save_picture(path, rows, labels, [*roles, "query", "truth"], f"{name}: one visual sentence a row")
        began = time.perf_counter()
        for index in range(1, 9):
            sentences("train", index, 256)
        speed = 8 * images[:, :, 0, 0, 0].numel() / (time.perf_counter() - began)
        print(f"wrote {path} ({speed:,.0f} images/s are drawn)")


if __name__ == "__main__":
    run_command(main)
