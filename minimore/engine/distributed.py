"""Several processes train one model: PyTorch's FSDP2 around the plain step.

torchrun starts N equal processes, one for each GPU. Each reads all data, and holds its share of the
rows of every parameter of the trunk, of their gradients and of the optimizer's moments.

    shares     the pairs of a step are cut into N shares of nearly equal tokens, one a process
    forward    FSDP2 gathers the parameters of a block before it, and drops them behind it
    weights    every process sees the features of all pairs: losses, their gradients, lambda, loss
    backward   each process through its own pairs; gradients are added up, and each process
               receives those of its rows
    update     each process its rows

The head is small, and every process holds it whole. A process that is alone passes through the
functions of this file as if they were not there.

N processes, B pairs in a step, D width.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..data.labels import Label
from ..data.pairs import TokenPair
from ..files import one_line
from ..model.tensors import Lazy, Named
from ..options import InputError, require
from ..reward import ModelOptions, device_of
from .objective import Objective, global_norm
from .optim import AdamW, where_it_is
from .plain import PlainEngine, computed_with, gradient_of
from .recipe import Recipe

# What stands below torch.distributed is imported where it is used: some builds of torch lack it.

Value = TypeVar("Value")
HEAD = "head"  # the one parameter that every process holds whole
VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# ---- the group of processes ----------------------------------------------------------------------


def started_processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    count = os.environ.get("WORLD_SIZE", "1")
    require(count.isdigit() and int(count), f"WORLD_SIZE is {count!r}: expected a number from 1")
    return int(count)


def is_group() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def processes() -> int:
    """How many processes train this model."""
    return dist.get_world_size() if is_group() else 1


def is_first() -> bool:
    """Whether this process is the one that prints, and that writes what is written once."""
    return not is_group() or dist.get_rank() == 0


@contextmanager
def joined(options: ModelOptions) -> Iterator[None]:
    """Within, the processes that torchrun has started are a group, of which the first one prints.

    Raises InputError where they cannot be a group, and where another process of it has gone.
    """
    if started_processes() == 1:
        yield
        return
    device = device_of_group(options)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        with (
            open(os.devnull, "w") as nowhere,
            redirect_stdout(sys.stdout if is_first() else nowhere),
        ):
            yield
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise InputError(
            f"process {dist.get_rank()} of {processes()}: another one has ended, and its message"
            f" says why ({one_line(error)})"
        ) from None
    dist.destroy_process_group()


def device_of_group(options: ModelOptions) -> str:
    """Where the processes are to compute; what cannot become a group is refused (InputError).

    All processes find the same, and the first one says it.
    """
    try:
        device = device_of(options)
        require_group(device)
    except InputError:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise InputError("") from None
    return device


def require_group(device: str) -> None:
    """Refuse processes that cannot become a group (InputError)."""
    count = started_processes()
    missing = [name for name in VARIABLES if name not in os.environ]
    require(
        not missing,
        f"WORLD_SIZE is {count}, but {', '.join(missing)} is not set; start with"
        f" torchrun --nproc-per-node {count} -m minimore train ...",
    )
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    require(here == count, f"{count} processes, but {here} on this machine: one machine only")
    backend = "nccl" if device == "cuda" else "gloo"
    require(
        dist.is_available() and dist.is_backend_available(backend),
        f"{count} processes: this torch has no {backend}; train with one process",
    )
    require(
        device == "cpu" or count <= torch.cuda.device_count(),
        f"{count} processes, but {torch.cuda.device_count()} GPUs: a GPU for each process;"
        f" --nproc-per-node {torch.cuda.device_count()}",
    )


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached any more."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


@contextmanager
def refused_together() -> Iterator[None]:
    """Within, what one process cannot do ends all of them; the first that cannot says why.

    Nothing within may wait for other processes.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed: list[bool] = [error is not None]
    if is_group():
        failed = [False] * processes()
        dist.all_gather_object(failed, error is not None)
    if error and failed.index(True) == (dist.get_rank() if is_group() else 0):
        raise error
    if any(failed):
        raise InputError("")  # another process says why


def from_first(value: Value) -> Value:
    """The value that the first process has."""
    values = [value]
    if is_group():
        dist.broadcast_object_list(values)
    return values[0]


