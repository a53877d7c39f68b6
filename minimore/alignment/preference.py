"""The preference objective: a policy learns from pairs, by log-probabilities of their responses.

    stream       P P P  C C C E  R R E       a prompt, its chosen and its rejected response
    read         . . #  # # # .  # # .       the states that predict a token of a response,
                     #                       and the prompt's last one once more
    tokens           log p of each target, given what stands before it
    responses        their sums, log π(y|x)
    pairs            a loss of preference_losses.py, beside log-probabilities of the references
    sources          mean losses L_k, weighted: Σ_k λ_k L_k

M targets, D width, V vocabulary, B pairs, S responses of a pair, R references, K sources.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.pairs import split_by_tokens
from ..engine.objective import require_finite
from ..model.attention import Stream
from ..model.rotation import at_least_fp32
from ..more import SEPARABLE, weighted_loss
from .language import Responses, pack_responses
from .policy import CHUNK
from .preference_losses import PreferenceLoss


class Comparison(NamedTuple):
    """A prompt with its chosen and its rejected response, and with those that a loss adds.

    texts: all of them as ids. reference: their log-probabilities by each reference, (R, S).
    """

    texts: Responses
    reference: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that are computed: the prompt once."""
        return self.texts.tokens


@dataclass(eq=False)
class ComparisonBatch:
    """B comparisons as one stream.

    reads: (M,) the places of the states that predict; targets: (M,) what they should predict;
    lengths: of every response, B S of them. reference: (R, B, S). source: (B,).
    """

    stream: Stream
    reads: Tensor
    targets: Tensor
    lengths: list[int]
    reference: Tensor
    source: Tensor

    @property
    def size(self) -> int:
        """How many pairs it has."""
        return len(self.source)


class PreferenceResult(NamedTuple):
    """What a step saw: its loss (), and of every pair its loss and implicit margin (B,).

    weights: (K,) of the sources. gradients: (K, D), those that the weights come from; NaN (K, 1)
    where the weighting looks at none.
    """

    loss: Tensor
    losses: Tensor
    margins: Tensor
    weights: Tensor
    gradients: Tensor

    def times(self, share: float) -> "PreferenceResult":
        """The same with its share of a step's loss and weights."""
        return self._replace(loss=self.loss * share, weights=self.weights * share)

    @classmethod
    def of_parts(cls, parts: Sequence["PreferenceResult"]) -> "PreferenceResult":
        """The result of a step from those of its parts, each with its share."""
        loss, losses, margins, weights, (gradients, *_) = zip(*parts)
        return cls(sum(loss), torch.cat(losses), torch.cat(margins), sum(weights), gradients)


def pack_comparisons(items: Sequence[Comparison], source: Sequence[int]) -> ComparisonBatch:
    """Lay out comparisons as one stream, each prompt once; source: of each."""
    texts = [item.texts for item in items]
    batch = pack_responses(texts)
    return ComparisonBatch(
        batch.stream,
        batch.reads,
        batch.targets,
        [len(response) for item in texts for response in item.responses],
        torch.stack([item.reference for item in items], dim=1),
        torch.tensor(source),
    )


# ---- log-probabilities ---------------------------------------------------------------------------


