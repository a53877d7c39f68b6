"""MORE, multi-objective reward learning: the paper in one file.

"On Diversified Preferences of Large Language Model Alignment", arXiv 2312.07401v5. The reward of a
response is r = head . z, with z the final hidden state of its last token and head one bias-free
linear layer. Every function is pure.

K sources, B pairs, D width.
"""

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .votes import Labels, labelled_losses, labelled_slopes

MOST_SOURCES = 12  # the exact solver tries all 2^K - 1 supports


def pair_losses(margins: Tensor, smoothing: float = 0.0, labels: Labels | None = None) -> Tensor:
    """Bradley-Terry loss of each pair: -log sigmoid(r_chosen - r_rejected), the summand of Eq. 1.

    margins: (B,) -> (B,), nats. smoothing: the share of labels taken as the wrong way round.
    labels: votes and the like (votes.py). The paper has neither. Source: Bradley and Terry 1952;
    arXiv 2312.07401v5, Eq. 1.

    >>> pair_losses(torch.tensor([0.0]))
    tensor([0.6931])
    """
    if labels is not None:
        return labelled_losses(margins, labels, smoothing)
    losses = -F.logsigmoid(margins)
    if smoothing == 0:
        return losses
    return (1 - smoothing) * losses - smoothing * F.logsigmoid(-margins)


def bradley_terry_losses(
    head: Tensor,
    z_chosen: Tensor,
    z_rejected: Tensor,
    source: Tensor,
    sources: int | None = None,
    smoothing: float = 0.0,
    labels: Labels | None = None,
) -> Tensor:
    """Mean Bradley-Terry loss of each source.

    L_k = -mean_{b in k} log sigmoid(head . (z_chosen_b - z_rejected_b))

    head: (D,); z_chosen, z_rejected: (B, D); source: (B,) integers in [0, K); sources: K, by
    default the largest + 1. Returns (K,), nats; NaN for a source without a pair in the batch.
    Source: Eq. 1, once per source as in Eq. 7.
    """
    losses = pair_losses((z_chosen - z_rejected) @ head, smoothing, labels)  # Eq. 1
    return torch.stack([losses[source == k].mean() for k in range(_count(source, sources))])


def head_gradients(
    head: Tensor,
    z_chosen: Tensor,
    z_rejected: Tensor,
    source: Tensor,
    sources: int | None = None,
    smoothing: float = 0.0,
    labels: Labels | None = None,
) -> Tensor:
    """Gradient of each source's loss with respect to the head, in closed form; no backward pass.

    g_k = -mean_{b in k} sigmoid(-margin_b) (z_chosen_b - z_rejected_b)

    With smoothing s, sigmoid(-margin_b) - s stands in the place of sigmoid(-margin_b); with labels,
    minus `labelled_slopes` does. Shapes as in `bradley_terry_losses`. Returns (K, D), detached; a
    NaN row for a source without a pair. Source: Eq. 8 and appendix B, theta_rm; equal to autograd
    on `bradley_terry_losses`.
    """
    difference = (z_chosen - z_rejected).detach()  # (B, D)
    margins = difference @ head.detach()  # (B,)
    if labels is None:
        d_margin = smoothing - torch.sigmoid(-margins)  # (B,) d loss / d margin
    else:
        d_margin = labelled_slopes(margins, labels, smoothing)
    per_pair = d_margin[:, None] * difference  # (B, D)
    return torch.stack([per_pair[source == k].mean(0) for k in range(_count(source, sources))])


