"""The streamed engine: a training step that never holds the gradient of the whole model.

Each block is updated, and its gradient dropped, as soon as the gradient is known. A block's
parameters and optimizer states are touched once forward and once backward, however many
micro-batches a step has. This makes it cheap to keep the states in the host's memory (host.py).

N tokens of a micro-batch, M tokens that are read, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..model.attention import Stream
from ..model.recompute import run_block
from ..model.rotation import at_least_fp32, rotations
from ..model.trunk import Block
from .distributed import DistributedEngine, ShardedAdamW, shard
from .host import Host
from .objective import Batch, NonFiniteGradient, Objective, global_norm
from .optim import AdamW
from .plain import PlainEngine
from .recipe import Recipe
from .trained import freeze, frozen_blocks

EMBEDDINGS = ("trunk.embedding.", "trunk.position_embedding.")

Gradients = dict[str, Tensor]  # parameter name -> gradient, in the compute type or at least fp32
AModule = TypeVar("AModule", bound=nn.Module)


def name_of_top(model: Any) -> str:
    """The name of the parameter on top, such as "head"; a tied one has its name in the trunk."""
    return next(name for name, p in model.named_parameters() if p is model.top)


def parts_of(model: Any) -> list[list[str]]:
    """Names of the trained parameters, part by part in the order in which backward reaches them.

    The top (head and final norm), the blocks from the last to the first, the embeddings. What is
    frozen is in no part, and a part of which all is frozen is left out.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    prefixes = [f"trunk.blocks.{i}." for i in reversed(range(len(model.trunk.blocks)))]
    blocks = [[name for name in names if name.startswith(prefix)] for prefix in prefixes]
    embeddings = [name for name in names if name.startswith(EMBEDDINGS)]
    below = embeddings + [name for block in blocks for name in block]
    top = [name for name in names if name not in below]
    return [part for part in (top, *blocks, embeddings) if part]


