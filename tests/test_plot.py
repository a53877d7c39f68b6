"""The page on trainings: what is read of the logs, what is drawn, and what is refused."""

import json
import random
import shutil
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from minimore.cli import main
from minimore.figures.history import ALL, Series, What, read_history
from minimore.figures.sketch import COLUMNS, DIRECTORY, ROWS, show_curves, text_of_curves
from minimore.options import InputError

SOURCES = ("ana", "ben", "cleo")


def report(names, value):
    rates = {"nll": value, "accuracy": 1 - value / 2, "mean_margin": value * 2, "ece": value / 10}
    return {"sources": {name: dict(rates) for name in names}, "mean": rates, "worst": {}}


def record_of(step, names=SOURCES, **parts):
    """A record as a training writes it, with numbers that differ everywhere."""
    rows = {
        name: {
            "pairs": 2,
            "loss": 1 / (step + k),
            "accuracy": (step % 3 + k) / 5,
            "margin": step / 10 - k,
            "weight": (step + k) / (len(names) * step + sum(range(len(names)))),
            "gradient_norm": 1.0,
        }
        for k, name in enumerate(names)
    }
    cosines = {
        f"{one} ~ {other}": (i - 2 * j) / 10 + step / 100
        for i, one in enumerate(names)
        for j, other in enumerate(names)
        if i < j
    }
    shared = {"step": step, "learning_rate": 1e-3 / step, "tokens": 9, "loss": 2 / step}
    return shared | {"sources": rows, "cosines": cosines, "seconds": 0.1} | parts


def policy_record(step):
    return {"step": step, "learning_rate": 1e-6, "tokens": 9, "targets": 4, "loss": 3 / step}


def write_run(directory, records):
    directory.mkdir(parents=True)
    lines = [json.dumps(record) + "\n" for record in records]
    (directory / "metrics.jsonl").write_text("".join(lines))
    return directory


