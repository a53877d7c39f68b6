"""Confidence by agreement: the measures by hand, a judge that answers, and the experiment."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

import minimore.lab.agreement as experiment
from minimore.alignment.policy import open_policy
from minimore.calibration import pair_ece
from minimore.cli import main
from minimore.data.forms import Pair
from minimore.data.pairs import encode
from minimore.data.world import World
from minimore.lab.agreement import rates_of, rates_of_margins, reward_margins, true_probabilities
from minimore.lab.consistency import MEASURES, counts_of, most_frequent
from minimore.lab.drift import true_pairs
from minimore.lab.grid import Home
from minimore.lab.judge import drawn_answers, letter_probabilities, questions_of
from minimore.lab.policies import Fitting, fitted
from minimore.model.checkpoint import Checkpoint
from minimore.reward import ModelOptions, group_rewards, open_reward_model

# ---- the measures --------------------------------------------------------------------------------


def by_hand(answers):
    """The three measures of one list of answers, as words and logarithms to the base 2 say them."""
    n, ordered = len(answers), sorted(Counter(answers).values(), reverse=True)
    entropy = -sum(count / n * math.log2(count / n) for count in ordered)
    most = math.log2(len(ordered)) if len(ordered) > 1 else 1.0
    second = ordered[1] if len(ordered) > 1 else 0
    return ordered[0] / n, 1 - entropy / most, (ordered[0] - second) / n


@pytest.mark.parametrize("possible, n", [(2, 1), (2, 5), (3, 4), (7, 12)])
def test_the_measures_are_those_of_a_loop(possible, n):
    answers = np.random.default_rng(possible).integers(possible, size=(200, n))
    counts = counts_of(answers, possible)
    expected = np.array([by_hand(row.tolist()) for row in answers])
    for measure, column in zip(MEASURES.values(), expected.T, strict=True):
        np.testing.assert_allclose(measure(counts), column, atol=1e-12)
        assert measure(counts).min() >= 0 and measure(counts).max() <= 1
    for row, answer in zip(answers.tolist(), most_frequent(counts)):
        assert row.count(answer) == max(Counter(row).values())


def test_of_two_answers_the_measures_are_functions_of_one_another():
    """So they order questions the same, and at most one of them can be calibrated."""
    counts = np.array([[k, 25 - k] for k in range(26)])
    share = MEASURES["agreement"](counts)
    np.testing.assert_allclose(MEASURES["first-second"](counts), 2 * share - 1, atol=1e-12)
    inner = share < 1
    p = share[inner]
    expected = 1 + p * np.log2(p) + (1 - p) * np.log2(1 - p)
    np.testing.assert_allclose(MEASURES["entropy"](counts)[inner], expected, atol=1e-12)
    assert (MEASURES["entropy"](counts)[~inner] == 1).all()


# ---- a judge -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A judge of a world in which the better response is easy to see, its questions, and pairs."""
    world = World(annotators=("ana",), train_pairs=(12,), test_pairs=2, conflict=0.0)
    home = tmp_path_factory.mktemp("judge") / "home"
    world.write(home)
    checkpoint = Checkpoint(str(home / "model"))
    options = ModelOptions(model=str(home / "model"), device="cpu", compute_dtype="float32")
    pairs = true_pairs(world.paths(home)["ana"][0])
    questions = questions_of(pairs, checkpoint.tokenizer, 0)
    fitting = Fitting(60, 12, 5e-3)
    return fitted(open_policy(checkpoint, options), questions.items(), fitting, 0), questions, pairs


@pytest.mark.slow
def test_a_judge_learns_the_letter_of_the_chosen_response(judge):
    _, questions, _ = judge
    assert set(questions.chosen_first.tolist()) == {True, False}
    for item, is_first in zip(questions.items(), questions.chosen_first, strict=True):
        assert item.responses == [[questions.letters[0 if is_first else 1]]]


def by_characters():
    """A tokenizer that writes every character as its code, for texts alone."""

    class Characters:
        def encode(self, texts, _):
            return [[ord(c) for c in text] for text in texts]

    return Characters()


def test_what_a_question_says():
    pair = Pair("\n\nHuman: x\n\nAssistant:", " good word", " bad word")
    questions = questions_of([pair] * 40, by_characters(), 1)
    texts = {"".join(map(chr, ids)) for ids in questions.texts}
    assert texts == {"A: good word\nB: bad word\n?", "A: bad word\nB: good word\n?"}
    for ids, is_first in zip(questions.texts, questions.chosen_first):
        assert "".join(map(chr, ids)).startswith("A: good") == is_first
    assert questions.letters == [ord("A"), ord("B")]


