"""Datasets, tasks and visual sentences: everything that goes into the models, and out of them to disk.

A *scene* is an RGB image. A *task* turns a scene into a (source, target) pair. A *visual sentence* is K
demonstration pairs and one query pair of the same task, each pair from a scene of its own:

    [src_1, dst_1, ..., src_K, dst_K, src_q, dst_q]        2K+2 images, the last one to be generated

Nothing but the demonstrations tells which task is meant. The datasets `shapes` and `glyphs` are drawn by
the code below, `folder:PATH` reads your own images. Images are float tensors (B, 3, H, W) in [-1, 1].

    python data.py --out contact_sheets      # a picture of every dataset and task
"""

import colorsys
import contextlib
import hashlib
import os
import re
import textwrap
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import runtime
from runtime import UserError

SPLITS = ("train", "val", "test")
TASKS = ("colorize", "inpaint", "edges")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CLOSED = "folders that cannot be opened"
HIDDEN = (".", "@", "$", "__MACOSX")  # what systems put beside files: ._a.png, @eaDir, $RECYCLE.BIN
SPELLINGS = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}


@dataclass
class DataConfig:
    """What the visual sentences are made of."""

    data: Annotated[str, "shapes, glyphs or folder:PATH"] = "shapes"
    image_size: Annotated[int, "height and width of every image in pixels"] = 32
    num_demos: Annotated[int, "K, the demonstration pairs before the query pair", (1, 3)] = 1
    palette: Annotated[str, "hues of drawn objects: fixed, or turned by the sentence"] = "fixed"
    train_sentences: Annotated[int, "sentences the backbone is pretrained on"] = 20480
    eval_sentences: Annotated[int, "sentences of the validation and of the test split", (16, 10**6)] = 512

    def __post_init__(self):
        drawn = self.data in ("shapes", "glyphs")
        if not drawn and not self.data.startswith("folder:"):
            raise UserError(f"--data {self.data}: expected shapes, glyphs or folder:PATH")
        if self.palette != "fixed" and not (drawn and self.palette == "sentence"):
            raise UserError(f"--palette {self.palette}: expected fixed or, for shapes and glyphs, sentence")
        if self.image_size < 16 or self.image_size % 8:
            raise UserError(f"--image-size {self.image_size}: expected a multiple of 8, at least 16")


BACKGROUNDS = torch.tensor([[250, 244, 234], [200, 216, 236], [40, 56, 42], [24, 28, 40]]) / 127.5 - 1
SHAPES = ("disc", "square", "triangle", "ring", "cross", "diamond")
GLYPHS = "ABCDEFGHJKLMNPRSTUVWXYZ23456789"


def palette(kinds: int) -> torch.Tensor:
    """Two shades of one hue for each kind of object: (kinds, 2 shades, 3 channels) in [-1, 1].

    The hue is fixed by the kind: to colorize an object, a model has to recognise it. Each shape's grey
    differs by 19 of 255 or more from every background's, so none vanishes in the grey image.
    """
    rgb = [[colorsys.hsv_to_rgb((k + 0.5) / kinds, 0.75, v) for v in (0.65, 0.95)] for k in range(kinds)]
    return (torch.tensor(rgb) * 255).round() / 127.5 - 1


