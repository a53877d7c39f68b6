"""MORE over all parameters: the weights λ from the gradients of the whole model.

The paper takes the gradient of the reward head for that of the model (Eq. 8). Here g_k is the
gradient of the loss L_k of source k in all parameters. The weights need no more of them than

    G_ij = g_i · g_j = Σ over the parts of the model  (g_i of the part) · (g_j of the part)

so a first walk backward adds up G part by part, and drops every gradient when it has been used. No
more than K gradients of one block exist at a time. Then the weights are known, and a second walk is
that of a streamed step:

    forward            1    as in StreamedStep
    first walk         3    compute a block again, and backward through it, with L_1 + ... + L_K
    weights                 λ from G
    second walk        3    the same with λ_1 L_1 + ... + λ_K L_K; every part is updated

in forward passes. A plain step with full recomputation takes 4, so this is 1.75 of it at most. One
backward pass serves all sources, because a micro-batch holds pairs of one source alone: what it
adds to the gradient of L_1 + ... + L_K is its part of g_k.

K sources, M tokens that are read, U tokens that differ, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.pairs import PairBatch
from ..model.checkpoint import Checkpoint
from ..model.rotation import at_least_fp32
from .objective import RewardObjective, Weigh
from .sizes import count, parameter_shapes
from .streamed import Gradients, StreamedEngine, StreamedStep, add_to

AT_ONCE = 1 << 22  # numbers of a gradient that are multiplied at once, in float64


class WholeModelStep(StreamedStep):
    """A streamed step whose weights come from the gradients of all parameters.

    The objective is a RewardObjective with `over_all`. Blocks are computed again as a whole.
    """

    objective: RewardObjective
    batches: Sequence[PairBatch]

    def _top_forward(self, read: Tensor) -> Any:
        """Walk backward once for the weights; then go on with them as a streamed step does.

        read: (M, D), what the last block returned at the tokens that the objective reads.
        """
        rows = rows_with_products(self._products(read))
        with self._weighing(partial(weigh_rows, self.objective.weigh, rows)):
            return super()._top_forward(read)

    @contextmanager
    def _weighing(self, weigh: Weigh) -> Iterator[None]:
        """Let the objective take its weights from another function, as long as this lasts."""
        objective = self.objective
        self.objective = replace(objective, weigh=weigh)
        try:
            yield
        finally:
            self.objective = objective

    # ---- the first walk ----

    def _products(self, read: Tensor) -> Tensor:
        """G (K, K), float64: the products of the sources' gradients in all parameters.

        A source without a pair has a gradient of zero.
        """
        self.source_of_batch = [int(batch.source[0]) for batch in self.batches]
        products, d_read = self._products_of_top(read)
        d_activations = self._gradient_of_output(d_read)
        inputs = list(self.inputs.stack)  # this walk takes them off the stack
        for number in reversed(range(len(self.blocks))):
            products += self._products_of_block(number, d_activations)
        self.inputs.stack = inputs  # and the second walk needs them again
        return products + self._products_of_embeddings(d_activations)

    def _products_of_top(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """The products at head and final norm, and d_read: (M, D), ∂(L_1 + ... + L_K) / ∂read.

        The head is small, so every source that has pairs goes through it on its own.
        """
        by_source = self._no_gradients()
        d_read = torch.zeros_like(read)
        for k in sorted(set(self.source_of_batch)):
            with self._weighing(partial(weigh_only, k)):
                super()._top_forward(read)
            by_source[k] = self._take_gradient_of_top()
            assert self.d_read is not None  # all blocks are trained
            d_read += self.d_read  # ∂L_k / ∂read, which is zero in the rows of other sources
        return products_of(by_source), d_read

    def _no_gradients(self) -> list[Gradients]:
        """Room for the gradients of each source, in which there are none yet."""
        return [{} for _ in range(self.objective.sources)]

    def _products_of_block(self, number: int, d_activations: list[Tensor]) -> Tensor:
        """The products at a block; d_activations become the gradients of its inputs."""
        by_source = self._no_gradients()
        for i, gradients in self._block_gradients(number, d_activations):
            add_to(by_source[self.source_of_batch[i]], gradients, several=True)
        return products_of(by_source)

    def _products_of_embeddings(self, d_activations: list[Tensor]) -> Tensor:
        """The products at the embeddings; d_activations: (N, D) of every micro-batch."""
        if self.trunk.c.embedding_scale != 1:
            d_activations = [d * self.trunk.embedding_scale for d in d_activations]
        streams = [part.stream for part in self.micro_batches]
        products = self._products_of_table(d_activations, [s.tokens for s in streams])
        if self.trunk.c.learned_positions:
            products += self._products_of_table(d_activations, [s.positions for s in streams])
        return products

    def _products_of_table(self, d_rows: list[Tensor], indices: list[Tensor]) -> Tensor:
        """The products at a table, of which micro-batch i read the rows indices[i] (N,).

        A step reads few rows of a table. The gradient of any other row is zero, so only the U rows
        that were read are computed.
        """
        rows_read, places = torch.cat(indices).unique(return_inverse=True)  # (U,), (all N,)
        places_of_batch = places.split([len(index) for index in indices])
        by_source = self._no_gradients()
        for k, d_batch, own_places in zip(self.source_of_batch, d_rows, places_of_batch):
            d = at_least_fp32(d_batch)
            gradient = d.new_zeros(len(rows_read), d.shape[1]).index_add_(0, own_places, d)
            add_to(by_source[k], {"table": gradient}, several=True)
        return products_of(by_source)


class WholeModelEngine(StreamedEngine):
    """Takes streamed steps with weights from the gradients of all parameters."""

    step_class = WholeModelStep


def whole_model_bytes(checkpoint: Checkpoint, sources: int) -> int:
    """Bytes that such a step takes besides: the gradients of a block, fp32, once a source."""
    return 4 * sources * count(parameter_shapes(checkpoint.config).block)


# ---- from gradients to weights -------------------------------------------------------------------


# Both are called as an objective calls its `weigh`, with losses (K,), head gradients (K, D), pairs
# (K,), once their first arguments are fixed. Neither looks at the gradients of the head.


def weigh_only(k: int, losses: Tensor, head_gradients: Tensor, pairs: Tensor) -> Tensor:
    """Weights (K,) that are 1 for source k and 0 for all others."""
    weights = torch.zeros_like(losses.detach())
    weights[k] = 1
    return weights


def weigh_rows(
    weigh: Weigh, rows: Tensor, losses: Tensor, head_gradients: Tensor, pairs: Tensor
) -> Tensor:
    """The weights (K,) that `weigh` solves, with rows (K, K) in place of the head's gradients."""
    return weigh(losses, rows, pairs)


def products_of(by_source: Sequence[Gradients]) -> Tensor:
    """The products (K, K), float64, of the sources' gradients; those of a source without are 0."""
    K = len(by_source)
    present = [k for k in range(K) if by_source[k]]  # the sources that have a gradient
    names = list(by_source[present[0]])
    device = by_source[present[0]][names[0]].device
    products = torch.zeros(K, K, dtype=torch.float64, device=device)
    places = torch.tensor(present, device=device)
    for name in names:
        portions = [by_source[k][name].flatten().split(AT_ONCE) for k in present]
        for portion_of_each in zip(*portions):
            rows = torch.stack(portion_of_each).double()  # (sources that are present, numbers)
            products[places[:, None], places] += rows @ rows.T
    return products


def rows_with_products(products: Tensor) -> Tensor:
    """Rows R (K, K) with R Rᵀ = G, which stand for the gradients wherever only products count.

    G = V diag(e) Vᵀ with e >= 0, so R = V diag(√e).
    """
    e, V = torch.linalg.eigh(products)
    return V * e.clamp_min(0).sqrt()
