"""Policies that learn from preference pairs, with a reward model or without: those of `policies`.

    pairs of all annotators -> base -> base, fitted by one of recipes.LEARNERS -> writes -> r*

All of them begin at the base policy of the world, and see the same pairs once, in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..alignment.comparisons import with_degrees
from ..alignment.language import Responses
from ..alignment.policy import LanguageModel
from ..alignment.preference import Comparison, PreferenceObjective
from ..alignment.preference_losses import PreferenceLoss
from ..alignment.references import log_probabilities
from ..alignment.responses import eos_of
from ..model.checkpoint import Checkpoint
from ..more import WEIGHTINGS
from ..reward import RewardModel
from .best_of import choices
from .drift import true_pairs
from .policies import Fitting, both_sides, divergence, fitted, texts_of, written
from .testbed import Testbed, by_turns, control, first

BETA, STRONG_BETA = 0.1, 0.3  # the larger it is, the closer the policy stays
CLIP = 0.1  # of mrpo
PAIRS_A_STEP = 50
LEARNING_RATE = 3e-4
OWN_SEED = 10**6  # of what the base writes to be remembered, far from the seeds of a testbed


class Worth(NamedTuple):
    """What a policy is worth, and what it cost.

    shared: (P, n) r* of n responses to each test prompt; annotators: (P, n, K) what each values.
    kl: KL(policy | base), nats a response. forgotten: KL(base | policy), by which responses of the
    base have become less likely. tokens: of a response.
    """

    shared: np.ndarray
    annotators: np.ndarray
    kl: float
    forgotten: float
    tokens: float

    def tensors(self) -> dict[str, Tensor]:
        """As tensors to store."""
        return {name: torch.as_tensor(np.asarray(v)) for name, v in self._asdict().items()}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "Worth":
        """What `tensors` made."""
        shared, annotators, *numbers = (tensors[name].numpy() for name in cls._fields)
        return cls(shared, annotators, *map(float, numbers))


def worth_of(testbed: Testbed, policy: LanguageModel) -> Worth:
    """What a policy is worth. All policies write with the same seeds."""
    seed, samples = OWN_SEED + testbed.world.seed, testbed.design.test_samples
    items = written(policy, testbed.checkpoint, testbed.test_prompts, samples, seed)
    rewards = [testbed.world.true_rewards(texts) for texts in texts_of(items, testbed.checkpoint)]
    of_base = written_by_base(testbed, testbed.test_prompts, seed + 1)
    return Worth(
        np.stack([of_prompt.shared for of_prompt in rewards]),
        np.stack([of_prompt.annotators for of_prompt in rewards]),
        divergence(policy, testbed.base, items),
        divergence(testbed.base, policy, of_base),
        float(np.mean([len(response) for item in items for response in item.responses])),
    )


def written_by_base(testbed: Testbed, prompts: Sequence[list[int]], seed: int) -> list[Responses]:
    """One response of the base to every prompt."""
    return written(testbed.base, testbed.checkpoint, prompts, 1, seed)


def chooser_worth(testbed: Testbed, model: RewardModel, checkpoint: Checkpoint) -> Worth:
    """What rejection sampling makes: the base, tuned on the best of 4 by a reward model."""
    few = first(testbed.design.samples, testbed.rewards(model, checkpoint))
    return worth_of(testbed, testbed.tuned(choices(few)))


def learner_worth(testbed: Testbed, learner: str) -> Worth:
    """What one of recipes.LEARNERS makes that has no reward model."""
    if learner in ("base", "sft"):
        return worth_of(testbed, control(testbed, learner))
    return worth_of(testbed, fitted_on_pairs(testbed, learner))


# ---- learning from pairs -------------------------------------------------------------------------


@dataclass(frozen=True)
class Learning:
    """How a learner differs from DPO; method: of the weights of sources."""

    loss: PreferenceLoss
    method: str = "proportional"


LEARNINGS = {
    "dpo": Learning(PreferenceLoss("dpo", BETA)),
    "dpo, beta .3": Learning(PreferenceLoss("dpo", STRONG_BETA)),
    "dpo, min-norm": Learning(PreferenceLoss("dpo", BETA), "more"),
    "mrpo": Learning(PreferenceLoss("mrpo", BETA, CLIP)),
    "bapo": Learning(PreferenceLoss("bapo", BETA)),
    "bapo, anchor 1": Learning(PreferenceLoss("bapo", BETA, anchor=1.0)),
    "spo": Learning(PreferenceLoss("spo", BETA)),
}


def fitted_on_pairs(testbed: Testbed, learner: str) -> LanguageModel:
    """A copy of the base that saw every training pair once, by one of LEARNINGS."""
    items, source = training_pairs(testbed, learner)
    references = [testbed.base]
    if learner == "mrpo":
        references.append(control(testbed, "sft"))
    reference = torch.stack([log_probabilities(model, items) for model in references])  # (R, N, S)
    comparisons = [Comparison(item, reference[:, i]) for i, item in enumerate(items)]
    objective = objective_of(LEARNINGS[learner], len(testbed.world.annotators))
    fitting = Fitting(len(items) // PAIRS_A_STEP, PAIRS_A_STEP, LEARNING_RATE)
    return fitted(testbed.base, comparisons, fitting, testbed.world.seed, objective, source)


def objective_of(learning: Learning, sources: int) -> PreferenceObjective:
    """The objective of a learner; min-norm weights are those of the paper's text, unscaled."""
    weigh = partial(WEIGHTINGS[learning.method], state={})
    if learning.method == "more":
        weigh = partial(weigh, normalize="none")
    return PreferenceObjective(sources, learning.loss, weigh, learning.method)


def training_pairs(testbed: Testbed, learner: str) -> tuple[list[Responses], list[int]]:
    """The training pairs with what a learner adds to them, and the annotator of each."""
    paths = testbed.world.paths(testbed.home).values()
    by_annotator = [both_sides(true_pairs(path), testbed.checkpoint) for path, _ in paths]
    numbered = [[(item, k) for item in items] for k, items in enumerate(by_annotator)]
    items, source = map(list, zip(*by_turns(numbered)))
    seed = OWN_SEED + testbed.world.seed
    if LEARNINGS[learner].loss.name == "bapo":
        of_base = written_by_base(testbed, [item.prompt for item in items], seed + 2)
        items = [
            item._replace(responses=item.responses + own.responses)
            for item, own in zip(items, of_base)
        ]
    if learner == "spo":
        items = with_degrees(items, eos_of(testbed.checkpoint), seed)
    return items, source
