"""`choose`: points of a grid, the taste behind comparisons, which to ask, and the verb."""

import io
import json
import math
from itertools import product
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from people import SimulatedPerson, asked_until_over, at_random, random_front

from minimore.checksums import write_checked_json
from minimore.cli import main
from minimore.lab.choosing import taste
from minimore.lab.choosing.asking import (
    informations,
    most_informative,
    standing_of,
)
from minimore.lab.choosing.points import Point, pareto, points_of, seconds_in, standardised
from minimore.lab.choosing.taste import MEAN, SPREAD, learned_taste
from minimore.more import pair_losses

# ---- points --------------------------------------------------------------------------------------

# accuracy and ECE of every scheme, and seconds of its training
SCHEMES = {
    "uniform": (0.70, 0.060, 10.0),
    "more": (0.72, 0.040, 20.0),
    "group dro": (0.69, 0.070, 30.0),  # beaten by both
    "raw": (0.50, 0.001, None),
    "single ana": (0.60, 0.200, 4.0),  # a model of one source
    "single ben": (0.60, 0.200, 6.0),
    "top": (0.80, 0.100, None),
    "uniform + T": (0.70, 0.020, None),
}


@pytest.fixture
def grid(tmp_path):
    """A finished grid of table2, with two seeds of two sources; ben is the worst by .02."""
    grid = tmp_path / "grid"
    entries = []
    for scheme, (accuracy, ece, seconds) in SCHEMES.items():
        for seed in (0, 1):
            entry = {"size": 16, "scheme": scheme, "seed": seed}
            entry["accuracy"] = {"ana": accuracy + 0.01, "ben": accuracy - 0.01}
            entries.append(entry | {"ece": {"ana": ece, "ben": ece + 0.002 * seed}})
            if seconds:
                run = grid / "runs" / f"16-{scheme.replace(' ', '_')}-{seed}"
                run.mkdir(parents=True)
                ends = (1.0, seconds + seed)
                lines = [json.dumps({"step": i, "seconds": s}) for i, s in enumerate(ends)]
                (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_checked_json(grid / "grid.json", {"experiment": "table2"})
    (grid / "report.json").write_text(json.dumps(entries))
    return grid


def test_the_points_of_a_table(grid):
    points = {point.name: point.criteria for point in points_of(grid, "conflict")}
    names = ["uniform", "more", "group dro", "raw", "top", "uniform + T"]
    assert list(points) == [f"{name}, 16" for name in names]
    np.testing.assert_allclose(points["more, 16"], [0.72, 0.71, 0.0405, 20.5])
    np.testing.assert_allclose(points["uniform + T, 16"], [0.70, 0.69, 0.0205, 10.5])
    assert points["raw, 16"][3] == 0 and points["top, 16"][3] == 4.5 + 6.5
    front = [point.name for point in pareto(points_of(grid, "conflict"))]
    assert front == ["more, 16", "raw, 16", "top, 16", "uniform + T, 16"]


def test_a_clock_that_began_anew_is_added(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"seconds": s}) + "\n" for s in (1, 5, 2, 3, 0.5)))
    assert seconds_in(log) == 5 + 3 + 0.5


def test_the_points_of_methods(tmp_path):
    def figures(accuracy, seconds):
        rates = {"accuracy": [accuracy, accuracy - 0.1], "ece": [0.02, 0.04]}
        return {"unknown": rates} | ({"seconds": seconds} if seconds else {})

    worlds = [{"truth": figures(0.9, None), "own": figures(a, 2.0)} for a in (0.7, 0.8)]
    write_checked_json(tmp_path / "grid.json", {"experiment": "methods"})
    (tmp_path / "report.json").write_text(json.dumps({"mild": worlds}))
    (point,) = points_of(tmp_path, "mild")
    assert point.name == "own"
    np.testing.assert_allclose(point.criteria, [0.7, 0.65, 0.03, 2.0])


def test_a_point_is_left_out_if_another_is_as_good_and_somewhere_better():
    random = np.random.default_rng(0)
    points = [Point(str(i), random.integers(3, size=4).astype(float)) for i in range(60)]
    front = {point.name for point in pareto(points)}
    for point in points:
        better = [
            other
            for other in points
            if all(s * a >= s * b for s, a, b in zip((1, 1, -1, -1), other[1], point[1]))
            and tuple(other[1]) != tuple(point[1])
        ]
        assert (point.name in front) == (not better)


