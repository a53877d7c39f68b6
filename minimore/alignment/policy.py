"""The same trunk as a language model: logits, loss of every token, perplexity.

N tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.attention import pack
from ..model.trunk import Trunk

# So many positions have logits at a time: 1024 of them, times Qwen's 152k tokens, are 0.6 GB.
CHUNK = 1024


class LanguageModel(nn.Module):
    """A trunk and its unembedding (V, D), whose products with the hidden states are the logits.

    output: the unembedding if it is a parameter of its own; None if it is tied, which means that it
    is the trunk's embedding.
    """

    def __init__(self, trunk: Trunk, unembedding: Tensor):
        super().__init__()
        self.trunk = trunk
        is_tied = unembedding is trunk.embedding.weight
        self.output = None if is_tied else nn.Parameter(unembedding.detach())

    @property
    def unembedding(self) -> Tensor:
        """(V, D)."""
        return self.trunk.embedding.weight if self.output is None else self.output

    @property
    def top(self) -> Tensor:
        """The parameter on top of the trunk."""
        return self.unembedding

    def logits(self, states: Tensor) -> Tensor:
        """Final hidden states (..., D) -> (..., V), in their type."""
        return F.linear(states, self.unembedding.to(states.dtype))

    def losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """-log p(target) of states (M, D) and the ids (M,) that follow them: (M,), nats.

        CHUNK states have logits at a time.
        """
        chunks = zip(states.split(CHUNK), targets.split(CHUNK))
        return torch.cat([F.cross_entropy(self.logits(s), t, reduction="none") for s, t in chunks])


def token_losses(model: LanguageModel, tokens: list[int]) -> Tensor:
    """Loss of every token but the first, given those before it; exp of the mean is the perplexity.

        L_t = -log p(token_t | token_0 ... token_{t-1}),  t = 1 ... N - 1

    Returns (N - 1,), nats.
    """
    stream = pack([([], [tokens])]).to(model.unembedding.device)
    # The last state predicts what comes after the text, of which nothing is known.
    states = model.trunk.states(stream)[:-1]
    return model.losses(states, torch.tensor(tokens[1:], device=states.device))