def most_of_all(number: int) -> int:
    """The largest of all processes' numbers."""
    if not is_group():
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    most = torch.tensor(number, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


# ---- what each process holds ---------------------------------------------------------------------


def own(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this process holds; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor with the rows of all processes, each of which must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_rows(tensor: Tensor) -> Tensor:
    """The rows of a whole tensor that this process is to hold: as many as FSDP2 takes."""
    parts = tensor.chunk(processes())
    place = dist.get_rank() if is_group() else 0
    return parts[place] if place < len(parts) else tensor[:0]


class ShardedAdamW(AdamW):
    """AdamW of which every process holds and updates its own rows."""

    def __init__(self, *values: Any, **named: Any):
        super().__init__(*values, **named)
        self.rows: dict[str, Tensor] = {}  # of parameters that the model does not hold yet

    def adopt(
        self, name: str, value: Tensor, home: Any = where_it_is, is_trained: bool = True
    ) -> Tensor:
        """Begin the state of this process's rows. Returns a parameter without memory.

        The head is held whole. The rows are held until `shard` lays them into the model.
        """
        if name == HEAD:
            return super().adopt(name, value, home, is_trained)
        self.rows[name] = super().adopt(name, own_rows(value).clone(), home, is_trained)
        return value.to("meta")

    def update(self, name: str, p: Tensor, gradient: Tensor, state: Any = None) -> None:
        """Step `steps + 1` of this process's rows of one parameter, in place."""
        super().update(name, own(p), own(gradient), state)

    def value(self, name: str, p: Tensor) -> Tensor:
        """The number that a parameter stands for, whole; every process must ask for it."""
        return whole(super().value(name, p))


def shard(model: Any, optimizer: ShardedAdamW) -> None:
    """Let FSDP2 hold a model whose parameters the optimizer has adopted.

    Gradients are added up, not averaged, since losses are means over all processes' pairs.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = model.head.device
    mesh = init_device_mesh(device.type, (processes(),))
    for module in (*model.trunk.blocks, model.trunk):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.trunk.to_empty(device=device)
    for name, rows in optimizer.rows.items():
        own(model.get_parameter(name).detach()).copy_(rows)
    optimizer.rows.clear()


@torch.no_grad()
def round_rows(model: Any, dtype: torch.dtype) -> None:
    """Round every number that is held to a type in which it has been stored."""
    for p in model.parameters():
        own(p).copy_(own(p).to(dtype))


# ---- one step ------------------------------------------------------------------------------------

# The only values that several processes can train with: streaming would gather each block again for
# every part of a step, and what is rounded at random depends on places in the whole parameter.
# What is frozen would be gathered like the rest, which nobody has tried.
GROUP_RECIPE = {"engine": "plain", "parameters": "float32", "moments": "float32", "train": "all"}


def check_group(recipe: Recipe, batch_size: int, unit: int, count: int) -> None:
    """Refuse what `count` processes cannot do, if they are several (InputError).

    batch_size: pairs of a step. unit: how many of them stay together.
    """
    if count == 1:
        return
    for name, only in GROUP_RECIPE.items():
        value = getattr(recipe, name)
        require(value == only, f"--{name} {value}: {count} processes train with {only} only")
    together = f" that stay together in groups of {unit}" if unit > 1 else ""
    require(
        batch_size // unit >= count,
        f"--batch-size {batch_size}: too few pairs{together} for {count} processes; expected at"
        f" least {count * unit}",
    )


def shares(tokens: Sequence[int], unit: int, count: int) -> list[range]:
    """Cut the items of a step into `count` consecutive shares of nearly equal tokens.

    tokens: of each item. Units of items are not cut: each is in the share in which its middle
    token is. A share is empty where there are fewer units than shares, or one is very long.

    >>> shares([5, 5, 5, 5], 1, 2), shares([9, 1, 1, 1], 1, 2)
    ([range(0, 2), range(2, 4)], [range(0, 1), range(1, 4)])
    """
    starts = np.arange(0, len(tokens), unit)
    sizes = np.add.reduceat(np.array(tokens), starts)
    middles = np.cumsum(sizes) - sizes / 2
    share_of_unit = middles * count // sum(tokens)
    bounds = np.searchsorted(share_of_unit, np.arange(count + 1)) * unit
    return [range(start, min(stop, len(tokens))) for start, stop in zip(bounds, bounds[1:])]


class WholeStep(NamedTuple):
    """What a loss reads of the batches of a step: source of every pair (B,), and labels."""

    source: Tensor
    labels: list[Label]


class DistributedEngine(PlainEngine):
    """The plain step of N processes, each with a share of the pairs.

    All of them compute the loss of the whole step. The gradients that the first one has found are
    sent to all: they follow the same lambda, to the bit.
    """

    def step(self, items: Sequence[TokenPair], source: Sequence[int], objective: Objective) -> Any:
        """One optimizer step on some pairs; source: the source of each. Returns the result.

        Every process gives the same pairs, and receives the result of all of them. Raises
        NonFiniteLoss, or NonFiniteGradient before anything is updated.
        """
        self.model.zero_grad()  # of a step that could not be taken
        unit = objective.unit or 1
        share = shares([pair.tokens for pair in items], unit, processes())[dist.get_rank()]
        batches = self._batches(share, items, source, objective, unit)
        own_states = self._states(batches)  # rows behind 2 len(share) are repeats, see _batches
        rows = slice(2 * share.start, 2 * share.stop)  # chosen and rejected of every pair
        states = own_states.new_zeros(2 * len(items), own_states.shape[1])
        states[rows] = own_states.detach()[: 2 * len(share)]
        dist.all_reduce(states)  # (2B, D): each row from the one process that has it
        states.requires_grad_()
        step = WholeStep(torch.tensor(source), [pair.label for pair in items])
        loss, result = objective.loss(computed_with(self.model), states, [step])
        loss.backward()
        for gradient in (gradient_of(states), gradient_of(self.model.head)):
            dist.broadcast(gradient, 0)
        d_states = torch.zeros_like(own_states)  # repeats keep a gradient of zero
        d_states[: 2 * len(share)] = gradient_of(states)[rows]
        if len(batches) == 1:
            own_states.backward(d_states)
        else:
            self._carry_on(batches, d_states)
        self._update()
        return result

    def _batches(
        self,
        share: range,
        items: Sequence[TokenPair],
        source: Sequence[int],
        objective: Objective,
        unit: int,
    ) -> list[Any]:
        """The micro-batches of a share, as many as of every other one.

        All processes gather and reduce at the same time. One that has fewer micro-batches computes
        one of them again, or the step's first pair, with a gradient of zero.
        """
        micro_tokens, pairs = self.recipe.micro_tokens, slice(share.start, share.stop)
        batches = []
        if share:
            batches = objective.batches(items[pairs], source[pairs], micro_tokens, unit)
        missing = most_of_all(len(batches)) - len(batches)
        again = batches or objective.batches(items[:1], source[:1], micro_tokens)
        return batches + again[:1] * missing

    def _states_of(self, batch: Any) -> Tensor:
        """Final states at the last token of every text; FSDP2 sees only calls of modules."""
        return self.model.trunk(batch.stream.to(self.model.top.device))

    def _is_finite(self, gradients: Mapping[str, Tensor]) -> bool:
        """Whether all gradients of all processes are finite."""
        own_gradients = [own(g) for g in gradients.values() if own(g).numel()]
        return not most_of_all(int(not global_norm(own_gradients).isfinite()))

    def _clip(self, gradients: Mapping[str, Tensor], most: float) -> None:
        """Scale the gradients down to a global norm; the head's, which all have, counts once."""
        squares = torch.zeros((), dtype=torch.float64, device=self.model.top.device)
        for name, gradient in gradients.items():
            if name != HEAD or is_first():
                squares += own(gradient).double().square().sum()
        dist.all_reduce(squares)
        scale = (most / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients.values():
            own(gradient).mul_(scale)


def give_rows(tensors: Named) -> None:
    """Give the first process the rows of every tensor, in the order in which it writes them."""
    for tensor in tensors.values():
        if isinstance(tensor, Lazy):
            tensor.make()


# ---- checkpoints ---------------------------------------------------------------------------------


def moments_in_shape(model: Any, optimizer: AdamW) -> dict[str, Tensor]:
    """The moments in the shapes of their parameters, by "KIND.PARAMETER"; views, not copies.

    Those of sharded parameters know which rows they are.
    """
    from torch.distributed.tensor import DTensor

    moments = {}
    for name, kinds in optimizer.state.items():
        p = model.get_parameter(name)
        for kind, moment in kinds.items():
            moment = moment.view(own(p).shape)
            if isinstance(p, DTensor):
                moment = DTensor.from_local(
                    moment, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
                )
            moments[f"{kind}.{name}"] = moment
    return moments


def write_moments(directory: Path, moments: dict[str, Tensor]) -> None:
    """Write the moments into a directory, every process its rows, as safetensors."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    with first_failure():
        save(
            moments,
            storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True),
        )


def read_moments(directory: Path, model: Any, optimizer: AdamW) -> None:
    """Read this process's rows of moments, however many processes have written them."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    moments = moments_in_shape(model, optimizer)
    with first_failure(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that each process reads on its own
        load(moments, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)


@contextmanager
def first_failure() -> Iterator[None]:
    """Raise the error itself of the first process that could not write or read its part."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        (raised, _), *_ = error.failures.values()
        raise raised from None


def split_moments(tensors: Mapping[str, Tensor], model: Any, optimizer: AdamW) -> None:
    """Take the rows that this process holds from the moments of one process, flat and whole."""
    for key, moment in moments_in_shape(model, optimizer).items():
        saved = tensors[key].view(moment.shape)
        is_sharded = own(moment) is not moment
        own(moment).copy_(own_rows(saved) if is_sharded else saved)
