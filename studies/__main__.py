"""The command: `python -m studies NAME [NAME ...] --seeds 5`, or `all`. See `studies/__init__.py`.

For each study it runs the cells that are missing in results/NAME.json, and then writes its table
and its picture. It can be stopped at any moment: finished cells are kept, and a cell goes on
within its trainings. Started twice, side by side, the two share the cells (give each its own cores:
OMP_NUM_THREADS); one that has nothing left to do shows what is there.
"""

import contextlib
import importlib
import io
import json
import shutil
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

import data
import runtime
import train_refiner
from runtime import UserError
from studies import runner

NAMES = (
    "rollout", "choice", "maturity", "window", "positions", "decoding", "data", "size", "backbones", "demos",
    "probe", "generalize", "speed", "adversarial",
)  # fmt: skip
DRAWN = ("choice", "window", "demos")  # need scenes whose colours can be chosen
STUDIES = {name: importlib.import_module(f"studies.{name}") for name in NAMES}


def machine(device: torch.device) -> dict:
    """What `speed` depends on beside the configuration."""
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {"device": str(device), "threads": torch.get_num_threads(), "transformers": version}


def rounded(value):
    """Floats with 6 digits after the point, small ones with 6 in all, in nested lists and dictionaries."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < 0.1 else round(value, 6)
    return value


def read_cells(path: Path, config: dict) -> list:
    """The finished cells in a result file. Raises UserError if they were made with another configuration."""
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text())
        made_with, cells = content["config"], content["cells"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a result of a study; move it away or give another --out") from None
    again = "move the file away to start again"
    if made_with.get("dtype") != config["dtype"]:
        again = f"go on with --dtype {made_with.get('dtype')}"
    runtime.check_config(path, made_with, config, again)
    return cells


def save(out: Path, name: str, config: dict, cells: list, **table) -> None:
    cells = sorted(cells, key=lambda cell: json.dumps(cell["cell"]))
    content = json.dumps({"study": name, "config": config, **table, "cells": cells}) + "\n"
    runtime.write_whole(out / f"{name}.json", lambda path: path.write_text(content))


def parse_arguments():
    parser = runtime.Parser(prog="python -m studies", description="The evidence, one study a question.")
    choices = ["all", *NAMES]
    parser.add_argument("studies", nargs="+", choices=choices, metavar="NAME", help=", ".join(choices))
    parser.add_argument("--preset", choices=("smoke", "toy"), default="toy", help="sizes (default: toy)")
    parser.add_argument("--seeds", type=int, choices=range(1, 11), metavar="N", default=5,
                        help="seeds 0 .. N-1, 1 to 10 (default: 5)")  # fmt: skip
    parser.add_argument("--out", default="results", help="folder for tables and pictures (default: results)")
    parser.add_argument("--work", default="runs/studies", help="folder for models (default: runs/studies)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    classes = {**train_refiner.CONFIGS, "study": runner.StudyConfig}
    for name, config_class in classes.items():
        parser.add_config(config_class, "" if name == "data" else f"{name}_")
    args = parser.parse_args()
    preset = {}
    if args.preset == "smoke":
        preset = {**train_refiner.PRESETS["smoke"], "study": runner.SMOKE}
    return args, runtime.configs_from_flags(args, classes, preset)


def missing_cells(name: str, kept: list, seeds: int) -> list:
    """The cells of a study, a dictionary of its seed and its setting each, that are not finished."""
    finished = [cell["cell"] for cell in kept]
    cells = [{"seed": seed, **setting} for seed in range(seeds) for setting in STUDIES[name].SETTINGS]
    return [cell for cell in cells if cell not in finished]


def main():
    args, config = parse_arguments()
    device = runtime.pick_device(args.device)
    dtype = runtime.pick_dtype(args.dtype, device)
    train_refiner.check_sizes(config, [runner.OURS])
    out, work = Path(args.out), Path(args.work)
    runtime.check_writable(out)
    runtime.check_writable(work, "--work")
    setup = runner.Setup(config, work, work, device, dtype)
    made_with = {"dtype": str(dtype).removeprefix("torch.")}
    made_with |= {name: asdict(part) for name, part in config.items()}

    chosen = [name for name in NAMES if {name, "all"} & set(args.studies)]
    if config["data"].data.startswith("folder:"):  # its pictures are its identity, not its path
        if drawn := [name for name in chosen if name in DRAWN]:
            raise UserError(f"--data {config['data'].data}: {', '.join(drawn)} need scenes drawn by code")
        made_with["pictures"] = data.Sentences(config["data"]).fingerprint
        made_with["data"]["data"] = "folder:"

    def config_of(name: str) -> dict:
        return {**made_with, "machine": machine(device)} if name == "speed" else made_with

    def cells_of(name: str) -> list:
        return read_cells(out / f"{name}.json", config_of(name))

    todo = []
    for name in chosen:
        todo += [(name, cell) for cell in missing_cells(name, cells_of(name), args.seeds)]

    minutes = sum(STUDIES[name].MINUTES for name, _ in todo)
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=minutes, unit="min", desc="studies", bar_format=layout) as bar:
        for name, cell in todo:
            bar.set_postfix_str(f"{name} {cell}", refresh=True)
            folder = work / "-".join(["unfinished", name, *map(str, cell.values())])
            with contextlib.suppress(runtime.InUse), runtime.locked(folder, "--work"):
                # Another process may have made it meanwhile
                if cell in missing_cells(name, cells_of(name), args.seeds):
                    with contextlib.redirect_stdout(io.StringIO()):  # which stages are reused
                        result = STUDIES[name].run(replace(setup, unfinished=folder), **cell)
                    with runtime.locked(work, "--work", wait=True):
                        made = {"cell": cell, "device": device.type}
                        others = [kept for kept in cells_of(name) if kept["cell"] != cell]
                        save(out, name, config_of(name), [*others, {**made, **rounded(result)}])
                shutil.rmtree(folder, ignore_errors=True)
            bar.update(STUDIES[name].MINUTES)

    for name in chosen:
        with runtime.locked(work, "--work", wait=True):
            study, cells = STUDIES[name], cells_of(name)
            if not cells:
                continue  # another process is at its first one
            text = study.show(cells)
            study.plot(out / f"{name}.png", cells)
            save(out, name, config_of(name), cells, table=text.splitlines())
        print(f"\n{name}\n\n{text}\n\nwrote {out / f'{name}.json'} and .png")


if __name__ == "__main__":
    runtime.run_command(main, "Finished cells and saved steps are kept; the same command goes on from there")
