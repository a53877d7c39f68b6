"""minimore: reward models from several sources of human preference, minimal and from scratch.

Source: arXiv 2312.07401.
"""

__version__ = "0.1.0"

from .calibration import accuracy, expected_calibration_error, pair_ece, reliability
from .data.pairs import load_source, pack_pairs
from .model.checkpoint import Checkpoint
from .more import (
    bradley_terry_losses,
    frank_wolfe_weights,
    head_gradients,
    min_norm_weights,
    more_loss,
    pair_losses,
    weighted_loss,
)
from .opened import OpenedRewardModel, load
from .report import evaluate_sources
from .reward import (
    ModelOptions,
    RewardModel,
    group_rewards,
    open_reward_model,
    pair_rewards,
    text_rewards,
)
from .score import best_of, score_texts

__all__ = [
    "load",
    "OpenedRewardModel",
    "bradley_terry_losses",
    "head_gradients",
    "min_norm_weights",
    "frank_wolfe_weights",
    "more_loss",
    "pair_losses",
    "weighted_loss",
    "accuracy",
    "pair_ece",
    "expected_calibration_error",
    "reliability",
    "Checkpoint",
    "load_source",
    "pack_pairs",
    "ModelOptions",
    "RewardModel",
    "open_reward_model",
    "pair_rewards",
    "text_rewards",
    "group_rewards",
    "score_texts",
    "best_of",
    "evaluate_sources",
]
