"""The run directory: what makes a training safe to kill. Every file is written beside and renamed; the last good state always stands.

options.json, environment.json    written at the start
metrics.jsonl                     one line a step, cut back to the checkpoint on resume
checkpoint-STEP/                  model, optimizer, weighting memory, random state, and a checksum of each file; the newest only, or --keep
README.md, evaluation.json, model.safetensors, tokenizer files, config.json       the finished model; config.json comes last
"""

import hashlib
import json
import os
import platform
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from threading import Thread

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .engine.host import available_memory
from .engine.optim import AdamW
from .engine.recipe import Recipe
from .files import one_line, read_json, write_json, write_text
from .model.checkpoint import Checkpoint, model_tensors, write_model
from .model.tensors import Lazy, write_tensors
from .options import InputError
from .reward import RewardModel

RECIPE = tuple(field.name for field in fields(Recipe))
MAY_CHANGE = (
    "resume",
    "output",
    "log_steps",
    "save_dtype",
    "save_steps",
    "keep",
    "memory",
    *RECIPE,
)  # options that a resumed run may give differently;
ROUNDING = (
    "engine",
    "recompute",
    "micro_tokens",
)  # of the recipe, these change a result by rounding only, and offloading not at all


# ---- saving ------------------------------------------------------------------------------------------------------------


