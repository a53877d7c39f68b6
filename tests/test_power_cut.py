"""After a power cut at any moment the same command ends as if there had been none.

Every state that power_cut.py records is tried with MINIMORE_POWER_CUTS=all, and otherwise some.
"""

import os
import shutil

import pytest
from power_cut import DIRECTORY, Disk, restore
from runs import RECIPES, content, options

from minimore.cli import main
from minimore.lab.features import FeaturesOptions, features
from minimore.resume import checkpoints
from minimore.score import ScoreOptions, score
from minimore.train import train


def some_of(states, most):
    """All states, or as many as are tried in every run of the tests, the last one included."""
    if os.environ.get("MINIMORE_POWER_CUTS") == "all":
        return states
    step = -(-len(states) // most)
    return states[::-step]


def files_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def lasting(disk):
    """What is on the disk in the end, by its path in the directory that was made.

    What is being removed may still be there.
    """
    inside = {path.partition("/")[2]: content for path, content in disk.lazy.items()}
    return {
        path: content
        for path, content in inside.items()
        if content is not DIRECTORY and ".partial" not in path
    }


@pytest.mark.slow
@pytest.mark.parametrize("name, recipe", [("plain", {}), ("lossy", RECIPES["lossy"])])
def test_a_training(world, tmp_path, monkeypatch, name, recipe):
    def run_in(root, resume):
        changes = recipe | {"save_steps": 3, "resume": resume}
        assert train(options(world, root / "run", **changes)) == 0
        return root / "run"

    root = tmp_path / "disk"
    root.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        whole = run_in(root, resume=False)
    expected, files = content(whole), files_of(whole)
    assert len(disk.states) > 100
    assert lasting(disk) == files
    for number, state in enumerate(some_of(disk.states, 6)):
        after = restore(state, tmp_path / f"after-{number}")
        run = run_in(after, resume=True)
        assert content(run) == expected
        assert not checkpoints(run) and not list(run.rglob("*.partial"))
        assert {p: b for p, b in files_of(run).items() if p != "metrics.jsonl"}.keys() == {
            p for p in files if p != "metrics.jsonl"
        }
        shutil.rmtree(after)


@pytest.mark.slow
def test_features(world, tmp_path, monkeypatch):
    directory, paths = world

    def run_in(root):
        features(
            FeaturesOptions(
                model=str(directory / "model"),
                source=tuple(f"{name}={a},{b}" for name, (a, b) in paths.items()),
                output=str(root / "states"),
            )
        )
        return files_of(root / "states")

    root = tmp_path / "disk"
    root.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        expected = run_in(root)
    assert lasting(disk) == expected
    for number, state in enumerate(some_of(disk.states, 5)):
        after = restore(state, tmp_path / f"after-{number}")
        if "states/features.json" in state:
            assert files_of(after / "states") == expected
        else:
            assert run_in(after) == expected


@pytest.mark.slow
def test_a_grid(tmp_path, monkeypatch):
    def run_in(root):
        command = ["reproduce", "table2", "--output", str(root / "grid"), "--seeds", "1"]
        command += ["--width", "16", "--pairs", "10", "--test-pairs", "24", "--batch-size", "10"]
        assert main([*command, "--scheme", "uniform"]) == 0
        names = ("report.json", "report.txt", "grid.json")
        return [(root / "grid" / name).read_bytes() for name in names]

    root = tmp_path / "disk"
    root.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        expected = run_in(root)
    for number, state in enumerate(some_of(disk.states, 3)):
        # A grid knows its own place, so it continues there.
        root.rename(tmp_path / f"before-{number}")
        assert run_in(restore(state, root)) == expected


def test_scores(world, tmp_path, monkeypatch):
    directory, paths = world
    root = tmp_path / "disk"
    root.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        score(
            ScoreOptions(
                model=str(directory / "model"),
                input=str(paths["ana"][1]),
                output=str(root / "out.jsonl"),
            )
        )
    expected = (root / "out.jsonl").read_bytes()
    beside = (root / "out.jsonl.crc32").read_bytes()
    assert disk.lazy == {"out.jsonl": expected, "out.jsonl.crc32": beside}
    for state in (state for state in disk.states if "out.jsonl" in state):
        assert state["out.jsonl"] == expected and state["out.jsonl.crc32"] == beside


@pytest.mark.parametrize("verb", ["probe", "evaluate", "check"])
def test_reports(world, tmp_path, monkeypatch, verb):
    """A file of figures is there whole, or not at all."""
    directory, paths = world
    model = str(directory / "model")
    sources = [f"--source={name}={a},{b}" for name, (a, b) in paths.items()]
    words = {
        "probe": ["--features", str(tmp_path / "states"), "--seeds", "1"],
        "evaluate": ["--model", model, f"--source=a={paths['ana'][1]}"],
        "check": ["--model", model, "--parity", "none"],
    }
    if verb == "probe":
        assert main(["features", "--model", model, *sources, "--output", words[verb][1]]) == 0
    root = tmp_path / "disk"
    root.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        assert main([verb, *words[verb], "--json", str(root / "out.json")]) == 0
    expected = (root / "out.json").read_bytes()
    assert disk.lazy == {"out.json": expected}
    for state in disk.states:
        assert state.get("out.json", expected) == expected


def test_what_is_not_brought_to_the_disk_is_lost(tmp_path, monkeypatch):
    """The harness itself: a file renamed without fsync is empty after a power cut."""
    root = tmp_path / "disk"
    root.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        (root / "a.partial").write_text("text")
        os.replace(root / "a.partial", root / "a")
    assert {"a": b""} in disk.states and {"a": b"text"} not in disk.states
