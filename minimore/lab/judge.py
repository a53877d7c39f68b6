"""A policy as a judge: shown two responses, it writes which one is better, A or B.

    A: amber cedar ...        the pair in a random order
    B: olive raven ...
    ?                         the policy writes one token

It is fitted on the letters of the annotators' choices, as a language model is. An answer is then
one token drawn from it: "A", "B", or another one, which is no answer to the question. Draws differ
because it is unsure which letter the annotator would write, so their agreement is a confidence.
The prompts of the pairs are not shown: they say nothing, except where they name the annotator.

N pairs, n answers to each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..alignment.generate import Sampling, generate
from ..alignment.language import Responses
from ..alignment.perplexity import response_losses
from ..alignment.policy import LanguageModel
from ..alignment.sample import seed_of
from ..data.forms import Pair
from ..model.tokenizer import Tokenizer

LETTERS = ("A", "B")
NO_LETTER = len(LETTERS)  # the answer of a draw that is neither


class Questions(NamedTuple):
    """N pairs as questions to a judge.

    texts: ids of the questions. chosen_first: (N,), whether the chosen response is A.
    letters: the ids of A and B.
    """

    texts: list[list[int]]
    chosen_first: np.ndarray
    letters: list[int]

    def items(self) -> list[Responses]:
        """What a judge is fitted on: every question with the letter of the chosen response."""
        places = (~self.chosen_first).astype(int).tolist()
        return [Responses(ids, [[self.letters[place]]]) for ids, place in zip(self.texts, places)]


def questions_of(pairs: Sequence[Pair], tokenizer: Tokenizer, seed: int) -> Questions:
    """A question about every pair, each in an order that the seed draws."""
    chosen_first = np.random.default_rng(seed).random(len(pairs)) < 0.5
    texts = [
        question(*((pair.chosen, pair.rejected) if is_first else (pair.rejected, pair.chosen)))
        for pair, is_first in zip(pairs, chosen_first)
    ]
    letters = [ids[0] for ids in tokenizer.encode(list(LETTERS), False)]
    return Questions(tokenizer.encode(texts, False), chosen_first, letters)


def question(a: str, b: str) -> str:
    """What a judge reads; behind it comes its letter."""
    return f"A: {a.strip()}\nB: {b.strip()}\n?"


def drawn_answers(
    judge: LanguageModel, questions: Questions, samples: int, seed: int
) -> np.ndarray:
    """n answers to every question: (N, n) of 0 for A, 1 for B, and NO_LETTER."""
    seeds = [[seed_of(seed, i, j) for j in range(samples)] for i in range(len(questions.texts))]
    drawn = generate(judge, questions.texts, seeds, Sampling(max_new_tokens=1))
    place_of = {token: place for place, token in enumerate(questions.letters)}
    answers = [place_of.get(sample.tokens[0], NO_LETTER) for sample in drawn]
    return np.array(answers).reshape(-1, samples)


def letter_probabilities(judge: LanguageModel, questions: Questions) -> np.ndarray:
    """The judge's own probabilities of A and of B: (N, 2). What is left is that of no letter."""
    both = [[token] for token in questions.letters]
    losses = response_losses(judge, [Responses(ids, both) for ids in questions.texts])
    return torch.exp(-torch.stack(list(losses))).double().numpy()
