"""Every tutorial runs without a warning, keeps its promises, and is made like the others."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minimore

HERE = str(
    Path(minimore.__file__).resolve().parents[1]
)  # what the test process imports, the tutorial imports
TUTORIALS = sorted((Path(__file__).resolve().parents[1] / "tutorials").glob("*.py"))


def test_tutorials_were_found():
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    importable = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": importable},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert not list(tmp_path.iterdir()), "a tutorial leaves nothing behind where it is run"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_is_made_like_the_others(path):
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    header = ast.get_docstring(tree) or ""
    assert re.search(r"seconds|minutes", header) and re.search(r"CPU|GPU", header), (
        "the header says how long and on what"
    )
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert len(asserts) >= 2
    assert not [
        node.lineno for node in asserts if isinstance(node.test, (ast.Constant, ast.Tuple))
    ], "an assert that cannot fail"
    assert len(re.findall(r"(?m)^# %%", text)) >= 3
    for exercise in ("Exercise 1", "Exercise 2"):
        assert re.search(rf"(?m)^#.*{exercise}", text), f"{exercise} is missing"