class StreamedStep:
    """One training step, from the micro-batches of its pairs to the gradient of every parameter.

        forward    embed -> block 0 -> block 1 -> ... -> top       keeps the input of each block
        loss       all items are in view at the top: the objective's loss and its gradient
        backward   top -> ... -> block 1 -> block 0 -> embed       computes a block again, yields
                                                                   its gradient, and forgets it

    `forward()` returns the objective's result. `backward()` is a generator: it yields the gradients
    of one part of `parts_of` at a time. The caller may change that part's parameters before it asks
    for the next.

    Frozen blocks (trained.py), which are the first ones, keep nothing on the way forward, and the
    way back ends before them.

    recompute: "full" keeps the inputs of the blocks alone, as drawn above; with a host, they are
    kept there. "selective" and "none" keep a graph of each block with more of what it computed.
    """

    def __init__(
        self,
        model: Any,
        batches: Sequence[Batch],
        objective: Objective,
        recompute: str = "full",
        host: Host | None = None,
    ):
        self.model, self.trunk = model, model.trunk
        self.blocks = cast(Sequence[Block], model.trunk.blocks)
        self.frozen = frozen_blocks(model)
        self.batches, self.objective = batches, objective
        self.recompute, self.host = recompute, host
        self.inputs = BlockInputs(host)  # what "full" keeps
        self.graphs: list[BlockGraph] = []  # what "selective" and "none" keep, last in, first out

    # ---- forward ----

    def forward(self) -> Any:
        """The objective's result over all items; keeps what backward needs."""
        self.micro_batches = [self._micro_batch(batch) for batch in self.batches]
        with torch.no_grad():
            activations = [self.trunk.embed(part.stream) for part in self.micro_batches]  # (N, D)
        for number in range(len(self.blocks)):
            self._block_forward(number, activations)
        read = [part.read(x) for x, part in zip(activations, self.micro_batches)]
        return self._top_forward(torch.cat(read))

    def _micro_batch(self, batch: Batch) -> "MicroBatch":
        device = self.model.top.device
        stream, reads = batch.stream.to(device), batch.reads.to(device)
        is_at_ends = batch.reads is batch.stream.last
        last_stream = stream.at_ends if is_at_ends else stream
        streams = [stream] * (len(self.blocks) - 1) + [last_stream]
        return MicroBatch(streams, rotations(self.trunk.c, stream.positions), reads)

    def _block_forward(self, number: int, activations: list[Tensor]) -> None:
        """Replace the input of a block by its output, for every micro-batch."""
        block = compute_copy(self.blocks[number], self.trunk.compute_dtype)
        for i, (streams, rotations_by_block, _) in enumerate(self.micro_batches):
            x, rotation, stream = activations[i], rotations_by_block[number], streams[number]
            if number < self.frozen or self.recompute == "full":
                if number >= self.frozen:
                    self.inputs.push(x)
                with torch.no_grad():
                    activations[i] = block(x, rotation, stream)
            else:
                x = x.detach().requires_grad_()
                y = run_block(block, x, rotation, stream, self.recompute)
                self.graphs.append(BlockGraph(block, x, y))
                activations[i] = y.detach()
            if self.host:
                self.host.end_part()

    def _top_forward(self, read: Tensor) -> Any:
        """Return the objective's result, and keep the gradients of its loss for backward.

        read: (M, D), what the last block returned at the tokens that the objective reads. Kept are
        d_read (M, D), the gradients d_top of the parameters of the top, and d_tied (V, D): that of
        an unembedding which is the embedding, whose own gradient comes last. Else d_tied is None,
        and so is d_read where no block is trained.
        """
        read = read.detach().requires_grad_(self.frozen < len(self.blocks))
        norm = compute_copy(self.trunk.final_norm, torch.float32)
        top = compute_parameter(self.model.top, self.trunk.compute_dtype)
        loss, result = self.objective.loss(top, norm(at_least_fp32(read)), self.batches)
        name = name_of_top(self.model)
        leaves = {"read": read, name: top}
        leaves |= {f"trunk.final_norm.{leaf}": p for leaf, p in norm.named_parameters()}
        trained = {leaf: tensor for leaf, tensor in leaves.items() if tensor.requires_grad}
        self.d_top = dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))
        self.d_read = self.d_top.pop("read", None)
        is_tied = self.model.top is self.trunk.embedding.weight
        self.d_tied = self.d_top.pop(name, None) if is_tied else None
        return result

    # ---- backward ----

    def backward(self) -> Iterator[Gradients]:
        """The gradients of every part of `parts_of`, one part at a time; once, after forward."""
        yield self._take_gradient_of_top()
        if self.d_read is None:
            return
        d_activations = self._gradient_of_output(self.d_read)
        for i in reversed(range(self.frozen, len(self.blocks))):
            gradients = self._block_backward(i, d_activations)
            yield {f"trunk.blocks.{i}.{name}": gradients.pop(name) for name in list(gradients)}
        if self.trunk.embedding.weight.requires_grad:
            yield self._embedding_gradients(torch.cat(d_activations))

    def _take_gradient_of_top(self) -> Gradients:
        """The gradients of the top, which are not kept here: an unembedding is large."""
        gradients, self.d_top = self.d_top, {}
        return gradients

    def _gradient_of_output(self, d_read: Tensor) -> list[Tensor]:
        """The gradient of what the last block returned, of every micro-batch."""
        parts = d_read.split([len(part.reads) for part in self.micro_batches])
        return [part.unread(d) for d, part in zip(parts, self.micro_batches)]

    def _block_backward(self, number: int, d_activations: list[Tensor]) -> Gradients:
        """The gradients of a block's parameters, summed over the micro-batches.

        d_activations: the gradients of the block's outputs, which become those of its inputs.
        """
        total: Gradients = {}
        for _, gradients in self._block_gradients(number, d_activations):
            add_to(total, gradients, several=len(d_activations) > 1)
        return total

    def _block_gradients(
        self, number: int, d_activations: list[Tensor]
    ) -> Iterator[tuple[int, Gradients]]:
        """Every micro-batch from the last to the first, and the gradients of a block that it has.

        d_activations: the gradients of the block's outputs, which become those of its inputs.
        """
        if self.recompute == "full":
            block = compute_copy(self.blocks[number], self.trunk.compute_dtype)
        for i in reversed(range(len(d_activations))):
            if self.recompute == "full":
                streams, rotations_by_block, _ = self.micro_batches[i]
                rotation, stream = rotations_by_block[number], streams[number]
                d_activations[i], gradients = recomputed_gradients(
                    block, self.inputs.pop(), d_activations[i], rotation, stream
                )
            else:
                d_activations[i], gradients = self.graphs.pop().gradients(d_activations[i])
            yield i, gradients

    def _embedding_gradients(self, d_activations: Tensor) -> Gradients:
        """Gradients of the embeddings, at once for all micro-batches; d_activations: (tokens, D).

        Every call makes a dense gradient (V, D), so several calls would need several of them. The
        numbers of d_activations are not needed any more, and may change.
        """
        if self.trunk.c.embedding_scale != 1:
            d_activations.mul_(self.trunk.embedding_scale)
        d_activations = at_least_fp32(d_activations)
        tokens = torch.cat([part.stream.tokens for part in self.micro_batches])
        d_embedding = embedding_gradient(d_activations, tokens, self.trunk.embedding)
        if self.d_tied is not None:
            d_embedding += self.d_tied
        gradients = {"trunk.embedding.weight": d_embedding}
        if self.trunk.c.learned_positions:
            positions = torch.cat([part.stream.positions for part in self.micro_batches])
            gradients["trunk.position_embedding.weight"] = embedding_gradient(
                d_activations,
                positions + self.trunk.c.position_offset,
                self.trunk.position_embedding,
            )
        return gradients


