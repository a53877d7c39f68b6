"""What stored rewards say: figures of every reward model of `figure7`, and what the truth is.

All rewards and gains are in σ, the standard deviation of r* over what the base policy writes.

P prompts, N samples of each, K annotators.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ..calibration import accuracy, fit_temperature, negative_log_likelihood, pair_ece
from ..uncertainty import debiased_ece
from .association import kendall
from .best_of import choices, chosen, curve, powers_of_two
from .cells import ModelMargins, margins_file
from .drift import true_pairs
from .grid import Cell
from .scale_matters import (
    THRESHOLD,
    divergence_of,
    is_sure,
    preferences,
    tilted,
    use_of_penalty,
    use_of_threshold,
)
from .statistics import held_out_margins, test_margins
from .testbed import Judgement, controls_of, first, open_testbed

ROUNDING = 1e-9  # two sums of the same word values may differ by so much

Figures = dict[str, float]


@dataclass(frozen=True, eq=False)
class Truth:
    """What is known of a world's samples and policies.

    few (P, 4), many (P', 64): r* of samples. preferred: (P, 3), the true probability that a sample
    is preferred to the first one. sigma: standard deviation of r*. odds: log-odds of a preference a
    unit of r*, the slope that fits the held-out labels best. controls: policies without a model.
    """

    few: np.ndarray
    many: np.ndarray
    preferred: np.ndarray
    sigma: float
    odds: float
    controls: Mapping[str, Judgement]


def truth_of(cell: Cell) -> Truth:
    """The truth of the world in which a cell's model chooses."""
    assert cell.testbed is not None
    testbed = open_testbed(*cell.testbed, cell.design)
    world, home = testbed.world, testbed.home
    samples = testbed.design.samples
    values = first(samples, [truth.annotators for truth in testbed.truth])  # (P, 4, K)
    pairs = [pair for _, test in world.paths(home).values() for pair in true_pairs(test)]
    return Truth(
        few=testbed.few,
        many=testbed.many,
        preferred=preferences(values, world.decisiveness),
        sigma=float(testbed.many.std()),
        odds=log_odds_of(world.true_margins(pairs).mean(1)),
        controls=controls_of(testbed),
    )


def log_odds_of(margins: np.ndarray) -> float:
    """Log-odds a unit of r*, from r* margins (N,) of labelled pairs; 1 where these do not tell."""
    temperature = fit_temperature(margins)
    return 1 / temperature if 0 < temperature < math.inf else 1.0


@dataclass(frozen=True, eq=False)
class Chooser:
    """A reward model, and the policy that it tuned.

    few (P, 4), many (P', 64): its rewards of samples, in fp32. policy: what its policy is worth.
    """

    recipe: str
    seed: int
    margins: ModelMargins
    few: np.ndarray
    many: np.ndarray
    policy: Judgement


def chooser_of(output: Path, cell: Cell, margins: ModelMargins) -> Chooser:
    """The stored rewards of a finished cell."""
    with safe_open(margins_file(output, cell), framework="np") as file:
        few, many = file.get_tensor("few"), file.get_tensor("many")
        names = [f"policy.{field}" for field in Judgement._fields]
        tensors = {name: torch.from_numpy(np.asarray(file.get_tensor(name))) for name in names}
    policy = Judgement.of_tensors(tensors, "policy")
    return Chooser(cell.at["recipe"], cell.at["seed"], margins, few, many, policy)


# ---- what a temperature changes, and what it does not --------------------------------------------


def calibration_of(chooser: Chooser, temperature: float = 1.0) -> Figures:
    """Accuracy, ECE, the same without noise, and NLL on test pairs: means over their sources."""
    margins = {name: m / temperature for name, m in test_margins(chooser.margins).items()}
    prompts = {name: own.prompts[own.is_test] for name, own in chooser.margins.items()}
    each = margins.values()
    return {
        "accuracy": mean([accuracy(m) for m in each]),
        "ece": mean([pair_ece(m) for m in each]),
        "ece less noise": mean([debiased_ece(m, prompts[name]) for name, m in margins.items()]),
        "nll": mean([negative_log_likelihood(m) for m in each]),
    }


def own_temperature(chooser: Chooser) -> float:
    """The temperature that fits the held-out pairs best; 1 where none does, or none are there."""
    held_out = held_out_margins(chooser.margins)
    temperature = fit_temperature(held_out) if len(held_out) else 1.0
    return temperature if 0 < temperature < math.inf else 1.0


def choices_at(chooser: Chooser, temperature: float) -> np.ndarray:
    """Which of its few samples to every prompt it chooses, its rewards divided in fp32: (P,)."""
    return choices(chooser.few / np.float32(temperature))


def ranking_of(chooser: Chooser, truth: Truth) -> Figures:
    """What depends on the order of rewards only.

    tau: Kendall's rank correlation with r* within a prompt, 0 where all rewards are equal. best of
    4, best of all: r* of the sample that it chooses, over the mean sample; regret: what the truly
    best sample has more.
    """
    many = truth.many / truth.sigma
    all_samples = many.shape[1]
    few = truth.few / truth.sigma
    own = chosen(few, choices(chooser.few))
    best_of_all = curve(chooser.many, many, [all_samples])[0]
    return {
        "tau": float(np.nan_to_num(kendall(chooser.many, many)).mean()),
        "best of 4": float((own - few.mean(1)).mean()),
        "regret of 4": float((few.max(1) - own).mean()),
        "best of all": float(best_of_all - many.mean()),
        "regret of all": float(many.max(1).mean() - best_of_all),
    }


def policy_of(policy: Judgement, truth: Truth) -> Figures:
    """What a policy is worth.

    gain: r* over the policy that was tuned on random samples; over base: over the base. win: how
    often its response to a prompt beats one of plain fine-tuning by r*, a tie being half a win.
    perplexity: of preferred responses, the mean over annotators.
    """
    random, base, sft = (truth.controls[name] for name in ("random", "base", "sft"))
    return {
        "gain": float((policy.rewards.mean() - random.rewards.mean()) / truth.sigma),
        "over base": float((policy.rewards.mean() - base.rewards.mean()) / truth.sigma),
        "win": win_rate(policy.rewards, sft.rewards),
        "kl": policy.kl,
        "perplexity": mean(policy.perplexities),
    }


def win_rate(rewards: np.ndarray, others: np.ndarray) -> float:
    """`verdicts` as one number: the share of wins, a tie being half a win."""
    win, tie, _ = verdicts(rewards, others)
    return win + tie / 2


def verdicts(rewards: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """How often a response wins, ties and loses against another policy's to the same prompt.

    rewards, others: (P, n); every response of one meets every response of the other.
    """
    difference = rewards[:, :, None] - others[:, None, :]
    is_tie = np.abs(difference) < ROUNDING
    return (
        float((~is_tie & (difference > 0)).mean()),
        float(is_tie.mean()),
        float((~is_tie & (difference < 0)).mean()),
    )


def scale_of(chooser: Chooser, truth: Truth, temperature: float = 1.0) -> Figures:
    """What depends on the scale of rewards: see scale_matters.py.

    threshold, penalty: what is won, as a share of what the truth would win. kept: share of samples;
    kept reward: their r* over the mean sample, times this share. tilted: r* of tilted samples over
    the mean one; tilted kl: how far they are from uniform.
    """
    few, many = chooser.few / temperature, chooser.many / temperature
    is_kept = is_sure(few)
    best_kept = truth.preferred > THRESHOLD
    rewards = (truth.few - truth.few.mean()) / truth.sigma
    log_odds = truth.many * truth.odds
    weights = tilted(many)
    return {
        "threshold": share_of(
            use_of_threshold(is_kept, truth.preferred), use_of_threshold(best_kept, truth.preferred)
        ),
        "kept": float(is_kept.mean()),
        "kept reward": float((is_kept * rewards[:, 1:]).mean()),
        "penalty": share_of(
            use_of_penalty(weights, log_odds), use_of_penalty(tilted(log_odds), log_odds)
        ),
        "tilted": float(((weights * truth.many).sum(1) - truth.many.mean(1)).mean() / truth.sigma),
        "tilted kl": float(divergence_of(weights).mean()),
    }


def share_of(won: float, most: float) -> float:
    """What is won as a share of the most; 0 where nothing can be won."""
    return won / most if most > 0 else 0.0


def figures_of(chooser: Chooser, truth: Truth) -> Figures:
    """All figures of a reward model as it was trained."""
    return (
        calibration_of(chooser)
        | ranking_of(chooser, truth)
        | policy_of(chooser.policy, truth)
        | scale_of(chooser, truth)
    )


def best_of_n(chooser: Chooser, truth: Truth) -> dict[str, np.ndarray]:
    """Best of n for n = 1, 2, 4, ...: what it promises and what it is worth, in true log-odds.

    promised: the model's own reward; worth: r*; both over the mean sample.
    """
    counts = powers_of_two(truth.many.shape[1])
    promised = curve(chooser.many, chooser.many, counts)
    worth = curve(chooser.many, truth.many * truth.odds, counts)
    return {"promised": promised - promised[0], "worth": worth - worth[0]}


def mean(values: Sequence[float] | Any) -> float:
    """The mean as a plain number."""
    return float(np.mean(values))
