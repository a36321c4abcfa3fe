"""Use what was trained: generate images, refine them, and look at both.

    python generate.py                                       # toy sentences of the test split
    python generate.py --task edges --gif edges.gif          # and the raster being written, as an animation
    python generate.py --task colorize --query photo.png     # your scene; demonstrations from the toy
    python generate.py --query q.png --demos src.png dst.png      # all yours: K pairs, and a source

With `--task`, the query is a scene: the task makes the source from it (grey, or with a hole, or as it is),
and the true target to compare with. With `--demos` it is the source itself, and no truth is known.
"""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import data
import evaluate
import runtime
import vqgan
import vsr
from data import TASKS
from runtime import UserError

SHIPPED = Path(__file__).parent / "weights" / "toy.pt"  # python train_refiner.py --weights weights/toy.pt


def sentences_to_show(args, config: dict) -> tuple[torch.Tensor, bool]:
    """What the flags ask for: images (n, 2K+2, 3, S, S), and whether the last one is the truth."""
    num_demos, size = config["data"]["num_demos"], config["data"]["image_size"]
    lonely = args.query is not None and not (args.task or args.demos)
    if lonely or (args.demos and (args.query is None or args.task)):
        raise UserError("--query goes with either --task or --demos, and --demos with --query alone")
    if args.demos:
        if len(args.demos) != 2 * num_demos:
            pairs = f"{num_demos} source/target pairs"
            raise UserError(f"--demos: {len(args.demos)} images, but these models were trained with {pairs}")
        images = [data.load_image(path, size) for path in (*args.demos, args.query)]
        return torch.stack([*images, torch.zeros_like(images[-1])])[None], False
    scenes = dict(config["data"])
    if scenes["data"] == "folder:":  # the pictures are where they were, or where --data says they are now
        where = args.data.removeprefix("folder:") if args.data else config.get("found_in")
        if where is None:
            raise UserError("--data: where are the pictures these models were trained on? Or give --demos")
        scenes["data"] += where
    elif args.data:
        raise UserError(f"--data {args.data}: {args.run} was not trained on a folder")
    sentences = data.Sentences(data.DataConfig(**scenes), config["run"]["seed"])
    if sentences.fingerprint != config.get("pictures"):
        print(f"note: {where} holds other pictures than those that the models were trained on")
    images, task = sentences("test", args.seed, 64)  # with seed 0 as in the evaluation
    chosen = images if args.task is None else images[task == TASKS.index(args.task)]
    if args.query is not None:
        chosen, scene = chosen[:1].clone(), data.load_image(args.query, size)[None]
        generator = torch.Generator().manual_seed(args.seed)
        chosen[0, -2:] = torch.cat(data.TASK_FUNCTIONS[args.task](scene, generator))
    return chosen[: args.count], True


