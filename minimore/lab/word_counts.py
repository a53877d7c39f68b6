"""The world's pairs as counts of words, drawn in memory: states on which every taste is linear.

An annotator of the world values a response by its words, so counts of words are the states of a
perfect trunk. Whatever a method gets wrong on them is the method's own fault.

K annotators, N pairs, W words.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from ..calibration import probability
from ..data.world import WORDS, World
from .methods.states import StatePairs


class CountedPairs(NamedTuple):
    """N labelled pairs of all annotators, and what is true of them.

    states: counts of words, of the size 1; prompts have the counts of theirs, and behind them (K,)
    whom they name. log_odds: (N, K) those with which every annotator prefers the chosen response.
    """

    states: StatePairs
    log_odds: np.ndarray


def counted_pairs(world: World, pairs: list[int], part: int) -> CountedPairs:
    """Pairs of every annotator as `World.write` draws them, but for their order.

    pairs: of each annotator; label ties are left out of them. part: 0 for training, 1 for a test;
    another part has other pairs.
    """
    parts = [pairs_of_annotator(world, k, count, part) for k, count in enumerate(pairs)]
    chosen, rejected, prompt, log_odds = (np.concatenate(arrays) for arrays in zip(*parts))
    source = np.repeat(np.arange(len(pairs)), [len(arrays[0]) for arrays in parts])
    states = StatePairs(
        torch.from_numpy(chosen),
        torch.from_numpy(rejected),
        torch.from_numpy(source),
        len(pairs),
        torch.from_numpy(prompt),
    )
    return CountedPairs(states, log_odds)


def pairs_of_annotator(world: World, k: int, pairs: int, part: int) -> tuple[np.ndarray, ...]:
    """The chosen, rejected and prompt states and the log-odds of annotator k's pairs."""
    K, random = len(world.annotators), np.random.default_rng([world.seed, 2, part, k])
    a, b = (word_states(random, pairs, world.response_words) for _ in range(2))
    names = np.zeros((pairs, K))
    names[:, k] = world.reveal
    prompt = np.concatenate([word_states(random, pairs, world.prompt_words), names], 1)
    shared, drifts = world.values()
    betas = np.broadcast_to(world.decisiveness, K)
    # A state is a count divided by √(n / W), and a true margin is a sum of values divided by √n.
    log_odds = betas * ((a - b) @ (shared + drifts).T / math.sqrt(len(WORDS)))  # (N, K), of a
    takes_a = random.random(pairs) < probability(log_odds[:, k])
    is_pair = random.random(pairs) >= world.ties
    is_pair[0] = True
    sides = np.where(takes_a, 1, -1)[:, None]
    chosen, rejected = np.where(sides > 0, a, b), np.where(sides > 0, b, a)
    return tuple(array[is_pair] for array in (chosen, rejected, prompt, sides * log_odds))


def word_states(random: np.random.Generator, texts: int, words: int) -> np.ndarray:
    """Counts of the world's words in random texts of so many words, divided by √(n / W): (N, W)."""
    drawn = random.integers(len(WORDS), size=(texts, words))
    counts = np.zeros((texts, len(WORDS)))
    np.add.at(counts, (np.arange(texts)[:, None], drawn), 1.0)
    return counts / math.sqrt(words / len(WORDS))
