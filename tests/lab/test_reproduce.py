"""Grids: the right cells, killed and continued to the same table; tables that say what the margins say."""

import json
import math
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

import minimore.lab.grid
from minimore.calibration import accuracy, fit_temperature, pair_ece
from minimore.cli import main
from minimore.data.world import World
from minimore.lab import published
from minimore.lab.grid import (
    REGIMES,
    SCHEMES,
    ReproduceOptions,
    check_plan,
    fingerprint,
    margins_of,
    plan,
)
from minimore.lab.reproduce import (
    cell_text,
    difference_text,
    figures_of,
    noise_of_pairs,
    scheme_table,
    with_derived,
)
from minimore.uncertainty import detectable, over_seeds

TINY = ["--width", "16", "--pairs", "10", "--test-pairs", "24", "--batch-size", "10"]
SCALING = ["--width", "16", "--pairs", "16", "--test-pairs", "24"]


def report(out):
    return (out / "report.txt").read_text()


# ---- the plan --------------------------------------------------------------------------------------------------------------


def test_table_2_has_the_cells_of_the_paper(tmp_path):
    cells = plan(ReproduceOptions(experiment="table2", output=str(tmp_path)))
    assert len(cells) == 3 * 3 * (1 + 5 + 3) and len({cell.name for cell in cells}) == len(cells)
    for cell in (c for c in cells if c.at["scheme"] != "raw"):
        singles = cell.at["scheme"].startswith("single ")
        steps = cell.options["pairs_per_source"] * len(cell.sources) / cell.options["batch_size"]
        assert (len(cell.sources), steps) == (
            (1, 80) if singles else (5, 400)
        )  # each on its own fifth of the steps
        assert len(cell.tests) == 5 and cell.world.seed == cell.at["seed"] == cell.options["seed"]


def test_every_experiment_has_a_plan(tmp_path):
    count = {
        e: len(plan(ReproduceOptions(experiment=e, output=str(tmp_path))))
        for e in ("regimes", "sources", "scaling", "drift")
    }
    assert count == {
        "regimes": 3 * len(REGIMES) * 4,
        "sources": 3 * 4 * 2,
        "scaling": 3 * 2 * 3 * 3 * (5 + 1),
        "drift": 3 * 3,
    }
    assert [
        len(c.sources)
        for c in plan(ReproduceOptions(experiment="sources", output="x", seeds=1, scheme=("more",)))
    ] == [2, 3, 4, 5]
    clean, authors = (
        next(
            c
            for c in plan(ReproduceOptions(experiment="drift", output="x", protocol=p))
            if c.at["scheme"] == "more"
        )
        for p in ("clean", "authors")
    )
    assert (
        "lambda_scope" not in clean.options
        and authors.options["lambda_scope"] == "group"
        and authors.options["gradient_average"] == 0.99
    )