@pytest.mark.slow
def test_answers_are_drawn_with_the_judges_own_probabilities(judge):
    """A judge that learned its pairs by heart is sure of them, and its draws say the same."""
    model, questions, _ = judge
    own = letter_probabilities(model, questions)
    assert own.shape == (12, 2) and (own.sum(1) <= 1 + 1e-6).all()
    answers = drawn_answers(model, questions, 400, 0)
    shares = counts_of(answers, 3)[:, :2] / 400
    spread = np.sqrt(np.maximum(own * (1 - own), 1e-3) / 400)
    assert (np.abs(shares - own) < 4.5 * spread).all()
    right = own.argmax(1) == (~questions.chosen_first).astype(int)
    assert right.mean() > 0.9
    assert torch.equal(
        torch.tensor(drawn_answers(model, questions, 3, 0)), torch.tensor(answers[:, :3])
    )


# ---- rates ---------------------------------------------------------------------------------------


def test_rates_are_those_of_the_papers_calibration():
    """With an outcome of 1 for every pair the reward model's ECE is `pair_ece`."""
    margins = np.random.default_rng(0).normal(size=500)
    rates = rates_of_margins(margins, np.ones(500))
    assert rates["ece"] == pytest.approx(pair_ece(margins), abs=1e-12)
    assert rates["accuracy"] == np.mean(margins > 0)
    exact = rates_of(np.array([0.7, 0.7, 0.9]), np.array([0.6, 0.8, 0.5]))
    assert exact["ece"] == pytest.approx(0.4 / 3) and exact["confidence"] == pytest.approx(2.3 / 3)


def test_true_probabilities_are_those_of_the_annotator_of_each_pair(tmp_path):
    world = World(annotators=("ana", "ben"), train_pairs=(2,), test_pairs=5, conflict=0.5)
    paths = world.write(tmp_path / "home")
    tests = [true_pairs(test) for _, test in paths.values()]
    p = true_probabilities(world, tests)
    for k, own in enumerate(tests):
        margins = 2.0 * world.true_margins(own)[:, k]
        np.testing.assert_allclose(p[5 * k : 5 * k + 5], 1 / (1 + np.exp(-margins)))


def test_margins_are_of_the_same_pairs_as_the_questions(tmp_path, monkeypatch):
    """Both read the test files of all annotators, label ties left out, in one order."""
    world = World(annotators=("ana", "ben"), train_pairs=(3,), test_pairs=9, ties=0.4, seed=2)
    world.write(tmp_path / "home")
    seen = []

    def untrained(model, items, fitting, seed, objective, source):
        seen.append(source)
        return model

    monkeypatch.setattr(experiment, "fitted", untrained)
    home = Home(tmp_path / "home", world)
    margins = reward_margins(home, 1.0, Fitting(1, 1, 1e-3))
    options = ModelOptions(model=str(home.directory / "model"), device="cpu", seed=2)
    model, checkpoint = open_reward_model(options)
    expected = []
    for _, path in world.paths(home.directory).values():
        for pair in true_pairs(path):
            texts = [pair.prompt + pair.chosen, pair.prompt + pair.rejected]
            (rewards,) = group_rewards(model, [encode(texts, checkpoint.tokenizer, 512)[0]])
            expected.append(float(rewards[0] - rewards[1]))
    assert 2 < len(expected) < 18
    np.testing.assert_allclose(margins, expected, atol=1e-5)
    train = [len(true_pairs(path)) for path, _ in world.paths(home.directory).values()]
    assert seen == [[0] * train[0] + [1] * train[1]]


# ---- the experiment ------------------------------------------------------------------------------


@pytest.fixture
def run_tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "QUICK", Fitting(3, 5, 3e-3))
    output = tmp_path / "grid"
    words = ["reproduce", "agreement", "--output", str(output), "--quick", "--pairs", "10"]

    def run(*flags):
        return main([*words, "--test-pairs", "4", *flags]), output

    return run


def test_the_whole_experiment_goes_on_where_it_was_killed(run_tiny, monkeypatch, capsys):
    made, figures_of_world = [], experiment.figures_of_world

    def interrupted(home, share, fitting):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(share)
        return figures_of_world(home, share, fitting)

    monkeypatch.setattr(experiment, "figures_of_world", interrupted)
    assert run_tiny("--seeds", "1")[0] == 130 and made == [1.0]
    monkeypatch.setattr(experiment, "figures_of_world", figures_of_world)
    code, output = run_tiny("--seeds", "1")
    assert code == 0
    report = json.loads((output / "report.json").read_text())
    assert list(report) == list(experiment.AMOUNTS)
    for worlds in report.values():
        assert len(worlds) == 1 and len(worlds[0]) == 2 + 2 * len(MEASURES)
        assert all(0 <= row["ece"] <= 1 for row in worlds[0].values())
    text, before = (output / "report.txt").read_text(), (output / "report.json").read_bytes()
    assert text.strip() in capsys.readouterr().out
    for path in output.glob("report.*"):
        path.unlink()
    assert run_tiny("--seeds", "1")[0] == 0
    assert (output / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--scheme", "more"), "expected no --scheme"),
        (("--regime", "revealed"), "a judge sees no prompt"),
        (("--model", "x", "--source", "a=b,c"), "exists in the world only"),
        (("--pairs", "9"), "expected at least 10"),
    ],
)
def test_what_is_refused(run_tiny, capsys, flags, words):
    code, output = run_tiny(*flags)
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1 and not output.exists()
