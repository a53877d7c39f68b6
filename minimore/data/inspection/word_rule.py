"""The word rule: what length and a few words alone say of a label. A model must beat it.

A Bradley-Terry model on differences of simple features, p = σ(w · (f(chosen) - f(rejected))). It is
fitted by Newton's method with a ridge, and tested on prompts that it was not fitted on. numpy only.

N pairs, F features.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ...calibration import probability
from ...uncertainty import Interval, intervals
from ..forms import Pair

WORDS = 100  # the most frequent ones, of which each is a feature
FOLDS = 5
RIDGE = 100.0
NEWTON_STEPS = 8
LONGEST = 5_000  # characters of a response that are looked at
WORD = re.compile(r"[^\W_]+(?:'\w+)?")
LIST_ITEM = re.compile(r"^[^\S\n]*(?:[-*\u2022]|\d+[.)])\s", re.MULTILINE)
STYLE = ("characters", "words", "lines", "list items", "digits", "?", "!", "capitals")


class WordRule(NamedTuple):
    """Accuracy of the rule on prompts that it was not fitted on, and what weighs most in it.

    strongest: (feature, weight in standard deviations), the largest first.
    """

    accuracy: Interval
    strongest: list[tuple[str, float]]


class FittedRule(NamedTuple):
    """The rule after a fit: the words that it counts, and per feature its scale and weight, (F,).

    scale: the root mean square of the differences that it was fitted on.
    """

    words: list[str]
    scale: np.ndarray
    weights: np.ndarray

    def margins(self, pairs: Sequence[Pair]) -> np.ndarray:
        """The rule's margins of pairs: (N,)."""
        return differences(pairs, self.words) / self.scale @ self.weights


def fitted_rule(pairs: Sequence[Pair]) -> FittedRule:
    """Fit the rule on all of these pairs."""
    words = frequent_words(text for pair in pairs for text in looked_at(pair))
    x = differences(pairs, words)
    scale = scale_of(x)
    return FittedRule(words, scale, fit(x / scale))


def word_rule(pairs: Sequence[Pair], prompts: np.ndarray) -> WordRule:
    """Fit and test the rule on pairs (at least two prompts). prompts: (N,), of each its number."""
    words = frequent_words(text for pair in pairs for text in looked_at(pair))
    x = differences(pairs, words)  # (N, F)
    x /= scale_of(x)
    group = np.unique(prompts, return_inverse=True)[1]
    fold = np.random.default_rng(0).permutation(group.max() + 1)[group] % FOLDS
    margins = np.zeros(len(x))
    for k in range(FOLDS):
        margins[fold == k] = x[fold == k] @ fit(x[fold != k])
    weights = fit(x)
    names = [*STYLE, *words]
    order = np.argsort(-np.abs(weights), kind="stable")[:5]
    strongest = [(names[i], float(weights[i])) for i in order]
    return WordRule(intervals(margins, prompts)[0], strongest)


def looked_at(pair: Pair) -> tuple[str, str]:
    """What is looked at of the chosen and the rejected response."""
    return pair.chosen[:LONGEST], pair.rejected[:LONGEST]


def differences(pairs: Sequence[Pair], words: Sequence[str]) -> np.ndarray:
    """(N, F) features of the chosen response minus those of the rejected one."""
    texts = map(looked_at, pairs)
    return np.array([features(a, words) - features(b, words) for a, b in texts])


def scale_of(x: np.ndarray) -> np.ndarray:
    """The root mean square of every feature, (F,); never 0."""
    return np.maximum(np.sqrt((x**2).mean(0)), 1e-9)


def frequent_words(texts: Iterable[str]) -> list[str]:
    """The most frequent words of some texts."""
    counts = Counter(word for text in texts for word in WORD.findall(text.lower()))
    return [word for word, _ in counts.most_common(WORDS)]


def features(text: str, words: Sequence[str]) -> np.ndarray:
    """(F,) logarithms of one plus counts: those of STYLE in their order, then those of words."""
    counts = Counter(WORD.findall(text.lower()))
    style = (
        len(text),
        counts.total(),
        text.count("\n"),
        len(LIST_ITEM.findall(text)),
        sum(map(str.isdigit, text)),
        text.count("?"),
        text.count("!"),
        sum(map(str.isupper, text)),
    )
    return np.log1p(np.array([*style, *(counts[word] for word in words)], dtype=np.float64))


def fit(x: np.ndarray) -> np.ndarray:
    """The weights (F,) that minimise -Σ log σ(x w) + (ridge / 2) |w|², by Newton's method.

    x: (N, F) differences of features.
    """
    w = np.zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        p = probability(x @ w)  # of the label as it is
        gradient = -x.T @ (1 - p) + RIDGE * w
        curvature = (x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(len(w))
        w -= np.linalg.solve(curvature, gradient)
    return w