def test_standardised_criteria_are_signed_and_equal_ones_count_nothing():
    points = [
        Point("a", np.array([0.7, 0.5, 0.1, 10.0])),
        Point("b", np.array([0.8, 0.5, 0.2, 20])),
    ]
    scaled = standardised(points)
    np.testing.assert_allclose(scaled, [[-1, 0, 1, 1], [1, 0, -1, -1]], atol=1e-12)
    doubled = [point._replace(criteria=point.criteria * [1, 1, 1, 7]) for point in points]
    np.testing.assert_allclose(standardised(doubled), scaled, atol=1e-12)  # seconds by logarithm


# ---- taste ---------------------------------------------------------------------------------------


def test_without_a_comparison_the_taste_is_the_prior():
    learned = learned_taste(np.zeros((0, 4)))
    np.testing.assert_allclose(learned.mean, MEAN)
    np.testing.assert_allclose(learned.covariance, SPREAD**2 * np.eye(4), atol=1e-12)


def test_the_likeliest_taste_and_its_spread_are_those_of_a_search():
    """In one dimension: the maximum of the posterior on a fine grid, and its curvature there."""
    differences = np.array([[1.0], [0.5], [-0.7], [2.0]])
    learned = learned_taste(differences)
    w = np.linspace(-6, 12, 360_001)
    posterior = -((w - MEAN) ** 2) / (2 * SPREAD**2)
    posterior -= np.logaddexp(0, -differences * w).sum(0)
    assert learned.mean[0] == pytest.approx(w[posterior.argmax()], abs=1e-4)
    i, step = posterior.argmax(), w[1] - w[0]
    curvature = (posterior[i - 200] - 2 * posterior[i] + posterior[i + 200]) / (200 * step) ** 2
    assert learned.covariance[0, 0] == pytest.approx(-1 / curvature, rel=1e-4)
    draws = learned.draws()
    assert draws.std() == pytest.approx(math.sqrt(learned.covariance[0, 0]), rel=0.1)


def test_the_taste_minimises_the_packages_own_bradley_terry_loss():
    """By autograd of `pair_losses`, also where answers contradict the prior and one another."""
    random = np.random.default_rng(2)
    for size in (0.1, 1.0, 10.0):
        differences = size * random.normal(size=(15, 4)) - size
        learned, d = learned_taste(differences), torch.from_numpy(differences)

        def loss(w, d=d):
            return pair_losses(d @ w).sum() + (w - MEAN).square().sum() / (2 * SPREAD**2)

        w = torch.from_numpy(learned.mean).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(w), w)
        assert gradient.abs().max() < 1e-7
        hessian = torch.autograd.functional.hessian(loss, w.detach()).numpy()
        np.testing.assert_allclose(np.linalg.inv(hessian), learned.covariance, rtol=1e-6)


# ---- asking --------------------------------------------------------------------------------------


def test_information_is_the_mutual_information_of_a_loop():
    random = np.random.default_rng(1)
    points, draws = random.normal(size=(4, 3)), random.normal(size=(50, 3))
    pairs = [(0, 1), (1, 3), (2, 0)]
    values = informations(points, draws, pairs)
    for (a, b), value in zip(pairs, values):
        joint = np.zeros((4, 2))  # of the best point and the answer
        for w in draws:
            p = 1 / (1 + math.exp(-w @ (points[a] - points[b])))
            joint[(points @ w).argmax()] += np.array([p, 1 - p]) / len(draws)
        best, answer = joint.sum(1), joint.sum(0)
        expected = sum(
            joint[i, j] * math.log(joint[i, j] / (best[i] * answer[j]))
            for i, j in product(range(4), range(2))
            if joint[i, j] > 0
        )
        assert value == pytest.approx(expected, abs=1e-9)
    assert (values >= -1e-12).all()


def test_a_criterion_on_which_no_choice_hangs_is_not_asked_about():
    """One point wins by any likely taste: it is clear at once, however vague the taste is."""
    points = np.array([[3.0, 3.0], [0.0, 0.1], [0.1, 0.0]])
    standing = standing_of(points, [])
    assert standing.best == 0 and standing.is_clear and standing.is_over


@pytest.mark.slow
def test_a_known_taste_is_served_with_fewer_comparisons_than_at_random(monkeypatch):
    """Over many tastes: by more than three standard errors, and no worse a point in the end."""
    monkeypatch.setattr(taste, "DRAWS", 200)
    saved, losses = [], []
    for seed in range(16):
        random = np.random.default_rng(seed)
        points = random_front(random)
        person = SimulatedPerson(points, random)
        counts, regrets = [], []
        for choose in (most_informative, at_random(random)):
            answers, standing = asked_until_over(points, person, choose)
            assert len({frozenset(pair) for pair in answers}) == len(answers)
            counts.append(len(answers))
            regrets.append(person.values.max() - person.values[standing.best])
        saved.append(counts[1] - counts[0])
        losses.append(regrets[0] - regrets[1])
    error = np.std(saved, ddof=1) / math.sqrt(len(saved))
    assert np.mean(saved) > 3 * error, (np.mean(saved), error)
    assert np.mean(losses) < 3 * np.std(losses, ddof=1) / math.sqrt(len(losses)) + 1e-9


