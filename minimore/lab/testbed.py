"""A world in which reward models choose for a policy, and the truth judges what it becomes.

    base        a policy that writes the world's responses
    samples     what it wrote to training prompts: 4 to each, and 64 to the first ones
    tune        the base, fitted on one chosen response of the first 4 to every prompt
    judge       what a policy writes to test prompts, by the true shared reward r*

Everything that does not depend on a reward model is made once, and stored beside the world.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..alignment.language import Responses
from ..alignment.policy import LanguageModel, open_policy
from ..checksums import read_checked_json, write_checked_json
from ..data.forms import Pair
from ..data.pairs import encode
from ..data.world import TrueRewards, World
from ..files import make_directory
from ..model.checkpoint import Checkpoint
from ..model.tensors import require_as_written, write_tensors
from ..reward import ModelOptions, RewardModel, group_rewards
from .best_of import choices
from .drift import true_pairs
from .policies import (
    MAX_LENGTH,
    Design,
    both_sides,
    chosen_sides,
    divergence,
    fitted,
    perplexity,
    texts_of,
    written,
)

Item = TypeVar("Item")  # a pair, or what was made of one


class Judgement(NamedTuple):
    """What a policy is worth.

    rewards: (P, n) r* of n responses to each test prompt. kl: from the base, nats a response.
    perplexities: (K,) of held-out responses that each annotator preferred.
    """

    rewards: np.ndarray
    kl: float
    perplexities: np.ndarray

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As tensors to store, whose names begin with `name`."""
        return {
            f"{name}.rewards": torch.from_numpy(self.rewards),
            f"{name}.kl": torch.tensor(self.kl, dtype=torch.float64),
            f"{name}.perplexities": torch.from_numpy(self.perplexities),
        }

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], name: str) -> "Judgement":
        """What `tensors` made."""
        rewards, kl, perplexities = (tensors[f"{name}.{field}"] for field in cls._fields)
        return cls(rewards.numpy(), float(kl), perplexities.numpy())


@dataclass(frozen=True, eq=False)
class Testbed:
    """The base policy of a world, and what it wrote.

    home: the world's directory. prompts: texts of the training prompts; samples: responses to each,
    in this order. test_prompts: ids. preferred: of every annotator, held-out
    prompts with their chosen responses.
    """

    home: Path
    world: World
    design: Design
    checkpoint: Checkpoint
    base: LanguageModel
    prompts: list[str]
    samples: list[Responses]
    test_prompts: list[list[int]]
    preferred: list[list[Responses]]

    # ---- samples and their truth ----

    @cached_property
    def texts(self) -> list[list[str]]:
        """The samples as texts."""
        return texts_of(self.samples, self.checkpoint)

    @cached_property
    def truth(self) -> list[TrueRewards]:
        """True rewards of the samples to every prompt."""
        return [self.world.true_rewards(texts) for texts in self.texts]

    @cached_property
    def few(self) -> np.ndarray:
        """r* of the first samples to every prompt: (prompts, samples)."""
        return first(self.design.samples, [truth.shared for truth in self.truth])

    @cached_property
    def many(self) -> np.ndarray:
        """r* of all samples to the first prompts: (curve_prompts, curve_samples)."""
        return np.stack([truth.shared for truth in self.truth[: self.design.curve_prompts]])

    def rewards(self, model: RewardModel, checkpoint: Checkpoint) -> list[Tensor]:
        """A reward model's rewards of the samples to every prompt, which it reads as texts."""
        texts = [prompt + text for prompt, own in zip(self.prompts, self.texts) for text in own]
        ids = iter(encode(texts, checkpoint.tokenizer, MAX_LENGTH)[0])
        groups = [[next(ids) for _ in own] for own in self.texts]
        return group_rewards(model, groups)

    # ---- policies ----

    def tuned(self, places: np.ndarray) -> LanguageModel:
        """The base, fitted on the sample at one place (prompts,) of each prompt's first ones."""
        items = [
            Responses(item.prompt, [item.responses[place]])
            for item, place in zip(self.samples, places.tolist())
        ]
        return fitted(self.base, items, self.design.tuning, self.world.seed)

    def judged(self, policy: LanguageModel) -> Judgement:
        """What a policy is worth. All policies write with the same seeds."""
        d, seed = self.design, seeds_of(self.world)[2]
        items = written(policy, self.checkpoint, self.test_prompts, d.test_samples, seed)
        rewards = [self.world.true_rewards(texts) for texts in texts_of(items, self.checkpoint)]
        return Judgement(
            np.stack([of_prompt.shared for of_prompt in rewards]),
            divergence(policy, self.base, items),
            np.array([perplexity(policy, items) for items in self.preferred]),
        )


def first(count: int, rows: Sequence) -> np.ndarray:
    """The first entries of every row: (rows, count)."""
    return np.stack([np.asarray(row[:count]) for row in rows])


def seeds_of(world: World) -> tuple[int, int, int]:
    """Seeds with which policies write: many samples, few samples, test responses."""
    return 3 * world.seed, 3 * world.seed + 1, 3 * world.seed + 2


