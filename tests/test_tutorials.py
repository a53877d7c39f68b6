"""Every tutorial runs without a warning, keeps its promises, and is made like the others."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_to_the_end

import minimore

# A tutorial imports the same minimore that the test imports.
IMPORTED_FROM = str(Path(minimore.__file__).resolve().parents[1])
TUTORIALS = sorted((Path(__file__).resolve().parents[1] / "tutorials").glob("*.py"))
# This one takes the least time, so it also runs without the slow tests.
QUICK = "03_conflicting_gradients"
# This one runs in a new Python, where an import that warns is an error, too.
FRESH = "01_one_preference_by_hand"
# What is given to a script that has a small size and a large one.
ARGUMENTS = {"18_the_gpu_recipe": ["--tiny"]}


def parameter(path):
    """The parameter of a test for one tutorial, marked as slow unless it is the quick one."""
    marks = () if path.stem == QUICK else pytest.mark.slow
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.fixture(params=TUTORIALS, ids=lambda path: path.stem)
def text(request):
    """The text of each tutorial in turn."""
    return request.param.read_text("utf-8")


@pytest.fixture
def asserts(text):
    """The assert statements of a tutorial."""
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]


def test_tutorials_were_found():
    assert {path.stem for path in TUTORIALS} >= {QUICK, FRESH}


@pytest.mark.parametrize("path", [parameter(path) for path in TUTORIALS])
def test_runs(path, tmp_path):
    if path.stem == FRESH:
        printed = run_afresh(path, tmp_path)
    else:
        words = ARGUMENTS.get(path.stem, [])
        printed = run_to_the_end(words, tmp_path, path, {"PYTHONWARNINGS": "error"})
    assert printed.strip()
    assert not list(tmp_path.iterdir()), "a tutorial leaves nothing behind where it is run"


def run_afresh(path, directory):
    """What a tutorial prints in a new Python."""
    importable = os.pathsep.join(filter(None, [IMPORTED_FROM, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": importable},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_header_says_how_long_and_on_what(text):
    header = ast.get_docstring(ast.parse(text)) or ""
    assert re.search(r"seconds|minutes", header)
    assert re.search(r"CPU|GPU", header)


def test_asserts_its_claims(asserts):
    assert len(asserts) >= 2


def test_no_assert_is_always_true(asserts):
    """A constant never fails, and neither does a tuple: `assert (claim, message)`."""
    cannot_fail = [a.lineno for a in asserts if isinstance(a.test, (ast.Constant, ast.Tuple))]
    assert not cannot_fail


def test_is_neither_a_leaflet_nor_a_book(text):
    assert 80 <= len(text.splitlines()) <= 180


def test_the_first_line_has_the_number_of_the_file():
    for number, path in enumerate(TUTORIALS, 1):
        assert path.stem.startswith(f"{number:02}_")
        assert path.read_text("utf-8").startswith(f'"""Tutorial {number}: ')


def test_has_cells(text):
    assert len(re.findall(r"(?m)^# %%", text)) >= 3


@pytest.mark.parametrize("exercise", ["Exercise 1", "Exercise 2"])
def test_has_two_exercises(text, exercise):
    assert re.search(rf"(?m)^#.*{exercise}", text)
