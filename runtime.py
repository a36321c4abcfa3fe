"""Nothing about refinement: flags, errors of one line, devices, whole files, resuming, processes."""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Sequence
from pathlib import Path

import filelock  # torch depends on it
import torch
import torch.distributed as dist
from tqdm import tqdm


class UserError(ValueError, argparse.ArgumentTypeError):
    """Something the user can put right. Commands, and argparse, print its one line and exit with status 2."""


class Parser(argparse.ArgumentParser):
    """argparse, with one line for a bad flag, and flags made from the fields of a config dataclass."""

    def error(self, message):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def add_config(self, config_class, prefix: str = "", skip: tuple = ()) -> None:
        """Add one flag a field; the annotations are `Annotated[type, help]`, with a range if need be."""
        group = self.add_argument_group(f"{config_class.__name__}: {config_class.__doc__.splitlines()[0]}")
        for name, (kind, text, *_) in annotations(config_class).items():
            if name not in skip:
                options = {"type": kind, "metavar": kind.__name__.upper()}
                if kind is bool:  # --flag and --no-flag
                    options = {"action": argparse.BooleanOptionalAction}
                group.add_argument(f"--{prefix}{name}".replace("_", "-"), help=text, **options)


def annotations(config_class) -> dict:
    """{field: (type, help, and a range if there is one)} of a config dataclass."""
    return {field.name: typing.get_args(field.type) for field in dataclasses.fields(config_class)}


def configs_from_flags(args, classes: dict, preset: dict) -> dict:
    """{component: config} of {component: class}: defaults, a preset's values over them, flags over both.

    Raises UserError, naming the flag, for a number out of its range: by default an int is from 1 to 10^9,
    a float at least 0 and finite.
    """
    configs = {}
    for component, config_class in classes.items():
        prefix, values = "" if component == "data" else f"{component}_", dict(preset.get(component, {}))
        for name, (kind, _, *limits) in annotations(config_class).items():
            if (given := getattr(args, f"{prefix}{name}", None)) is not None:
                low, high = limits[0] if limits else (1, 10**9) if kind is int else (0, math.inf)
                if kind in (int, float) and not (low <= given <= high and math.isfinite(given)):
                    at_most = f" and at most {high:g}" if high < math.inf else " and finite" * (kind is float)
                    flag = f"--{prefix}{name}".replace("_", "-")
                    raise UserError(f"{flag} {given}: expected a number of at least {low:g}{at_most}")
                values[name] = given
        configs[component] = config_class(**values)
    return configs


def seed(text: str) -> int:
    """A seed from a flag, 0 to 2^63 - 1; argparse names the flag for any other."""
    if not 0 <= int(text) < 2**63:
        raise UserError(f"{text}: expected a whole number from 0 to 2^63 - 1")
    return int(text)


