"""Prototypes: a source's taste is a point, and a response is worth its nearness to it.

PAL, arXiv 2406.08469, its model A: the point of a source is a mixture of a few points that all
sources share. Checked against the authors' code; the numbers of its equations could not be.

K sources, N pairs, D width, P points, d width of the space in which they lie.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...more import pair_losses
from .solve import Parameters, solve
from .states import StatePairs, of_no_source, of_own_source


def nearness(parameters: Parameters, pairs: StatePairs) -> Tensor:
    """How much nearer the chosen response is to every source's point, (N, K):

        |f(z_rejected) - a_k| - |f(z_chosen) - a_k|    with a_k = Σ_p softmax(weights_k)_p point_p

    f is linear. Differs from the authors' code, which has several layers for f, and offers an angle
    in place of the distance.
    """
    ideal = parameters["weights"].softmax(1) @ parameters["points"]  # (K, d)
    chosen, rejected = (
        torch.cdist(z @ parameters["map"].T, ideal, compute_mode="donot_use_mm_for_euclid_dist")
        for z in (pairs.chosen, pairs.rejected)
    )
    return rejected - chosen


@dataclass(frozen=True)
class Prototypes:
    """A few ideal points, and the share of each in every source.

    A pair of no known source gets the mean probability of all. Differs: the paper fits the shares
    of a new user to a few pairs of theirs.
    """

    points: int = 3
    dimensions: int = 8

    def start(self, train: StatePairs, seed: int) -> Parameters:
        """map: (d, D); points: (P, d); weights: (K, P). Drawn, since all zeros would stay so."""
        random, width = torch.Generator().manual_seed(seed), train.chosen.shape[1]
        shapes = {
            "map": (self.dimensions, width),
            "points": (self.points, self.dimensions),
            "weights": (train.sources, self.points),
        }
        scales = {"map": width**-0.5, "points": 1.0, "weights": 1.0}
        return {
            name: scales[name] * torch.randn(shape, generator=random, dtype=train.chosen.dtype)
            for name, shape in shapes.items()
        }

    def loss(self, parameters: Parameters, pairs: StatePairs) -> Tensor:
        """The mean loss of all pairs, each by the point of its source: ()."""
        return pair_losses(of_own_source(nearness(parameters, pairs), pairs.source)).mean()

    def fit(self, train: StatePairs, seed: int) -> Parameters:
        """map, points and weights, as `start` makes them."""
        return solve(partial(self.loss, pairs=train), self.start(train, seed))

    def margins(self, parameters: Parameters, pairs: StatePairs, knows_source: bool) -> Tensor:
        """By the point of its source, or by the mean probability of all."""
        margins = nearness(parameters, pairs)  # (N, K)
        return of_own_source(margins, pairs.source) if knows_source else of_no_source(margins)
