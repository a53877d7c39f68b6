"""The same trunk as a language model: logits, loss of every token, perplexity.

N tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.memory import LOGITS_AT_ONCE
from ..model.attention import pack
from ..model.checkpoint import Checkpoint, Hold, Top
from ..model.families import Family
from ..model.trunk import Trunk
from ..options import require
from ..reward import ModelOptions, compute_type, device_of, held_in

# So many positions have logits at a time: 1024 of them, times Qwen's 152k tokens, are 0.6 GB.
CHUNK = LOGITS_AT_ONCE


class LanguageModel(nn.Module):
    """A trunk and its unembedding (V, D), whose products with the hidden states are the logits.

    output: the unembedding if it is a parameter of its own; None if it is tied, which means that it
    is the trunk's embedding.
    """

    kind = "language"  # of model/checkpoint.py's KINDS

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

    def saved_top(self, family: Family) -> Top:
        """What a checkpoint of this model holds besides the trunk."""
        return {} if self.output is None else {family.language_head: ("output", self.output)}

    def logits(self, states: Tensor) -> Tensor:
        """Final hidden states (..., D) -> (..., V), in their type."""
        return F.linear(states, self.unembedding.to(states.dtype))

    def losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """-log p(target) of states (M, D) and the ids (M,) that follow them: (M,), nats.

        CHUNK states have logits at a time.
        """
        chunks = zip(states.split(CHUNK), targets.split(CHUNK))
        return torch.cat([F.cross_entropy(self.logits(s), t, reduction="none") for s, t in chunks])


def open_policy(
    checkpoint: Checkpoint, options: ModelOptions, hold: Hold | None = None
) -> LanguageModel:
    """The language model of a checkpoint, on the device and in the compute type asked for.

    hold: what the model is to hold of each parameter as it is loaded; by default matrices in the
    compute type. Raises InputError if the checkpoint has no language-model head.
    """
    require_language_model(checkpoint)
    compute = compute_type(options)
    held = hold or held_in(compute)
    trunk, _ = checkpoint.load(
        device=device_of(options), hold=lambda name, value: held(f"trunk.{name}", value)
    )
    trunk.compute_dtype = compute
    unembedding = checkpoint.unembedding(trunk, held)
    assert unembedding is not None, "asked above"
    return LanguageModel(trunk, unembedding).eval()


def require_language_model(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint without a language-model head (InputError).

    A reward model has none, although config.json may still say that it is tied to the embedding.
    """
    is_tied = checkpoint.is_tied and not checkpoint.has_head
    require(
        is_tied or checkpoint.language_head,
        f"{checkpoint.directory}: has no language-model head, so it cannot write; expected the"
        " checkpoint of a causal language model",
    )


def token_losses(model: LanguageModel, tokens: list[int]) -> Tensor:
    """Loss of every token but the first, given those before it; exp of the mean is the perplexity.

        L_t = -log p(token_t | token_0 ... token_{t-1}),  t = 1 ... N - 1

    Returns (N - 1,), nats.
    """
    stream = pack([([], [tokens])]).to(model.unembedding.device)
    # The last state predicts what comes after the text, of which nothing is known.
    states = model.trunk.states(stream)[:-1]
    return model.losses(states, torch.tensor(tokens[1:], device=states.device))
