"""Linear heads: one for all sources, or one for each. They are the two ends of all that follows.

K sources, N pairs, D width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from ...more import pair_losses
from .solve import Parameters, solve
from .states import StatePairs, of_no_source, of_own_source


class Method(Protocol):
    """A way to answer preferences of several sources, on frozen states.

        parameters = method.fit(train, seed)                 whatever it learns, by name
        m = method.margins(parameters, test, knows_source)   P(chosen is better) = σ(m)

    A new method is a class with these two, and a name in `by_name.METHODS`.
    """

    def fit(self, train: StatePairs, seed: int) -> Parameters:
        """What is learned from the pairs. A seed only matters where a start is drawn."""
        ...

    def margins(self, parameters: Parameters, pairs: StatePairs, knows_source: bool) -> Tensor:
        """The log-odds that each chosen response is preferred: (N,).

        knows_source: `pairs.source` may be used. A method that has no use for it ignores it.
        """
        ...


@dataclass(frozen=True)
class SharedHead:
    """Bradley-Terry on everything: one head, and every pair counts the same.

    L = mean_b -log σ(w · (z_chosen - z_rejected)). Source: arXiv 2312.07401v5, Eq. 1, MultiTask.
    """

    def loss(self, parameters: Parameters, pairs: StatePairs) -> Tensor:
        """The mean loss of all pairs: ()."""
        return pair_losses(pairs.difference @ parameters["head"]).mean()  # Eq. 1

    def fit(self, train: StatePairs, seed: int) -> Parameters:
        """head: (D,)."""
        start = {"head": train.chosen.new_zeros(train.chosen.shape[1])}
        return solve(partial(self.loss, pairs=train), start)

    def margins(self, parameters: Parameters, pairs: StatePairs, knows_source: bool) -> Tensor:
        """The same for every source."""
        return pairs.difference @ parameters["head"]


@dataclass(frozen=True)
class OwnHeads:
    """A head for each source, which learns from its pairs alone: nothing is shared."""

    def loss(self, parameters: Parameters, pairs: StatePairs) -> Tensor:
        """The mean loss of all pairs, each by the head of its source: ()."""
        margins = pairs.difference @ parameters["heads"].T  # (N, K)
        return pair_losses(of_own_source(margins, pairs.source)).mean()

    def fit(self, train: StatePairs, seed: int) -> Parameters:
        """heads: (K, D)."""
        start = {"heads": train.chosen.new_zeros(train.sources, train.chosen.shape[1])}
        return solve(partial(self.loss, pairs=train), start)

    def margins(self, parameters: Parameters, pairs: StatePairs, knows_source: bool) -> Tensor:
        """By the head of its source, or by the mean probability of all heads."""
        margins = pairs.difference @ parameters["heads"].T  # (N, K)
        return of_own_source(margins, pairs.source) if knows_source else of_no_source(margins)
