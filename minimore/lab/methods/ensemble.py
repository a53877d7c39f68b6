"""Pairwise-calibrated ensembles: as many heads prefer a response as annotators do.

arXiv 2506.06298: pairwise calibration, and an ensemble grown head by head (forward stagewise
additive modelling). Of the paper its abstract and summaries of its method could be read, not its
equations: that a head's vote is softened to a sigmoid while it learns is ours.

N pairs, D width, M heads.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .solve import Parameters, solve
from .states import StatePairs


def grown(parameters: Parameters, share: Tensor | None, pairs: StatePairs) -> Tensor:
    """The share with a further head of weight a: (1 - a) share + a σ(w · difference), (N,).

    parameters: head (D,), and a weight () with a = σ(weight). The first head has no weight, and
    makes the share by itself.
    """
    votes = (pairs.difference @ parameters["head"]).sigmoid()
    if share is None:
        return votes
    a = parameters["weight"].sigmoid()
    return (1 - a) * share + a * votes


@dataclass(frozen=True)
class CalibratedEnsemble:
    """Heads whose weighted share of votes is to match the annotators' share.

    Each pair is one vote. Its squared distance from the share is least, in the mean, where the
    share is that of the annotators. The source is not used, as in the paper. heads: M.
    """

    heads: int = 4

    def loss(self, parameters: Parameters, share: Tensor | None, pairs: StatePairs) -> Tensor:
        """Mean squared distance of the grown share from the vote, which is 1: ()."""
        return (1 - grown(parameters, share, pairs)).square().mean()

    def fit(self, train: StatePairs, seed: int) -> Parameters:
        """heads: (M, D); weights: (M,), which sum to 1. Those before it stay while one grows."""
        random, width = torch.Generator().manual_seed(seed), train.chosen.shape[1]
        drawn = torch.randn(self.heads, width, generator=random).to(train.chosen) / width**0.5
        first = solve(partial(self.loss, share=None, pairs=train), {"head": drawn[0]})
        heads, weights = [first["head"]], train.chosen.new_ones(1)
        share = grown(first, None, train)
        for head in drawn[1:]:
            start = {"head": head, "weight": train.chosen.new_zeros(())}
            further = solve(partial(self.loss, share=share, pairs=train), start)
            share, a = grown(further, share, train), further["weight"].sigmoid()
            heads, weights = [*heads, further["head"]], torch.cat([(1 - a) * weights, a[None]])
        return {"heads": torch.stack(heads), "weights": weights}

    def margins(self, parameters: Parameters, pairs: StatePairs, knows_source: bool) -> Tensor:
        """The log-odds of the share, each head's vote softened."""
        votes, weights = pairs.difference @ parameters["heads"].T, parameters["weights"].log()
        return (F.logsigmoid(votes) + weights).logsumexp(1) - (
            F.logsigmoid(-votes) + weights
        ).logsumexp(1)
