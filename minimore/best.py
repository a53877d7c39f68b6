"""The best step of a run, by its validation: sought while it trains, and kept when it is finished.

while it trains    every saved state says which step is the best so far; checkpoint-STEP of that
                   step stays as long as a state that is kept names it
when finished      best/ is the model of that step, an ordinary checkpoint like the run itself,
                   which is the model of the last step; best.json says which step it was
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .data.overlap import TRAINING_PROMPTS
from .files import directory_written_whole, write_bytes, write_json, write_text
from .metrics import figures_of
from .model.checkpoint import Checkpoint, stored_tensors, write_model
from .options import InputError
from .resume import UNREADABLE, check_whole, checkpoint_of, remove
from .run import BEST
from .tables import number

FIGURES = {"accuracy": "accuracy", "nll": "NLL"}  # by which a step may be the best, and in words


class Best(NamedTuple):
    """The best step so far. by: a key of FIGURES; value: its mean over the validation sources."""

    step: int
    by: str
    value: float

    def __str__(self) -> str:
        return f"validation {FIGURES[self.by]} {number(self.value)}"


def better_of(best: Best | None, candidate: Best) -> Best:
    """The better of two, both by the same figure; the earlier one where they are equal.

    NaN is worse than any number.

    >>> better_of(Best(10, "nll", 0.6), Best(20, "nll", 0.5)).step
    20
    >>> better_of(Best(10, "accuracy", 0.6), Best(20, "accuracy", 0.6)).step
    10
    """
    if best is None or math.isnan(best.value):
        return candidate
    larger_is_better = best.by == "accuracy"
    is_better = candidate.value > best.value if larger_is_better else candidate.value < best.value
    return candidate if is_better else best


def saved_best(run: Path, facts: Mapping[str, Any]) -> Best | None:
    """The best step so far, as a saved state of the run has it; None if it has none.

    Where its checkpoint was removed, the best is sought anew among the steps to come, which is
    said. Raises InputError for a state that says something else.
    """
    if "best" not in facts:
        return None
    try:
        best = Best(**facts["best"])
        checkpoint = checkpoint_of(run, best.step)
        is_readable = best.by in FIGURES and isinstance(best.value, float)
    except UNREADABLE:
        is_readable = False
    if not is_readable:
        raise InputError(
            f"{run}: the last checkpoint says that the best step so far is {facts['best']!r};"
            " remove that checkpoint, or start a new run"
        )
    if checkpoint.is_dir():
        return best
    print(
        f"{checkpoint}, the best so far, is missing: the best is sought among the steps to come",
        flush=True,
    )
    return None


def validation_line(record: Mapping[str, Any], best: Best | None) -> str:
    """What the validation after a step has shown, mean over the sources, and the best step."""
    line = f"validation after step {record['step']}: {figures_of(record['validation']['mean'])}"
    if best is None:
        return line
    if best.step == record["step"]:
        return f"{line}; best {FIGURES[best.by]} so far"
    return f"{line}; best {FIGURES[best.by]} {number(best.value)} at step {best.step}"


# ---- in the finished run -------------------------------------------------------------------------


def write_best(run: Path, best: Best, kind: str, dtype: str, card: str) -> None:
    """Write best/: the model of the best step, made of its checkpoint, tensor by tensor.

    kind: "reward" or "language", as of the model. dtype: in which its weights are stored. card: its
    README.md. With a copy of options.json and of the hashes of the training prompts it can be read
    as the run can, wherever it is moved. Raises InputError for a checkpoint that is not as it was
    written.
    """
    check_whole(checkpoint_of(run, best.step))
    checkpoint = Checkpoint(str(checkpoint_of(run, best.step)))
    if (run / BEST).is_dir():  # left by a killed try; checkpoint-STEP is still there
        remove(run / BEST)
    with directory_written_whole(run / BEST) as directory:
        for name in ("options.json", TRAINING_PROMPTS):
            write_bytes(directory / name, (run / name).read_bytes())
        write_text(directory / "README.md", card)
        write_model(directory, checkpoint, stored_tensors(checkpoint, dtype), kind, dtype)


def write_which(run: Path, best: Best, steps: int, last: float) -> None:
    """Write best.json, and print what is in best/ and what is in the run itself.

    last: the same figure of the model of the last step.
    """
    write_json(run / "best.json", best._asdict() | {"steps": steps, "last": last})
    print(f"best: step {best.step} of {steps}, {best}, in {run / BEST}")
    print(f"last: step {steps} of {steps}, {best._replace(value=last)}, in {run}")