def chosen_for(testbed: Testbed, model: RewardModel, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A reward model's rewards of all samples, and what the policy is worth that it tuned.

    few: of the first samples to every prompt, of which it chose the best; many: of all samples to
    the first prompts; policy.*: see `Judgement`.
    """
    rewards = testbed.rewards(model, checkpoint)
    few = first(testbed.design.samples, rewards)
    many = np.stack(rewards[: testbed.design.curve_prompts])
    judgement = testbed.judged(testbed.tuned(choices(few)))
    tensors = {"few": torch.from_numpy(few), "many": torch.from_numpy(many)}
    return tensors | judgement.tensors("policy")


# ---- made once a world ---------------------------------------------------------------------------


@lru_cache(maxsize=1)  # a grid takes one world after the other
def open_testbed(home: Path, world: World, design: Design) -> Testbed:
    """The testbed of a world that is written: read what is stored, make and store the rest.

    A kill loses at most the part that was being made.
    """
    directory = home / "policies"
    make_directory(directory)
    checkpoint = Checkpoint(str(home / "model"))
    paths = world.paths(home).values()
    training = by_turns([true_pairs(path) for path, _ in paths])
    tests = [true_pairs(path) for _, path in paths]
    base = base_policy(directory / "base.safetensors", checkpoint, training, design, world.seed)
    prompts = [pair.prompt for pair in training[: design.prompts]]
    samples = samples_of_base(directory / "samples.json", base, checkpoint, prompts, design, world)
    test_pairs = by_turns(tests)[: design.test_prompts]
    return Testbed(
        home,
        world,
        design,
        checkpoint,
        base,
        prompts,
        samples,
        test_prompts=[item.prompt for item in chosen_sides(test_pairs, checkpoint)],
        preferred=[chosen_sides(pairs[: design.preferred], checkpoint) for pairs in tests],
    )


def by_turns(pairs_of_annotators: Sequence[Sequence[Item]]) -> list[Item]:
    """The pairs of all annotators: the first of each, then the second of each, and so on."""
    most = max(map(len, pairs_of_annotators))
    return [pairs[i] for i in range(most) for pairs in pairs_of_annotators if i < len(pairs)]


def base_policy(
    path: Path, checkpoint: Checkpoint, pairs: Sequence[Pair], design: Design, seed: int
) -> LanguageModel:
    """The policy that writes what both sides of the training pairs look like."""
    options = ModelOptions(model=str(checkpoint.directory), device="cpu", compute_dtype="float32")
    policy = open_policy(checkpoint, options)
    if path.exists():
        require_as_written(path, is_ours=True)
        policy.load_state_dict(load_file(path))
        return policy
    policy = fitted(policy, both_sides(pairs, checkpoint), design.base, seed)
    write_tensors(path, policy.state_dict())
    return policy


def samples_of_base(
    path: Path,
    base: LanguageModel,
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    design: Design,
    world: World,
) -> list[Responses]:
    """What the base wrote to the training prompts: many responses to the first, few to the rest."""
    if path.exists():
        stored = read_checked_json(path)
        return [Responses(*item) for item in stored["samples"]]
    ids = checkpoint.tokenizer.encode(list(prompts), False)
    many, few, _ = seeds_of(world)
    first_ids, other_ids = ids[: design.curve_prompts], ids[design.curve_prompts :]
    samples = written(base, checkpoint, first_ids, design.curve_samples, many)
    samples += written(base, checkpoint, other_ids, design.samples, few)
    write_checked_json(path, {"samples": samples})
    return samples


CONTROLS = ("base", "random", "sft", "best")


def controls_of(testbed: Testbed) -> dict[str, Judgement]:
    """What policies are worth that need no reward model; stored beside the world.

    base      as it is
    random    tuned on a random one of the first samples to every prompt
    sft       fitted as long on the chosen responses of as many training pairs
    best      tuned on the truly best of the first samples: no reward model can choose better
    """
    path = testbed.home / "policies" / "controls.safetensors"
    if not path.exists():
        tensors: dict[str, Tensor] = {}
        for name in CONTROLS:
            tensors |= testbed.judged(control(testbed, name)).tensors(name)
        write_tensors(path, tensors)
    require_as_written(path, is_ours=True)
    tensors = load_file(path)
    return {name: Judgement.of_tensors(tensors, name) for name in CONTROLS}


def control(testbed: Testbed, name: str) -> LanguageModel:
    """One of the policies of `controls_of`."""
    world, design = testbed.world, testbed.design
    if name == "base":
        return testbed.base
    if name == "random":
        random = np.random.default_rng([world.seed, 2])
        return testbed.tuned(random.integers(design.samples, size=len(testbed.samples)))
    if name == "best":
        return testbed.tuned(choices(testbed.few))
    paths = world.paths(testbed.home)
    pairs = by_turns([true_pairs(training) for training, _ in paths.values()])
    items = chosen_sides(pairs[: design.prompts], testbed.checkpoint)
    return fitted(testbed.base, items, design.tuning, world.seed)
