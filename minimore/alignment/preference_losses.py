"""Policies without a reward model: four losses that learn a policy from preference pairs at once.

All of them look at a response y to a prompt x through its implicit reward, which is how much more
likely the policy finds it than a fixed reference does:

    r(x, y) = β (log π(y|x) - log π_ref(y|x))        arXiv 2305.18290, Eq. 5, but for a
                                                     term of x alone, which no comparison sees

    DPO     the chosen response has the higher implicit reward
    MRPO    the same with several references, which are merged into one
    BAPO    DPO, and a response of the reference itself is to stay as likely as it was
    SPO     DPO, and a response of which words were removed is to be worth less, the more so the
            more of them were removed

Every function is pure. Columns of `policy` and `reference` are log-probabilities of whole
responses, in nats: the chosen one, the rejected one, and then those that a loss adds.

B pairs, S responses of a pair, R references.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("dpo", "mrpo", "bapo", "spo")
CHOSEN, REJECTED, ADDED = 0, 1, 2  # the columns


def implicit_rewards(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """r = β (log π - log π_ref), as drawn above.

    policy, reference: log-probabilities of responses (B, S). Returns (B, S).

    >>> implicit_rewards(torch.tensor([[-1.0, -4.0]]), torch.tensor([[-2.0, -2.0]]), beta=0.5)
    tensor([[ 0.5000, -1.0000]])
    """
    return beta * (policy - reference)


def implicit_margins(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The implicit reward of the chosen response minus that of the rejected one: (B,).

    σ(margin) is the probability with which the policy, as a reward model, expects the preference.
    """
    rewards = implicit_rewards(policy, reference, beta)
    return rewards[:, CHOSEN] - rewards[:, REJECTED]


def dpo_losses(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation: the Bradley-Terry loss of the implicit rewards.

    L = -log σ(r(x, y_chosen) - r(x, y_rejected))

    policy, reference: (B, S), of which the first two columns are read. Returns (B,), nats. Source:
    Rafailov et al. 2023, arXiv 2305.18290, Eq. 7.

    >>> dpo_losses(torch.tensor([[-1.0, -4.0]]), torch.tensor([[-2.0, -2.0]]), beta=0.5)
    tensor([0.2014])
    """
    return -F.logsigmoid(implicit_margins(policy, reference, beta))  # 2305.18290, Eq. 7


def mrpo_losses(
    policy: Tensor, references: Tensor, beta: float, clip: float | None = None
) -> Tensor:
    """Multi-reference preference optimisation: DPO against one reference merged from several.

    references: (R, B, S); see `merged_reference`. With one reference it is DPO. Source: Le et al.
    2024, arXiv 2405.16388.
    """
    return dpo_losses(policy, merged_reference(references, clip), beta)


def merged_reference(references: Tensor, clip: float | None = None) -> Tensor:
    """Several references as one, their harmonic mean: log π_ref = -log Σ_k α_k / π_k, α_k = 1/R.

    It belongs to a lower bound of the mean reward less β Σ_k α_k KL(π | π_k), and so has the closed
    form of DPO. (The geometric mean would belong to that objective itself.) A response that one
    reference finds very unlikely is unlikely for the harmonic mean, too. So with a clip ε every
    other reference may differ from the first one by the share ε at most:

        log π_k <- log π_k clipped to (1 ± ε) log π_1

    references: log-probabilities (R, B, S), at most 0. Returns (B, S).

    Source: arXiv 2405.16388; the form of both equations was checked against the authors' code
    (thaihungle/MRPO, trainer_mref.py), the numbers of the equations could not be. Differs from it:
    the α are equal and do not follow how well each reference tells the two responses apart, and ε
    is the same for chosen and rejected responses.

    >>> merged_reference(torch.tensor([[[0.25]], [[0.75]]]).log()).exp()
    tensor([[0.3750]])
    """
    if clip is not None:
        first = references[0]
        references = references.clamp((1 + clip) * first, (1 - clip) * first)
    return math.log(len(references)) - torch.logsumexp(-references, dim=0)


def bapo_losses(policy: Tensor, reference: Tensor, beta: float, anchor: float) -> Tensor:
    """Base-anchored preference optimisation: DPO with a price for forgetting.

    L = L_DPO + anchor · max(0, -r(x, y_base))

    y_base is a response that the reference wrote to the prompt itself. It may become more likely,
    and costs nothing then. policy, reference: (B, 3), the third column being y_base. Returns (B,).
    With anchor = 0 it is DPO.

    Source: Lee et al. 2024, arXiv 2407.00693. Of it we could read the abstract and reviews only,
    which say: a loss that keeps the likelihood of the reference's own response at what it was. That
    it is one-sided, linear, added to the loss of DPO and measured by the implicit reward is ours.
    """
    base = implicit_rewards(policy, reference, beta)[:, ADDED]
    return dpo_losses(policy, reference, beta) + anchor * F.relu(-base)


def spo_losses(policy: Tensor, reference: Tensor, beta: float, degree: float) -> Tensor:
    """Self-supervised preference optimisation: DPO, and a loss on the degree of preference.

    L = L_DPO + degree · 1/J Σ_j -log σ(r(x, y_j) - r(x, y_j+1)),    j = 0 ... J - 1

    y_0 is the chosen response, and y_1 ... y_J are the same with more and more of it removed: their
    order is known without a label. policy, reference: (B, 2 + J), J >= 1, the columns being y_0,
    the rejected response, y_1 ... y_J. Returns (B,). With degree = 0 it is DPO.

    Source: Li et al. 2024, arXiv 2409.17791. Of it we could read the abstract only, which says: a
    self-supervised loss on the degree of preference, added to that of the alignment. That the
    degree is told by the order of implicit rewards, and no classifier is trained, is ours.
    """
    rewards = implicit_rewards(policy, reference, beta)
    by_degree = torch.cat([rewards[:, :1], rewards[:, ADDED:]], dim=1)  # (B, 1 + J)
    steps = by_degree[:, :-1] - by_degree[:, 1:]  # (B, J)
    return dpo_losses(policy, reference, beta) - degree * F.logsigmoid(steps).mean(1)


@dataclass(frozen=True)
class PreferenceLoss:
    """One of LOSSES with its strengths; all of them behind the same two verbs.

    beta: of the implicit rewards. clip: of MRPO; anchor: of BAPO; degree: of SPO.
    """

    name: str
    beta: float
    clip: float | None = None
    anchor: float = 0.1
    degree: float = 1.0

    def losses(self, policy: Tensor, references: Tensor) -> Tensor:
        """The loss of each pair (B,), from (B, S) and (R, B, S); R is 1 but for MRPO."""
        if self.name == "mrpo":
            return mrpo_losses(policy, references, self.beta, self.clip)
        (reference,) = references
        if self.name == "bapo":
            return bapo_losses(policy, reference, self.beta, self.anchor)
        if self.name == "spo":
            return spo_losses(policy, reference, self.beta, self.degree)
        return dpo_losses(policy, reference, self.beta)

    def margins(self, policy: Tensor, references: Tensor) -> Tensor:
        """The implicit margin of each pair (B,), from (B, S) and (R, B, S)."""
        reference = merged_reference(references, self.clip)
        return implicit_margins(policy, reference, self.beta)
