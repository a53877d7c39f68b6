"""MaxMin-RLHF: groups of sources that nobody named, and a head that is fair to the worst of them.

arXiv 2402.08925, algorithm 2 (rewards by expectation-maximisation) and its MaxMin objective. The
numbers of its equations could not be checked, so the algorithm is cited by its number alone.

K sources, U groups, N pairs, D width.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...more import pair_losses
from .solve import PRIOR, Parameters, penalty, solve
from .states import StatePairs, of_own_source

SHARPNESS = 100.0  # of the soft maximum: it is above the maximum by at most log U / 100


def expectation(heads: Tensor, pairs: StatePairs) -> Tensor:
    """The group that explains all pairs of a source best: (K,) integers.

        u_k = argmax_u Π_{b of k} σ(w_u · (z_chosen_b - z_rejected_b))

    heads: (U, D). Source: algorithm 2, E-step; it assigns users, who are the sources here.
    """
    losses = pair_losses(pairs.difference @ heads.T)  # (N, U)
    sums = losses.new_zeros(pairs.sources, len(heads)).index_add(0, pairs.source, losses)
    return sums.argmin(1)


def mixture_loss(parameters: Parameters, groups: Tensor, pairs: StatePairs) -> Tensor:
    """Minus the mean log-likelihood of all pairs, each by the head of its source's group: ().

    parameters: heads (U, D). groups: of each source, (K,). Source: algorithm 2, M-step.
    """
    margins = pairs.difference @ parameters["heads"].T  # (N, U)
    return pair_losses(of_own_source(margins, groups[pairs.source])).mean()


def group_losses(head: Tensor, groups: Tensor, pairs: StatePairs) -> Tensor:
    """Mean loss of one head (D,) in every group that has pairs: (at most U,)."""
    losses, group = pair_losses(pairs.difference @ head), groups[pairs.source]  # (N,), (N,)
    return torch.stack([losses[group == u].mean() for u in group.unique()])


def worst_loss(parameters: Parameters, groups: Tensor, pairs: StatePairs) -> Tensor:
    """A soft maximum of the groups' losses: log Σ_u exp(s L_u) / s, with s = SHARPNESS: ().

    Source: the paper's MaxMin objective, max_π min_u E r_u. Differs: there a policy is as good as
    it can be for the worst group, here a reward is.
    """
    losses = group_losses(parameters["head"], groups, pairs)
    return (SHARPNESS * losses).logsumexp(0) / SHARPNESS


@dataclass(frozen=True)
class MaxMin:
    """Groups by hard expectation-maximisation, then one head for the worst-off group.

    A pair whose source is known gets the head of its group, another pair the fair head. groups: U.
    restarts: from random groups; the likeliest wins. Where nobody knows the sources, give every
    pair a source of its own; opposite halves then explain any pair by half, and cannot be told
    apart.
    """

    groups: int = 2
    rounds: int = 30
    restarts: int = 4
    prior: float = PRIOR

    def mixture(self, train: StatePairs, seed: int) -> tuple[Parameters, Tensor, list[float]]:
        """Heads (U, D), groups (K,), and a list: the penalised log-likelihood per pair, by round.

        It never falls: each step raises it, or leaves it.
        """
        random = torch.Generator().manual_seed(seed)
        groups = torch.randint(self.groups, (train.sources,), generator=random)
        heads: Parameters = {"heads": train.chosen.new_zeros(self.groups, train.chosen.shape[1])}
        likelihoods: list[float] = []
        for _ in range(self.rounds):
            loss = partial(mixture_loss, groups=groups, pairs=train)
            heads = solve(loss, heads, self.prior)
            likelihoods.append(-float(loss(heads) + penalty(heads["heads"], self.prior)))
            groups_before = groups
            groups = expectation(heads["heads"], train)  # E-step; `solve` above is the M-step
            if torch.equal(groups, groups_before):
                break
        return heads, groups, likelihoods

    def fit(self, train: StatePairs, seed: int) -> Parameters:
        """heads: (U, D); groups: (K,); head: (D,), the fair one."""
        tries = [self.mixture(train, self.restarts * seed + i) for i in range(self.restarts)]
        heads, groups, _ = max(tries, key=lambda result: result[2][-1])
        start = {"head": heads["heads"].mean(0)}
        fair = solve(partial(worst_loss, groups=groups, pairs=train), start, self.prior)
        return {"heads": heads["heads"], "groups": groups, "head": fair["head"]}

    def margins(self, parameters: Parameters, pairs: StatePairs, knows_source: bool) -> Tensor:
        """By the head of the source's group, or by the fair one."""
        if not knows_source:
            return pairs.difference @ parameters["head"]
        margins = pairs.difference @ parameters["heads"].T  # (N, U)
        return of_own_source(margins, parameters["groups"][pairs.source])
