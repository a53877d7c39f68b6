"""`reproduce curves`: which pairs are of a kind, what a head learns from them, and the report."""

import json

import numpy as np
import pytest
import torch

import minimore.lab.learning_curves as curves
from minimore.calibration import accuracy
from minimore.cli import main
from minimore.data.world import World
from minimore.figures import plots
from minimore.lab.grid import REGIMES
from minimore.lab.learning_curves import KINDS, by_turns, figures_of_world
from minimore.lab.methods.heads import SharedHead
from minimore.lab.word_counts import counted_pairs

WORLD = World(**REGIMES["conflict"], test_pairs=40, seed=3)


@pytest.fixture(scope="module")
def pool():
    return counted_pairs(WORLD, [100] * 5, 0)


def test_kinds_are_what_they_say(pool):
    source, kinds = pool.states.source.tolist(), {name: s(pool) for name, (_, s) in KINDS.items()}
    own = [abs(row[k]) for row, k in zip(pool.log_odds.tolist(), source)]
    median = np.median(own)
    for i, row in enumerate(pool.log_odds.tolist()):
        wanted = sum(value > 0 for value in row)
        assert kinds["agreed"][i] == (wanted in (0, 5))
        assert kinds["contested"][i] == (wanted in (2, 3))
        assert kinds["far"][i] == (own[i] > median) != kinds["close"][i]
        assert kinds["1 source"][i] == (source[i] == 0)
        assert kinds["2 sources"][i] == (source[i] < 2)
    assert kinds["far"].sum() == 250 and kinds["any"].all()


def test_turns_take_one_pair_of_every_source(pool):
    is_of_kind = KINDS["agreed"][1](pool)
    ordered = by_turns(pool.states, is_of_kind)
    assert len(ordered.chosen) == is_of_kind.sum()
    assert ordered.source[:15].tolist() == [0, 1, 2, 3, 4] * 3
    for k in range(5):
        mine = torch.from_numpy(is_of_kind) & (pool.states.source == k)
        assert torch.equal(ordered.chosen[ordered.source == k], pool.states.chosen[mine])


def only(monkeypatch, *kinds):
    """Leave all other kinds out."""
    monkeypatch.setattr(curves, "KINDS", {kind: KINDS[kind] for kind in kinds})


def test_figures_are_those_of_a_head_that_saw_these_pairs(pool, monkeypatch):
    only(monkeypatch, "close", "long")
    figures = figures_of_world(WORLD, 100)
    test = counted_pairs(WORLD, [40] * 5, 1).states
    train = by_turns(pool.states, KINDS["close"][1](pool)).at(torch.arange(80))
    head = SharedHead()
    margins = head.margins(head.fit(train, 0), test, False).numpy().reshape(5, 40)
    expected = np.mean([accuracy(own) for own in margins])
    assert figures["close"]["80"]["accuracy"] == pytest.approx(expected, abs=1e-12)
    assert set(figures["long"]) == {"1", "5", "20", "80"}
    words = World(**REGIMES["conflict"], test_pairs=40, seed=3, response_words=28)
    train = by_turns(counted_pairs(words, [100] * 5, 0).states, np.ones(500, bool))
    margins = head.margins(head.fit(train.at(torch.arange(20)), 0), test, False).numpy()
    expected = np.mean([accuracy(own) for own in margins.reshape(5, 40)])
    assert figures["long"]["20"]["accuracy"] == pytest.approx(expected, abs=1e-12)


def test_a_curve_ends_where_its_kind_does(monkeypatch):
    """One source has too few pairs for the last amount; without drift nothing is contested."""
    only(monkeypatch, "1 source", "contested")
    monkeypatch.setattr(curves, "SHARES", (1 / 100, 1 / 4))
    figures = figures_of_world(World(test_pairs=10, conflict=0.0), 100)
    assert set(figures["contested"]) == set()
    assert set(figures["1 source"]) == {"5"}


# ---- the experiment ------------------------------------------------------------------------------


@pytest.fixture
def run_few(monkeypatch, tmp_path):
    only(monkeypatch, "any", "far")
    monkeypatch.setattr(curves, "SHARES", (1 / 400, 4 / 25))
    output = tmp_path / "grid"
    words = ["reproduce", "curves", "--output", str(output), "--pairs", "80", "--test-pairs", "40"]
    return lambda *flags: (main([*words, "--seeds", "3", *flags]), output)


def test_the_report_and_a_kill(run_few, monkeypatch, capsys):
    monkeypatch.setattr(plots, "available", lambda: False)
    code, output = run_few()
    assert code == 0
    text, whole = (output / "report.txt").read_text(), (output / "report.json").read_bytes()
    worlds = json.loads(whole)
    gaps = [world["far"]["64"]["accuracy"] - world["any"]["64"]["accuracy"] for world in worlds]
    (line,) = [line for line in text.splitlines() if line.startswith("far")][:1]
    assert f"{np.mean(gaps):+.3f}" in line
    assert text.strip() in capsys.readouterr().out
    (output / "worlds" / "1.json").write_text("{")
    (output / "report.json").unlink()
    assert run_few()[0] == 0
    assert (output / "report.json").read_bytes() == whole


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--scheme", "more"), "expected no --scheme"),
        (("--model", "x", "--source", "a=b,c"), "exists in the world only"),
        (("--pairs", "79"), "expected at least 80"),
    ],
)
def test_what_is_refused(run_few, capsys, flags, words):
    code, output = run_few(*flags)
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1 and not output.exists()
