"""The same trunk as a language model: logits, loss of every token, perplexity.

N tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.attention import pack
from ..model.trunk import Trunk

CHUNK = 1024  # positions whose logits exist at a time: 1024 x 152k of Qwen's are 0.6 GB


class LanguageModel(nn.Module):
    """trunk, and unembedding (V, D): the logits are its products with the final hidden states. A tied one is the embedding itself."""

    def __init__(self, trunk: Trunk, unembedding: Tensor):
        super().__init__()
        self.trunk = trunk
        self.unembedding = (
            unembedding if isinstance(unembedding, nn.Parameter) else nn.Parameter(unembedding)
        )

    def logits(self, states: Tensor) -> Tensor:
        """Final hidden states (..., D) -> (..., V), in their type."""
        return F.linear(states, self.unembedding.to(states.dtype))


def token_losses(model: LanguageModel, tokens: list[int]) -> Tensor:
    """-log p, in nats, of every token but the first, given those before it: (N - 1,); exp of their mean is the perplexity."""
    states = model.trunk.states(pack([([], [tokens])]).to(model.unembedding.device))[:-1]
    targets = torch.tensor(tokens[1:], device=states.device)
    return torch.cat(
        [
            F.cross_entropy(model.logits(s), t, reduction="none")
            for s, t in zip(states.split(CHUNK), targets.split(CHUNK))
        ]
    )
