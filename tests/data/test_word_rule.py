"""The word rule: its weights are a minimum, it finds what is there, and it never sees its test."""

import random

import numpy as np
import pytest
import torch

from minimore.data.forms import Pair
from minimore.data.inspection.word_rule import (
    RIDGE,
    STYLE,
    features,
    fit,
    fitted_rule,
    frequent_words,
    word_rule,
)
from minimore.data.world import WORDS


def test_the_weights_minimise_the_loss():
    random_state = np.random.default_rng(0)
    x = random_state.normal(size=(300, 6)) + [1.0, 0.5, 0, 0, 0, -0.3]
    w = torch.tensor(fit(x), requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(torch.tensor(x) @ w).sum() + RIDGE / 2 * w @ w
    loss.backward()
    assert w.grad.abs().max() < 1e-9


def test_features_are_counts():
    text = "1. Yes!\n- No, not 22 CATS? Not's"
    values = dict(zip((*STYLE, "not", "yes", "x"), np.expm1(features(text, ["not", "yes", "x"]))))
    expected = {"characters": len(text), "words": 7, "lines": 1, "list items": 2, "digits": 3}
    expected |= {"?": 1, "!": 1, "capitals": 7, "not": 1, "yes": 1, "x": 0}
    assert values == pytest.approx(expected)
    assert frequent_words(["b b a", "B c"])[0] == "b"


def pairs_of(count, rng, marked):
    """Random pairs; a share of the chosen texts holds one word more that the other does not."""
    pairs = []
    for i in range(count):
        chosen, rejected = (" ".join(rng.choices(WORDS, k=20)) for _ in range(2))
        if rng.random() < marked:
            chosen, rejected = f"{chosen} moreover", f"{rejected} whatever"
        pairs.append(Pair(f"prompt {i}", chosen, rejected))
    return pairs


def test_a_word_that_gives_the_label_away_is_found():
    result = word_rule(pairs_of(500, random.Random(0), 0.8), np.arange(500))
    assert result.accuracy.low > 0.75
    assert {name for name, _ in result.strongest[:2]} == {"moreover", "whatever"}


def test_labels_without_a_rule_give_one_half_also_where_prompts_repeat():
    """Ten pairs of a prompt have the same two texts: a rule that saw them in the fit would win."""
    pairs = [pair for pair in pairs_of(60, random.Random(1), 0) for _ in range(10)]
    prompts = np.repeat(np.arange(60), 10)
    honest = word_rule(pairs, prompts).accuracy
    assert honest.low < 0.5 < honest.high
    assert word_rule(pairs, np.arange(600)).accuracy.value > honest.value + 0.2


def test_a_fitted_rule_has_the_same_margins_for_the_same_pairs_and_less_for_swapped_ones():
    """All features are odd in the two responses, so swapped pairs have the opposite margin."""
    pairs = pairs_of(200, random.Random(1), 0.8)
    rule = fitted_rule(pairs)
    turned = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    assert np.allclose(rule.margins(turned), -rule.margins(pairs))
    assert (rule.margins(pairs_of(200, random.Random(2), 0.8)) > 0).mean() > 0.7
