"""The options that every training takes, and what follows of them for each of its steps.

Which items a step has is a function of seed and step alone, and so is its learning rate. So a run
that is continued goes on as if it had not stopped.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .data.sampling import epoch_steps
from .engine.recipe import RecipeOptions
from .model.tensors import STORAGE
from .options import COUNT, Range, option
from .reward import ModelOptions

LINES_A_RUN = 25  # that are printed of its steps, unless --log-steps says it


@dataclass(frozen=True, kw_only=True)
class LoopOptions(RecipeOptions, ModelOptions):
    """What every training takes, whatever it trains."""

    output: str = option(
        value="RUN", help="run directory to make; must not exist, except with --resume"
    )
    resume: bool = option(
        False, help="continue the run in --output; options that are not given are the run's own"
    )
    learning_rate: float = option(1e-6, within=Range(above=0), help="peak learning rate")
    warmup: float = option(
        0.0,
        within=Range(least=0, most=1),
        help="share of the steps in which the learning rate rises linearly from 0",
    )
    schedule: str = option(
        "linear",
        choices=("linear", "cosine", "constant"),
        help="learning rate after warmup",
    )
    weight_decay: float = option(0.0, within=Range(least=0), help="AdamW's decoupled weight decay")
    save_steps: int = option(500, within=COUNT, help="steps between checkpoints")
    keep: int | None = option(
        None,
        within=COUNT,
        help="checkpoints to keep, the newest ones, also when the run is finished (default: one "
        "while it trains, none when it is finished)",
    )
    log_steps: int | None = option(
        None,
        within=COUNT,
        help="steps between printed lines, and steps over which the means in brackets are taken "
        f"(default: as many as make about {LINES_A_RUN} lines); metrics.jsonl has every step",
    )
    save_dtype: str = option(
        "float32",
        choices=tuple(STORAGE),
        help="type in which the finished model is stored",
    )


@dataclass(frozen=True)
class Schedule:
    """Which items a step sees, and its learning rate: all of it known before the first step.

    Steps are numbered from 1. epochs: passes over the items. sizes: items of each source. sampling,
    per_source, per_step: see `epoch_steps`.
    """

    options: LoopOptions
    epochs: int
    sizes: tuple[int, ...]
    batch_size: int
    sampling: str = "proportional"
    per_source: int | tuple[int | None, ...] | None = None
    per_step: tuple[int, ...] | None = None

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self._steps_per_epoch * self.epochs

    def sampled_at(self, step: int) -> np.ndarray:
        """The items of a step: (B, 2), a source and an item in it."""
        epoch, place = divmod(step - 1, self._steps_per_epoch)
        return self._epoch(epoch)[place]

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate_at(step, self.steps, self.options)

    @property
    def _steps_per_epoch(self) -> int:
        return len(self._epoch(0))

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        return _cached_epoch_steps(
            self.sizes,
            self.sampling,
            self.per_source,
            self.batch_size,
            self.options.seed,
            epoch,
            self.per_step,
        )


_cached_epoch_steps = lru_cache(maxsize=2)(epoch_steps)  # the first epoch, and the present one


def learning_rate_at(step: int, steps: int, options: LoopOptions) -> float:
    """Learning rate of step 1, 2, ..., steps.

    It rises linearly during the warmup, then follows the schedule, which would reach 0 one step
    after the last.
    """
    warmup_steps = math.ceil(options.warmup * steps)
    if step <= warmup_steps:
        return options.learning_rate * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, steps - warmup_steps)
    factors = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "constant": 1.0,
    }
    return options.learning_rate * factors[options.schedule]
