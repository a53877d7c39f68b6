"""Whether a method helps: what is trained, which rates are kept, and what the verdict says."""

import json
import math
import shutil

import numpy as np
import pytest

from minimore.cli import main
from minimore.lab import cells, trial
from minimore.lab.statistics import figures_of
from minimore.lab.trial import Trial, TrialOptions, best_rates
from minimore.lab.verdict import nll_half, sentence, verdict_text
from minimore.uncertainty import student_t


def words_of(world, output, *more):
    directory, paths = world
    words = ["compare-methods", "--model", str(directory / "model"), "--output", str(output)]
    for name, (train_path, test_path) in paths.items():
        words += ["--source", f"{name}={train_path},{test_path}"]
    return [*words, "--batch-size", "12", "--max-length", "64", *more]


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared") / "trial"
    rates = ["--learning-rate", "1e-3", "--learning-rate", "1e-2"]
    assert main(words_of(world, output, "--seeds", "1", *rates)) == 0
    return output


def test_a_sweep_and_a_verdict(compared):
    runs = sorted(path.name for path in (compared / "runs").iterdir() if path.is_dir())
    assert runs == ["more-0.001-0", "more-0.01-0", "uniform-0.001-0", "uniform-0.01-0"]
    text = (compared / "report.txt").read_text()
    assert "more against uniform:\n  accuracy " in text
    assert "by test prompts alone" in text and "1 of 3 seeds" in text
    entries = json.loads((compared / "report.json").read_text())
    assert {entry["scheme"] for entry in entries} >= {"uniform", "more"}


def test_it_goes_on_with_more_seeds_and_computes_nothing_twice(
    world, compared, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "trial"
    shutil.copytree(compared, output)
    trained = []
    monkeypatch.setattr(cells, "run_cell", lambda _, cell: trained.append(cell.name) or 143)
    words = words_of(world, output, "--seeds", "2", "--learning-rate", "1e-2")
    assert main(words) == 143
    assert trained == ["uniform-0.01-1"]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "finished  uniform-0.01-0" in said and "4 trainings of uniform, more" in said
    assert main([*words, "--epochs", "2"]) == 2
    assert "holds a comparison with epochs 1, not 2" in capsys.readouterr().err


def test_every_method_keeps_the_rate_with_the_lowest_nll(capsys):
    options = TrialOptions(model="m", output="o", learning_rate=(1.0, 2.0, 3.0))
    trials = [
        Trial(method, rate, 0.6, nll)
        for method, nlls in {"uniform": (0.5, 0.4, 0.6), "more": (0.5, 0.6, 0.3)}.items()
        for rate, nll in zip(options.rates, nlls)
    ]
    best = best_rates(options, trials)
    assert best == {"uniform": 2.0, "more": 3.0}
    trial.print_sweep(options, trials, best)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "<- kept" in line] == [lines[1], lines[5]]
    assert lines[6:] == ["more keeps the largest rate of the sweep: a further one may be better"]


@pytest.mark.parametrize(
    "more, says",
    [
        (["--method", "more"], "expected two or more"),
        (["--method", "more", "--method", "more"], "expected every value once"),
        (["--learning-rate", "-1"], "--learning-rate -1"),
        (["--batch-size", "7"], "--batch-size 7"),
        (["--seeds", "0"], "--seeds 0"),
        (["--source", "zoe=a.jsonl"], "has no test file"),
        (["--max-length", "4096"], "was made for 2048 tokens"),
    ],
)
def test_what_cannot_be_compared_is_one_line(world, tmp_path, capsys, more, says):
    assert main(words_of(world, tmp_path / "out", *more)) == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1 and not (tmp_path / "out").exists()


def test_where_more_is_uniform_is_said_before_anything_is_trained(world, tmp_path, capsys):
    words = words_of(world, tmp_path / "out", "--dry-run")
    assert main(words) == 0 and "so MORE is uniform here" not in capsys.readouterr().out
    last = len(words) - 1 - words[::-1].index("--source")
    assert main(words[:last] + words[last + 2 :]) == 0
    assert capsys.readouterr().out.count("so MORE is uniform here") == 1