# ---- the verb ------------------------------------------------------------------------------------


@pytest.fixture
def answer(monkeypatch):
    """Type these answers; behind them the terminal is closed."""

    def type_answers(*words):
        rest = iter(words)

        def typed(_):
            try:
                return next(rest)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", typed)

    return type_answers


def test_choosing_goes_on_where_it_was_left(grid, tmp_path, answer, capsys):
    """Killed after every answer it asks the same, and stores the same, as in one go."""
    words = ["choose", str(grid), "--output"]
    answer("a", "B", "what?", "a", "enough")
    assert main([*words, str(tmp_path / "whole.json")]) == 0
    whole = capsys.readouterr().out
    for letter in ("a", "b", "a"):
        answer(letter)
        assert main([*words, str(tmp_path / "cut.json")]) == 0
    cut = capsys.readouterr().out
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert cut.splitlines()[-1] == whole.splitlines()[-1]
    assert "6 points; 2 of them are left out" in whole and "your choice after 3" in whole


def test_answers_of_a_file_count_like_typed_ones(grid, tmp_path, answer, capsys):
    answer("a", "b")
    output = tmp_path / "typed.json"
    assert main(["choose", str(grid), "--output", str(output)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    pairs = json.loads(output.read_text())["answers"]
    lines = [json.dumps(dict(zip(("chosen", "rejected"), pair))) + "\n" for pair in pairs]
    (tmp_path / "answers.jsonl").write_text("".join(lines))
    answer("enough")
    assert main(["choose", str(grid), "--answers", str(tmp_path / "answers.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_what_the_verb_refuses(grid, tmp_path, answer, capsys):
    answer()
    file = tmp_path / "file.jsonl"

    def refusal(*words):
        assert main(["choose", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "holds no finished grid" in refusal(tmp_path)
    assert "holds no finished grid" in refusal(tmp_path / "nowhere")
    file.write_text('{"chosen": "more, 16", "rejected": "mroe, 16"}\n')
    assert "file.jsonl:1: 'mroe, 16' is none of the points" in refusal(grid, "--answers", file)
    file.write_text('{"chosen": "more, 16", "rejected": "more, 16"}\n')
    assert "with itself" in refusal(grid, "--answers", file)
    write_checked_json(file, {"points": ["a", "b"], "answers": []})
    assert "answers about other points" in refusal(grid, "--output", file)
    file.write_text("{}")
    assert "checksum" in refusal(grid, "--output", file)
    for log in grid.glob("runs/16-more-*/metrics.jsonl"):
        log.write_text("{}")
    assert "is not a report of table2" in refusal(grid)
    for log in grid.glob("runs/16-more-*/metrics.jsonl"):
        log.unlink()
    assert "holds no 16-more-SEED/metrics.jsonl" in refusal(grid)
    (grid / "report.json").write_text('[{"size": 16}]')
    assert "is not a report of table2" in refusal(grid)
    write_checked_json(grid / "grid.json", {"experiment": "figure7"})
    assert "is a grid of figure7; expected one of table2, methods" in refusal(grid)


@pytest.mark.parametrize(
    "damage",
    [{"accuracy": {}}, {"accuracy": {"ana": 10**400}}, {"ece": {"ana": 1e308, "ben": 1e308}}],
)
def test_a_report_with_impossible_numbers_is_refused_in_one_line(grid, capsys, damage):
    report = grid / "report.json"
    entries = json.loads(report.read_text())
    report.write_text(json.dumps([entry | damage for entry in entries]))
    assert main(["choose", str(grid)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not a report of table2" in error


def test_nobody_can_answer_where_there_is_no_input_or_none_that_is_text(grid, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["choose", str(grid)]) == 0
    assert "your choice after 0 comparisons" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    assert main(["choose", str(grid)]) == 2
    assert "holds bytes that are no text" in capsys.readouterr().err


def test_answers_of_another_process_are_not_overwritten(grid, tmp_path, monkeypatch, capsys):
    words = ["choose", str(grid), "--output", str(tmp_path / "answers.json")]

    def slow_answer(_):
        """While this one thinks, another person answers."""
        monkeypatch.setattr("builtins.input", Mock(side_effect=["a", "b", EOFError]))
        assert main(words) == 0
        return "b"

    monkeypatch.setattr("builtins.input", slow_answer)
    assert main(words) == 2
    assert "another process has changed it" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "answers.json").read_text())["answers"]) == 2