class Saver:
    """Writes checkpoint-STEP (made beside, renamed when whole), then removes those that are older than the newest `keep`.

    Where the memory allows, a copy of everything is made and written by a thread, while training goes on.
    """

    def __init__(self, run: Path, origin: Checkpoint, digests: dict, keep: int = 1):
        self.run, self.origin, self.digests, self.keep = run, origin, digests, keep
        self.thread, self.error = None, None

    def save(self, model: RewardModel, optimizer: AdamW, memory: dict):
        """Save the state after step `optimizer.steps`; an error of the thread is raised by the next `save` or `wait`."""
        self.wait()
        copy = available_memory() > 1.2 * bytes_to_copy(model, optimizer)
        tensors = model_tensors(
            self.origin,
            model.trunk,
            model.head,
            value=lambda name, p: optimizer.value(f"trunk.{name}", p),
        )
        if copy:
            tensors = {key: lazy.make().clone() for key, lazy in tensors.items()}
        state = {
            f"weighting.{k}": v.to("cpu", copy=True).contiguous() for k, v in memory.items()
        } | {"random": torch.get_rng_state()}
        state |= {
            f"{kind}.{name}": t.to("cpu", copy=True)
            if copy
            else Lazy(tuple(t.shape), t.dtype, t.cpu)
            for name, kinds in optimizer.state.items()
            for kind, t in kinds.items()
            if kind != "low"
        }
        known = {
            "step": optimizer.steps,
            "threads": torch.get_num_threads(),
            "data": self.digests,
            "weighting": sorted(memory),
        }
        if not copy:
            self._write(tensors, state, known)
            return
        self.thread = Thread(target=self._caught, args=(tensors, state, known))
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.wait()
        elif self.thread:  # what goes wrong already is what is told
            self.thread.join()

    def wait(self):
        """Until what was saved last is on the disk."""
        if self.thread:
            self.thread.join()
        self.thread, error, self.error = None, self.error, None
        if error:
            raise error

    def _caught(self, *arguments):
        try:
            self._write(*arguments)
        except BaseException as error:
            self.error = error

    def _write(self, tensors, state, known):
        try:
            self._write_beside(tensors, state, known)
        except OSError as error:
            kept = checkpoints(self.run)
            raise OSError(
                error.errno,
                f"{error.strerror or error}; checkpoint-{known['step']} was not written, {kept[-1].name if kept else 'no checkpoint'} is kept",
                str(self.run),
            ) from None

    def _write_beside(self, tensors, state, known):
        final = self.run / f"checkpoint-{known['step']}"
        unfinished = final.with_name(f"{final.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            write_model(unfinished, self.origin, tensors, "float32")
            write_tensors(unfinished / "state.safetensors", state)
            write_json(
                unfinished / "state.json",
                known
                | {
                    "sha256": {
                        path.name: file_digest(path) for path in sorted(unfinished.iterdir())
                    }
                },
            )
            os.replace(unfinished, final)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        for old in checkpoints(self.run)[: -self.keep]:
            remove(old)


def bytes_to_copy(model: RewardModel, optimizer: AdamW) -> int:
    """Bytes of a saved state: fp32 parameters and moments as they are stored."""
    return sum(4 * p.numel() for p in model.parameters()) + sum(
        t.nbytes for state in optimizer.state.values() for kind, t in state.items() if kind != "low"
    )


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    h = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            h.update(chunk)
    return h.hexdigest()


# ---- loading -----------------------------------------------------------------------------------------------------------


def remedy(directory: Path) -> str:
    """What to do about a checkpoint that cannot be read."""
    others = [p for p in checkpoints(directory.parent) if p != directory]
    return f"remove {directory.name} to " + (
        f"continue from {others[-1].name}" if others else "start this run again from step 0"
    )


def check_whole(directory: Path) -> dict:
    """state.json of a checkpoint, every file of which is as it was written; an InputError names the first that is not."""
    try:
        state = read_json(directory / "state.json")
        older = "step" in state and "sha256" not in state
        if not older:
            _check_files(directory, state)
    except (InputError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{directory}: not a whole checkpoint ({type(error).__name__}: {one_line(error)}); {remedy(directory)}"
        ) from None
    if older:
        raise InputError(
            f"{directory}: was written by an older version of minimore, without checksums; continue this run with that version"
        )
    return state


def _check_files(directory, state):
    sums = dict(state["sha256"])
    if not {"config.json", "state.safetensors"} <= set(sums) or not any(
        name.startswith("model") for name in sums
    ):
        raise ValueError("its list of files is not whole")
    if type(state["step"]) is not int or state["step"] != int(
        directory.name.removeprefix("checkpoint-")
    ):
        raise ValueError(f"its step is {state['step']!r}")
    for name, digest in sums.items():
        if not (directory / name).is_file():
            raise ValueError(f"{name} is missing")
        if file_digest(directory / name) != digest:
            raise ValueError(f"{name} is damaged: its checksum is another")


def load_state(
    directory: Path, state: dict, optimizer: AdamW, memory: dict, digests: dict, device
) -> int:
    """Put the moments, the weighting's memory and the random state back, the model being loaded; returns the step.

    state: what `check_whole` said. Raises InputError if it is another model's or recipe's, or if the data have changed.
    """
    try:
        tensors = load_file(directory / "state.safetensors")
        for name, kinds in optimizer.state.items():
            for kind, ours in kinds.items():
                if kind != "low":  # which came with the model
                    _fill(ours, tensors, f"{kind}.{name}")
        if {f"weighting.{name}" for name in state["weighting"]} != {
            key for key in tensors if key.startswith("weighting.")
        }:
            raise ValueError(
                "state.json and state.safetensors disagree about the weighting's memory"
            )
        remembered = {
            name: tensors[f"weighting.{name}"].to(device, copy=True) for name in state["weighting"]
        }
        if not all(t.isfinite().all() and len(t) == len(digests) for t in remembered.values()):
            raise ValueError("the weighting's memory is damaged")
        threads, data = int(state["threads"]), dict(state["data"])
        torch.set_rng_state(tensors["random"])
    except (
        SafetensorError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise InputError(
            f"{directory}: does not fit this run ({type(error).__name__}: {one_line(error)}); {remedy(directory)}"
        ) from None
    for name, digest in digests.items():
        if data.get(name) != digest:
            raise InputError(
                f"{directory}: source {name!r} has other pairs than when this run began; restore the file or start a new run"
            )
    memory.update(remembered)
    if threads != torch.get_num_threads():
        print(
            f"this run used {threads} threads, now {torch.get_num_threads()}: it will continue, but not bit for bit",
            flush=True,
        )
    optimizer.steps = state["step"]
    return state["step"]


def _fill(ours, tensors, key):
    """Copy tensors[key] into our own memory, or raise a ValueError if it does not fit."""
    if tensors[key].shape != ours.shape or tensors[key].dtype != ours.dtype:
        raise ValueError(
            f"{key} is {tensors[key].dtype} {tuple(tensors[key].shape)}, expected {ours.dtype} {tuple(ours.shape)}"
        )
    ours.copy_(tensors[key])


# ---- the directory -----------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]{1,18}", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def remove(checkpoint: Path):
    """Remove a checkpoint whole: renamed first, so that a kill leaves no half of it."""
    gone = checkpoint.with_name(f"{checkpoint.name}.gone.partial")
    os.replace(checkpoint, gone)
    gone.unlink() if gone.is_symlink() else shutil.rmtree(gone)


def open_run(options) -> Path | None:
    """The directory of a new or continued run; None if it is finished already. Raises InputError for any other directory."""
    run, wanted = Path(options.output), json.loads(json.dumps(asdict(options)))
    stored = run / "options.json"
    if (
        os.path.lexists(run)
        and not options.resume
        and not (run.is_dir() and not any(run.iterdir()))
    ):
        raise InputError(
            f"--output {run}: exists already; choose another name, or continue it with --resume"
        )
    if not options.output:
        raise InputError("--output: the path is empty")
    if (
        run.exists()
        and not stored.is_file()
        and (not run.is_dir() or any(not p.name.endswith(".partial") for p in run.iterdir()))
    ):
        raise InputError(
            f"--output {run}: not a run directory (it has no options.json); choose another name"
        )
    if stored.is_file():
        given = read_json(stored)
        for key in sorted(wanted.keys() | given.keys() - {"recipe"}):
            if key not in MAY_CHANGE and wanted.get(key) != given.get(key):
                raise InputError(
                    f"--resume: --{key.replace('_', '-')} is {wanted.get(key)!r} but the run in {run} has {given.get(key)!r}; "
                    "give the same command again, or start a new run"
                )
    if (run / "config.json").is_file():
        Checkpoint(str(run))  # finished means that it opens
        for old in checkpoints(run):  # a kill may have come between the finished model and this
            remove(old)
        sweep(run)
        print(f"{run}: finished already")
        return None
    return run


def stored_recipe(run: Path) -> dict:
    """The recipe of a run that is there, {} of a new one."""
    path = run / "options.json"
    if not path.is_file():
        return {}
    recipe = read_json(path).get("recipe")
    try:
        Recipe(**recipe | {"offload": tuple(recipe["offload"])}).check()
    except (InputError, TypeError, KeyError) as error:
        raise InputError(
            f'{path}: "recipe" is not that of a run ({one_line(error)}); restore the file, or start a new run'
        ) from None
    return recipe


class Lock:
    """Within, no other process trains in a run directory. One that is not there yet is made and locked by `take`."""

    def __init__(self, run: Path):
        self.run, self.descriptor = run, None

    def __enter__(self):
        self._lock()
        return self

    def take(self):
        """Make the directory, and lock it, before anything is written there."""
        self.run.mkdir(parents=True, exist_ok=True)
        self._lock()

    def _lock(self):
        """Once, where there is a directory and the system has such locks."""
        if fcntl is None or self.descriptor is not None or not self.run.is_dir():
            return
        self.descriptor = os.open(self.run, os.O_RDONLY)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--output {self.run}: another process is training there; wait for it, or stop it first"
            ) from None
        except OSError:  # a file system without locks
            pass

    def __exit__(self, *_):
        if self.descriptor is not None:
            os.close(self.descriptor)


def check_recipe(run: Path, recipe: Recipe):
    """Refuse to continue a run with a recipe that would change its result; say what changes it by rounding."""
    before, now = stored_recipe(run), json.loads(json.dumps(asdict(recipe)))
    for key in RECIPE:
        if before and key != "offload" and before.get(key) != now[key]:
            change = f"--{key.replace('_', '-')} is {now[key]!r} but the run in {run} has {before.get(key)!r}"
            if key not in ROUNDING:
                raise InputError(
                    f"--resume: {change}; give the same command again, or start a new run"
                )
            print(f"{change}: it will continue, but not bit for bit", flush=True)


def sweep(run: Path):
    """Remove what a kill left unfinished."""
    for unfinished in run.glob("*.partial"):
        unfinished.unlink() if unfinished.is_symlink() or not unfinished.is_dir() else shutil.rmtree(
            unfinished
        )


def start_run(run: Path, options, recipe: Recipe):
    """Write options.json and environment.json into the directory."""
    sweep(run)
    write_json(
        run / "options.json",
        {k: v for k, v in asdict(options).items() if k != "resume"} | {"recipe": asdict(recipe)},
    )
    write_json(
        run / "environment.json",
        {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    )


def cut_metrics(path: Path, step: int):
    """Drop the lines of steps after the checkpoint: they will be run again."""
    lines = (
        path.read_text("utf-8", errors="replace").splitlines(keepends=True)
        if path.is_file()
        else []
    )
    try:
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(
            f"{path}: holds a line that is not a step's record; remove the file to go on without the log so far"
        ) from None
    write_text(path, "".join(whole))
