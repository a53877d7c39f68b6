"""The methods by name. Whoever adds one adds its line here."""

from .ensemble import CalibratedEnsemble
from .gated import GatedHeads
from .heads import Method, OwnHeads, SharedHead
from .maxmin import MaxMin
from .mean_variance import MeanVariance
from .prototypes import Prototypes
from .shrinkage import Shrinkage, Temperatures

METHODS: dict[str, Method] = {
    "shared": SharedHead(),
    "own": OwnHeads(),
    "maxmin": MaxMin(),
    "mean_variance": MeanVariance(),
    "prototypes": Prototypes(),
    "gated": GatedHeads(),
    "ensemble": CalibratedEnsemble(),
    "shrinkage": Shrinkage(),
    "temperatures": Temperatures(),
}

# Methods whose start is drawn. What the others learn does not depend on the seed.
DRAWN = ("maxmin", "prototypes", "ensemble")

# Methods that answer in another way where the source of a pair is known.
USES_SOURCE = ("own", "maxmin", "prototypes", "shrinkage", "temperatures")
