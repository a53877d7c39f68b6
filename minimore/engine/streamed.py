"""The streamed engine: the whole step forward, block by block; the weights at the head, with every pair in view; then the walk back,
in which each block is updated, and its gradient dropped, as soon as it is known.

    memory held   the parameters and the optimizer's states, every block's input, one block's gradient, one chunk's activations
    never held    the gradient of the whole model

A block's parameters and states are touched once forward and once back however many chunks a step has, which is what makes it cheap to
keep the states in the host's memory (host.py). N tokens of a chunk, D width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..data.pairs import PairBatch, TokenPair
from ..model.recompute import run_block
from ..model.trunk import at_least_fp32, rotary_angles
from ..reward import RewardModel
from .host import Host
from .objective import NonFiniteGradient, RewardObjective, StepResult, largest, micro_batches
from .optim import AdamW
from .plain import PlainEngine
from .recipe import Recipe

Gradients = dict[str, Tensor]  # parameter name -> gradient, at least fp32 or the compute type


def parts_of(model: RewardModel) -> list[list[str]]:
    """Names of the parameters in the order in which the walk back reaches them: the top, the blocks from the last on, the embeddings."""
    names = [name for name, _ in model.named_parameters()]
    prefixes = [f"trunk.blocks.{i}." for i in reversed(range(len(model.trunk.blocks)))]
    blocks = [[name for name in names if name.startswith(prefix)] for prefix in prefixes]
    embeddings = [name for name in names if "embedding" in name]
    return [
        [name for name in names if name not in embeddings + sum(blocks, [])],
        *blocks,
        embeddings,
    ]


def to_compute(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's parameters as leaves of a new graph: matrices in the compute type, vectors as they are."""
    return {
        name: (p.detach().to(dtype) if p.ndim > 1 else p.detach()).requires_grad_()
        for name, p in module.named_parameters()
    }


class Walk:
    """One step: built, it has gone forward (z_chosen, z_rejected, weights, loss); iterated over, it goes back, and yields the gradients
    of each part of `parts_of`. The parameters of a part may be changed as soon as it is there."""

    def __init__(
        self,
        model: RewardModel,
        batches: Sequence[PairBatch],
        how: RewardObjective,
        recompute: str = "full",
        host: Host | None = None,
    ):
        trunk, self.model, self.recompute, self.host = model.trunk, model, recompute, host
        self.streams = [batch.stream.to(model.head.device) for batch in batches]
        self.rotations = [rotary_angles(trunk.c, stream.positions) for stream in self.streams]
        with torch.no_grad():
            chunks = [trunk.embed(stream) for stream in self.streams]  # (N, D) each
        self.kept = []  # per block: its leaves and, per chunk, what `_forward` keeps
        for block in trunk.blocks:
            leaves, kept = to_compute(block, trunk.compute_dtype), []
            for i, x in enumerate(chunks):
                chunks[i], keep = self._forward(block, leaves, x, i)
                kept.append(keep)
                if host:
                    host.part()
            self.kept.append((leaves if recompute != "full" else None, kept))
        last = torch.cat(
            [x.index_select(0, s.last) for x, s in zip(chunks, self.streams)]
        )  # (2B, D), all that the head sees
        del chunks
        self._head(
            last.detach().requires_grad_(),
            torch.cat([batch.source for batch in batches]).to(last.device),
            how,
        )

    def _call(self, block, leaves, x, i, value=True):
        return functional_call(block, leaves, (x, self.rotations[i], self.streams[i], value))

    def _forward(self, block, leaves, x, i):
        """A block's output for chunk i, without a graph, and what backward will need: x alone, or x and a graph."""
        if self.recompute == "full":
            keep = self.host.put(x) if self.host else x
            with torch.no_grad():
                return self._call(block, leaves, x, i), keep
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = run_block(
                lambda *given: functional_call(block, leaves, given),
                x,
                self.rotations[i],
                self.streams[i],
                self.recompute,
            )
        return y.detach(), (x, y)

    def _head(self, last, source, how):
        """Loss and weights over all pairs, and their gradient down to the last tokens."""
        leaves = to_compute(self.model.trunk.final_norm, torch.float32)
        head = self.model.head.detach().requires_grad_()
        z = functional_call(self.model.trunk.final_norm, leaves, (at_least_fp32(last),))  # (2B, D)
        loss, weights = how.loss(head, z[0::2], z[1::2], source)
        self.d_last, d_head, *d_norm = torch.autograd.grad(loss, [last, head, *leaves.values()])
        self.top = {"head": d_head} | dict(
            zip((f"trunk.final_norm.{name}" for name in leaves), d_norm)
        )
        self.result = z[0::2].detach(), z[1::2].detach(), weights, loss.detach()

    def __iter__(self) -> Iterator[Gradients]:
        trunk, d_last = (
            self.model.trunk,
            self.d_last.split([len(stream.last) for stream in self.streams]),
        )
        yield self.top
        d_chunks = [
            d.new_zeros(len(stream.tokens), d.shape[1]).index_copy_(0, stream.last, d)
            for d, stream in zip(d_last, self.streams)
        ]
        for b in reversed(range(len(trunk.blocks))):
            yield {
                f"trunk.blocks.{b}.{name}": g
                for name, g in self._block_gradients(trunk.blocks[b], d_chunks).items()
            }
        yield self._embedding_gradients(torch.cat(d_chunks))

    def _block_gradients(self, block, d_chunks) -> Gradients:
        """The block's gradient over all chunks; d_chunks: that of its outputs, becomes that of its inputs."""
        (leaves, kept), sums = self.kept.pop(), None
        leaves = leaves or to_compute(block, self.model.trunk.compute_dtype)
        for i in reversed(range(len(kept))):
            ahead = kept[-2] if len(kept) > 1 else self.kept[-1][1][-1] if self.kept else None
            x, y = self._again(block, leaves, kept.pop(), i, ahead)
            d_chunks[i], *gradients = torch.autograd.grad(y, [x, *leaves.values()], d_chunks[i])
            if sums is None:
                sums = (
                    gradients if not kept else [at_least_fp32(g) for g in gradients]
                )  # chunks are summed in fp32
            else:
                for total, g in zip(sums, gradients):
                    total.add_(g)
            del x, y, gradients
        return dict(zip(leaves, sums))

    def _again(self, block, leaves, keep, i, ahead):
        """The input and the output of a chunk with its graph, made again if it was not kept."""
        if self.recompute != "full":
            return keep
        if self.host:
            x = self.host.get(keep)
            self.host.fetch(ahead)  # on its way while this chunk is computed
        else:
            x = keep
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return x, self._call(block, leaves, x, i, value=False)

    def _embedding_gradients(self, dx) -> Gradients:
        """Once for all chunks: each separate call would make another dense (V, D) gradient."""
        trunk, dx = self.model.trunk, at_least_fp32(dx)
        tables = {
            "trunk.embedding.weight": (trunk.embedding, torch.cat([s.tokens for s in self.streams]))
        }
        if trunk.c.learned_positions:
            tables["trunk.position_embedding.weight"] = (
                trunk.position_embedding,
                torch.cat([s.positions for s in self.streams]) + trunk.c.position_offset,
            )
        return {
            name: torch.ops.aten.embedding_dense_backward(dx, index, len(table.weight), -1, False)
            for name, (table, index) in tables.items()
        }


