"""Mean-and-variance rewards: a response is not worth a number, but a normal distribution.

Distributional preference learning, arXiv 2312.08358: where annotators disagree about a response,
its variance says so. Checked against the authors' code; the numbers of its equations could not be.

N pairs, D width.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

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

    It has no use for the source. Differs from the authors' code: Φ itself, where they take
    σ(√(2π) z), which is steeper (its slope at 0 is .63, that of Φ .40); no penalty on variances.
    """

    def loss(self, parameters: Parameters, pairs: StatePairs) -> Tensor:
        """mean_b -log Φ(...): ()."""
        return -torch.special.log_ndtr(standardised(parameters, pairs)).mean()

    def fit(self, train: StatePairs, seed: int) -> Parameters:
        """mean, deviation: (D,); offset: ()."""
        width = train.chosen.shape[1]
        start = {name: train.chosen.new_zeros(width) for name in ("mean", "deviation")}
        start["offset"] = train.chosen.new_zeros(())
        return solve(partial(self.loss, pairs=train), start)

    def margins(self, parameters: Parameters, pairs: StatePairs, knows_source: bool) -> Tensor:
        """The log-odds of Φ."""
        z = standardised(parameters, pairs)
        return torch.special.log_ndtr(z) - torch.special.log_ndtr(-z)
