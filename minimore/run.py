"""The run directory: what makes a training safe to kill.

    options.json, environment.json    written at the start, and training_prompts.safetensors
    metrics.jsonl                     one line a step, cut back to the checkpoint on resume
    checkpoint-STEP/                  the state after that step (resume.py)
    README.md, evaluation.json, model.safetensors, tokenizer files, config.json
                                      the finished model; config.json comes last
    best/, best.json, validation.json
                                      the model of the best step, if it was sought (best.py)

Every file is written beside its place and renamed, so the last good state always stands.
"""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .checksums import read_checked_json, write_checked_json
from .engine.distributed import is_first
from .engine.recipe import Recipe
from .files import locked, make_directory, one_line, sweep, to_disk, write_json
from .model.checkpoint import Checkpoint
from .options import InputError, flag_of, require
from .resume import checkpoints, environment, remove, remove_superseded
from .temperature import TEMPERATURE

BEST = "best"  # the directory of the model of the best step, in a finished run
# What is said of a finished model, and is not true any more when its run goes on.
OF_FINISHED = ("README.md", "evaluation.json", "validation.json", "best.json", TEMPERATURE)
RECIPE = tuple(field.name for field in fields(Recipe))
# Parts of a recipe that change a result by rounding only. Offloading does not change it at all.
ROUNDING = ("engine", "recompute", "micro_tokens")
# Options that a resumed run may give differently. `check_recipe` looks at the recipe's own, and
# there may be more epochs, but not fewer.
MAY_CHANGE = (
    "resume",
    "output",
    "epochs",
    "eval_steps",
    "log_steps",
    "device",
    "save_dtype",
    "save_steps",
    "keep",
    "memory",
    "allow_overlap",
    "beyond_positions",
    *RECIPE,
)


# ---- opening -------------------------------------------------------------------------------------


def open_run(options: Any) -> Path | None:
    """The directory of a new or a continued run; None if the run is finished already.

    It removes what kills have left in a finished run, so whoever calls it holds the `Lock`. Raises
    InputError for any other directory, and for options that the run does not have.
    """
    run = Path(options.output)
    require(options.output, "--output: the path is empty")
    is_empty = run.is_dir() and not any(run.iterdir())
    if options.resume and (is_empty or not run.exists()):
        print(f"{run}: there is no run yet to continue, so it begins", flush=True)
    require(
        options.resume or is_empty or not os.path.lexists(run),
        f"--output {run}: exists already; choose another name, or continue it with --resume",
    )
    if (run / "options.json").is_file():
        _require_same_options(run, options)
    elif run.exists():
        is_ours = run.is_dir() and all(path.name.endswith(".partial") for path in run.iterdir())
        require(
            is_ours,
            f"--output {run}: not a run directory (it has no options.json); choose another name",
        )
    if not (run / "config.json").is_file():
        return run
    Checkpoint(str(run)).require_weights_as_written()  # finished means that it opens
    stored = read_checked_json(run / "options.json")
    remove_superseded(run, stored.get("keep") or 0)  # a kill may have come before
    sweep(run)
    if options.epochs == stored["epochs"]:
        print(f"{run}: finished already")
        return None
    require(
        checkpoints(run),
        f"--epochs {options.epochs}: {run} is finished after {stored['epochs']}, and kept no"
        f" checkpoint from which it could go on (--keep 1 keeps one); start a new run, with --model"
        f" {run} from these weights",
    )
    return run


def _require_same_options(run: Path, options: Any) -> None:
    """Refuse options other than those with which the run began, and say what changes a result.

    An option that there was not yet when it began has its default.
    """
    defaults = {field.name: field.default for field in fields(options)}
    stored = defaults | read_checked_json(run / "options.json")
    wanted = as_json(options)
    for key in sorted(wanted.keys() | stored.keys() - {"recipe"}):
        require(
            key in MAY_CHANGE or wanted.get(key) == stored.get(key),
            f"--resume: {flag_of(key)} is {wanted.get(key)!r} but the run in {run} has"
            f" {stored.get(key)!r}; give the same command again, or start a new run",
        )
    require(
        wanted["epochs"] >= stored["epochs"],
        f"--resume: --epochs is {wanted['epochs']} but the run in {run} has {stored['epochs']};"
        " expected as many, or more",
    )
    consequences = {
        "device": "on another device it does not continue bit for bit, and --compute-dtype auto is"
        " bfloat16 on CUDA and float32 on a CPU"
    }
    if wanted.get("keep_best"):
        consequences["eval_steps"] = "the best step is sought among other ones from here on"
    for key, consequence in consequences.items():
        if wanted[key] != stored[key]:
            change = f"{flag_of(key)} is {wanted[key]!r} but the run in {run} has {stored[key]!r}"
            print(f"{change}: {consequence}", flush=True)


