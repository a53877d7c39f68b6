"""Empirical Bayes: every source has its own head, drawn towards what all have in common.

How strongly is not chosen but learned: the heads of sources are taken as normal around the shared
one, and the spread that makes the data likeliest wins. Source: Efron and Morris 1973 for the idea;
MacKay 1992 for the evidence by Laplace's approximation.

K sources, N pairs, D width.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...more import pair_losses
from .heads import SharedHead
from .solve import PRIOR, Parameters, penalty, solve
from .states import StatePairs, of_no_source, of_own_source

SPREADS = tuple(2.0**power for power in range(-5, 2))  # of sources' heads around the shared one
FOLDS = 5


def heads_of(parameters: Parameters) -> Tensor:
    """w_k = shared + offset_k: (K, D)."""
    return parameters["shared"] + parameters["offsets"]


def shrunk_loss(parameters: Parameters, spread: float, pairs: StatePairs) -> Tensor:
    """Minus the log posterior of all heads, divided by N, but for a constant: ().

    [Σ_b -log σ(w_k · difference_b) + Σ_k |offset_k|² / (2 spread²)] / N + PRIOR |shared|² / 2
    """
    margins = pairs.difference @ heads_of(parameters).T  # (N, K)
    losses = pair_losses(of_own_source(margins, pairs.source))
    offsets = penalty(parameters["offsets"], 1 / spread**2) / len(losses)
    return losses.mean() + offsets + penalty(parameters["shared"], PRIOR)


def log_evidence(parameters: Parameters, spread: float, pairs: StatePairs) -> float:
    """Log-likelihood of the spread, the offsets integrated out by Laplace's approximation.

    -N shrunk_loss - 1/2 Σ_k log det(I + spread² H_k)    H_k = Σ_b p (1 - p) difference differenceᵀ

    H_k is the curvature of source k's loss. The shared head is taken as known.
    """
    evidence = -len(pairs.chosen) * shrunk_loss(parameters, spread, pairs)
    for k, head in enumerate(heads_of(parameters)):
        own = pairs.difference[pairs.source == k]
        p = (own @ head).sigmoid()
        curvature = (own * (p * (1 - p))[:, None]).T @ own
        evidence -= torch.eye(len(head)).to(head).add(spread**2 * curvature).logdet() / 2
    return float(evidence)


@dataclass(frozen=True)
class Shrinkage:
    """Heads of sources around a shared one, at the likeliest of some spreads.

    A small spread is the shared head, a large one gives each source its own.
    """

    spreads: tuple[float, ...] = SPREADS

    def fit(self, train: StatePairs, seed: int) -> Parameters:
        """heads: (K, D); shared: (D,); spread: ()."""
        width = train.chosen.shape[1]
        parameters = {
            "shared": train.chosen.new_zeros(width),
            "offsets": train.chosen.new_zeros(train.sources, width),
        }
        tries = []
        for spread in self.spreads:
            loss = partial(shrunk_loss, spread=spread, pairs=train)
            parameters = solve(loss, parameters, prior=0)
            tries.append((log_evidence(parameters, spread, train), spread, parameters))
        _, spread, parameters = max(tries, key=lambda result: result[0])
        return {
            "heads": heads_of(parameters),
            "shared": parameters["shared"],
            "spread": train.chosen.new_tensor(spread),
        }

    def margins(self, parameters: Parameters, pairs: StatePairs, knows_source: bool) -> Tensor:
        """By the head of its source, or by the mean probability of all."""
        margins = pairs.difference @ parameters["heads"].T  # (N, K)
        return of_own_source(margins, pairs.source) if knows_source else of_no_source(margins)


@dataclass(frozen=True)
class Temperatures:
    """The control that costs nothing: one shared head, and a temperature for each source.

    An inverse temperature is a head on one number, the margin, so `Shrinkage` draws those of all
    sources together. It may be negative: a source that wants the opposite is read backwards. The
    margins on which temperatures are fitted come from heads that did not see their pairs.
    """

    def fit(self, train: StatePairs, seed: int) -> Parameters:
        """head: (D,); inverse: (K,), one over each temperature."""
        shared, fold = SharedHead(), torch.arange(len(train.chosen)) % FOLDS
        margins = train.chosen.new_zeros(len(train.chosen))
        for i in range(FOLDS):
            others, own = train.at(fold != i), train.at(fold == i)
            margins[fold == i] = shared.margins(shared.fit(others, seed), own, False)
        as_states = replace(
            train, chosen=margins[:, None], rejected=torch.zeros_like(margins[:, None])
        )
        inverse = Shrinkage().fit(as_states, seed)["heads"][:, 0]
        return shared.fit(train, seed) | {"inverse": inverse}

    def margins(self, parameters: Parameters, pairs: StatePairs, knows_source: bool) -> Tensor:
        """Divided by the temperature of its source, or by the mean probability of all."""
        margins = (pairs.difference @ parameters["head"])[:, None] * parameters["inverse"]  # (N, K)
        return of_own_source(margins, pairs.source) if knows_source else of_no_source(margins)
