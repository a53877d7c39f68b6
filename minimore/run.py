"""The run directory: what makes a training safe to kill. Every file is written beside and renamed; the last good state always stands.

    options.json, environment.json    written at the start
    metrics.jsonl                     one line a step, cut back to the checkpoint on resume
    checkpoint-STEP/                  model, optimizer, weighting memory, random state; the newest only
    README.md, evaluation.json, model.safetensors, tokenizer files, config.json       the finished model; config.json comes last
"""

import json
import os
import platform
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .checkpoint import Checkpoint, save_checkpoint, write_tensors
from .options import InputError, one_line, read_json, write_json, write_text
from .reward import RewardModel

MAY_CHANGE = ("resume", "output", "log_steps", "save_dtype")         # options that a resumed run may give differently,
ROUNDING = ("micro_tokens", "recompute")             # and these, which change a result by rounding only: what to try when memory runs out
MOMENTS = ("exp_avg", "exp_avg_sq")                  # AdamW's state of each parameter


def save_state(run: Path, origin: Checkpoint, model: RewardModel, optimizer, memory: dict, step: int, digests: dict):
    """Write checkpoint-STEP (made beside, renamed when whole), then remove the older ones."""
    final, unfinished = run / f"checkpoint-{step}", run / f"checkpoint-{step}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        _write_state(unfinished, origin, model, optimizer, memory, step, digests)
        os.replace(unfinished, final)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    remove_checkpoints(run, keep=final)


def _write_state(directory, origin, model, optimizer, memory, step, digests):
    save_checkpoint(directory, origin, model.trunk, model.head)
    tensors = {f"weighting.{k}": v.contiguous() for k, v in memory.items()} | {"random": torch.get_rng_state()}
    for name, p in model.named_parameters():
        tensors |= {f"{kind}.{name}": optimizer.state[p][kind] for kind in MOMENTS}
    write_tensors(directory / "state.safetensors", tensors)
    write_json(directory / "state.json", {"step": step, "threads": torch.get_num_threads(), "data": digests, "weighting": sorted(memory)})


def load_state(directory: Path, model: RewardModel, optimizer, memory: dict, digests: dict) -> int:
    """Put the optimizer, the weighting's memory and the random state back; returns the step.

    Raises InputError if a file is missing, damaged or another model's, or if the data have changed.
    """
    try:
        state, tensors = read_json(directory / "state.json"), load_file(directory / "state.safetensors")
        if state["step"] != int(directory.name.removeprefix("checkpoint-")) or type(state["step"]) is not int:
            raise ValueError(f"its step is {state['step']!r}")
        threads, data = int(state["threads"]), dict(state["data"])
        moments = {name: {kind: _like(tensors, f"{kind}.{name}", p) for kind in MOMENTS} for name, p in model.named_parameters()}
        remembered = {name: tensors[f"weighting.{name}"].to(model.head.device, copy=True) for name in state["weighting"]}
        if not all(t.isfinite().all() and len(t) == len(digests) for t in remembered.values()):
            raise ValueError("the weighting's memory is damaged")
        torch.set_rng_state(tensors["random"])
    except (InputError, SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{directory}: not a whole checkpoint ({type(error).__name__}: {one_line(error)}); remove it to start this run again from step 0") from None
    for name, digest in digests.items():
        if data.get(name) != digest:
            raise InputError(f"{directory}: source {name!r} has other pairs than when this run began; restore the file or start a new run")
    for name, p in model.named_parameters():
        optimizer.state[p] = {"step": torch.tensor(float(state["step"]), device=p.device)} | moments[name]
    memory.update(remembered)
    if threads != torch.get_num_threads():
        print(f"this run used {threads} threads, now {torch.get_num_threads()}: it will continue, but not bit for bit", flush=True)
    return state["step"]


def _like(tensors, key, parameter):
    """tensors[key] on the parameter's device, in memory that torch allocated, or a ValueError if it does not fit."""
    if tensors[key].shape != parameter.shape or tensors[key].dtype != parameter.dtype:
        raise ValueError(f"{key} is {tensors[key].dtype} {tuple(tensors[key].shape)}")
    return tensors[key].to(parameter.device, copy=True)


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]{1,18}", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def remove_checkpoints(run: Path, keep: Path | None = None):
    """Remove every checkpoint of a run but one."""
    for old in checkpoints(run):
        if old != keep:
            old.unlink() if old.is_symlink() else shutil.rmtree(old)


def open_run(options) -> Path | None:
    """The directory of a new or continued run; None if it is finished already. Raises InputError for any other directory."""
    run, wanted = Path(options.output), json.loads(json.dumps(asdict(options)))
    stored = run / "options.json"
    if os.path.lexists(run) and not options.resume and not (run.is_dir() and not any(run.iterdir())):
        raise InputError(f"--output {run}: exists already; choose another name, or continue it with --resume")
    if not options.output:
        raise InputError("--output: the path is empty")
    if run.exists() and not stored.is_file() and (not run.is_dir() or any(not p.name.endswith(".partial") for p in run.iterdir())):
        raise InputError(f"--output {run}: not a run directory (it has no options.json); choose another name")
    if stored.is_file():
        given = read_json(stored)
        for key in wanted.keys() | given.keys():
            if key in MAY_CHANGE or wanted.get(key) == given.get(key):
                continue
            change = f"--{key.replace('_', '-')} is {wanted.get(key)!r} but the run in {run} has {given.get(key)!r}"
            if key not in ROUNDING:
                raise InputError(f"--resume: {change}; give the same command again, or start a new run")
            print(f"{change}: it will continue, but not bit for bit")
    if (run / "config.json").is_file():
        Checkpoint(str(run))                         # finished means that it opens
        remove_checkpoints(run)                      # a kill may have come between the finished model and this
        print(f"{run}: finished already")
        return None
    return run


def start_run(run: Path, options):
    """Make the directory with options.json and environment.json."""
    run.mkdir(parents=True, exist_ok=True)
    for unfinished in run.glob("*.partial"):         # left by a kill
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    write_json(run / "options.json", {k: v for k, v in asdict(options).items() if k != "resume"})
    write_json(run / "environment.json", {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "machine": platform.machine(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None})


def cut_metrics(path: Path, step: int):
    """Drop the lines of steps after the checkpoint: they will be run again."""
    lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
    try:
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{path}: holds a line that is not a step's record; remove the file to go on without the log so far") from None
    write_text(path, "".join(whole))
