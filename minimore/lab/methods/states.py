"""Pairs as frozen states, and what is done with them everywhere. Pure functions.

K sources, N pairs, D width of a state, E width of a prompt's state.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StatePairs:
    """N pairs as the states of their texts, all of one floating type.

    chosen, rejected: (N, D). source: (N,) integers in [0, sources). sources: K, absent ones
    counted. prompt: (N, E) states of the prompts, or nothing where they are not known.
    """

    chosen: Tensor
    rejected: Tensor
    source: Tensor
    sources: int
    prompt: Tensor | None = None

    @cached_property
    def difference(self) -> Tensor:
        """The chosen state minus the rejected one: (N, D)."""
        return self.chosen - self.rejected

    def at(self, places: Tensor) -> "StatePairs":
        """The pairs at some places: indices, or a mask (N,)."""
        prompt = None if self.prompt is None else self.prompt[places]
        return StatePairs(
            self.chosen[places], self.rejected[places], self.source[places], self.sources, prompt
        )


def of_own_source(margins: Tensor, source: Tensor) -> Tensor:
    """Of margins by every source (N, K), each pair's own: (N,)."""
    return margins.gather(1, source[:, None])[:, 0]


def of_no_source(margins: Tensor) -> Tensor:
    """The margin when nobody says which source a pair is of.

        log p / (1 - p)    with p = mean_k σ(m_k)

    margins: by every source, (N, K) -> (N,). All sources are as likely. In logarithms, so that no
    probability is rounded to 0 or 1.
    """
    chosen = torch.nn.functional.logsigmoid(margins).logsumexp(1)
    rejected = torch.nn.functional.logsigmoid(-margins).logsumexp(1)
    return chosen - rejected
