"""The recipe of a training step: how it is carried out, memory against time.

Beyond rounding, only the storage of parameters and moments, clipping, and what is trained change a
step's result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..model.recompute import RECOMPUTE
from ..options import option, require
from .trained import ALL, require_train

ENGINES = ("plain", "streamed")
PARAMETERS = ("float32", "split", "bfloat16")
MOMENTS = ("float32", "bfloat16", "int8")
OFFLOADS = ("inputs", "states")


@dataclass(frozen=True)
class Recipe:
    """One choice of everything that trades memory against time.

    engine: "plain" is autograd over the whole model, "streamed" goes block by block.
    parameters, moments: how the numbers are stored (optim.py). recompute: what backward makes again
    (model/recompute.py). offload: what the host's memory holds. micro_tokens: tokens computed at a
    time. max_grad_norm: the gradient is scaled down to this norm; None leaves it. train: which
    parameters are trained (trained.py).
    """

    engine: str = "plain"
    parameters: str = "float32"
    moments: str = "float32"
    recompute: str = "none"
    offload: tuple[str, ...] = ()
    micro_tokens: int = 8192
    max_grad_norm: float | None = None
    train: str = ALL

    def check(self) -> None:
        """Raise InputError for a value that does not exist, or for two that contradict."""
        self._check_values()
        is_plain = self.engine == "plain"
        require(
            not is_plain or self.parameters == "float32",
            f"--parameters {self.parameters} needs --engine streamed: the plain engine's gradients"
            " are of the parameters' type, and bfloat16 gradients do not add up",
        )
        require(
            not is_plain or not self.offload,
            f"--offload {' '.join(self.offload[:1])} needs --engine streamed: the plain engine"
            " needs everything at once",
        )
        require(
            "inputs" not in self.offload or self.recompute == "full",
            f"--offload inputs needs --recompute full: with --recompute {self.recompute} more than"
            " the blocks' inputs is kept",
        )
        require(
            is_plain or self.max_grad_norm is None,
            "--max-grad-norm needs --engine plain: the streamed engine has changed the last blocks"
            " before it knows the gradient of the first",
        )

    def _check_values(self) -> None:
        known = {
            "engine": ENGINES,
            "parameters": PARAMETERS,
            "moments": MOMENTS,
            "recompute": RECOMPUTE,
        }
        for name, values in known.items():
            value = getattr(self, name)
            require(value in values, f"--{name} {value}: expected one of {', '.join(values)}")
        require(self.micro_tokens >= 1, f"--micro-tokens {self.micro_tokens}: expected at least 1")
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"--max-grad-norm {self.max_grad_norm}: expected more than 0",
        )
        require_train(self.train)

    def __str__(self) -> str:
        """The recipe as options of the command."""
        words = [
            f"--engine {self.engine}",
            f"--parameters {self.parameters}",
            f"--moments {self.moments}",
            f"--recompute {self.recompute}",
            *(f"--offload {what}" for what in self.offload),
            f"--micro-tokens {self.micro_tokens}",
        ]
        if self.max_grad_norm is not None:
            words.append(f"--max-grad-norm {self.max_grad_norm:g}")
        if self.train != ALL:
            words.append(f"--train {self.train}")
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The options that make a recipe. None is left to `--memory`, or to the default."""

    memory: str | None = option(
        None,
        value="24GB",
        help="what the training may take of the device's memory: what is not given of the recipe "
        "is then chosen, exact and as fast as fits",
    )
    engine: str | None = option(
        None,
        choices=ENGINES,
        help="plain: autograd over the whole model (default); streamed: block by block, each "
        "updated as soon as its gradient is known",
    )
    parameters: str | None = option(
        None,
        choices=PARAMETERS,
        help="storage of matrices: float32 (default); split: bf16 to compute with and the 16 bits "
        "that are missing; bfloat16: rounded at random (the last two with --engine streamed)",
    )
    moments: str | None = option(
        None,
        choices=MOMENTS,
        help="storage of AdamW's moments: float32 (default), bfloat16 or int8, rounded at random",
    )
    recompute: str | None = option(
        None,
        choices=RECOMPUTE,
        help="what is made again in backward: none (default), selective (all but matrix products "
        "and attention) or full (whole blocks)",
    )
    offload: tuple[str, ...] = option(
        (),
        repeat=True,
        choices=OFFLOADS,
        help="keep the blocks' inputs, or the optimizer's states, in the host's memory (with "
        "--engine streamed)",
    )
    max_grad_norm: float | None = option(
        None, help="clip the gradient's global norm (with --engine plain; default: no clipping)"
    )
    train: str | None = option(
        None,
        value="all|head|last-N",
        help="what is trained: all (default); the head alone; or the last N blocks, the final norm "
        "and the head. All else stays as it is, and takes neither gradients nor moments",
    )

    def chosen_recipe(
        self, micro_tokens: int, stored: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The fields of a recipe that the user chose, by name.

        stored: the recipe of a run that is continued. It keeps its storage of numbers, and what it
        trains.
        """
        stored = stored or {}
        values = {
            "engine": self.engine,
            "parameters": self.parameters or stored.get("parameters"),
            "moments": self.moments or stored.get("moments"),
            "recompute": self.recompute,
            "micro_tokens": micro_tokens,
            "offload": tuple(sorted(set(self.offload))),
            "max_grad_norm": self.max_grad_norm,
            "train": stored.get("train") if self.train is None else self.train,
        }
        return {name: value for name, value in values.items() if value not in (None, ())}