def save_animation(path, tokenizer, query, truth, written, refined, target_tokens) -> None:
    """A GIF: the raster is written token by token with its errors in red, then one refining step.

    query, truth: (3, H, W); written, refined, target_tokens: (N,). Without the last no errors are marked.
    """
    (h, w), codebook, font = tokenizer.grid, tokenizer.codebook.vectors, ImageFont.load_default(size=14)
    size = max(256 // query.shape[-1], 1) * query.shape[-1]
    before, after = tokenizer.decode(torch.stack([written, refined])).cpu()
    errors = [None, None]
    if target_tokens is not None:
        errors = [vsr.cosine_error(y, target_tokens, codebook).tolist() for y in (written, refined)]
    frames, times = [], []

    def panel(image, error=None, known=h * w):
        """The picture of the first `known` tokens, errors (N,) as a red tint."""
        pixels = data.to_uint8(image).permute(1, 2, 0).cpu().numpy()
        picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(picture, "RGBA")  # blends what it draws
        for t in range(h * w):
            x, y = t % w * size // w, t // w * size // h
            box = [x, y, x + size // w - 1, y + size // h - 1]
            if t >= known:
                draw.rectangle(box, fill=(24, 24, 28))
            elif error is not None and error[t] > 0:
                red = (255, 0, 40)
                draw.rectangle(box, fill=(*red, int(70 + 130 * min(1.0, error[t]))), outline=red)
        return picture

    def add(caption, milliseconds, image, error=None, known=h * w):
        if error is not None:
            caption += f", {sum(e > 0 for e in error[:known])} wrong"
        panels = {"query": panel(query), caption: panel(image, error, known)}
        panels |= {"truth": panel(truth)} if target_tokens is not None else {}
        frame = Image.new("RGB", (len(panels) * (size + 8) + 8, size + 36), "white")
        for i, (title, picture) in enumerate(panels.items()):
            frame.paste(picture, (8 + i * (size + 8), 28))
            ImageDraw.Draw(frame).text((8 + i * (size + 8), 6), title, fill="black", font=font)
        frames.append(frame)
        times.append(milliseconds)

    for t in range(0, h * w, max(1, h * w // 64)):
        add(f"written: {t} of {h * w}", 80, before, errors[0], t)
    add("written", 1200, before, errors[0])
    add("refined, one pass", 1200, after, errors[1])
    add("generated", 600, before)
    add("refined", 1200, after)
    options = {"append_images": frames[1:], "duration": times, "loop": 0, "optimize": True}
    runtime.write_whole(path, lambda p: frames[0].save(p, save_all=True, **options))


def parse_arguments():
    parser = runtime.Parser(description="Generate images, refine them, and show both.")
    parser.add_argument("--run", help="folder or weights of a training (default: runs/toy, else as shipped)")
    parser.add_argument("--task", choices=TASKS, help="which task (default: a mix)")
    parser.add_argument("--query", metavar="IMAGE", help="your own image, with --task or --demos")
    parser.add_argument("--demos", nargs="+", metavar="IMAGE", help="your demonstrations: source target ...")
    parser.add_argument("--count", type=int, choices=range(1, 17), metavar="N", default=8,
                        help="toy sentences to show, 1 to 16 (default: 8)")  # fmt: skip
    parser.add_argument("--reads", type=evaluate.reading, help="which refiner: tokens+query (default: all)")
    parser.add_argument("--data", metavar="folder:PATH", help="where the pictures of the training are now")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (default: 0)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="... likeliest up to this probability")
    parser.add_argument("--seed", type=runtime.seed, default=0, help="which sentences, and the sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--out", default="generated.png", help="the picture (default: generated.png)")
    parser.add_argument("--gif", metavar="PATH", help="also write an animation, of the largest error")
    parser.add_argument(
        "--save", metavar="PATH", help="also write its refined image alone, as large as it is"
    )
    parser.add_argument("--scale", type=int, choices=range(1, 33), metavar="N", default=1,
                        help="make that image N times as large, 1 to 32 (default: 1)")  # fmt: skip
    args = parser.parse_args()
    if args.scale > 1 and not args.save:
        raise UserError(f"--scale {args.scale}: enlarges the image of --save; give that as well")
    if args.temperature != 0 and not 1e-3 <= args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature:g}: expected 0 (greedy), or 0.001 and above")
    narrowed = (args.top_k, args.top_p) != (0, 1)
    if narrowed and not (args.temperature > 0 and args.top_k >= 0 and 0 < args.top_p <= 1):
        raise UserError("--top-k (1 or more) and --top-p (above 0, up to 1) need a --temperature above 0")
    stills = ".png .jpg .webp"
    for flag, path, endings in (
        ("--out", args.out, stills),
        ("--gif", args.gif, ".gif"),
        ("--save", args.save, stills),
    ):
        if path is not None:
            if Path(path).suffix.lower() not in endings.split():
                raise UserError(f"{flag} {path}: expected a file name that ends in one of {endings}")
            runtime.check_writable(Path(path).parent, flag)
    finished = any(Path("runs/toy").glob("refiner_*.pt"))  # or it is one that has been stopped
    args.run = args.run or ("runs/toy" if finished else SHIPPED)
    return args


@torch.no_grad()
def main():
    args = parse_arguments()
    device = runtime.pick_device(args.device)
    tokenizer, backbone, refiners, config = evaluate.load_run(args.run, device)
    if args.reads is not None:
        if args.reads not in refiners:
            raise UserError(f"--reads {args.reads}: {args.run} has only {', '.join(refiners)}")
        refiners = {args.reads: refiners[args.reads]}
    images, truth_known = sentences_to_show(args, config)

    tokens = tokenizer.encode(images.flatten(0, 1).to(device)).view(*images.shape[:2], -1)  # (n, 2K+2, N)
    prompt, generator = tokens[:, :-1].flatten(1), torch.Generator().manual_seed(args.seed)
    sampling = (args.temperature, args.top_k, args.top_p, generator)
    rollout = backbone.generate(prompt, tokens.shape[2], *sampling)
    codebook, written = tokenizer.codebook.vectors, {"generated": rollout.tokens}  # {name: (n, N)}
    for reading, refiner in refiners.items():
        written[evaluate.method_name(reading)], _ = vsr.refine(refiner, codebook, *rollout)
    made = {name: tokenizer.decode(y).cpu() for name, y in written.items()}  # {name: (n, 3, H, W)}

    # Compared with the truth, or, if that is not known, with what was generated
    target_tokens = tokens[:, -1] if truth_known else rollout.tokens
    compared = [name for name in written if truth_known or name != "generated"]
    errors = {name: vsr.cosine_error(written[name], target_tokens, codebook) for name in compared}  # (n, N)
    columns = dict(zip(data.prompt_titles(images.shape[1]), images[:, :-1].unbind(1), strict=True)) | made
    if truth_known:
        columns["truth"] = images[:, -1]
    for name, error in errors.items():
        columns[f"{'error of' if truth_known else 'changed by'} {name}"] = error.unflatten(1, tokenizer.grid)
    data.save_picture(args.out, list(zip(*columns.values(), strict=True)), column_labels=list(columns))
    print(f"wrote {args.out}: {len(images)} sentences, with the models of {args.run}")
    for name, error in errors.items() if truth_known else ():
        psnr = vqgan.psnr(made[name], images[:, -1]).mean().item()
        print(f"  {name:27} cosine error {error.mean().item():.4f}, PSNR {psnr:.2f} dB")
    worst = errors["generated"].mean(1).argmax().item() if truth_known else 0  # where most is to be refined
    refined = [name for name in written if name.startswith("refined_")] or ["parallel"]
    name = "refined_tokens+query" if "refined_tokens+query" in refined else refined[0]
    if args.save:
        image = Image.fromarray(data.to_uint8(made[name][worst]).permute(1, 2, 0).numpy())
        image = image.resize([side * args.scale for side in image.size], Image.Resampling.BICUBIC)
        runtime.write_whole(args.save, image.save)
        print(f"wrote {args.save}, {image.width} x {image.height} pixels, with {name}")
    if args.gif:
        known = target_tokens[worst] if truth_known else None
        shown = (*images[worst, -2:], rollout.tokens[worst], written[name][worst], known)
        save_animation(args.gif, tokenizer, *shown)
        print(f"wrote {args.gif}, with {name}")


if __name__ == "__main__":
    runtime.run_command(main)