class StreamedEngine:
    """Walks, and updates every part as soon as its gradient is there."""

    def __init__(self, model: RewardModel, optimizer: AdamW, recipe: Recipe):
        self.model, self.optimizer, self.recipe, self.parts = (
            model,
            optimizer,
            recipe,
            parts_of(model),
        )
        self.inputs, self.states = (
            Host(model.head.device) if what in recipe.offload else None
            for what in ("inputs", "states")
        )

    def step(
        self, pairs: Sequence[TokenPair], source: Sequence[int], how: RewardObjective
    ) -> StepResult:
        """One optimizer step on B pairs; source: the source of each. Raises NonFiniteLoss, or NonFiniteGradient after the walk."""
        walk = Walk(
            self.model,
            micro_batches(pairs, source, self.recipe.micro_tokens),
            how,
            self.recipe.recompute,
            self.inputs,
        )
        finite = torch.tensor(True, device=self.model.head.device)
        for i, gradients in enumerate(walk):
            self._fetch(i + 1)
            for name in self.parts[i]:
                finite &= largest(gradients[name]).isfinite()
                self._update(name, gradients.pop(name))
            if self.states:
                self.states.part()
        self.optimizer.steps += 1
        if not finite:  # asked once a step: every question makes a GPU wait
            raise NonFiniteGradient
        return walk.result

    def settle(self):
        """Wait until all states that are on their way to the host have arrived: before they are read there."""
        if self.states is not None:
            self.states.settle()

    def _update(self, name, gradient):
        p, home = self.model.get_parameter(name), self.optimizer.state[name]
        if self.states is None:
            self.optimizer.update(name, p, gradient)
            return
        state = {kind: self.states.get(tensor) for kind, tensor in home.items()}
        self.optimizer.update(name, p, gradient, state)
        for kind, tensor in state.items():
            self.states.put_back(tensor, home[kind])

    def _fetch(self, i):
        """Send for the states of the next part, which come while this one is updated and the next one's gradient is computed."""
        if self.states is not None and i < len(self.parts):
            for name in self.parts[i]:
                for tensor in self.optimizer.state[name].values():
                    self.states.fetch(tensor)


def open_engine(
    model: RewardModel, optimizer: AdamW, recipe: Recipe
) -> PlainEngine | StreamedEngine:
    """The engine that a recipe names; raises InputError for a recipe that contradicts itself."""
    recipe.check()
    return (PlainEngine if recipe.engine == "plain" else StreamedEngine)(model, optimizer, recipe)