def shape_masks(size: int) -> torch.Tensor:
    """Coverage masks of all shapes at two sizes: (kinds, sizes, S, S) in [0, 1], centred.

    Coordinates are multiples of 1/8 pixel: every inside test is exact in float32, on every machine.
    """
    axis = (torch.arange(size * 4) - size * 2 + 0.5) / 4  # (4S,) sub-pixel centres, in pixels from the middle
    y, x = axis[:, None], axis[None, :]
    d2, larger, smaller = x * x + y * y, torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    masks = []
    for r in (size * 6 / 32, size * 8 / 32):
        inside = (
            d2 <= r * r,
            larger <= r * 0.875,
            (y <= r * 0.875) & (2 * x.abs() <= y + r),
            (d2 <= r * r) & (d2 >= r * r * 0.25),
            (smaller <= r * 0.375) & (larger <= r),
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
                canvas = canvas.rotate(angle, Image.Resampling.BILINEAR)
                canvas = canvas.resize((size, size), Image.Resampling.BOX)
                masks.append(np.asarray(canvas, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(masks)).view(len(GLYPHS), 9, size, size)


class Layers(NamedTuple):
    """n scenes before they are painted: a flat background and two objects, the second over the first."""

    background: torch.Tensor  # (n, 3, 1, 1)
    alpha: torch.Tensor  # (2, n, 1, S, S): where each object covers what is below
    kind: torch.Tensor  # (2, n) long
    shade: torch.Tensor  # (2, n) long, 0 or 1

    def paint(self, colours: torch.Tensor) -> torch.Tensor:
        """The scenes (n, 3, S, S) with objects of these colours, (2, n, 3)."""
        image = self.background
        for alpha, colour in zip(self.alpha, colours, strict=True):
            image = image + alpha * (colour[:, :, None, None] - image)
        return image


def draw_layers(masks: torch.Tensor, n: int, generator: torch.Generator, apart: int = 2) -> Layers:
    """Draw n random scenes. masks: (kinds, variants, S, S), from `shape_masks` or `glyph_masks`.

    Objects stand on a grid of S/8 pixels, at least `apart` of its steps from each other, across or down.
    """
    kinds, variants, size, _ = masks.shape

    def pick(high):
        return torch.randint(high, (n,), generator=generator)

    background = BACKGROUNDS[pick(len(BACKGROUNDS))][:, :, None, None]
    steps = [torch.arange(-2, 3)] * 4
    places = torch.cartesian_prod(*steps).view(-1, 2, 2)  # (625, 2 objects, row and column)
    places = places[(places[:, 0] - places[:, 1]).abs().amax(1) >= apart]  # with 2: (456, 2, 2)
    place = places[pick(len(places))].transpose(0, 1)  # (2, n, 2)
    drawn = [torch.stack([pick(kinds), pick(variants), pick(2)]) for _ in range(2)]
    kind, variant, shade = torch.stack(drawn, dim=1)  # each (2, n)
    read = torch.arange(size) - place[..., None] * (size // 8)  # (2, n, 2, S), in the mask
    rows, columns = read.clamp(0, size - 1).unbind(2)  # the masks' borders are empty
    which = kind[..., None, None], variant[..., None, None]
    alpha = masks[(*which, rows[..., :, None], columns[..., None, :])]  # (2, n, S, S)
    return Layers(background, alpha[:, :, None], kind, shade)


def draw_scenes(masks: torch.Tensor, turn: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw n scenes (n, 3, S, S); turn: (n,) long, by how many kinds the hues of each are rotated."""
    layers = draw_layers(masks, len(turn), generator)
    return layers.paint(palette(len(masks))[(layers.kind + turn) % len(masks), layers.shade])


def split_of(images: torch.Tensor) -> torch.Tensor:
    """The split of scenes (n, 3, S, S): 0 train (80 %), 1 val (10 %), 2 test (10 %), (n,) long.

    Decided by a hash of the pixels, so that no picture, however it came about, can be in two splits.
    """
    pixels = to_uint8(images).flatten(1).long()  # (n, 3*S*S)
    weights = (torch.arange(pixels.shape[1]) * 0x9E3779B97F4A7C1 + 0x2545F4914F6CDD1) | 1
    mixed = (pixels * weights).sum(1)  # int64, wraps around
    bucket = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B >> 33) % 10
    return (bucket >= 8).long() + (bucket >= 9).long()


TURNS = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # EXIF orientation -> Image.Transpose


def load_image(path, size: int) -> torch.Tensor:
    """Read one image file as (3, size, size) in [-1, 1]: upright, on white, centre-cropped, resized.

    Raises UserError, naming the file, if it cannot be read as an image.
    """
    try:
        with warnings.catch_warnings(record=True), Image.open(path) as image:  # of what it can read
            image.draft(None, (4 * size, 4 * size))  # of a large JPEG only the size that is needed
            image.load()
            turn = None
            with contextlib.suppress(Exception):  # tags that are damaged are no reason to refuse a picture
                turn = TURNS.get(image.getexif().get(0x0112))
            if image.mode in ("I", "F"):
                raise ValueError("numbers without a known range; save it with 8 bits")
            if image.mode.startswith("I;16"):  # Pillow would clip
                tags = getattr(image, "tag_v2", {})  # of a TIFF: 281 the largest number, 258 the bits
                top = tags.get(281, (2 ** tags.get(258, (16,))[0] - 1,))[0]
                values = np.asarray(image) * (255 / top)
                image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
            image = (image if turn is None else image.transpose(turn)).convert("RGBA")
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{path}: cannot be read as an image ({error})") from None
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    filter = Image.Resampling.BOX if min(image.size) >= 2 * size else Image.Resampling.BICUBIC
    return to_float(ImageOps.fit(image, (size, size), filter))


def given_split(path: Path) -> str | None:
    """The split that a part of a path names, in one of the usual spellings: "Validation" -> "val"."""
    for part in path.parts[:-1]:
        stem = re.sub(r"([ _.-]*(?i:set|split|data|images|imgs|\d+))+$|[AB]$", "", part).lower()
        if (split := SPELLINGS.get(stem, stem)) in SPLITS:
            return split
    return None


def image_files(root: Path) -> tuple[list[Path], defaultdict]:
    """All image files below `root`, links followed, and the other files: {what they are: [path, ...]}."""
    images, others, seen = [], defaultdict(list), set()

    def refused(error):
        others[CLOSED].append(error.filename)

    for folder, folders, files in os.walk(root, followlinks=True, onerror=refused):
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        if (real := os.path.realpath(folder)) in seen:  # two links to one folder, or a circle
            folders.clear()
            continue
        seen.add(real)
        for path in (Path(folder, name) for name in files):
            ending = "hidden" if path.name.startswith(HIDDEN) else path.suffix.lower()
            group = images if ending in IMAGE_ENDINGS else others[ending or "without ending"]
            group.append(path)
    return sorted(images), others


def load_folder(folder: str, size: int) -> dict[str, torch.Tensor]:
    """Read every image below `folder`; one line says what was read, and what was left out and why.

    Returns {"train", "val", "test": (n, 3, size, size) uint8}, held in memory (3 KB an image at 32 x 32).
    Sub-folders train, val and test, in any usual spelling, are the splits. Without them each image's content
    decides (`split_of`): on every machine alike, in whatever order the files come. Copies count once,
    and so do mirror images: the first by name.
    """
    root, flag = Path(folder).expanduser(), f"--data folder:{folder}"
    if not root.is_dir():
        raise UserError(f"{flag}: no such folder")
    files, left_out = image_files(root)
    given = {path: given_split(path.relative_to(root)) for path in files}
    missing = [split for split in SPLITS if split not in given.values()]
    if 0 < len(missing) < len(SPLITS):
        advice = "add one, or rename the others to have all pictures mixed"
        raise UserError(f"{flag}: has no folder for {' and '.join(missing)}; {advice}")
    found, seen = {split: [] for split in SPLITS}, set()
    for path in tqdm(files, f"read {root.name}", delay=1, leave=None):
        if not missing and given[path] is None:
            left_out["beside the splits"].append(path)
            continue
        try:
            image = load_image(path, size)
        except UserError as error:
            left_out["unreadable"].append(error)
            continue
        pixels = to_uint8(image)
        keys = [hashlib.sha256(x.numpy().tobytes()).digest() for x in (pixels, pixels.flip(-1))]
        if keys[0] in seen:  # it could be demonstration and query at once, and `scenes` mirrors
            left_out["copies"].append(path)
            continue
        seen.update(keys)
        found[given[path] or SPLITS[split_of(image[None])]].append(pixels)
    said = ", ".join(f"{len(images)} {split}" for split, images in found.items()) + " images"
    if colours := sorted(x.flatten(1).unique(dim=1).shape[1] for x in found["train"][:256]):
        said += f", {colours[len(colours) // 2]} colours in the median one"
    if left_out:
        said += "; left out: " + ", ".join(f"{len(x)} {why}" for why, x in left_out.items())
        for why in ("unreadable", CLOSED, "beside the splits"):  # of these one wants to see an example
            said += f"; first {why}: {left_out[why][0]}" if why in left_out else ""
    if min(map(len, found.values())) < 4:
        raise UserError(f"{flag}: each split needs 4 different images ({', '.join(IMAGE_ENDINGS)}): {said}")
    print(f"folder:{folder}: {said}")
    return {split: torch.stack(images) for split, images in found.items()}


# Tasks: scene -> (source, target)


def grey(images: torch.Tensor) -> torch.Tensor:
    """Luma (ITU-R BT.601) of (B, 3, H, W) images, as three equal channels."""
    luma = 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]
    return luma.repeat(1, 3, 1, 1)


def colorize(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey image -> the RGB image. The generator is for `inpaint`: all tasks are called alike."""
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

    White (1) on black (-1), three equal channels. The filter is written with shifted sums: a convolution may
    add in another order on another machine.
    """
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    across = padded[..., :, 2:] - padded[..., :, :-2]  # (B, 3, S+2, S)
    down = padded[..., 2:, :] - padded[..., :-2, :]  # (B, 3, S, S+2)
    g_x = (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 4  # (B, 3, S, S)
    g_y = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 4
    length = (g_x * g_x + g_y * g_y).sqrt().amax(1, keepdim=True).clamp(max=1)  # (B, 1, S, S)
    return images, (2 * length - 1).repeat(1, 3, 1, 1)


TASK_FUNCTIONS = {"colorize": colorize, "inpaint": inpaint, "edges": edges}


class Sentences:
    """Visual sentences of one dataset, made on demand, and without a state.

    `sentences(split, index, n)` depends on the seed and these three alone, on every machine, in any order.
    """

    tasks = TASKS

    def __init__(self, config: DataConfig, seed: int = 0):
        self.config, self.seed = config, seed
        self.folder, self.masks, self.fingerprint = None, None, None
        if config.data == "shapes":
            self.masks = shape_masks(config.image_size)
        elif config.data == "glyphs":
            self.masks = glyph_masks(config.image_size)
        else:
            self.folder = load_folder(config.data.removeprefix("folder:"), config.image_size)
            # Another picture changes which ones are drawn: models made of the old ones do not fit.
            digest = hashlib.sha256(b"".join(images.numpy().tobytes() for images in self.folder.values()))
            self.fingerprint = digest.hexdigest()[:16]

    def scenes(self, split: str, n: int, generator: torch.Generator) -> torch.Tensor:
        """n sets of K+1 scenes of `split`, no image of a folder twice in one: (n, K+1, 3, S, S)."""
        per_sentence = self.config.num_demos + 1
        if self.folder is not None:
            images = self.folder[split]
            # Without replacement: a scene that is demonstration and query gives the answer away.
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

    def generator(self, split: str, index: int) -> torch.Generator:
        """The random numbers of one batch."""
        digest = hashlib.sha256(f"{self.seed}/{split}/{index}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def __call__(self, split: str, index: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The index-th batch of a split: images (n, 2K+2, 3, S, S) and tasks, (n,) long into `TASKS`."""
        generator = self.generator(split, index)
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
        """The first `total` sentences of a split, 64 at a time; the same ones for every `total`."""
        for index, start in enumerate(range(0, total, 64)):
            images, task = self(split, index, 64)
            yield images[: total - start], task[: total - start]


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Put batches of (images, task) together: images (total, 2K+2, 3, S, S), task (total,)."""
    images, task = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(task)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images in [-1, 1] (values outside are clipped) -> uint8 in [0, 255], same shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images) -> torch.Tensor:
    """uint8 images in [0, 255] -> float in [-1, 1]; a Pillow image becomes (3, H, W)."""
    if isinstance(images, Image.Image):
        images = torch.from_numpy(np.array(images)).permute(2, 0, 1)
    return images.float() / 127.5 - 1


def save_picture(path, rows: list, row_labels=(), column_labels=(), title: str = "") -> None:
    """Write a labelled grid of pictures: equally long rows of images (3, H, W) and maps (H, W).

    Of a map black is 0, and the brightest 1 or more.
    """
    size = max(cell.shape[-1] for row in rows for cell in row)

    def tile(cell):  # -> (size + border, size + border, 3) uint8
        if cell.ndim == 3:
            rgb = to_uint8(cell).permute(1, 2, 0).cpu().numpy()
        else:
            rgb = colormaps["magma"](cell.float().cpu().numpy(), bytes=True)[..., :3]
        rgb = rgb.repeat(size // len(rgb), 0).repeat(size // len(rgb), 1)
        return np.pad(rgb, [(size // 20, size // 20)] * 2 + [(0, 0)], constant_values=255)

    picture = np.block([[[tile(cell)] for cell in row] for row in rows])  # one image: axes for each are slow
    figure = Figure(figsize=(len(rows[0]) + 0.9, len(rows) + 0.5), layout="constrained", dpi=130)
    axis, pitch = figure.subplots(), size + 2 * (size // 20)
    axis.imshow(picture, interpolation="nearest")
    axis.spines[:].set_visible(False)
    columns = [textwrap.fill(label.replace("_", " "), 12, break_long_words=False) for label in column_labels]
    axis.set_xticks([(i + 0.5) * pitch for i in range(len(columns))], columns, fontsize=8)
    axis.set_yticks([(i + 0.5) * pitch for i in range(len(row_labels))], row_labels, fontsize=8)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    figure.suptitle(title, fontsize=9)
    runtime.write_whole(path, figure.savefig)


def prompt_titles(num_images: int) -> list[str]:
    """Titles of the images that a sentence of `num_images` has before its last."""
    demos = num_images // 2 - 1
    return [*(f"{role} {k + 1}" for k in range(demos) for role in ("source", "target")), "query"]


def main():
    parser = runtime.Parser(description="Write a contact sheet of each dataset and task.")
    parser.add_argument("--out", default="contact_sheets", help="folder for the pictures")
    parser.add_argument("--seed", type=runtime.seed, default=0)
    parser.add_config(DataConfig, skip=("data", "train_sentences", "eval_sentences"))
    parser.add_argument("--data", dest="names", nargs="+", default=["shapes", "glyphs"], help="datasets")
    args = parser.parse_args()
    runtime.check_writable(args.out)
    sheets = Counter()
    for name in args.names:
        config = runtime.configs_from_flags(args, {"data": DataConfig}, {"data": {"data": name}})["data"]
        images, task = Sentences(config, args.seed)("train", 0, 256)
        rows = [list(images[task == number][i]) for number in range(len(TASKS)) for i in range(3)]
        labels = [task_name if i == 1 else "" for task_name in TASKS for i in range(3)]
        sheet = Path(name.removeprefix("folder:")).resolve().name or "folder"
        sheets[sheet] += 1
        path = Path(args.out) / f"{sheet}{'' if sheets[sheet] == 1 else f'-{sheets[sheet]}'}.png"
        title = f"{sheet}: one visual sentence a row"
        save_picture(path, rows, labels, [*prompt_titles(images.shape[1]), "truth"], title)
        print(f"wrote {path}")


if __name__ == "__main__":
    runtime.run_command(main)