def test_a_dry_run_prints_the_cells_and_writes_nothing(tmp_path, capsys):
    assert (
        main(
            ["reproduce", "table2", "--output", str(tmp_path / "grid"), "--dry-run", "--seeds", "1"]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "27 runs, 0 of them finished" in said
        and said.count("to do") == 27
        and re.search(r"about \d+\.\d\d hours", said)
    )
    assert not (tmp_path / "grid").exists()


# ---- running ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished grid: every scheme, two seeds."""
    out = tmp_path_factory.mktemp("grid") / "whole"
    assert (
        main(
            [
                "reproduce",
                "table2",
                "--output",
                str(out),
                "--seeds",
                "2",
                *TINY,
                *(a for s in SCHEMES for a in ("--scheme", s)),
            ]
        )
        == 0
    )
    return out


def test_tables_say_what_the_margins_say(whole):
    o = ReproduceOptions(
        experiment="table2",
        output=str(whole),
        seeds=2,
        width=(16,),
        pairs=10,
        test_pairs=24,
        batch_size=10,
        scheme=tuple(SCHEMES),
    )
    cells = {(c.at["scheme"], c.at["seed"]): margins_of(whole, c, o) for c in plan(o)}
    assert len(cells) == 2 * (5 + len(SCHEMES) - 1)
    test = lambda scheme, seed: {name: m[t] for name, (m, t, _) in cells[scheme, seed].items()}
    held = [p[~t] for sources in cells.values() for _, t, p in sources.values()]
    assert all((p % 4 == 0).all() and len(p) for p in held) and sum(
        map(len, held)
    ) == pytest.approx(
        0.25 * sum(len(m) for s in cells.values() for m, _, _ in s.values()), rel=0.1
    )
    text = report(whole)
    every = {(e["scheme"], e["seed"]): e for e in json.loads((whole / "report.json").read_text())}
    for scheme in ("uniform", "more", "group dro", "smoothing", "multitask", "more per group"):
        line = next(l for l in text.splitlines() if re.match(rf"{scheme} +[\d.]", l))
        means = [
            np.mean([f(m) for m in test(scheme, s).values()])
            for f in (accuracy, pair_ece)
            for s in (0, 1)
        ]
        assert line.split(scheme)[1].split()[:6] == [
            f"{np.mean([accuracy(test(scheme, s)[n]) for s in (0, 1)]):.3f}"
            for n in test(scheme, 0)
        ] + [f"{np.mean(means[:2]):.3f}"]
        assert f"|{np.mean(means[2:]):15.3f}" in line and all(
            0 < x < 1 for x in every[scheme, 0]["floor"].values()
        )
        if scheme != "uniform":
            base = np.mean([accuracy(m) for s in (0, 1) for m in test("uniform", s).values()])
            assert f"{np.mean(means[:2]) - base:+.3f}" in line
    top = np.mean([accuracy(test(f"single {n}", s)[n]) for s in (0, 1) for n in test("uniform", 0)])
    assert f"{top:.3f}" in next(l for l in text.splitlines() if l.startswith("top "))
    assert (
        "trained on / tested on" in text
        and "62.38* 62.64" in text
        and (whole / "figures" / "size-16.png").stat().st_size > 5000
    )
    assert all((whole / "runs" / c.name / "config.json").is_file() for c in plan(o) if c.sources)
    assert (
        every["more", 1]["ece"] == {n: pair_ece(m) for n, m in test("more", 1).items()}
        and every["top", 0]["size"] == 16
    )
    raw, again = test("raw", 0), test("raw", 1)
    assert all(not np.array_equal(raw[n], again[n]) for n in raw) and re.search(
        r"(?m)^raw +[.0-9]", text
    )


def test_a_finished_grid_runs_nothing_again(whole, monkeypatch):
    before = report(whole)
    monkeypatch.setattr("minimore.lab.grid.train", lambda *a: 1 / 0)
    assert (
        main(
            [
                "reproduce",
                "table2",
                "--output",
                str(whole),
                "--seeds",
                "2",
                *TINY,
                *(a for s in SCHEMES for a in ("--scheme", s)),
            ]
        )
        == 0
    )
    assert report(whole) == before


def test_a_grid_interrupted_anywhere_ends_with_the_same_table(tmp_path, monkeypatch, capsys):
    command = lambda name: [
        "reproduce",
        "sources",
        "--output",
        str(tmp_path / name),
        "--seeds",
        "1",
        *TINY[:-2],
        "--batch-size",
        "60",
        "--scheme",
        "more",
    ]
    assert main(command("whole")) == 0
    chance = np.random.default_rng(0)
    for name in ("write_tensors", "train", "source_margins", "random_checkpoint"):
        real, left = getattr(minimore.lab.grid, name), [int(chance.integers(1, 5))]

        def interrupt(*arguments, **named):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        monkeypatch.setattr(minimore.lab.grid, name, interrupt)
        code = main(command("cut"))
        assert code in (0, 130)
        monkeypatch.setattr(minimore.lab.grid, name, real)
    assert main(command("cut")) == 0
    assert report(tmp_path / "cut") == report(tmp_path / "whole")
    assert not list((tmp_path / "cut").rglob("*.partial*"))


def test_a_killed_grid_ends_with_the_same_table(tmp_path):
    command = lambda name: [
        sys.executable,
        "-m",
        "minimore",
        "reproduce",
        "drift",
        "--output",
        str(tmp_path / name),
        "--seeds",
        "1",
        *TINY,
        "--scheme",
        "uniform",
        "--scheme",
        "more",
    ]
    with subprocess.Popen(command("cut"), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("[1/2]"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    for name in ("cut", "whole"):
        assert subprocess.run(command(name), stdout=subprocess.DEVNULL).returncode == 0
    assert report(tmp_path / "cut") == report(tmp_path / "whole")
    assert (
        "slope own drift" in report(tmp_path / "whole")
        and len(re.findall(r"(?m)^more ", report(tmp_path / "whole"))) >= 4
    )


@pytest.mark.parametrize(
    "experiment, more",
    [
        ("regimes", ["--scheme", "uniform", "--scheme", "more"]),
        ("scaling", []),
        ("table2", ["--protocol", "authors", "--quick"]),
    ],
)
def test_the_other_experiments_run(experiment, more, tmp_path):
    assert (
        main(
            [
                "reproduce",
                experiment,
                "--output",
                str(tmp_path / "grid"),
                "--seeds",
                "1",
                *SCALING,
                *more,
            ]
        )
        == 0
    )
    text = report(tmp_path / "grid")
    if experiment == "regimes":
        assert all(f"regime {r}" in text for r in REGIMES)
    if experiment == "scaling":
        assert (
            len(re.findall(r"(?m)^(conflict|revealed) ", text)) == 6 and "cost of sharing" in text
        )
    if experiment == "table2":
        assert "+ T" not in text  # the authors fit no temperature, and use every test pair


def test_real_files_and_checkpoints(tmp_path):
    """The same command with --model and --source; intervals come from the test pairs, too."""
    paths = World(annotators=("ana", "ben", "cleo"), train_pairs=(20,), test_pairs=40).write(
        tmp_path / "world"
    )
    given = [a for n, (x, y) in paths.items() for a in ("--source", f"{n}={x},{y}")]
    out = tmp_path / "grid"
    assert (
        main(
            [
                "reproduce",
                "table2",
                "--output",
                str(out),
                "--model",
                str(tmp_path / "world" / "model"),
                *given,
                "--seeds",
                "1",
                "--pairs",
                "12",
                "--scheme",
                "uniform",
                "--scheme",
                "more",
            ]
        )
        == 0
    )
    line = next(l for l in report(out).splitlines() if l.startswith("more "))
    assert line.count("±") >= 6 and "bootstrap by prompt" in report(out)


def test_other_files_at_the_same_place_are_noticed(tmp_path):
    paths = World(annotators=("ana", "ben", "cleo"), train_pairs=(20,), test_pairs=40).write(
        tmp_path / "world"
    )
    given = [a for n, (x, y) in paths.items() for a in ("--source", f"{n}={x},{y}")]
    cells = lambda: check_plan(
        ReproduceOptions(
            experiment="table2",
            output=str(tmp_path / "g"),
            model=(str(tmp_path / "world" / "model"),),
            source=tuple(given[1::2]),
            scheme=("uniform",),
        )
    )
    before = [fingerprint(c) for c in cells()]
    assert before == [fingerprint(c) for c in cells()] and len(set(before)) == 3
    weights = tmp_path / "world" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    changed = [fingerprint(c) for c in cells()]
    assert not set(before) & set(changed)
    paths["ben"][1].write_text(paths["ana"][1].read_text())
    minimore.lab.grid._digest.cache_clear()
    assert not set(changed) & {fingerprint(c) for c in cells()}


def test_two_models_of_one_name_are_refused(tmp_path, capsys):
    paths = World(annotators=("ana", "ben"), train_pairs=(20,), test_pairs=40).write(
        tmp_path / "world"
    )
    given = [a for n, (x, y) in paths.items() for a in ("--source", f"{n}={x},{y}")]
    model = str(tmp_path / "world" / "model")
    assert (
        main(
            [
                "reproduce",
                "table2",
                "--output",
                str(tmp_path / "g"),
                "--model",
                model,
                "--model",
                model,
                *given,
            ]
        )
        == 2
    )
    assert "given twice" in capsys.readouterr().err
    assert (
        main(
            [
                "reproduce",
                "table2",
                "--output",
                str(tmp_path / "g"),
                "--model",
                model,
                "--source",
                f"a={paths['ana'][0]},{paths['ana'][0]}",
            ]
        )
        == 2
    )
    assert "both training and test" in capsys.readouterr().err and not (tmp_path / "g").exists()


def test_equally_calibrated_schemes_are_not_ranked_by_sharpness():
    """Two calibrated models, one sharp and one blunt: a plain ECE differs by what noise adds to it."""
    random, flags = np.random.default_rng(0), 0
    for _ in range(40):
        rows = {"uniform": [], "more": []}
        for _ in range(5):
            odds = random.normal(0, 1, (2, 3, 400)) * np.array([0.1, 1])[:, None, None]
            m = np.where(random.random(odds.shape) < 1 / (1 + np.exp(-odds)), odds, -odds)
            for scheme, x in zip(rows, m):
                margins, prompts = dict(zip("abc", x)), dict.fromkeys("abc", np.arange(400))
                rows[scheme].append(
                    figures_of(margins, prompts) | {"margins": margins, "prompts": prompts}
                )
        line = next(l for l in scheme_table(rows, list("abc")).splitlines() if l.startswith("more"))
        flags += "!" in line.split("|")[2].split("±")[2][:8]
    assert flags == 0


def test_what_cannot_be_run_is_refused(whole, tmp_path, capsys):
    def refused(*arguments):
        assert main(["reproduce", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    out = tmp_path / "grid"
    assert "go together" in refused("table2", "--output", out, "--model", "x")
    assert "no test file" in refused("table2", "--output", out, "--model", "x", "--source", "a=b")
    alone = World(annotators=("ana",), train_pairs=(9,), test_pairs=9).write(tmp_path / "alone")[
        "ana"
    ]
    assert "at least two sources" in refused(
        "sources",
        "--output",
        out,
        "--model",
        tmp_path / "alone" / "model",
        "--source",
        f"a={alone[0]},{alone[1]}",
    )
    assert "world only" in refused("drift", "--output", out, "--model", "x", "--source", "a=b,c")
    assert "multiple of 8" in refused("table2", "--output", out, "--width", 12)
    assert "--seeds 0" in refused("table2", "--output", out, "--seeds", 0)
    assert "EXPERIMENT is missing" in refused("--output", out)
    assert "table3: expected one of table2, regimes" in refused("table3", "--output", out)
    assert "holds a grid with test_pairs 24, not 25" in refused(
        "table2",
        "--output",
        whole,
        *TINY,
        *(a for s in SCHEMES for a in ("--scheme", s)),
        "--test-pairs",
        25,
    )
    assert "expected other schemes" in refused("drift", "--output", out, "--scheme", "raw")
    assert "expected other schemes" in refused("drift", "--output", out, "--regime", "reversed")
    for flags in (
        ("--pairs", 0),
        ("--batch-size", 0),
        ("--batch-size", 7),
        ("--learning-rate", 0),
        ("--max-length", 0),
        ("--micro-tokens", 0),
        ("--width", 16, "--width", 16),
    ):
        refused("table2", "--output", out, *flags)
    refused("sources", "--output", out, "--batch-size", 10)
    refused("scaling", "--output", out, "--pairs", 4)
    assert "holds no grid" in refused("table2", "--output", tmp_path)
    assert not out.exists()


# ---- tables ------------------------------------------------------------------------------------------------------------------


def test_derived_schemes():
    random, test = np.random.default_rng(0), np.arange(40) % 4 != 0
    single = {
        f"single {n}": {m: (random.normal(0.5, s, 40), test, np.arange(40)) for m in "ab"}
        for n, s in (("a", 1), ("b", 9))
    }
    found = with_derived(
        single
        | {"uniform": {m: (3 * random.normal(0.5, 1, 40), test, np.arange(40)) for m in "ab"}}
    )
    values = lambda scheme, name: single[scheme][name][0]
    assert np.array_equal(found["top"]["b"], values("single b", "b")[test])
    assert np.allclose(
        found["averaging"]["a"], (values("single a", "a") + values("single b", "a"))[test] / 2
    )
    held = {s: np.concatenate([single[s][m][0][~test] for m in "ab"]) for s in single}
    assert np.allclose(
        found["averaging scaled"]["a"],
        sum(values(s, "a")[test] / np.sqrt((held[s] ** 2).mean()) for s in single) / 2,
    )
    assert len(found["uniform + T"]["a"]) == test.sum() and accuracy(
        found["uniform + T"]["a"]
    ) == accuracy(found["uniform"]["a"])
    ratio = found["uniform"]["a"][0] / found["uniform + T"]["a"][0]
    assert (
        0 < ratio == pytest.approx(found["uniform"]["b"][3] / found["uniform + T"]["b"][3])
        and ratio != 1
    )
    assert "single a + T" not in found and fit_temperature([1.0, -0.5]) > 0


def test_intervals_and_flags():
    assert (
        cell_text([0.5, 0.6, 0.7]) == f"0.600 ± {over_seeds([0.5, 0.6, 0.7])[1]:.3f}"
        and cell_text([0.5]) == "0.500"
    )
    assert (
        cell_text([0.5], 0.03) == "0.500 ± 0.030"
        and cell_text([0.5, 0.6, 0.7], 0.1)
        == f"0.600 ± {math.hypot(0.1, over_seeds([0.5, 0.6, 0.7])[1]):.3f}"
    )
    assert difference_text([0.1, 0.1001, 0.0999]).endswith("!") and not difference_text(
        [0.1, -0.1, 0.05]
    ).endswith("!")
    assert not difference_text([0.1, 0.1001, 0.0999], may_flag=False).endswith(
        "!"
    ) and not difference_text([0.1, 0.1001, 0.0999], 0.2).endswith("!")
    assert (
        difference_text([0.1], 0.02).strip() == "+0.100 ± 0.020"
        and difference_text([0.1, 0.2]).strip() == "+0.150"
    )  # too few seeds to flag
    assert difference_text([-0.1, -0.2]).strip() == "-0.150"
    random, found = np.random.default_rng(0), 0
    for _ in range(2000):  # the power that detectable() promises
        sample = random.normal(0, 1, 10)
        shift = (2.262 + 0.842) / math.sqrt(10)
        found += difference_text(sample + shift).endswith("!")
        assert detectable(sample) == pytest.approx(shift * sample.std(ddof=1), rel=0.01)
    assert found / 2000 == pytest.approx(0.79, abs=0.04)


def test_noise_of_test_pairs():
    random = np.random.default_rng(0)
    row = lambda: {"margins": {"a": random.normal(0.5, 1, 900)}, "prompts": {"a": np.arange(900)}}
    one = row()
    p = accuracy(one["margins"]["a"])
    assert noise_of_pairs([one])["accuracy"][0] == pytest.approx(
        1.96 * math.sqrt(p * (1 - p) / 900), rel=0.1
    )
    assert noise_of_pairs([one], [one])["accuracy"][0] == 0
    clustered = one | {"prompts": {"a": np.arange(900) // 9}}
    assert noise_of_pairs([clustered])["accuracy"][0] > 0


def test_the_papers_table():
    text = published.table_2()
    assert text.count("*") == 5 + 1 and text.count("\n") == 1 + 20
    for base, schemes in published.TABLE_2.items():
        for row in schemes.values():
            assert len(row) == 7 and min(row[:6]) > 40 and row[6] < 0.2, base
