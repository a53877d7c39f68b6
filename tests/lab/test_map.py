"""The map is true: every name on it exists, its links lead somewhere, and no line is wide."""

import importlib
import re

import pytest
from conftest import ROOT

from minimore.cli import VERBS, build_parser

PAGE = (ROOT / "minimore" / "lab" / "MAP.md").read_text("utf-8")
NAMES = sorted(set(re.findall(r"`([^`]+)`", PAGE)) - {"minimore"})


def test_the_map_has_names_in_every_part():
    parts = re.split(r"^## ", PAGE, flags=re.M)[1:]
    titles = [part.split("\n")[0] for part in parts]
    assert titles == ["Sources", "Formats", "Models of preference", "Uses", "Evaluations"]
    assert all("**Not here**" in part and part.count("`") >= 10 for part in parts)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_exists(name):
    if name.startswith("minimore "):
        verb, rest = name.removeprefix("minimore "), []
        if verb not in VERBS:
            verb, rest = verb.rsplit(" ", 1)
            assert build_parser().parse_args([verb, rest, "--output", "x"]).verb == verb
        assert verb in VERBS
        return
    module, attribute = name.rsplit(".", 1)
    assert hasattr(importlib.import_module(f"minimore.{module}"), attribute)


def test_no_line_is_wide_and_the_labs_page_points_here():
    assert all(len(line) <= 100 for line in PAGE.splitlines())
    assert "(MAP.md)" in (ROOT / "minimore" / "lab" / "README.md").read_text("utf-8")
