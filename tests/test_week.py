"""A week of one user on the files of a world: two trainings, a kill, and scores that agree."""

import json
import math
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import Command
from runs import command, content, options, run_command

import minimore
from minimore.cli import main
from minimore.data.world import World

CHANGES = {
    **{"validation": 0.2, "eval_steps": 20, "save_steps": 5, "keep_best": "nll"},
    **{"epochs": 3, "batch_size": 24, "learning_rate": 3e-3},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world that is large enough to learn something: its directory, and the files by name."""
    directory = tmp_path_factory.mktemp("world")
    world = World(annotators=("ana", "ben", "cleo"), train_pairs=(400, 300, 200), test_pairs=80)
    return directory, world.write(directory)


@pytest.fixture(scope="module")
def home(world, tmp_path_factory):
    """Runs of two methods, and of one that was killed and resumed by its directory alone."""
    home = tmp_path_factory.mktemp("week")
    for method in ("uniform", "more"):
        run_command(options(world, home / method, method=method, **CHANGES))
    process = Command(command(options(world, home / "killed", method="more", **CHANGES)))
    while process.is_running and not list((home / "killed").glob("checkpoint-*[0-9]")):
        time.sleep(0.02)
    process.signal(signal.SIGKILL)
    process.wait()
    assert not (home / "killed" / "config.json").exists()
    assert main(["train", "--output", str(home / "killed"), "--resume"]) == 0
    return home


@pytest.mark.slow
def test_the_week(home, world, tmp_path, capsys, transformers):
    more, uniform = home / "more", home / "uniform"
    # The killed run ends as the other one.
    assert content(home / "killed") == content(more)
    assert (home / "killed" / "best" / "config.json").exists()

    # It can be watched, and compared.
    assert main(["plot", str(uniform), str(more), "--output", str(tmp_path / "page")]) == 0
    tests = [("--source", f"{name}={test}") for name, (_, test) in world[1].items()]
    words = ["evaluate", "--model", str(more), "--baseline", str(uniform)]
    report_path = tmp_path / "report.json"
    assert main([*words, *sum(tests, ()), "--json", str(report_path)]) == 0
    report = json.loads(report_path.read_text())
    assert set(report["differences"]) == set(world[1]) and "mean_difference" in report

    # A temperature of held-out pairs is stored.
    held_out = ("--calibrate", f"ana={world[1]['ben'][1]}")
    words = ["evaluate", "--model", str(more), *tests[0], *held_out, "--store-temperature"]
    assert main(words) == 0
    capsys.readouterr()

    # Sixteen responses to a prompt have the same rewards from the command and from Python,
    pairs = [json.loads(line) for line in Path(world[1]["ana"][1]).read_text().splitlines()]
    prompt = pairs[0]["prompt"]
    responses = [pair[side] for pair in pairs[:8] for side in ("chosen", "rejected")]
    texts, scores = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    texts.write_text(json.dumps({"prompt": prompt, "responses": responses}) + "\n")
    words = ["score", "--model", str(more), "--input", str(texts), "--output", str(scores)]
    assert main(words) == 0
    rewards = json.loads(scores.read_text())["rewards"]
    model = minimore.load(more, device="cpu")
    assert model.score(prompt, responses) == pytest.approx(rewards, abs=1e-5)
    margin = (rewards[0] - rewards[1]) / model.temperature
    assert model.temperature != 1
    assert model.prefers(prompt, *responses[:2]) == pytest.approx(1 / (1 + math.exp(-margin)))
    # and by the snippets of the model card.
    for snippet in snippets_of(more / "README.md"):
        names = {"RUN": str(more), "prompt": prompt, "response": responses[5]}
        with torch.no_grad():
            exec(snippet, names)
        assert names["reward"] == pytest.approx(rewards[5], abs=1e-4), snippet


def snippets_of(card):
    """The Python of a model card."""
    found = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert len(found) == 2
    return found