def as_json(value: Any) -> dict[str, Any]:
    """A dataclass as JSON would give it back: tuples are lists."""
    return json.loads(json.dumps(asdict(value)))


class Lock:
    """Within, no other process trains in a run directory, or opens it to train there.

    A directory that is there is locked at once. A new one is made and locked by `take`, so that a
    command that is refused leaves nothing behind. Of several processes that train together the
    first one locks.
    """

    def __init__(self, run: Path):
        self.run = run
        self.descriptor: int | None = None

    def __enter__(self) -> "Lock":
        self._lock()
        return self

    def take(self) -> None:
        """Make the directory, and lock it, before anything is written there."""
        if is_first():
            make_directory(self.run)
            self._lock()

    def __exit__(self, *_: Any) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    def _lock(self) -> None:
        """Lock it once, if it is there and if the system has such locks."""
        if self.descriptor is not None or not is_first() or not self.run.is_dir():
            return
        self.descriptor = locked(
            self.run,
            f"--output {self.run}: another process is training there;"
            " wait for it, or stop it first",
        )


# ---- the recipe of a run -------------------------------------------------------------------------


def stored_recipe(run: Path) -> dict[str, Any]:
    """The recipe with which a run began, with the defaults of what there was not yet; or {}."""
    path = run / "options.json"
    if not path.is_file():
        return {}
    values: Any = read_checked_json(path).get("recipe")
    try:
        recipe = Recipe(**values | {"offload": tuple(values["offload"])})
        recipe.check()
    except (InputError, TypeError, KeyError) as error:
        raise InputError(
            f'{path}: "recipe" is not that of a run ({one_line(error)});'
            " restore the file, or start a new run"
        ) from None
    return as_json(recipe)


def check_recipe(run: Path, recipe: Recipe) -> None:
    """Refuse to continue a run with a recipe that changes its result (InputError).

    A change that only rounds otherwise is accepted, and printed.
    """
    stored, wanted = stored_recipe(run), as_json(recipe)
    rounding = []
    for key in RECIPE:
        if not stored or key == "offload" or stored.get(key) == wanted[key]:
            continue
        change = f"{flag_of(key)} is {wanted[key]!r} but the run in {run} has {stored.get(key)!r}"
        require(
            key in ROUNDING,
            f"--resume: {change}; give the same command again, or start a new run",
        )
        rounding.append(change)
    for change in rounding:
        print(f"{change}: it will continue, but not bit for bit", flush=True)


# ---- what stands in the directory ----------------------------------------------------------------


def start_run(run: Path, options: Any, recipe: Recipe) -> None:
    """Write options.json and environment.json into the directory.

    What kills left half-written goes first, and so do checkpoints that are not to be kept: on a
    full disk this makes room. A finished run that goes on is no finished one any more.
    """
    reopen(run)
    sweep(run)
    remove_superseded(run, options.keep or 1)
    named = {name: value for name, value in asdict(options).items() if name != "resume"}
    write_checked_json(run / "options.json", named | {"recipe": asdict(recipe)})
    write_json(run / "environment.json", environment())


def reopen(run: Path) -> None:
    """Let a run look as it did before it was finished, or half finished.

    config.json goes first: its presence means finished. Weights and tokenizer stay until others are
    written in their place.
    """
    was_finished = (run / "config.json").exists()
    if was_finished:
        (run / "config.json").unlink()
        to_disk(run)
    removed = [name for name in OF_FINISHED if (run / name).exists()]
    for name in removed:
        (run / name).unlink()
    if (run / BEST).is_dir():
        remove(run / BEST)
        removed.append(f"{BEST}/")
    if was_finished:
        print(f"{run}: goes on, so what was said of the finished model goes: {', '.join(removed)}")
