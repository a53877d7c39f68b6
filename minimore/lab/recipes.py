"""The reward models of `figure7` and `table1`: one recipe each, trained in every world.

Those of `figure7` are to differ in accuracy, and in calibration at equal accuracy: by scheme,
width, number of sources, amount of data and of noise, regime, seed, and by what they memorised.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RewardRecipe:
    """How a reward model differs from the plain one, which has uniform weights and all sources.

    regime: of the world in which it is trained; None is that of the policy. pairs: of each source,
    as a share of --pairs. seen: pairs of each source that training sees, as
    a share of --pairs; where it exceeds pairs, they are seen again and again. K: of the world's
    sources, the first ones. again: how many seeds later it begins. smoothing: share of labels taken
    as the wrong way round. quick: whether the quick cut has it.
    """

    recipe: str
    scheme: str = "uniform"
    regime: str | None = None
    size: int = 32
    K: int = 5
    pairs: float = 1.0
    seen: float = 1.0
    again: int = 0
    smoothing: float = 0.0
    quick: bool = False

    def place(self, regime: str) -> dict[str, Any]:
        """Its place in a grid whose policies live in a world of this regime."""
        place = asdict(self) | {"regime": self.regime or regime}
        return {name: value for name, value in place.items() if name != "quick"}


RECIPES = (
    RewardRecipe("plain", quick=True),
    RewardRecipe("other seed", again=1),
    RewardRecipe("more", "more", quick=True),
    RewardRecipe("more per group", "more per group"),
    RewardRecipe("group dro", "group dro"),
    RewardRecipe("multitask", "multitask"),
    RewardRecipe("smoothing", smoothing=0.3),
    RewardRecipe("narrow", size=16),
    RewardRecipe("wide", size=64),
    RewardRecipe("1 source", K=1, quick=True),
    RewardRecipe("2 sources", K=2),
    RewardRecipe("3 sources", K=3),
    RewardRecipe("4 sources", K=4),
    RewardRecipe("3 sources more", "more", K=3),
    RewardRecipe("half", seen=1 / 2),
    RewardRecipe("quarter", seen=1 / 4),
    RewardRecipe("eighth by heart", pairs=1 / 8),
    RewardRecipe("sixteenth by heart", pairs=1 / 16, quick=True),
    RewardRecipe("sixteenth by heart more", "more", pairs=1 / 16),
    RewardRecipe("1 source by heart", K=1, pairs=1 / 8),
    RewardRecipe("noise", regime="noise"),
    RewardRecipe("noise more", "more", regime="noise"),
    RewardRecipe("sizes", regime="sizes"),
    RewardRecipe("sizes more", "more", regime="sizes"),
    RewardRecipe("mild", regime="mild"),
    RewardRecipe("reversed", regime="reversed"),
    RewardRecipe("reversed more", "more", regime="reversed"),
)


# How the policies of `policies` come about. Rejection sampling is by a plain reward model that saw
# the same pairs; learners.py has the others.
LEARNERS = (
    *("base", "sft", "rejection sampling"),
    *("dpo", "dpo, beta .3", "dpo, min-norm", "mrpo", "bapo", "bapo, anchor 1", "spo"),
)
CHOOSER = "rejection sampling"  # the only one with a reward model

# Schemes of `table1`. With two sources MORE is uniform weights, unless the gradients keep their
# lengths: two gradients of equal length always get weights 1/2.
TABLE_1_SCHEMES = ("multitask", "more", "more unscaled")


def table_1_recipes(sizes: Sequence[int]) -> list[RewardRecipe]:
    """Every scheme of `table1` at every width, of the world's two sources."""
    return [
        RewardRecipe(f"{scheme} {size}", scheme, size=size, K=2)
        for size in sizes
        for scheme in TABLE_1_SCHEMES
    ]
