"""Exercises are graded fairly: our own code is right, every mistake is seen and said in a line."""

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from mistakes import MISTAKES, RIGHT_TOO

import minimore.exercises.judge as judging
from minimore.cli import main
from minimore.exercises.blank import cut
from minimore.exercises.catalogue import EXERCISES
from minimore.exercises.judge import judge

BY_NAME = {exercise.name: exercise for exercise in EXERCISES}
NUMBERS = range(1, len(EXERCISES) + 1)


def solved(exercise):
    """The file of an exercise with our own body in it."""
    parts = cut(exercise.function)
    return f"{parts.imports}\n\n\n{parts.head}\n{parts.body}\n"


def verdict_on(text, exercise, tmp_path, **options):
    """What the judge says of a file."""
    path = tmp_path / f"{exercise.name}.py"
    path.write_text(text, "utf-8")
    verdict = judge(path, exercise.name, exercise.check, **options)
    assert "\n" not in verdict.line
    return verdict


@pytest.mark.parametrize("name", BY_NAME)
def test_our_own_code_is_right(name, tmp_path):
    verdict = verdict_on(solved(BY_NAME[name]), BY_NAME[name], tmp_path)
    assert verdict == (True, f"right: {name} passes every case")


@pytest.mark.parametrize(
    "name, mistake",
    [
        pytest.param(name, mistake, id=f"{name}-{mistake[0]}")
        for name, mistakes in MISTAKES.items()
        for mistake in mistakes
    ],
)
def test_a_mistake_is_seen_and_said(name, mistake, tmp_path):
    _, before, after = mistake
    text = solved(BY_NAME[name])
    assert before in text, "our code has changed: change the mistake, too"
    wrong = text.replace(before, after)
    verdict = verdict_on(wrong, BY_NAME[name], tmp_path)
    assert not verdict.is_right
    assert verdict.line.startswith("wrong: ") and len(verdict.line) <= 300
    is_compared = "expected" in verdict.line
    assert is_compared or f"{name}.py:" in verdict.line, verdict.line


@pytest.mark.parametrize("name", RIGHT_TOO)
def test_another_way_is_right_too(name, tmp_path):
    imports, body = RIGHT_TOO[name]
    parts = cut(BY_NAME[name].function)
    text = f"{parts.imports}\n{imports}\n\n\n{parts.head}{body}"
    verdict = verdict_on(text, BY_NAME[name], tmp_path)
    assert verdict.is_right, verdict.line


def test_every_exercise_has_five_mistakes_at_least():
    assert len(EXERCISES) >= 10 and set(MISTAKES) == set(BY_NAME)
    assert min(map(len, MISTAKES.values())) >= 5


# ---- the verb ------------------------------------------------------------------------------------