def test_rates_are_not_tried_where_nothing_can_choose_between_them(world, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(world[1]["ana"][1].read_text().splitlines(keepends=True)[:3]))
    words = ["compare-methods", "--model", str(world[0] / "model"), "--output"]
    words += [str(tmp_path / "out"), "--source", f"ana={world[1]['ana'][0]},{few}"]
    assert main([*words, "--learning-rate", "1e-3", "--learning-rate", "1e-2"]) == 2
    line = capsys.readouterr().err
    assert "no TEST file has 4 prompts" in line and line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_no_comparison_is_left_alone(world, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert main(words_of(world, tmp_path / "out")) == 2
    assert "exists already and holds no comparison" in capsys.readouterr().err


# ---- the verdict ---------------------------------------------------------------------------------

RANDOM = np.random.default_rng(0)
PROMPTS = {"a": np.repeat(np.arange(300), 2), "b": np.arange(400)}


def rows_of(quality, seeds, temperature=1.0, random=RANDOM):
    """Seeds of a method that ranks pairs so well, with margins that are so far too large."""
    rows = []
    for _ in range(seeds):
        margins = {
            name: temperature * (quality + random.normal(size=len(prompts)))
            for name, prompts in PROMPTS.items()
        }
        rows.append(figures_of(margins, PROMPTS))
    return rows


def test_a_better_method_is_called_better_and_a_worse_one_worse():
    schemes = {"uniform": rows_of(0.3, 4), "more": rows_of(1.0, 4), "dro": rows_of(-0.3, 4)}
    better, worse = (
        verdict_text(schemes, ["a", "b"]).split("more against uniform:")[1].split("dro")[:2]
    )
    assert better.count(", better") >= 2 and "worse" not in better
    assert ", worse" in worse and "better" not in worse


@pytest.mark.slow
def test_methods_that_do_not_differ_seldom_seem_to():
    random, flagged = np.random.default_rng(1), 0
    for _ in range(30):
        one, other = (rows_of(0.5, 3, random=random) for _ in range(2))
        flagged += "no clear difference" not in sentence(one, other, ["a", "b"], "accuracy")
    assert flagged <= 6  # 1 or 2 are expected


def test_nll_half_is_that_of_whole_prompts():
    one, other = rows_of(0.5, 1), rows_of(0.5, 1)
    d = np.logaddexp(0, -one[0].margins["a"]) - np.logaddexp(0, -other[0].margins["a"])
    by_prompt = d.reshape(300, 2).mean(1)
    expected = student_t(299) * by_prompt.std(ddof=1) / math.sqrt(300)
    assert nll_half(one, other, "a") == pytest.approx(expected)


@pytest.mark.parametrize("seeds", [1, 3])
def test_of_one_test_prompt_there_is_no_interval(seeds):
    prompts = {"a": np.zeros(1, int)}
    rows, base = (
        [figures_of({"a": np.array([margin + seed])}, prompts) for seed in range(seeds)]
        for margin in (1.0, 0.5)
    )
    text = verdict_text({"base": base, "better": rows}, ["a"])
    assert "NLL" in text and "; a source has one test prompt" in text and "nan" not in text


def test_calibrated_methods_are_not_ranked_by_ece_and_chance_is_said():
    schemes = {"uniform": rows_of(0.0, 3, 0.01), "more": rows_of(0.0, 3, 0.01)}
    text = verdict_text(schemes, ["a", "b"])
    assert "so not ranked" in text and "No method ranks more pairs right" in text
    schemes = {"uniform": rows_of(1.0, 3, 5.0), "more": rows_of(1.0, 3, 1.0)}
    text = verdict_text(schemes, ["a", "b"])
    assert "No method" not in text and "not ranked" not in text