class TokenLogProbabilities(torch.autograd.Function):
    """log p of each target, from (M, D) states times an unembedding (V, D).

    CHUNK states have logits at a time. They are computed again on the way back, since the slope of
    the loss on a token is known only when all tokens of a pair are:

        p = softmax(s Wᵀ)      ∂s = ∂ (onehot - p) W      ∂W = Σ ∂ (onehot - p)ᵀ s
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """(M, D), (V, D), (M,) -> (M,)."""
        ctx.save_for_backward(states, unembedding, targets)
        losses = [
            F.cross_entropy(logits_of(s, unembedding), target, reduction="none")
            for s, target in zip(states.split(CHUNK), targets.split(CHUNK))
        ]
        return -torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """(M,) -> (M, D), (V, D) unless the unembedding is frozen."""
        states, unembedding, targets = ctx.saved_tensors
        d_states = torch.empty_like(states)
        is_trained = ctx.needs_input_grad[1]
        d_unembedding = torch.zeros_like(at_least_fp32(unembedding)) if is_trained else None
        chunks = (x.split(CHUNK) for x in (states, targets, d_outputs[0], d_states))
        for s, target, d, d_s in zip(*chunks):
            d_logits = -logits_of(s, unembedding).softmax(1)
            d_logits[torch.arange(len(target), device=target.device), target] += 1  # onehot - p
            d_logits = (d_logits * d[:, None]).to(unembedding.dtype)
            d_s.copy_(d_logits @ unembedding)  # into d_states
            if d_unembedding is not None:
                d_unembedding += d_logits.T @ s.to(unembedding.dtype)
        if d_unembedding is None:
            return d_states, None, None
        return d_states, d_unembedding.to(unembedding.dtype), None


def logits_of(states: Tensor, unembedding: Tensor) -> Tensor:
    """(M, D), (V, D) -> (M, V); multiplied in the type of the unembedding, at least fp32 then."""
    return at_least_fp32(states.to(unembedding.dtype) @ unembedding.T)


def response_log_probabilities(
    states: Tensor, unembedding: Tensor, targets: Tensor, lengths: Sequence[int]
) -> Tensor:
    """log π(y|x) of each response, the sum over its tokens.

    states: (M, D); unembedding: (V, D); targets: (M,); lengths: of the responses, which sum to M.
    Returns (responses,), nats.
    """
    by_token = TokenLogProbabilities.apply(states, unembedding, targets)
    return torch.stack([tokens.sum() for tokens in by_token.split(list(lengths))])


# ---- the objective -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceObjective:
    """How the losses of pairs become one loss.

    weigh: (losses (K,), gradients (K, D), pairs (K,)) -> weights (K,), one of more.WEIGHTINGS with
    its state. method: its name there.
    """

    sources: int
    loss_of_pairs: PreferenceLoss
    weigh: Callable[[Tensor, Tensor, Tensor], Tensor]
    method: str = "proportional"

    @property
    def unit(self) -> int | None:
        """1 where every pair may be weighted on its own, None where only the whole step may."""
        return 1 if SEPARABLE.get(self.method) == "pairs" else None

    def batches(
        self, items: Sequence[Comparison], source: Sequence[int], micro_tokens: int, unit: int = 1
    ) -> list[ComparisonBatch]:
        """Consecutive batches of at most micro_tokens tokens."""
        ranges = split_by_tokens([item.tokens for item in items], micro_tokens, unit)
        return [
            pack_comparisons(items[part.start : part.stop], source[part.start : part.stop])
            for part in ranges
        ]

    def loss(
        self, unembedding: Tensor, states: Tensor, batches: Sequence[ComparisonBatch]
    ) -> tuple[Tensor, PreferenceResult]:
        """The weighted loss () of the pairs of these batches, and what the step saw.

        unembedding: (V, D); states: (M, D). Raises NonFiniteLoss.
        """
        device = states.device
        targets = torch.cat([batch.targets for batch in batches]).to(device)
        source = torch.cat([batch.source for batch in batches]).to(device)
        reference = torch.cat([batch.reference for batch in batches], dim=1).to(device)
        lengths = [length for batch in batches for length in batch.lengths]
        policy = response_log_probabilities(states, unembedding, targets, lengths)
        policy = policy.view(len(source), -1)  # (B, S)
        pair_losses = self.loss_of_pairs.losses(policy, reference)  # (B,)
        # L_k is NaN for a source without a pair here; `weighted_loss` leaves it out.
        losses = torch.stack([pair_losses[source == k].mean() for k in range(self.sources)])  # L_k
        require_finite(losses, source)
        tokens = torch.tensor(lengths, device=device).view(len(source), -1).sum(1)
        source_of_target = source.repeat_interleave(tokens)  # (M,)
        if self.method == "more":
            gradients = shift_gradients(losses, states, source_of_target)
        else:
            gradients = states.new_full((self.sources, 1), torch.nan)  # unused by other weightings
        weights = self.weigh(losses, gradients, torch.bincount(source, minlength=self.sources))
        loss = weighted_loss(weights, losses)  # ()  2312.07401, Eq. 7
        margins = self.loss_of_pairs.margins(policy, reference)
        seen = (loss, pair_losses, margins, weights, gradients)
        return loss, PreferenceResult(*(tensor.detach() for tensor in seen))


def shift_gradients(losses: Tensor, states: Tensor, source: Tensor) -> Tensor:
    """Gradient of each source's loss by one shift δ of all states that the unembedding reads.

        h_k = ∂L_k/∂δ = Σ_{t of source k} ∂L_k/∂s_t,    states s_t + δ, at δ = 0

    A reward model is weighted by the gradients of its head, a vector (D,) at the top of the trunk.
    A policy has a matrix (V, D) there, and K gradients of that would be larger than most models.
    The shift δ is a vector (D,) at the same place: if the final norm has a bias, δ is added to it.
    One backward pass of the top serves all sources, since each token belongs to one of them. So
    the promise of min-norm weights holds for δ: a small step of it along -Σ_k λ_k h_k raises no
    source's loss.

    losses: (K,), each a function of the states of its own tokens; states: (M, D); source: (M,) of
    every state. Returns (K, D), a zero row for a source without a state.
    """
    (d_states,) = torch.autograd.grad(losses.sum(), states, retain_graph=True)  # (M, D)
    return torch.stack([d_states[source == k].sum(0) for k in range(len(losses))])
