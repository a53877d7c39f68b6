"""What is saved of a training, and put back so that it continues bit for bit.

checkpoint-STEP/
  model.safetensors, config.json, tokenizer files   the model, as any checkpoint
  state.safetensors         moments, the weighting's state, the random state
  moments/                  the moments instead, if several processes have trained
  state.json                the step, and a checksum of every other file
"""

import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .checksums import CHECKSUM, file_checksum, read_checked_json, write_checked_json
from .engine.distributed import (
    give_rows,
    is_first,
    moments_in_shape,
    processes,
    read_moments,
    split_moments,
    write_moments,
)
from .engine.host import available_memory
from .engine.optim import AdamW
from .files import blame, directory_written_whole, one_line, read_json, to_disk, unfinished_name
from .model.checkpoint import Checkpoint, model_tensors, write_model
from .model.tensors import Lazy, write_tensors
from .options import InputError

MOMENTS = "moments"  # the directory of what several processes have written
ROOM = 1.2  # times a copy of the state, that must be free in memory before one is made

# What may go wrong when a checkpoint is not what it should be.
UNREADABLE = (OSError, KeyError, TypeError, ValueError, RuntimeError, OverflowError)


# ---- saving --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """All that a training needs to continue: a model's tensors, its other state, and plain facts.

    A tensor is a copy, or a `Lazy` one that is made when it is written. moments: those of which
    each of several processes has some rows.
    """

    kind: str  # of model
    model: dict[str, Lazy | Tensor]
    state: dict[str, Lazy | Tensor]
    facts: dict[str, Any]
    moments: dict[str, Tensor]


class Saver:
    """Writes checkpoint-STEP, then removes the others but the newest `keep` and the best.

        memory allows a copy     copy everything -> training goes on, a thread writes the copy
        it does not              write tensor by tensor, and training waits
        several processes        the first writes the model, and each its rows of the moments

    Use it as a context: at its end the last checkpoint is on the disk.
    """

    def __init__(self, run: Path, origin: Checkpoint, digests: Mapping[str, str], keep: int = 1):
        self.run, self.origin, self.digests, self.keep = run, origin, digests, keep
        self.thread: Thread | None = None
        self.error: BaseException | None = None

    def save(
        self,
        model: Any,
        optimizer: AdamW,
        weighting_state: Mapping[str, Tensor],
        log_checksum: str,
        facts: Mapping[str, Any],
    ) -> None:
        """Save the state after step `optimizer.steps`, at once or by a thread that begins here.

        model: a RewardModel or a LanguageModel. log_checksum: of the log so far. facts: what
        state.json is to say besides; the checkpoint of the step that its "best" names is kept. An
        error of the thread is raised by the next `save` or `wait`.
        """
        self.wait()
        is_alone = processes() == 1
        has_room = is_alone and available_memory() > ROOM * bytes_to_copy(model, optimizer)
        snapshot = self._snapshot(model, optimizer, weighting_state, log_checksum, copy=has_room)
        snapshot.facts.update(facts)
        if has_room:
            self.thread = Thread(target=self._write_in_thread, args=(snapshot,))
            self.thread.start()
        else:
            self._write(snapshot)

    def raise_error(self) -> None:
        """Raise the error of a thread that has failed, if there is one."""
        if self.error:
            self.wait()

    def wait(self) -> None:
        """Wait until what was saved last is on the disk."""
        if self.thread:
            self.thread.join()
        self.thread, error, self.error = None, self.error, None
        if error:
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, error_type: Any, *_: Any) -> None:
        if error_type is None:
            self.wait()
        elif self.thread:  # an earlier error takes precedence over one of the thread
            self.thread.join()

    def _snapshot(
        self,
        model: Any,
        optimizer: AdamW,
        weighting_state: Mapping[str, Tensor],
        log_checksum: str,
        copy: bool,
    ) -> Snapshot:
        top = model.saved_top(self.origin.family)
        parts = model_tensors(self.origin, model.trunk, top, value=optimizer.value)
        tensors: dict[str, Lazy | Tensor] = {
            key: lazy.make().clone() if copy else lazy for key, lazy in parts.items()
        }
        state: dict[str, Lazy | Tensor] = {
            f"weighting.{name}": value.to("cpu", copy=True).contiguous()
            for name, value in weighting_state.items()
        }
        state["random"] = torch.get_rng_state()
        moments = {}
        if processes() > 1:
            moments = moments_in_shape(model, optimizer)
        else:
            state |= moments_to_write(optimizer, copy)
        facts = {
            "step": optimizer.steps,
            "environment": environment(),
            "data": dict(self.digests),
            "log": log_checksum,
            "weighting": sorted(weighting_state),
        }
        return Snapshot(model.kind, tensors, state, facts, moments)

    def _write_in_thread(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:
            self.error = error

    def _write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, then remove old ones. If it fails, the OSError says what is kept."""
        name = f"checkpoint-{snapshot.facts['step']}"
        if not is_first():
            self._take_part(unfinished_name(self.run / name), snapshot)
            return
        try:
            with directory_written_whole(self.run / name) as directory:
                self._write_into(directory, snapshot)
        except OSError as error:
            earlier = checkpoints(self.run)  # oldest first
            last = earlier[-1].name if earlier else "no checkpoint"
            reason = error.strerror or error
            message = f"{reason}; {name} was not written, {last} is kept"
            raise OSError(error.errno, message, str(self.run)) from None
        remove_superseded(self.run, self.keep)

    def _write_into(self, directory: Path, snapshot: Snapshot) -> None:
        write_model(directory, self.origin, snapshot.model, snapshot.kind, "float32")
        write_tensors(directory / "state.safetensors", snapshot.state)
        if snapshot.moments:
            write_moments(directory / MOMENTS, snapshot.moments)
        files = {
            path.relative_to(directory).as_posix(): file_checksum(path)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        write_checked_json(directory / "state.json", snapshot.facts | {"files": files})

    def _take_part(self, directory: Path, snapshot: Snapshot) -> None:
        """What every process but the first does for a checkpoint that this one writes."""
        give_rows(snapshot.model)
        write_moments(directory / MOMENTS, snapshot.moments)


def moments_of(optimizer: AdamW) -> list[tuple[str, Tensor]]:
    """The optimizer's states by the key under which they are saved: "KIND.PARAMETER".

    The low halves of split parameters are left out. They are part of the model's fp32 numbers.
    """
    return [
        (f"{kind}.{name}", tensor)
        for name, kinds in optimizer.state.items()
        for kind, tensor in kinds.items()
        if kind != "low"
    ]


def moments_to_write(optimizer: AdamW, copy: bool) -> dict[str, Lazy | Tensor]:
    """The same on the CPU: copied now, or when they are written."""
    return {
        key: moment.to("cpu", copy=True)
        if copy
        else Lazy(tuple(moment.shape), moment.dtype, moment.cpu)
        for key, moment in moments_of(optimizer)
    }


def bytes_to_copy(model: Any, optimizer: AdamW) -> int:
    """Bytes of a saved state: fp32 parameters, and moments as they are stored."""
    parameters = sum(4 * p.numel() for p in model.parameters())
    return parameters + sum(moment.nbytes for _, moment in moments_of(optimizer))


# ---- what the bits depend on ---------------------------------------------------------------------

# Variables with which libraries of matrix products are told how to compute.
VARIABLES = ("ATEN_", "CUBLAS_", "DNNL_", "KMP_", "MKL_", "NVIDIA_TF32_", "ONEDNN_", "OPENBLAS_")


def environment() -> dict[str, Any]:
    """What the last bits of a number depend on, besides the run: libraries, machine, settings."""
    settings = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "processor": processor(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "settings": dict(sorted(settings.items())),
        **({"processes": processes()} if processes() > 1 else {}),
    }


def processor() -> str:
    """The name of the CPU, as far as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return name[1] if name else platform.processor()


def print_other_environment(saved: Mapping[str, Any]) -> None:
    """Say what is another than when the state was saved, and that bits may be others, too."""
    alone = {"processes": 1}  # which is not written
    now, saved = alone | environment(), alone | dict(saved)
    changes = [
        f"{name} {saved.get(name)!r}, now {now[name]!r}"
        for name in now
        if name != "python" and saved.get(name) != now[name]
    ]
    if changes:
        print(
            f"this run used {'; '.join(changes)}: it will continue, but not bit for bit",
            flush=True,
        )


# ---- the checkpoints of a run --------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that were written whole, oldest first."""
    directories = [
        path
        for path in run.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-[0-9]{1,18}", path.name) and path.is_dir()
    ]
    return sorted(directories, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, by its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoint_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / f"checkpoint-{int(step)}"


def best_named_by(checkpoint: Path) -> Path | None:
    """The checkpoint of the best step so far, as this one has it; None if it names none."""
    try:
        return checkpoint_of(
            checkpoint.parent, read_json(checkpoint / "state.json")["best"]["step"]
        )
    except UNREADABLE:
        return None


def remove_superseded(run: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`, and the best steps that these name."""
    oldest_first = checkpoints(run)
    first_kept = max(0, len(oldest_first) - keep)
    best_steps = [best_named_by(checkpoint) for checkpoint in oldest_first[first_kept:]]
    for old in oldest_first[:first_kept]:
        if old not in best_steps:
            remove(old)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It is renamed first: a kill leaves no half of it under its name."""
    going = checkpoint.with_name(f"{checkpoint.name}.gone.partial")
    os.replace(checkpoint, going)
    to_disk(going.parent)
    if going.is_symlink():
        going.unlink()
    else:
        shutil.rmtree(going)


def remedy(checkpoint: Path) -> str:
    """What to do about a checkpoint that cannot be read."""
    others = [path for path in checkpoints(checkpoint.parent) if path != checkpoint]
    instead = f"continue from {others[-1].name}" if others else "start this run again from step 0"
    return f"remove {checkpoint.name} to {instead}"


# ---- putting back --------------------------------------------------------------------------------


def check_whole(checkpoint: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint of which every file is as it was written.

    Raises InputError, which names the first file that is not.
    """
    path = checkpoint / "state.json"
    try:
        stored = read_json(path)
        is_old = "step" in stored and CHECKSUM not in stored
        if not is_old:
            facts = read_checked_json(path)
            _check_files(checkpoint, facts)
    except UNREADABLE as error:
        blame(error)
        raise InputError(
            f"{checkpoint}: not a whole checkpoint ({type(error).__name__}: {one_line(error)});"
            f" {remedy(checkpoint)}"
        ) from None
    if is_old:
        raise InputError(
            f"{checkpoint}: was written by an older version of minimore, with other checksums;"
            " continue this run with that version"
        )
    return facts


def _check_files(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    checksums = dict(facts["files"])
    has_model = any(name.startswith("model") for name in checksums)
    if not has_model or not {"config.json", "state.safetensors"} <= set(checksums):
        raise ValueError("its list of files is not whole")
    if type(facts["step"]) is not int or facts["step"] != step_of(checkpoint):
        raise ValueError(f"its step is {facts['step']!r}")
    for name, stored in checksums.items():
        if not (checkpoint / name).is_file():
            raise ValueError(f"{name} is missing")
        if file_checksum(checkpoint / name) != stored:
            raise ValueError(f"{name} is damaged: its checksum is another")


def load_state(
    checkpoint: Path,
    facts: Mapping[str, Any],
    model: Any,
    optimizer: AdamW,
    weighting_state: dict[str, Tensor],
    digests: Mapping[str, str],
) -> int:
    """Put everything back but the model, which is loaded already; return the step.

    The optimizer's moments, the weighting's state and the random state are changed in place. facts:
    what `check_whole` returned. digests: of the sources' pairs. Raises InputError if the checkpoint
    is another model's or recipe's, or if the data have changed.
    """
    try:
        tensors = load_file(checkpoint / "state.safetensors")
        if (checkpoint / MOMENTS).is_dir():
            read_moments(checkpoint / MOMENTS, model, optimizer)
        elif processes() > 1:
            split_moments(tensors, model, optimizer)
        else:
            for key, moment in moments_of(optimizer):
                _copy_into(moment, tensors, key)
        saved_weighting = _weighting_state(tensors, facts, len(digests), model.top.device)
        saved_digests, saved_environment = dict(facts["data"]), dict(facts["environment"])
        torch.set_rng_state(tensors["random"])
    except (SafetensorError, *UNREADABLE) as error:
        blame(error)
        raise InputError(
            f"{checkpoint}: does not fit this run ({type(error).__name__}: {one_line(error)});"
            f" {remedy(checkpoint)}"
        ) from None
    for name, digest in digests.items():
        if saved_digests.get(name) != digest:
            raise InputError(
                f"{checkpoint}: source {name!r} has other texts than when this run began;"
                " restore the file or start a new run"
            )
    weighting_state.update(saved_weighting)
    print_other_environment(saved_environment)
    optimizer.steps = facts["step"]
    return optimizer.steps


def _copy_into(moment: Tensor, tensors: Mapping[str, Tensor], key: str) -> None:
    """Copy tensors[key] into a tensor of ours, or raise a ValueError if it does not fit."""
    saved = tensors[key]
    if saved.shape != moment.shape or saved.dtype != moment.dtype:
        raise ValueError(
            f"{key} is {saved.dtype} {tuple(saved.shape)},"
            f" expected {moment.dtype} {tuple(moment.shape)}"
        )
    moment.copy_(saved)


def _weighting_state(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], sources: int, device: torch.device
) -> dict[str, Tensor]:
    """The weighting's own state, one row a source; ValueError if it is not whole."""
    names = list(facts["weighting"])
    saved = {key for key in tensors if key.startswith("weighting.")}
    if {f"weighting.{name}" for name in names} != saved:
        raise ValueError("state.json and state.safetensors disagree about the weighting's state")
    state = {name: tensors[f"weighting.{name}"].to(device, copy=True) for name in names}
    if not all(value.isfinite().all() and len(value) == sources for value in state.values()):
        raise ValueError("the weighting's state is damaged")
    return state