# ---- what lies between forward and backward ------------------------------------------------------


class MicroBatch(NamedTuple):
    """What every block needs to know of a micro-batch besides its input, and what is read at last.

    reads: (M,) the places that are read. Where these are the ends of the texts, the last block has
    a stream in which nothing else asks, so that its output is what is read.
    """

    streams: list[Stream]  # of every block
    rotations: list[tuple[Tensor, Tensor]]  # of every block
    reads: Tensor

    @property
    def stream(self) -> Stream:
        """The tokens and their positions."""
        return self.streams[0]

    def read(self, output: Tensor) -> Tensor:
        """What is read (M, D) of the last block's output."""
        is_all = self.streams[-1].asked is not None
        return output if is_all else output.index_select(0, self.reads)

    def unread(self, d_read: Tensor) -> Tensor:
        """The gradient of the last block's output: d_read (M, D) at the places read, else zero."""
        if self.streams[-1].asked is not None:
            return d_read  # this output has no other rows
        d_output = d_read.new_zeros(len(self.streams[-1].tokens), d_read.shape[1])
        return d_output.index_add_(0, self.reads, d_read)  # adds, as a place may be read twice


class BlockInputs:
    """The inputs of every block and micro-batch, last in, first out.

    They are in the host's memory if there is a host.
    """

    def __init__(self, host: Host | None):
        self.host = host
        self.stack: list[Tensor] = []  # of inputs, or of their homes on the host

    def push(self, x: Tensor) -> None:
        """Keep an input."""
        self.stack.append(self.host.put(x) if self.host else x)

    def pop(self) -> Tensor:
        """The input that was pushed last."""
        x = self.stack.pop()
        if self.host is None:
            return x
        x = self.host.get(x)
        if self.stack:
            self.host.fetch(self.stack[-1])  # needed next, so it comes while this one is computed
        return x


class BlockGraph(NamedTuple):
    """A block that ran with a graph: a copy in the compute type, its input, its output."""

    block: Block
    x: Tensor
    y: Tensor

    def gradients(self, d_y: Tensor) -> tuple[Tensor, Gradients]:
        """The gradients of the input and of the parameters, from that of the output (N, D)."""
        names = [name for name, _ in self.block.named_parameters()]
        inputs = [self.x, *self.block.parameters()]
        d_x, *gradients = torch.autograd.grad(self.y, inputs, d_y)
        return d_x, dict(zip(names, gradients))


def compute_copy(module: AModule, dtype: torch.dtype) -> AModule:
    """The same module with parameters of its own, at which a graph ends.

    Matrices are in the compute type, and vectors as they are. No number is copied where the type is
    the same: then both modules see the same memory.
    """
    twin = copy(module)
    twin._parameters = {
        name: None if p is None else compute_parameter(p, dtype)
        for name, p in module._parameters.items()
    }
    twin._modules = {name: compute_copy(part, dtype) for name, part in module.named_children()}
    return twin


