"""Language models of the world's responses: fitted in memory within seconds, and made to write.

    fresh     the world's checkpoint, whose weights are random: it writes nonsense
    base      fitted on both responses of the world's training pairs: it writes random words, as
              the world's responses are
    tuned     the base, fitted on responses that somebody chose

A response ends with EOS, in training and when it is written.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from ..alignment.generate import Sampling, generate
from ..alignment.language import LanguageObjective, Responses
from ..alignment.perplexity import response_losses
from ..alignment.policy import LanguageModel
from ..alignment.responses import ResponseTexts, cut_to_length, encoded, eos_of
from ..alignment.sample import response_text, seed_of
from ..data.forms import Pair
from ..engine.objective import Objective
from ..engine.optim import AdamW
from ..engine.plain import PlainEngine
from ..engine.recipe import Recipe
from ..model.checkpoint import Checkpoint, ids_of_eos
from ..reward import RewardModel

AnyModel = TypeVar("AnyModel", LanguageModel, RewardModel)

MAX_LENGTH = 512  # tokens of a prompt and a response
MAX_NEW_TOKENS = 32  # the world's responses have 14 words of one token each, and EOS


@dataclass(frozen=True)
class Fitting:
    """How a policy is fitted: AdamW, and a learning rate that falls linearly to 0.

    items: prompts with their responses that each step sees.
    """

    steps: int
    items: int
    learning_rate: float


@dataclass(frozen=True)
class Design:
    """How much a policy writes, and how it is fitted.

    prompts, samples: training prompts and the responses to each from which one is chosen.
    curve_prompts, curve_samples: the first prompts have so many samples, for best-of-n curves.
    test_prompts, test_samples: on which a policy is judged. preferred: pairs of every annotator
    whose chosen responses give the perplexity.
    """

    base: Fitting = Fitting(200, 40, 3e-3)
    tuning: Fitting = Fitting(40, 50, 1e-3)
    prompts: int = 1000
    samples: int = 4
    curve_prompts: int = 100
    curve_samples: int = 64
    test_prompts: int = 200
    test_samples: int = 8
    preferred: int = 100


FULL = Design()
QUICK = Design(
    base=Fitting(60, 20, 5e-3),
    tuning=Fitting(12, 20, 2e-3),
    prompts=120,
    curve_prompts=20,
    curve_samples=16,
    test_prompts=40,
    test_samples=4,
    preferred=10,
)


def fitted(
    policy: AnyModel,
    items: Sequence[Any],
    fitting: Fitting,
    seed: int,
    objective: Objective | None = None,
    source: Sequence[int] | None = None,
) -> AnyModel:
    """A copy of a policy, fitted on responses, or on what another objective learns from.

    With `RewardObjective` it is a reward model that is fitted, on pairs. The seed decides in which
    order they are seen. source: of each item, by default 0.
    """
    objective, source = objective or LanguageObjective(), source or [0] * len(items)
    policy = copy.deepcopy(policy)
    optimizer = AdamW()
    optimizer.adopt_all(policy)
    engine = PlainEngine(policy, optimizer, Recipe())
    for step, places in enumerate(orders(len(items), fitting, seed)):
        optimizer.learning_rate = fitting.learning_rate * (1 - step / fitting.steps)
        engine.step(
            [items[place] for place in places], [source[place] for place in places], objective
        )
    return policy


def orders(count: int, fitting: Fitting, seed: int) -> np.ndarray:
    """Which of `count` items each step sees: (steps, items); one shuffled epoch after the other."""
    random = np.random.default_rng(seed)
    epochs = math.ceil(fitting.steps * fitting.items / count)
    order = np.concatenate([random.permutation(count) for _ in range(epochs)])
    return order[: fitting.steps * fitting.items].reshape(fitting.steps, fitting.items)


def written(
    policy: LanguageModel,
    checkpoint: Checkpoint,
    prompts: Sequence[list[int]],
    samples: int,
    seed: int,
) -> list[Responses]:
    """So many responses of a policy to every prompt, EOS included.

    What is drawn is a function of the seed, the prompt's number and the sample's: two policies that
    write with the same seed differ by what they have learned, and by little else.
    """
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, eos=frozenset(ids_of_eos(checkpoint)))
    seeds = [[seed_of(seed, i, j) for j in range(samples)] for i in range(len(prompts))]
    items = [Responses(prompt, []) for prompt in prompts]
    for sample in generate(policy, prompts, seeds, sampling):
        items[sample.prompt].responses.append(sample.tokens)
    return items


def texts_of(items: Iterable[Responses], checkpoint: Checkpoint) -> list[list[str]]:
    """What responses say, without EOS: a list for every prompt."""
    eos = frozenset(ids_of_eos(checkpoint))
    return [
        [response_text(checkpoint.tokenizer, item.prompt, ids, eos) for ids in item.responses]
        for item in items
    ]


def both_sides(pairs: Iterable[Pair], checkpoint: Checkpoint) -> list[Responses]:
    """Pairs as ids: the prompt with its chosen and its rejected response, each with EOS.

    Those without a token of their own on some side are left out.
    """
    texts = [
        ResponseTexts(pair.prompt, [pair.chosen, pair.rejected], False, [True, True], [*pair.blank])
        for pair in pairs
    ]
    bos, ends = len(checkpoint.tokenizer.bos), [eos_of(checkpoint)] * 2
    items = [
        cut_to_length(prompt, sides, ends, bos, MAX_LENGTH)[0]
        for prompt, *sides in encoded(texts, checkpoint.tokenizer)
    ]
    return [item for item in items if item is not None]


def chosen_sides(pairs: Iterable[Pair], checkpoint: Checkpoint) -> list[Responses]:
    """Pairs as ids: the prompt with its chosen response alone."""
    return [Responses(item.prompt, item.responses[:1]) for item in both_sides(pairs, checkpoint)]


# ---- what a policy has become --------------------------------------------------------------------


def perplexity(policy: LanguageModel, items: Sequence[Responses]) -> float:
    """exp of the mean loss of all tokens of these responses."""
    losses = sum(float(row.sum()) for row in response_losses(policy, items))
    tokens = sum(len(response) for item in items for response in item.responses)
    return math.exp(losses / tokens)


def divergence(policy: LanguageModel, base: LanguageModel, items: Sequence[Responses]) -> float:
    """KL from the base, in nats a response, estimated from responses that the policy wrote.

    KL(policy | base) = E [log policy(response) - log base(response)]
    """
    own, other = (torch.cat(response_losses(model, items)) for model in (policy, base))
    return float((other - own).mean())