def test_all_are_listed(capsys):
    assert main(["exercise"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for number, exercise in enumerate(EXERCISES, 1):
        for words in (str(number), exercise.title, exercise.name, exercise.teaches):
            assert words in lines[number]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("number", NUMBERS)
def test_a_blank_file_has_what_its_reader_needs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exercise, words = EXERCISES[number - 1], ["exercise", str(number), "--output", "my answers"]
    assert main(words) == 0
    (path,) = Path("my answers").iterdir()
    text, parts = path.read_text("utf-8"), cut(exercise.function)
    assert parts.head in text and parts.imports in text and parts.body not in text
    assert max(map(len, text.splitlines())) <= 100
    assert f"fill in {exercise.name}" in capsys.readouterr().out
    assert main([*words, "--check"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    blank_at = 1 + text.splitlines().index("    raise NotImplementedError(")
    assert line == f"still blank: {path}:{blank_at}: {exercise.instruction}"
    filled = text[: text.index("    raise NotImplementedError")] + parts.body + "\n"
    path.write_text(filled, "utf-8")
    assert main([*words, "--check"]) == 0
    assert capsys.readouterr().out == f"right: {exercise.name} passes every case\n"
    assert list(path.parent.iterdir()) == [path], "nothing is left beside an answer"


def test_an_answer_is_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["exercise", "1"]) == 0
    path = tmp_path / "exercises" / "01_pair_losses.py"
    path.write_text("my work")
    assert main(["exercise", "1"]) == 2
    assert "exists already" in capsys.readouterr().err and path.read_text() == "my work"


def test_the_commands_in_the_file_parse(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["exercise", "2", "--output", "my answers"]) == 0
    text = (tmp_path / "my answers" / "02_pair_ece.py").read_text()
    command = next(line for line in text.splitlines() if "--hint" in line).partition(" gives")[0]
    capsys.readouterr()
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == EXERCISES[1].hints[0] + "\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_every_exercise_has_three_hints(number, capsys):
    for hint in (1, 2, 3):
        assert main(["exercise", str(number), "--hint", str(hint)]) == 0
        assert capsys.readouterr().out == EXERCISES[number - 1].hints[hint - 1] + "\n"


@pytest.mark.parametrize(
    "words, message",
    [
        ("0", "expected a number from 1 to"),
        ("99", "expected a number from 1 to"),
        ("pair_losses", "expected a number from 1 to"),
        ("1 --hint 4", "--hint 4: expected 1 to 3"),
        ("1 --hint 1 --check", "expected one of them"),
        ("--check", "need a number"),
        ("--hint 1", "need a number"),
        ("1 --check", "`minimore exercise 1` writes it"),
        ("1 --check --output elsewhere", "`minimore exercise 1 --output elsewhere` writes it"),
    ],
)
def test_bad_input_is_refused_in_a_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["exercise", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minimore exercise: ") and message in line


# ---- whatever a reader writes --------------------------------------------------------------------

PAIR_LOSSES = BY_NAME["pair_losses"]


@pytest.mark.parametrize(
    "body, line",
    [
        ("def pair_losses(:\n    pass\n", ":1: SyntaxError: "),
        ("import nothing_of_this_name\n", ":1: ModuleNotFoundError: "),
        ("x = 1\n", "has no function pair_losses"),
        ("def pair_losses(m, smoothing=0):\n    return m.nothing\n", ":2: AttributeError: "),
        ("def pair_losses(m, smoothing=0):\n    return undefined\n", ":2: NameError: "),
        ("def pair_losses(m, smoothing=0):\n    pass\n", "got None; is a `return` missing?"),
        ("def pair_losses(m, smoothing=0):\n    return 'a'\n", "expected numbers, got str"),
        ("def pair_losses(m, smoothing=0):\n    return 0\n", "expected shape (4,), got shape ()"),
        ("def pair_losses():\n    return 0\n", "TypeError: "),
        ("def pair_losses(m, smoothing=0):\n    exit(0)\n", ":2: SystemExit: 0"),
        ("def pair_losses(m, s=0):\n    return pair_losses(m, s)\n", ":2: RecursionError: "),
        ("def pair_losses(m, s=0):\n    return [2] * 4\n", "expected [0.693147, 0.313262, 2.12"),
    ],
)  # fmt: skip
def test_whatever_goes_wrong_is_one_line(body, line, tmp_path):
    verdict = verdict_on(body, PAIR_LOSSES, tmp_path)
    assert not verdict.is_right and line in verdict.line, verdict.line


def test_a_loop_without_an_end_is_ended(tmp_path):
    text = "def pair_losses(m, smoothing=0):\n    while True:\n        m = m + 1\n"
    verdict = verdict_on(text, PAIR_LOSSES, tmp_path, seconds=0.2)
    assert not verdict.is_right and "TimeoutError: it took more than 0.2 s" in verdict.line
    assert "pair_losses.py:2" in verdict.line or "pair_losses.py:3" in verdict.line


def test_a_warning_is_no_mistake(tmp_path):
    text = solved(PAIR_LOSSES).replace("    losses =", "    import warnings\n"
        "    warnings.warn('careful')\n    losses =")  # fmt: skip
    assert verdict_on(text, PAIR_LOSSES, tmp_path).is_right


@pytest.mark.parametrize("name", ["pair_losses", "pack", "min_norm_weights"])
def test_the_docstring_in_the_file_is_tested_as_it_stands(name, tmp_path):
    """A reader may also run the examples in the docstring."""
    path = tmp_path / f"{name}.py"
    path.write_text("import torch\n" + solved(BY_NAME[name]), "utf-8")
    function = judging.function_of(path, name)
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(function, globs=function.__globals__):
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0 and runner.tries >= 1


def test_the_page_of_the_tutorials_names_each_of_them_and_every_exercise_once():
    page = (ROOT / "tutorials" / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+\.py)` \|.*\|([\d, ]*)\|$", page, re.M)
    assert [file for file, _ in rows] == sorted(p.name for p in (ROOT / "tutorials").glob("*.py"))
    numbers = [int(number) for _, cell in rows for number in cell.replace(",", " ").split()]
    assert sorted(numbers) == list(NUMBERS)
    assert max(map(len, page.splitlines())) <= 100


def test_the_list_on_the_page_of_the_wing_is_what_is_printed(capsys):
    page = (ROOT / "minimore" / "exercises" / "README.md").read_text("utf-8")
    main(["exercise"])
    table = capsys.readouterr().out.partition("\n\n")[0]
    assert f"```\n{table}\n```" in page


@pytest.mark.slow
def test_the_command_ends_with_the_exit_code(tmp_path):
    command = [sys.executable, "-m", "minimore", "exercise", "3", "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    checked = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert checked.returncode == 1 and checked.stdout.startswith("still blank: ")
    assert not checked.stderr


@pytest.mark.parametrize(
    "line",
    [
        "raise GeneratorExit",
        "raise type('X', (BaseException,), {})('a\\nb')",
        "raise type('X', (Exception,), {'__str__': lambda self: 1 / 0})()",
    ],
)
def test_whatever_an_answer_raises_is_one_wrong_line(line, tmp_path):
    path = tmp_path / "answer.py"
    path.write_text(f"def pair_losses(*arguments, **options):\n    {line}\n")
    verdict = judge(path, "pair_losses", EXERCISES[0].check)
    assert not verdict.is_right and "\n" not in verdict.line and "answer.py:2" in verdict.line
