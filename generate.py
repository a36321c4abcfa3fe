"""Use what was trained: generate images, refine them, and look at both.

    python generate.py                                            # toy sentences of the test split, shipped weights
    python generate.py --task edges --gif edges.gif               # and the raster being written, as an animation
    python generate.py --task colorize --query photo.png          # your scene; demonstrations from the toy
    python generate.py --query q.png --demos src.png dst.png      # all yours: K source/target pairs and a source

With `--task`, the query is a scene: the task makes the source from it (grey, or with a hole, or as it is), and
the true target to compare with. With `--demos`, the query is the source itself, and no truth is known.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import data
import train_refiner
import vqgan
import vsr
from data import TASKS, UserError

SHIPPED = Path(__file__).parent / "weights" / "toy.pt"  # python train_refiner.py --weights weights/toy.pt


def sentences_to_show(args, config: data.DataConfig, seed: int) -> tuple[torch.Tensor, bool]:
    """The visual sentences that the flags ask for: images (n, 2K+2, 3, S, S), and whether the last is the truth.

    config, seed: of the data that the models were trained on.
    """
    if args.demos and args.query is None:
        raise UserError("--demos: give the image to be completed as well, with --query")
    if args.demos and args.task:
        raise UserError("--demos: the demonstrations tell the task; leave --task out")
    if args.demos:
        if len(args.demos) != 2 * config.num_demos:
            pairs = f"{config.num_demos} source/target pair{'s' if config.num_demos > 1 else ''}"
            raise UserError(f"--demos: {len(args.demos)} images, but these models were trained with {pairs}")
        images = [data.load_image(path, config.image_size) for path in (*args.demos, args.query)]
        return torch.stack([*images, torch.zeros_like(images[-1])])[None], False
    if args.query is not None and args.task is None:
        raise UserError("--query: give --task, or the demonstrations of a task with --demos")
    images, task = data.Sentences(config, seed)("test", args.seed, 64)  # seed 0: the first sentences of the evaluation
    if args.query is None:
        chosen = images if args.task is None else images[task == TASKS.index(args.task)]
        return chosen[: args.count], True
    chosen = images[task == TASKS.index(args.task)][:1].clone()
    scene = data.load_image(args.query, config.image_size)[None]
    generator = torch.Generator().manual_seed(args.seed)
    source, target = data.TASK_FUNCTIONS[args.task](scene, generator)
    chosen[0, -2:] = torch.cat([source, target])
    return chosen, True


def save_animation(path, tokenizer, query, truth, y, y_refined, y_true) -> None:
    """A GIF: the raster is written token by token with its errors in red, then one refining step.

    query, truth: (3, H, W); y, y_refined, y_true: tokens (N,). Without a truth (y_true None) no errors are
    marked. The shown patches are those of the finished image.
    """
    h, w = tokenizer.grid
    N = h * w
    codebook = tokenizer.codebook.vectors
    with torch.no_grad():
        before, after = tokenizer.decode(torch.stack([y, y_refined])).cpu()
    size = max(256 // query.shape[-1], 1) * query.shape[-1]
    font = ImageFont.load_default(size=14)

    def panel(image, error=None, known=N):
        """Picture of the first `known` tokens' patches, errors (N,) as a red tint."""
        pixels = data.to_uint8(image).permute(1, 2, 0).cpu().numpy()
        picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).convert("RGBA")
        veil = Image.new("RGBA", picture.size)
        draw = ImageDraw.Draw(veil)
        for t in range(N):
            box = [(t % w) * size // w, (t // w) * size // h, (t % w + 1) * size // w - 1, (t // w + 1) * size // h - 1]
            if t >= known:
                draw.rectangle(box, fill=(24, 24, 28, 255))
            elif error is not None and error[t] > 0:
                draw.rectangle(box, fill=(255, 0, 40, int(70 + 130 * min(1.0, error[t].item()))), outline=(255, 0, 40))
        return Image.alpha_composite(picture, veil).convert("RGB")

    errors = [None, None]
    if y_true is not None:
        errors = [vsr.cosine_error(v, y_true, codebook).cpu() for v in (y, y_refined)]
    frames, times = [], []

    def add(picture, caption, milliseconds):
        panels = [panel(query), picture] + ([panel(truth)] if y_true is not None else [])
        frame = Image.new("RGB", (len(panels) * (size + 8) + 8, size + 36), "white")
        draw = ImageDraw.Draw(frame)
        for i, (part, title) in enumerate(zip(panels, ["query", caption, "truth"], strict=False)):
            frame.paste(part, (8 + i * (size + 8), 28))
            draw.text((8 + i * (size + 8), 6), title, fill="black", font=font)
        frames.append(frame)
        times.append(milliseconds)

    def wrong(error, known=N):
        return "" if error is None else f", {int((error[:known] > 0).sum())} wrong"

    for t in [*range(0, N, max(1, N // 64)), N]:
        add(panel(before, errors[0], t), f"written: {t} of {N}{wrong(errors[0], t)}", 80)
    times[-1] = 1200
    add(panel(after, errors[1]), f"refined, one pass{wrong(errors[1])}", 1200)
    add(panel(before), "greedy", 600)
    add(panel(after), "refined", 1200)
    data.write_whole(
        path, lambda p: frames[0].save(p, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)
    )


def main():
    parser = data.Parser(description="Generate images with and without refinement.")
    parser.add_argument("--run", help="folder or weights of a train_refiner.py (default: runs/toy, or else the shipped weights)")
    parser.add_argument("--task", choices=TASKS, help="which task (default: a mix)")
    parser.add_argument("--query", metavar="IMAGE", help="your own image, with --task or --demos")
    parser.add_argument("--demos", nargs="+", metavar="IMAGE", help="your own demonstrations: source target [source target ...]")
    parser.add_argument("--count", type=int, default=8, help="toy sentences to show (default: 8)")
    parser.add_argument("--inputs", choices=vsr.INPUTS, help="which refiner (default: the one that reads most)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (default: 0)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens up to this probability")
    parser.add_argument("--seed", type=data.seed, default=0, help="which sentences, and the sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--out", default="generated.png", help="the picture (default: generated.png)")
    parser.add_argument("--gif", metavar="PATH", help="also write an animation of the first sentence")
    args = parser.parse_args()
    if not 1 <= args.count <= 16:
        raise UserError(f"--count {args.count}: expected a number from 1 to 16")
    if 0 < args.temperature < 1e-3:
        raise UserError(f"--temperature {args.temperature:g}: expected 0 (greedy decoding), or 0.001 and above")
    if not 0 <= args.temperature < float("inf") or args.top_k < 0 or not 0 < args.top_p <= 1:
        raise UserError("--temperature and --top-k cannot be negative, and --top-p lies above 0 and up to 1")
    if args.temperature == 0 and (args.top_k or args.top_p < 1):
        raise UserError("--top-k and --top-p need a --temperature above 0 (0 is greedy decoding)")
    for flag, path, endings in (("--out", args.out, (".png", ".jpg", ".webp")), ("--gif", args.gif, (".gif",))):
        if path is not None and Path(path).suffix.lower() not in endings:
            raise UserError(f"{flag} {path}: expected a file name that ends in {' or '.join(endings)}")
        if path is not None:
            data.check_writable(Path(path).parent, flag)
    device = data.pick_device(args.device)
    args.run = args.run or ("runs/toy" if Path("runs/toy").is_dir() else SHIPPED)
    tokenizer, backbone, refiners, config = train_refiner.load_run(args.run, device)
    inputs = args.inputs or list(refiners)[-1]
    if inputs not in refiners:
        raise UserError(f"--inputs {inputs}: {args.run} has a refiner for {', '.join(refiners)} only")
    images, truth_known = sentences_to_show(args, data.DataConfig(**config["data"]), config["run"]["seed"])

    with torch.no_grad():
        tokens = tokenizer.encode(images.flatten(0, 1).to(device)).view(*images.shape[:2], -1)  # (n, 2K+2, N)
        y_true = tokens[:, -1] if truth_known else None
        generator = torch.Generator().manual_seed(args.seed)
        rollout = backbone.generate(
            tokens[:, :-1].flatten(1), tokens.shape[2], args.temperature, args.top_k, args.top_p, generator
        )
        codebook = tokenizer.codebook.vectors
        y_refined, _ = vsr.refine(refiners[inputs], codebook, rollout.tokens, hidden=rollout.hidden, context=rollout.context)
        written, refined = tokenizer.decode(rollout.tokens).cpu(), tokenizer.decode(y_refined).cpu()

    heads = [f"{role} {k + 1}" for k in range(images.shape[1] // 2 - 1) for role in ("source", "target")]
    heads += ["query", "generated", "refined"] + (["truth", "error\nbefore", "error\nafter"] if truth_known else ["changed"])
    rows = []
    for i in range(len(images)):
        row = [*images[i, :-1], written[i], refined[i]]
        if truth_known:
            maps = [vsr.cosine_error(y[i], y_true[i], codebook).view(tokenizer.grid) for y in (rollout.tokens, y_refined)]
            row += [images[i, -1], *maps]
        else:
            row += [vsr.cosine_error(rollout.tokens[i], y_refined[i], codebook).view(tokenizer.grid)]
        rows.append(row)
    data.save_picture(args.out, rows, column_labels=heads)
    print(f"wrote {args.out}: {len(images)} sentences, refiner '{inputs}' of {args.run}")
    if truth_known:
        for name, y, made in (("generated", rollout.tokens, written), ("refined", y_refined, refined)):
            error = vsr.cosine_error(y, y_true, codebook).mean().item()
            quality = vqgan.psnr(made, images[:, -1]).mean().item()
            print(f"  {name:10} cosine error {error:.4f}, PSNR {quality:.2f} dB")
    if args.gif:
        y = rollout.tokens[0], y_refined[0], None if y_true is None else y_true[0]
        save_animation(args.gif, tokenizer, images[0, -2], images[0, -1], *y)
        print(f"wrote {args.gif}")


if __name__ == "__main__":
    data.run_command(main)
