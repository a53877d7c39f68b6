"""Mean-and-variance rewards: a response is not worth a number, but a normal distribution.

Distributional preference learning, arXiv 2312.08358: where annotators disagree about a response,
its variance says so. Checked against the authors' code; the numbers of its equations could not be.

N pairs, D width.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ...more import pair_losses
from .solve import Parameters, solve
from .states import StatePairs


def standardised(parameters: Parameters, pairs: StatePairs) -> Tensor:
    """(μ_chosen - μ_rejected) / √(σ²_chosen + σ²_rejected): (N,).

    μ = mean · z and σ = softplus(deviation · z + offset), as in the authors' code.
    """
    mean = pairs.difference @ parameters["mean"]
    chosen, rejected = (
        F.softplus(z @ parameters["deviation"] + parameters["offset"])
        for z in (pairs.chosen, pairs.rejected)
    )
    return mean / (chosen.square() + rejected.square()).sqrt()


@dataclass(frozen=True)
class MeanVariance:
    """P(chosen is better) = Φ(standardised difference): both rewards are drawn, independently.

    As in the authors' code, σ(√(2π) z) stands for Φ(z). It is steeper (its slope at 0 is .63, that
    of Φ .40) and has longer tails, without which a few texts of a tiny variance would decide the
    loss. Equal variances are Bradley-Terry. It has no use for the source.
    """

    def loss(self, parameters: Parameters, pairs: StatePairs) -> Tensor:
        """mean_b -log σ(√(2π) z_b): ()."""
        return pair_losses(self.margins(parameters, pairs, False)).mean()

    def fit(self, train: StatePairs, seed: int) -> Parameters:
        """mean, deviation: (D,); offset: ()."""
        width = train.chosen.shape[1]
        start = {name: train.chosen.new_zeros(width) for name in ("mean", "deviation")}
        start["offset"] = train.chosen.new_zeros(())
        return solve(partial(self.loss, pairs=train), start)

    def margins(self, parameters: Parameters, pairs: StatePairs, knows_source: bool) -> Tensor:
        """√(2π) z."""
        return math.sqrt(2 * math.pi) * standardised(parameters, pairs)