def some_records(steps=50, names=SOURCES):
    for step in range(1, steps + 1):
        parts = {}
        if step % 10 == 0:
            parts = {"evaluation": report(names, 0.5), "validation": report(names, 1 / step)}
        yield record_of(step, names, **parts | ({"best": 20} if step >= 20 else {}))


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", some_records())


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 7, 99])
def test_smoothing_is_the_mean_of_the_steps_around(window):
    values = np.random.default_rng(0).normal(size=30)
    values[[0, 3, 4, 5, 29]] = np.nan
    expected = []
    for i in range(30):
        around = values[max(0, i - window // 2) : i + window // 2 + 1]
        there = [value for value in around if not np.isnan(value)]
        expected.append(np.mean(there) if there else np.nan)
    smoothed = Series(np.arange(30), values).smoothed(window)
    np.testing.assert_allclose(smoothed, expected, rtol=1e-12)


def test_every_figure_of_a_log_is_read(run):
    records = list(some_records())
    history = read_history(str(run))
    assert history.steps == 50 and history.sources == list(SOURCES) and history.best == 20
    for source in SOURCES:
        for figure in ("loss", "accuracy", "margin", "weight"):
            series = history.series[What("training", source, figure)]
            assert series.steps.tolist() == list(range(1, 51))
            assert series.values.tolist() == [r["sources"][source][figure] for r in records]
        cosines = history.series[What("training", source, "cosine")].values
        of_source = [
            [v for names, v in r["cosines"].items() if source in names.split(" ~ ")]
            for r in records
        ]
        np.testing.assert_allclose(cosines, np.mean(of_source, axis=1))
    accuracies = [[row["accuracy"] for row in r["sources"].values()] for r in records]
    of_all = history.series[What("training", ALL, "accuracy")].values
    np.testing.assert_allclose(of_all, np.mean(accuracies, axis=1))
    validation = history.series[What("validation", "ben", "ECE")]
    assert validation.steps.tolist() == [10, 20, 30, 40, 50]
    assert validation.values.tolist() == [1 / step / 10 for step in (10, 20, 30, 40, 50)]
    assert history.series[What("test", ALL, "loss")].values.tolist() == [0.5] * 5
    # Nothing else is there: 3 sources x 5 figures, 3 of all, 2 reports x 4 rows x 4 figures.
    assert len(history.series) == 15 + 3 + 32


@pytest.mark.slow
@pytest.mark.parametrize("logged", [True, False])
def test_the_last_evaluation_stands_at_the_last_step(logged, tmp_path):
    """It is in evaluation.json, also where no step was evaluated on the way."""
    records = list(some_records(steps=47)) if logged else [record_of(s) for s in range(1, 48)]
    run = write_run(tmp_path / "run", records)
    (run / "evaluation.json").write_text(json.dumps(report(SOURCES, 0.25)))
    (run / "validation.json").write_text(json.dumps(report(SOURCES, 0.125)))
    history = read_history(str(run))
    before = [10, 20, 30, 40] if logged else []
    for kind, value in (("test", 0.25), ("validation", 0.125)):
        for source in (*SOURCES, ALL):
            series = history.series[What(kind, source, "loss")]
            assert series.steps.tolist() == [*before, 47] and series.values[-1] == value
            assert history.series[What(kind, source, "ECE")].values[-1] == value / 10
    assert main(["plot", str(run)]) == 0


def test_what_the_log_has_of_the_last_step_stays(tmp_path):
    run = write_run(tmp_path / "run", some_records())
    (run / "evaluation.json").write_text(json.dumps(report(SOURCES, 0.25)))
    series = read_history(str(run)).series[What("test", ALL, "loss")]
    assert series.steps.tolist() == [10, 20, 30, 40, 50] and series.values[-1] == 0.5


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"sources": {"ana": {}}, "mean": {}}'])
def test_a_damaged_report_is_refused_by_name(content, run, capsys):
    (run / "evaluation.json").write_text(content)
    assert main(["plot", str(run)]) == 2
    error = capsys.readouterr().err
    assert "evaluation.json: " in error and error.count("\n") == 1


def test_a_real_log_is_read_whole(halted):
    history = read_history(str(halted))
    weights = [history.series[What("training", name, "weight")].values for name in SOURCES]
    assert history.steps == 11 and np.sum(weights, axis=0) == pytest.approx(1)
    for figure in ("loss", "accuracy", "margin", "cosine"):
        assert np.isfinite(history.series[What("training", "ana", figure)].values).all()


def test_a_source_without_pairs_has_a_gap_and_an_old_log_no_margin(tmp_path):
    records = list(some_records(3))
    for record in records:
        del record["sources"]["ana"]["margin"]
    records[1]["sources"]["ben"] |= {"pairs": 0, "loss": None, "accuracy": None, "margin": None}
    records[1]["cosines"] |= {"ana ~ ben": None, "ben ~ cleo": None}
    history = read_history(str(write_run(tmp_path / "run", records)))
    assert np.isnan(history.series[What("training", "ben", "loss")].values).tolist() == [0, 1, 0]
    assert np.isnan(history.series[What("training", "ben", "cosine")].values[1])
    cleo = history.series[What("training", "cleo", "cosine")].values[1]
    assert cleo == records[1]["cosines"]["ana ~ cleo"]
    assert What("training", "ana", "margin") not in history.series


def test_a_last_line_that_is_being_written_is_left_out_and_said(run, capsys):
    log = run / "metrics.jsonl"
    log.write_text(log.read_text()[:-5])
    assert read_history(str(run)).steps == 49
    assert f"{log}:50: this last line is not whole, so it is left out" in capsys.readouterr().out


DAMAGE = {
    "is not JSON": lambda lines: [*lines[:3], "{]\n", *lines[3:]],
    "metrics.jsonl:3: is not the record of a step": lambda lines: [*lines[:2], lines[0]],
    '"step" is 2 after 3': lambda lines: [*lines[:3], lines[1]],
    "TypeError": lambda lines: [*lines[:3], "[]\n"],
    "KeyError: 'loss'": lambda lines: [lines[0].replace('"loss"', '"lost"', 1)],
    "'1e-3' is not a number": lambda lines: [lines[0].replace("0.001", '"1e-3"', 1)],
    "nan is not a number": lambda lines: [lines[0].replace("0.001", "NaN", 1)],
    "AttributeError": lambda lines: [json.dumps(policy_record(1) | {"sources": [1]}) + "\n"],
    "\"best\" is 'x'": lambda lines: [json.dumps(policy_record(1) | {"best": "x"}) + "\n"],
    "has no step yet": lambda lines: [],
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_log_is_refused_in_one_line(run, capsys, said):
    log = run / "metrics.jsonl"
    log.write_text("".join(DAMAGE[said](log.read_text().splitlines(keepends=True))))
    assert main(["plot", str(run)]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
    assert not list(run.glob("training.*"))


@pytest.mark.slow
def test_no_mutated_log_is_a_traceback(run):
    chance, log = random.Random(0), run / "metrics.jsonl"
    whole = b"".join(log.read_bytes().splitlines(keepends=True)[8:11])
    pieces = [b"null", b"-1", b"1e999", b"[]", b"{}", b'""', b"true", b'"\\ud800"', b"9" * 50]
    read = 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(data))
            end = place + chance.choice([0, 1, 1, 5, 60])
            data[place:end] = chance.choice([*pieces, bytes([chance.randrange(256)]), b""])
        log.write_bytes(data)
        try:
            read_history(str(run))
            read += 1
        except InputError:
            pass
    assert 0 < read < 500


# ---- what is drawn -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_page_has_the_same_bytes_again_and_no_date(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", map(policy_record, range(1, 5)))
    for suffix in ("png", "svg"):
        (run / f"training.{suffix}").write_text("an older page, which is drawn anew")
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out == f"figure: {run}/training.png and {run}/training.svg\n"
    assert main(["plot", str(run), "--output", str(tmp_path / "page.1")]) == 0
    for suffix in ("png", "svg"):
        first = (run / f"training.{suffix}").read_bytes()
        assert first == (tmp_path / f"page.1.{suffix}").read_bytes()
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    tree = xml.etree.ElementTree.parse(run / "training.svg")
    assert not [node for node in tree.iter() if node.tag.endswith("}date")]
    assert main(["plot", str(run), "--output", str(tmp_path / "page.1")]) == 2
    assert "exists already" in capsys.readouterr().err


def words_of(runs, output):
    """All words on the page of some runs, in the order in which they are drawn."""
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert main(["plot", *map(str, runs), "--output", str(output)]) == 0
    tree = xml.etree.ElementTree.parse(f"{output}.svg")
    return ["".join(node.itertext()) for node in tree.iter() if node.tag.endswith("}text")]


@pytest.mark.slow
def test_the_page_of_one_run_says_what_is_what(run, tmp_path):
    words = words_of([run], tmp_path / "page")
    for said in (
        *("training", "held out", "TEST files", "training, mean of 3 steps", "one step"),
        *("best step by validation: 20", "prompts held out for validation", *SOURCES),
        *("weight λ, mean of 3 steps", "mean cosine with others", "learning rate"),
        *("ECE, mean over sources", "accuracy, mean over sources", "margin"),
    ):
        assert said in words, said
    assert words.count("loss") == 2 and words.count("ECE") == 1


@pytest.mark.slow
def test_the_page_of_several_runs_names_each_and_what_one_lacks(tmp_path, capsys):
    run = write_run(tmp_path / "run", some_records(20, ("ana", "ben")))
    other = write_run(tmp_path / "o$t_h$er", (record_of(s, ("ana", "dov")) for s in range(1, 9)))
    words = words_of([run, other], tmp_path / "page")
    assert f"{other}"[-8:] in "".join(words) and "best step by validation" in words
    assert {"ana", "ben", "dov"} <= set(words)
    said = capsys.readouterr().out
    assert f"{run}: has no source dov, which other runs have" in said
    assert f"{other}: has no source ben, which other runs have" in said


@pytest.mark.slow
def test_what_nobody_logged_has_no_panel(tmp_path):
    policy = write_run(tmp_path / "policy", map(policy_record, range(1, 5)))
    words = words_of([policy], tmp_path / "page")
    assert words.count("loss") == 1 and "learning rate" in words
    assert not {"accuracy", "ECE", "weight λ", "margin"} & set(words)
    alone = write_run(tmp_path / "alone", (record_of(s, ("ana",)) for s in range(1, 5)))
    words = words_of([alone], tmp_path / "page-2")
    assert "ana" in words and not any("weight" in word or "cosine" in word for word in words)


def test_the_lines_are_the_numbers_of_the_log(run):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from minimore.figures.curves import Page

    history = read_history(str(run))
    page = Page([history])
    assert page.window == 3
    panel = Figure().subplots()
    page.draw_panel(panel, "ben", "accuracy")
    steps = history.series[What("training", "ben", "accuracy")]
    chance, dots, line, validation, test, best = panel.lines
    assert chance.get_ydata() == [0.5, 0.5]
    assert dots.get_ydata().tolist() == steps.values.tolist()
    np.testing.assert_array_equal(line.get_ydata(), steps.smoothed(3))
    assert validation.get_xdata().tolist() == [10, 20, 30, 40, 50]
    assert test.get_ydata().tolist() == [0.75] * 5 and list(best.get_xdata()) == [20, 20]
    Page([history, history]).draw_panel(panel, "ben", "weight")
    colours = [line.get_color() for line in panel.lines[6:]]
    assert len(set(colours)) == len(colours) == 2  # no dots, and a colour for each run


def test_a_column_of_panels_shows_every_point(run, tmp_path):
    """Axes that begin at 0 still reach the largest value of any source."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from minimore.figures.curves import Page

    log = run / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records[-1]["validation"]["sources"]["cleo"]["ece"] = 0.9
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    part = Figure().subfigures(1, 1)
    Page([read_history(str(run))]).draw_sources(part, SOURCES)
    panels = [panel for panel in part.axes if panel.get_title(loc="left") == "ECE"]
    assert panels[0].get_ylim()[0] == 0 and panels[0].get_ylim()[1] >= 0.9


# ---- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_drawn_is_refused_in_one_line(run, tmp_path, capsys, monkeypatch):
    policy = write_run(tmp_path / "policy", [policy_record(1)])
    other = Path(shutil.copytree(run, tmp_path / "other"))
    (tmp_path / "empty").mkdir()
    page = ["--output", str(tmp_path / "page")]
    for arguments, said in (
        ([], "RUN is missing"),
        ([""], "the path is empty"),
        ([str(tmp_path / "absent")], "is no run: it has no metrics.jsonl"),
        ([str(tmp_path / "empty")], "is no run: it has no metrics.jsonl"),
        ([str(run / "metrics.jsonl")], "is no run: it has no metrics.jsonl"),
        ([str(run), str(other)], "--output is missing"),
        ([str(run), f"{run}/.", *page], "is given twice"),
        ([str(run), str(policy), *page], "are not comparable; draw them apart"),
        ([str(run), "--output", str(run / "metrics.jsonl" / "page")], "is not a directory"),
        ([str(run)] * 33, "33 runs: expected at most 32"),
    ):
        assert main(["plot", *arguments]) == 2, arguments
        message = capsys.readouterr().err
        assert said in message and message.count("\n") == 1, message
    monkeypatch.setattr("minimore.figures.plots.available", lambda: False)
    assert main(["plot", str(run)]) == 2
    assert "this page needs matplotlib: pip install 'minimore[plots]'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.partial"))


# ---- curves as text ------------------------------------------------------------------------------


def test_text_of_curves_has_every_point_at_its_place():
    rising, falling = ([0, 1, 2], [0.0, 5.0, 10.0]), ([0, 2], [10.0, 0.0])
    lines = text_of_curves("x", "y", {"rising": rising, "falling": falling}).splitlines()
    assert lines[0] == "y: a rising, b falling" and lines[-1].split() == ["0", "2", "x"]
    pictures = [line.partition("|")[2].ljust(COLUMNS) for line in lines[1:-1]]
    places = {
        mark: {
            (row, column) for row, line in enumerate(pictures) for column in marks_at(line, mark)
        }
        for mark in "ab"
    }
    assert {(ROWS - 1, 0), (0, COLUMNS - 1)} <= places["a"] and len(places["a"]) == 3
    assert places["b"] == {(0, 0), (ROWS - 1, COLUMNS - 1)}


def marks_at(line, mark):
    """The columns of a line at which a mark stands."""
    return [column for column, letter in enumerate(line) if letter == mark]


def test_a_constant_curve_is_a_line_and_the_first_of_two_equal_ones_is_seen():
    flat = ([1, 2, 3], [0.5, 0.5, 0.5])
    text = text_of_curves("x", "y", {"one": flat, "other": flat})
    picture = "".join(line.partition("|")[2] for line in text.splitlines()[1:-1])
    assert picture.count("a") == 3 and "b" not in picture


@pytest.mark.parametrize("has_matplotlib", [True, False])
def test_curves_are_printed_and_written_where_a_directory_is_named(
    has_matplotlib, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("minimore.figures.sketch.available", lambda: has_matplotlib)
    monkeypatch.setenv(DIRECTORY, str(tmp_path / "figures"))
    if has_matplotlib:
        pytest.importorskip("matplotlib")
    show_curves("name", "A title", "x", "y", {"one": ([0, 1], [0, 1])})
    printed = capsys.readouterr().out
    assert "A title\ny: a one" in printed
    assert (tmp_path / "figures" / "name.png").exists() == has_matplotlib
    assert ("name.png is not written" in printed) != has_matplotlib
