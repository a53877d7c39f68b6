"""Gated multi-head rewards: one head a source, and the prompt decides how they are mixed.

ArmoRM, arXiv 2406.12845: heads first, then a gate over them while they stay as they are. Checked
against the authors' code; the numbers of its equations could not be.

K sources, N pairs, D width of a state, E width of a prompt's state.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ...more import pair_losses
from .heads import OwnHeads
from .solve import Parameters, solve
from .states import StatePairs


def prompt_states(pairs: StatePairs) -> Tensor:
    """The states of the prompts (N, E); without them none, (N, 0): the gate is then a constant."""
    return pairs.chosen[:, :0] if pairs.prompt is None else pairs.prompt


def gated_margins(parameters: Parameters, heads: Tensor, pairs: StatePairs) -> Tensor:
    """e^scale Σ_k softmax(gate prompt + offset)_k w_k · (z_chosen - z_rejected): (N,)."""
    shares = (prompt_states(pairs) @ parameters["gate"].T + parameters["offset"]).softmax(1)
    return parameters["scale"].exp() * (shares * (pairs.difference @ heads.T)).sum(1)


@dataclass(frozen=True)
class GatedHeads:
    """One head a source; a gate that reads the prompt mixes them. It never sees the source.

    Differs: a head learns from pairs, where the paper has ratings of each objective; the gate is
    linear, the paper's has hidden layers; nothing is taken off for long responses.
    """

    def loss(self, parameters: Parameters, heads: Tensor, pairs: StatePairs) -> Tensor:
        """The mean Bradley-Terry loss of the gated reward: ()."""
        return pair_losses(gated_margins(parameters, heads, pairs)).mean()

    def fit(self, train: StatePairs, seed: int) -> Parameters:
        """heads: (K, D); gate: (K, E); offset: (K,); scale: ()."""
        heads = OwnHeads().fit(train, seed)["heads"]
        K, width = train.sources, prompt_states(train).shape[1]
        shapes = {"gate": (K, width), "offset": (K,), "scale": ()}
        start = {name: train.chosen.new_zeros(shape) for name, shape in shapes.items()}
        gate = solve(partial(self.loss, heads=heads, pairs=train), start)
        return gate | {"heads": heads}

    def margins(self, parameters: Parameters, pairs: StatePairs, knows_source: bool) -> Tensor:
        """By the gate, whether the source is known or not."""
        return gated_margins(parameters, parameters["heads"], pairs)
