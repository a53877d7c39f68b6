"""The language objective: the mean loss of the tokens of responses, given what stands before them.

    stream       P P P  R R R E          a prompt, a response, its end
    read         . . #  # # # .          the states that predict a token of the response
    targets          R  R R E

    loss = mean over all targets of  -log p(target | everything before it)

It is what fine-tunes a policy on responses that were chosen. The logits of a chunk of targets exist
at a time, never those of all.

M targets, D width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.pairs import split_by_tokens
from ..engine.objective import NonFiniteLoss
from ..model.attention import Stream, pack
from ..model.rotation import at_least_fp32
from .policy import CHUNK


class Responses(NamedTuple):
    """A prompt, of at least one id, and responses to it, of at least one id each."""

    prompt: list[int]
    responses: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens that are computed: the prompt once."""
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass(eq=False)
class LanguageBatch:
    """Prompts and responses as one stream.

    reads: (M,) the places of the states that predict; targets: (M,) what they should predict.
    """

    stream: Stream
    reads: Tensor
    targets: Tensor

    @property
    def size(self) -> int:
        """How many targets it has."""
        return len(self.targets)


class LanguageResult(NamedTuple):
    """What a step saw: the mean loss of its targets (), in nats, and how many there are."""

    loss: Tensor
    targets: int

    def times(self, share: float) -> "LanguageResult":
        """The same with its share of a step's loss."""
        return self._replace(loss=self.loss * share)

    @classmethod
    def of_parts(cls, parts: Sequence["LanguageResult"]) -> "LanguageResult":
        """The result of a step from those of its parts, each with its share of the loss."""
        losses, targets = zip(*parts)
        return cls(sum(losses), sum(targets))


def perplexity_of(loss: float) -> tuple[float, str]:
    """exp(loss), the perplexity of a mean loss in nats, as a number and as text.

    >>> perplexity_of(8.0)[1], perplexity_of(1000.0)[1]
    ('2,980.96', '1.01e+304')
    """
    value = math.exp(min(loss, 700))  # 709 is the last one that a float can hold
    return value, f"{value:,.2f}" if value < 1e9 else f"{value:.2e}"


def pack_responses(items: Sequence[Responses]) -> LanguageBatch:
    """Lay out prompts and responses as one stream, each prompt once.

    >>> batch = pack_responses([Responses([7, 8], [[1, 2], [3]])])
    >>> batch.stream.tokens.tolist(), batch.reads.tolist(), batch.targets.tolist()
    ([7, 8, 1, 2, 3], [1, 2, 1], [1, 2, 3])
    """
    reads: list[int] = []
    targets: list[int] = []
    start = 0
    for prompt, responses in items:
        place = start + len(prompt)  # of the next response's first token
        for response in responses:
            # Its first token is predicted by the prompt's last, the others by the one before.
            reads += [start + len(prompt) - 1, *range(place, place + len(response) - 1)]
            targets += response
            place += len(response)
        start = place
    return LanguageBatch(pack(items), torch.tensor(reads), torch.tensor(targets))


@dataclass(frozen=True)
class LanguageObjective:
    """The mean loss of all targets of a step; any micro-batch may be finished on its own."""

    @property
    def unit(self) -> int:
        """Every prompt with its responses may be finished on its own."""
        return 1

    def batches(
        self, items: Sequence[Responses], source: Sequence[int], micro_tokens: int, unit: int = 1
    ) -> list[LanguageBatch]:
        """Consecutive batches of at most micro_tokens tokens; the sources make no difference."""
        ranges = split_by_tokens([item.tokens for item in items], micro_tokens, unit)
        return [pack_responses(items[part.start : part.stop]) for part in ranges]

    def loss(
        self, unembedding: Tensor, states: Tensor, batches: Sequence[LanguageBatch]
    ) -> tuple[Tensor, LanguageResult]:
        """The mean loss () of all targets of these batches; unembedding: (V, D); states: (M, D).

        Raises NonFiniteLoss.
        """
        targets = torch.cat([batch.targets for batch in batches]).to(states.device)
        loss = TokenLoss.apply(states, unembedding, targets)
        if not loss.isfinite():
            raise NonFiniteLoss(0)
        return loss, LanguageResult(loss.detach(), len(targets))


class TokenLoss(torch.autograd.Function):
    """Mean cross-entropy of (M, D) states times an unembedding (V, D), CHUNK states at a time.

    The gradients are computed beside the loss, while the logits of a chunk are there:

        p = softmax(s Wᵀ)      ∂s = (p - onehot) W / M      ∂W = Σ (p - onehot)ᵀ s / M
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        """(M, D), (V, D), (M,) -> ()."""
        M = len(targets)
        total = states.new_zeros(())
        d_states = torch.empty_like(states)
        is_trained = ctx.needs_input_grad[1]
        d_unembedding = torch.zeros_like(at_least_fp32(unembedding)) if is_trained else None
        chunks = (tensor.split(CHUNK) for tensor in (states, targets, d_states))
        for s, target, d_s in zip(*chunks):
            s = s.to(unembedding.dtype)
            logits = at_least_fp32(s @ unembedding.T)
            total += F.cross_entropy(logits, target, reduction="sum")
            d_logits = logits.softmax(1)
            d_logits[torch.arange(len(target), device=target.device), target] -= 1  # p - onehot
            d_logits = (d_logits / M).to(unembedding.dtype)
            d_s.copy_(d_logits @ unembedding)  # into d_states
            if d_unembedding is not None:
                d_unembedding += d_logits.T @ s
        ctx.gradients = d_states, d_unembedding  # neither input nor output, so not saved as such
        ctx.dtype = unembedding.dtype
        return total / M

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """() -> (M, D), (V, D) unless the unembedding is frozen."""
        d_states, d_unembedding = ctx.gradients
        ctx.gradients = None
        d_states.mul_(d_loss[0])
        if d_unembedding is None:
            return d_states, None, None
        return d_states, d_unembedding.mul_(d_loss[0]).to(ctx.dtype), None