def run_command(main, kept: str = "", divides: bool = False) -> None:
    """Run `main`: a UserError is one line and exit status 2. kept: what to say after Ctrl-C.

    divides: whether the command divides its work among the processes of `torchrun`.
    """
    for stream in (sys.stdout, sys.stderr):  # a file's name may not exist in the encoding of a terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if dist.is_torchelastic_launched() and not divides:
            raise UserError("torchrun: only train_refiner.py works in more than one process")
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print("\ninterrupted", *filter(None, (str(interrupt), kept)), sep=". ", file=sys.stderr)
        sys.exit(130)


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` -> a device that is there. Raises UserError otherwise."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        torch.backends.cudnn.allow_tf32 = False  # its convolutions in float32: near codes need the digits
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or mps")
    return device


def pick_dtype(name: str, device: torch.device, begun: Sequence[Path] = ()) -> torch.dtype:
    """`auto`, `float32` or `bfloat16` -> the precision of `autocast`.

    begun: files of a run's first stage. `auto`: what the run was begun in, if one is there, else bfloat16
    where the hardware is fast at it.
    """
    if name == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if device.type != "cpu":
            fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if fast else "float32"
        for path in filter(Path.is_file, begun):
            if (kept := load_checkpoint(path)["config"].get("run", {}).get("dtype", name)) != name:
                print(f"--dtype {kept}: {path.parent} was begun in it; here, --dtype auto would be {name}")
                name = kept
    return getattr(torch, name)


def check_compile(device: torch.device) -> None:
    """Raise UserError if `torch.compile` does not work here, for want of a C++ compiler for instance."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds, and pages long
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise UserError(f"--compile: torch.compile does not work here ({reason}); leave it out") from None


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which models run: matrix products in dtype, or nothing changed for float32."""
    if dtype == torch.float32:  # without naming it: some versions warn of it where it is not supported
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def write_whole(path, write) -> None:
    """Call `write(temporary_path)`, then put the file in place: it is whole or is not there."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason})") from None
    finally:
        if temporary.is_file():
            temporary.unlink()


def check_writable(folder, flag: str = "--out") -> None:
    """Make `folder` if need be; raises UserError if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror})") from None


class InUse(UserError):
    """Another process works on a folder."""


@contextlib.contextmanager
def locked(folder, flag: str = "--out", wait: bool = False):
    """Keep other processes from working on `folder`; if one does, raises InUse, or waits for its end."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(Path(folder) / ".lock", timeout=-1 if wait else 0):
            yield
    except filelock.Timeout:
        advice = f"another process is at work there; wait for it, or give another {flag}"
        raise InUse(f"{flag} {folder}: {advice}") from None


def save(path, content: dict) -> None:
    """Write a dictionary whole or not at all: readable JSON for .json, else tensors and plain types."""
    if Path(path).suffix == ".json":
        write_whole(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))
    else:
        write_whole(path, lambda p: torch.save(content, p))


def load_checkpoint(path) -> dict:
    """Read what `save` wrote. Raises UserError, naming the file, for anything else."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train one with `python train_refiner.py`")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content.get("config").keys()
    except Exception as error:  # a truncated file, another format, a pickle with code in it
        raise UserError(f"{path}: not a checkpoint of this project ({type(error).__name__})") from None
    return content


def fingerprint(weights: dict) -> str:
    """16 hex digits that name weights {name: tensor} by their values."""
    digest = hashlib.sha256()
    for name, x in sorted(weights.items()):
        x = x.half() if x.is_floating_point() else x  # as `evaluate.save_weights` keeps them
        digest.update(name.encode() + x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_config(path, old: dict, new: dict, advice: str, prefix: str = "") -> None:
    """Raise UserError, with the first field that differs, if `path` was made with another configuration."""
    for name, value in new.items():
        if isinstance(value, dict):
            check_config(path, old.get(name, {}), value, advice, f"{prefix}{name}.")
        elif name != "found_in" and old.get(name) != value:  # where the files are does not matter
            difference = f"{prefix}{name} = {old.get(name)}, now {value}"
            raise UserError(f"{path} was made with {difference}: give another --out, or {advice}")


def stage(path: Path, config: dict, name: str, train) -> dict:
    """The checkpoint of a stage, reused or made: {"config", "model" or tensors, "log", "seconds"}.

    config: plain types, all that the stage depends on; UserError if the checkpoint has another. train: a
    function of `progress` (see `training_steps`) that returns (model or {name: tensor}, log).
    """
    if dist.is_initialized():
        dist.barrier()  # what another process removes or writes is removed or written now
    if path.is_file():
        checkpoint = load_checkpoint(path)
        check_config(path, checkpoint["config"], config, f"--fresh {name} to train again from there")
        if "seconds" not in checkpoint:
            raise UserError(f"{path}: not a checkpoint of this stage; remove it, or give another --out")
        print(f"{name}: reusing {path}")
        return checkpoint
    unfinished = path.with_suffix(".progress")
    made, log = train((unfinished, config))
    made = made if isinstance(made, dict) else {"model": made.state_dict()}
    checkpoint = {"config": config, **made, "log": log, "seconds": log["seconds"]}
    if is_first():
        save(path, checkpoint)
        unfinished.unlink(missing_ok=True)
    return checkpoint


def training_steps(name: str, steps: int, log: dict, parts: dict, progress=None, every=100, unit="step"):
    """The steps of a training, as a bar to loop over. Killed at any moment, it goes on where it was.

    progress: None, or (file, configuration). Every `every` steps the file gets all that the loop changes:
    `parts` ({name: module, optimizer or generator}), the log and torch's random state. If it is there at
    the start, all of it is put back, and the weights at the end are those of a training that was not
    interrupted: on a CPU bit for bit, on a GPU up to rounding. log["seconds"]: how long they took, in all
    attempts. The first Ctrl-C lets the step end, saves, and raises KeyboardInterrupt.
    Raises UserError for another configuration, and for weights that are not finite: they are not saved.
    """
    log["seconds"], first = 0.0, 0
    if progress and progress[0].is_file():
        first = resume(name, log, parts, *progress)
        print(f"{name}: goes on at {unit} {first} of {steps}")
    began, interrupted = time.perf_counter() - log["seconds"], threading.Event()

    def interrupt(*_) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one does not wait

    def finite() -> bool:
        modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
        return all(p.isfinite().all() for module in modules for p in module.parameters())

    def run():
        saved, handler = first, signal.signal(signal.SIGINT, interrupt) if progress else None
        try:
            for step in range(first, steps):
                yield step  # here the loop does its work
                log["seconds"] = time.perf_counter() - began
                stops, due = interrupted.is_set(), step % every == every - 1
                if progress and is_first() and (stops or due) and finite():
                    content = {"config": progress[1], "step": step + 1}
                    content["random"] = [source.get_rng_state() for source in random_sources(parts)]
                    content["parts"] = {key: state_of(part) for key, part in parts.items()}
                    save(progress[0], {**content, "log": log})
                    saved = step + 1
                if stops and is_first():  # one that left earlier would keep it from saving
                    raise KeyboardInterrupt(f"{name}: {unit} {saved} of {steps} is saved")
            if not finite():  # no loss has seen the last update
                raise UserError(f"{name}: the weights are not finite; try a lower learning rate")
        finally:
            if progress:
                signal.signal(signal.SIGINT, handler)

    return tqdm(run(), desc=name, total=steps, initial=first, unit=unit, mininterval=1, leave=None)


def state_of(part) -> dict | torch.Tensor:
    """The state of a module, an optimizer or a generator."""
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def random_sources(parts: dict) -> list:
    """What a training draws from beside its generators: torch, and the GPU that its modules are on."""
    modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    kinds = {parameter.device.type for module in modules for parameter in module.parameters()}
    return [torch, *map(torch.get_device_module, kinds - {"cpu"})]


def resume(name: str, log: dict, parts: dict, path: Path, config: dict) -> int:
    """Put the saved state of a training back into its log and parts; returns the steps that are done."""
    saved = load_checkpoint(path)
    check_config(path, saved["config"], config, "remove the file to begin again")
    try:
        for key, part in parts.items():
            load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
            load(saved["parts"][key])
        # Not strict: a training may go on on another device
        for source, state in zip(random_sources(parts), saved["random"], strict=False):
            source.set_rng_state(state)
        log.update(saved["log"])
        return saved["step"]
    except (KeyError, TypeError, ValueError, RuntimeError):  # of another version
        advice = f"not what this version of {name} keeps; remove the file to begin again"
        raise UserError(f"{path}: {advice}") from None


def finite_mean(loss: torch.Tensor, name: str, step: int, flag: str, rate: float) -> float:
    """A training's loss, the mean over all processes. UserError, with what to try, if it is not finite."""
    value = mean_of_all(loss).item()
    if not math.isfinite(value):
        at = f"the loss is {value} at step {step}, learning rate {rate:.2g}"
        raise UserError(f"{name}: {at}; try a lower {flag}")
    return value


# More than one process. All draw the same batches from the same seeds, each works on its rows of them,
# and DistributedDataParallel averages the gradients: the batch is the same for any number of processes.


def start_processes(name: str, batch_sizes: dict) -> torch.device:
    """Join the processes that `torchrun` has started, if it has; returns the device of this one.

    name: as for `pick_device`. batch_sizes: {flag: size}. Raises UserError if one cannot be divided, or
    there are too few GPUs.
    """
    if not dist.is_torchelastic_launched():
        return pick_device(name)
    processes = int(os.environ["WORLD_SIZE"])
    for flag, size in batch_sizes.items():
        if size % processes:
            raise UserError(f"{flag} {size}: not a multiple of the {processes} processes")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: with torchrun it is cpu, or cuda: a GPU for each process")
    device = pick_device(name if name == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    if dist.get_rank() > 0:  # the first one prints, and writes
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    return device


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def end_processes() -> bool:
    """Wait for all processes and end the group; returns whether this is the first, which goes on."""
    first = is_first()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return first


def own_rows(total: int) -> slice:
    """The rows of a batch of `total` that this process works on."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return slice(rank * total // size, (rank + 1) * total // size)


def all_rows(own: torch.Tensor, total: int) -> torch.Tensor:
    """What all processes made of their `own_rows`, together: (own, ...) -> (total, ...) on each."""
    if not dist.is_initialized():
        return own
    rows = own.new_zeros(total, *own.shape[1:])
    rows[own_rows(total)] = own
    dist.all_reduce(rows)  # a sum, in which each row is not zero once
    return rows


def mean_of_all(own: torch.Tensor) -> torch.Tensor:
    """The mean over all processes, without a gradient."""
    mean = own.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean


def data_parallel(model: torch.nn.Module) -> torch.nn.Module:
    """The model to call in a training step: its gradients become the mean over all processes."""
    wrap = torch.nn.parallel.DistributedDataParallel
    return wrap(model, broadcast_buffers=False) if dist.is_initialized() else model