def compute_parameter(p: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """A parameter as it is computed with: a matrix in the compute type, a vector as it is."""
    value = p.detach().to(dtype) if p.ndim > 1 else p.detach()
    return nn.Parameter(value, requires_grad=p.requires_grad)


def recomputed_gradients(
    block: Block, x: Tensor, d_y: Tensor, rotation: tuple[Tensor, Tensor], stream: Stream
) -> tuple[Tensor, Gradients]:
    """The gradients of a block's input x and parameters, from x and d_y (N, D); no graph was kept.

    The block is computed again, but for its last product y = residual + hidden Wᵀ + b. The
    gradients of that are

        ∂W = ∂yᵀ hidden      ∂b = Σ ∂y over the tokens      ∂hidden = ∂y W      ∂residual = ∂y

    and need no y. All others come from autograd. A norm behind the MLP needs what it normed, so
    such a block is computed again to its end.
    """
    x = x.detach().requires_grad_()
    if block.norm_after:
        return BlockGraph(block, x, block(x, rotation, stream)).gradients(d_y)
    residual, hidden = block.before_last_product(x, rotation, stream)
    last = block.mlp.down
    with torch.no_grad():
        d_hidden = d_y @ last.weight
        gradients = {"mlp.down.weight": d_y.T @ hidden}
        if last.bias is not None:
            gradients["mlp.down.bias"] = d_y.sum(0).to(last.bias.dtype)  # vectors are fp32
    others = {name: p for name, p in block.named_parameters() if name not in gradients}
    # Backward needs where residual and hidden are in the graph, not their values: free the memory.
    starts = [get_gradient_edge(residual), get_gradient_edge(hidden)]
    del residual, hidden
    d_x, *d_others = torch.autograd.grad(starts, [x, *others.values()], [d_y, d_hidden])
    return d_x, gradients | dict(zip(others, d_others))


def add_to(total: Gradients, gradients: Gradients, several: bool) -> None:
    """Add the gradients of one micro-batch of several, in fp32, and drop them here."""
    for name in list(gradients):
        gradient = gradients.pop(name)
        if name in total:
            total[name].add_(gradient)
        else:
            total[name] = at_least_fp32(gradient) if several else gradient


def embedding_gradient(d_rows: Tensor, index: Tensor, table: nn.Embedding) -> Tensor:
    """The gradient (V, D) of a table, of which the rows `index` (N,) were read."""
    rows = len(table.weight)
    return torch.ops.aten.embedding_dense_backward(d_rows, index, rows, -1, False)


# ---- the engine ----------------------------------------------------------------------------------


class StreamedEngine:
    """Takes streamed steps, and updates every part as soon as its gradient is there."""

    step_class = StreamedStep

    def __init__(self, model: Any, optimizer: AdamW, recipe: Recipe):
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        self.parts = parts_of(model)
        device = model.top.device
        self.host_of_inputs = Host(device) if "inputs" in recipe.offload else None
        self.host_of_states = Host(device) if "states" in recipe.offload else None

    def step(self, items: Sequence[Any], source: Sequence[int], objective: Objective) -> Any:
        """One optimizer step on some items; source: the source of each. Returns the result.

        Raises NonFiniteLoss before, and NonFiniteGradient after, the parameters have changed.
        """
        step = self.step_class(
            self.model,
            objective.batches(items, source, self.recipe.micro_tokens),
            objective,
            self.recipe.recompute,
            self.host_of_inputs,
        )
        result = step.forward()
        is_finite = torch.tensor(True, device=self.model.top.device)
        for part, gradients in enumerate(step.backward()):
            self._fetch_states(part + 1)
            is_finite &= self._update(part, gradients)
        self.optimizer.steps += 1
        if not is_finite:  # asked once a step, since every question makes a GPU wait
            raise NonFiniteGradient
        return result

    def settle(self) -> None:
        """Wait until all states on their way to the host are there, before they are read there."""
        if self.host_of_states is not None:
            self.host_of_states.settle()

    def _update(self, part: int, gradients: Gradients) -> Tensor:
        """Update a part and drop its gradients; returns whether all of them were finite, ()."""
        is_finite = global_norm(list(gradients.values())).isfinite()
        for name in self.parts[part]:
            self._update_parameter(name, gradients.pop(name))
        if self.host_of_states:
            self.host_of_states.end_part()
        return is_finite

    def _update_parameter(self, name: str, gradient: Tensor) -> None:
        p, host = self.model.get_parameter(name), self.host_of_states
        if host is None:
            self.optimizer.update(name, p, gradient)
            return
        homes = self.optimizer.state[name]
        state = {kind: host.get(home) for kind, home in homes.items()}
        self.optimizer.update(name, p, gradient, state)
        for kind, tensor in state.items():
            host.put_back(tensor, homes[kind])

    def _fetch_states(self, part: int) -> None:
        """Begin to fetch the states of a part.

        They come while the part before is updated and the gradient of this one is computed.
        """
        if self.host_of_states is None or part == len(self.parts):
            return
        for name in self.parts[part]:
            for home in self.optimizer.state[name].values():
                self.host_of_states.fetch(home)


def open_engine(model: Any, optimizer: AdamW, recipe: Recipe) -> PlainEngine | StreamedEngine:
    """The engine that a recipe names; for a sharded optimizer, that of several processes.

    From then on the model has gradients only of what the recipe trains. Raises InputError for a
    recipe that contradicts itself, or does not fit the model.
    """
    recipe.check()
    freeze(model, recipe.train)
    if isinstance(optimizer, ShardedAdamW):
        shard(model, optimizer)
        return DistributedEngine(model, optimizer, recipe)
    if recipe.engine == "plain":
        return PlainEngine(model, optimizer, recipe)
    return StreamedEngine(model, optimizer, recipe)