def min_norm_weights(gradients: Tensor) -> Tensor:
    """Weights of the shortest vector in the convex hull of the gradients, exactly.

    argmin_lambda ||sum_k lambda_k g_k||^2 with lambda_k >= 0, sum_k lambda_k = 1

    gradients: (K, D), K <= 12. Returns (K,) float64. A zero row takes all the weight. Raises
    ValueError if a value is not finite. Source: appendix B of the paper; Sener and Koltun 2018
    (MGDA). The paper iterates (`frank_wolfe_weights`); here every support is solved in closed form
    and the shortest candidate wins, so there is no tolerance to choose.

    >>> min_norm_weights(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    G = _checked(gradients)
    K = len(G)
    if K > MOST_SOURCES:
        raise ValueError(
            f"the exact solver takes at most {MOST_SOURCES} sources, got {K}; use another method"
        )
    norms = G.norm(dim=1)
    if (norms == 0).any():
        return (norms == 0).double() / (norms == 0).sum()
    units = G / norms[:, None]
    C, b = units @ units.T, norms.min() / norms  # cosines, and scales in (0, 1]
    # On a support S the minimiser solves (C_S + b_S b_S^T) x = b_S, and lambda is proportional to
    # x b. Off S the matrix is the identity.
    supports = list(product([0.0, 1.0], repeat=K))[1:]
    S = torch.tensor(supports, dtype=G.dtype, device=G.device)  # (2^K - 1, K)
    A = S[:, :, None] * (C + b[:, None] * b) * S[:, None, :] + torch.diag_embed(1 - S)
    x, _ = torch.linalg.solve_ex(A, (S * b)[..., None])
    candidates = (x[..., 0] * b * S).nan_to_num(0, 0, 0).clamp_min(0)
    # Every candidate is feasible, or NaN if all of it was clipped.
    candidates = candidates / candidates.sum(1, keepdim=True)
    lengths = (candidates @ G).norm(dim=1).nan_to_num(torch.inf)
    return candidates[lengths.argmin()]


def frank_wolfe_weights(
    gradients: Tensor, iterations: int = 1000, tolerance: float = 1e-5
) -> Tensor:
    """The same weights by Frank-Wolfe with exact line search, as the paper solves them.

    They are approximate. gradients: (K, D). It starts at the gradient of least norm and stops when
    no weight moved by `tolerance`. Returns (K,) float64. Source: arXiv 2312.07401v5, section 4;
    Jaggi 2013. Differs from the authors' code: no clamp of the step to [.001, .999], and it starts
    at one gradient, not at the best pair.
    """
    G = _checked(gradients)
    M = G @ G.T  # all that the weights need
    weights = F.one_hot(M.diagonal().argmin(), len(M)).to(M)
    for _ in range(iterations):
        fastest = (M @ weights).argmin()  # the vertex towards which the length falls fastest
        d = F.one_hot(fastest, len(M)).to(M) - weights
        curvature = d @ M @ d
        if curvature <= 0:
            break
        step = (-(weights @ M @ d) / curvature).clamp(0, 1)  # exact line search
        weights = weights + step * d
        if (step * d).abs().sum() < tolerance:
            break
    return weights


NORMALIZATIONS = ("none", "l2", "loss", "loss+")


def normalize_gradients(gradients: Tensor, losses: Tensor, normalize: str) -> Tensor:
    """Scale the head gradients before the solve.

    `none`: g; `l2`: g / ||g||; `loss`: g / ((l + 1) / sum (l + 1)); `loss+`: g / (||g|| l)

    gradients: (K, D), losses: (K,). Returns (K, D) float64; a zero row stays zero. Two rows of
    length 1 always get weights (1/2, 1/2): with two sources `l2` is uniform. Source: the authors'
    code; the paper's text does not normalise.
    """
    G, losses = gradients.double(), losses.double()
    if normalize == "none":
        return G
    if normalize == "loss":
        return G / ((losses + 1) / (losses + 1).sum())[:, None]
    # A confident source's gradient is so small that its squares would vanish: scale it first.
    tiny = torch.finfo(torch.float64).tiny
    scaled = G / G.abs().amax(1, keepdim=True).clamp_min(tiny)
    units = scaled / scaled.norm(dim=1, keepdim=True).clamp_min(tiny)
    if normalize == "l2":
        return units
    if normalize == "loss+":
        return units / losses.clamp_min(1e-100)[:, None]
    raise ValueError(f"normalize: {normalize!r} is not one of {', '.join(NORMALIZATIONS)}")


def more_loss(
    head: Tensor,
    z_chosen: Tensor,
    z_rejected: Tensor,
    source: Tensor,
    sources: int | None = None,
    normalize: str = "l2",
) -> tuple[Tensor, Tensor]:
    """The MORE loss of one batch: L_MORE = sum_k lambda_k L_k.

    lambda comes from `min_norm_weights` and is detached. Shapes as in `bradley_terry_losses`.
    Returns the loss () and the weights (K,). With one source it is plain Bradley-Terry. Source:
    Eq. 7 and appendix B.
    """
    losses = bradley_terry_losses(head, z_chosen, z_rejected, source, sources)
    gradients = head_gradients(head, z_chosen, z_rejected, source, sources)
    pairs = torch.bincount(source, minlength=len(losses))
    weights = more_weights(losses, gradients, pairs, {}, normalize=normalize)
    return weighted_loss(weights, losses), weights


def weighted_loss(weights: Tensor, losses: Tensor) -> Tensor:
    """sum_k lambda_k L_k, Eq. 7, over the sources that have a weight.

    weights, losses: (K,). A source that is absent from the batch has the loss NaN and the weight 0,
    and does not enter.
    """
    present = weights > 0
    return weights[present].to(losses) @ losses[present]  # Eq. 7


# ---- weightings ----------------------------------------------------------------------------------
# (losses (K,), gradients (K, D), pairs (K,), state) -> weights (K,) on the simplex. A source with
# pairs == 0 gets weight 0. `state` is a dict of tensors that lives as long as the run and is saved
# with it.

State = dict[str, Tensor]


def uniform_weights(losses: Tensor, gradients: Tensor, pairs: Tensor, state: State) -> Tensor:
    """The same weight for every source in the batch."""
    present = (pairs > 0).to(losses)
    return present / present.sum()


def proportional_weights(losses: Tensor, gradients: Tensor, pairs: Tensor, state: State) -> Tensor:
    """Each source's share of the batch: lambda_i = |D_i| / |D|.

    This is plain mixing, the paper's MultiTask (below Eq. 7).
    """
    return pairs.to(losses) / pairs.sum()


def more_weights(
    losses: Tensor,
    gradients: Tensor,
    pairs: Tensor,
    state: State,
    *,
    normalize: str = "l2",
    average: float = 1.0,
) -> Tensor:
    """Min-norm weights of the (normalised, averaged) head gradients: the paper's lambda.

    `average` is the weight alpha of the newest gradient in m <- (1 - alpha) m + alpha g; 1 keeps no
    average. m starts at a source's first gradient. Differs from the authors' code, where m starts
    at random. State: "average" (K, D), "seen" (K,).
    """
    present = pairs > 0
    g = torch.where(present[:, None], gradients, 0).detach()
    if average < 1:
        seen = state.get("seen", torch.zeros_like(present))
        old = torch.where(seen[:, None], state.get("average", g), g)
        g = torch.where(present[:, None], (1 - average) * old + average * g, old)
        state.update(average=g, seen=seen | present)
    weights = torch.zeros_like(losses.detach())
    solved = min_norm_weights(normalize_gradients(g[present], losses.detach()[present], normalize))
    weights[present] = solved.to(weights)
    return weights


def group_dro_weights(
    losses: Tensor, gradients: Tensor, pairs: Tensor, state: State, *, rate: float = 0.01
) -> Tensor:
    """Worst source first: q_k <- q_k exp(rate L_k), normalised.

    An absent source keeps its share and gets no weight. State: "log_q" (K,), logarithms, so that no
    loss overflows. Source: Sagawa et al. 2020, arXiv 1911.08731, algorithm 1.
    """
    present, losses = pairs > 0, losses.detach()
    log_q = state.get("log_q", torch.zeros_like(losses))
    log_q = log_q + torch.where(present, rate * losses, 0)
    state["log_q"] = log_q = log_q.log_softmax(0)
    return torch.where(present, log_q, -torch.inf).softmax(0)


WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "more": more_weights,
    "uniform": uniform_weights,
    "proportional": proportional_weights,
    "group_dro": group_dro_weights,
}

# What a weighting may weigh on its own: single pairs, groups of one pair a source, or else only the
# whole step. It decides how a step may be cut into micro-batches.
SEPARABLE = {"proportional": "pairs", "uniform": "groups"}


def _count(source: Tensor, sources: int | None) -> int:
    """K, as it was given or as the batch shows it."""
    return sources if sources is not None else int(source.max()) + 1


def _checked(gradients: Tensor) -> Tensor:
    """Float64 copy, scaled so that squares neither overflow nor vanish."""
    if gradients.ndim != 2 or len(gradients) == 0:
        raise ValueError(
            f"gradients must have shape (K, D) with K >= 1, got {tuple(gradients.shape)}"
        )
    G = gradients.detach().double()
    if not G.isfinite().all():
        raise ValueError("gradients must be finite")
    return G / G.abs().max().clamp_min(torch.finfo(G.dtype).tiny)
