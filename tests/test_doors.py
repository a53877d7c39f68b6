"""Thousands of damaged inputs again, at the doors that test_fuzz.py does not knock at.

Trainings, stored states, plans, every step of an alignment, what a kill has left of them, verdicts,
the file of a world, and what an endpoint answers. MINIMORE_FUZZ=10000 sets their number.
"""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_fuzz import damage_bytes, damage_file, damage_value, within_limits

import minimore.alignment.endpoint as endpoint
from minimore.cli import main
from minimore.data.world import World
from minimore.model.tensors import write_tensors

COUNT = int(os.environ.get("MINIMORE_FUZZ", 56))

# Of every door: the command, and the files and directories that may be damaged.
DOORS = {
    "train": (
        "train --model model --source a=a.jsonl,b.jsonl --batch-size 4 --log-steps 100"
        " --output out",
        ["a.jsonl", "b.jsonl", "model"],
    ),
    "train, resumed": (
        "train --model model --source a=a.jsonl,b.jsonl --batch-size 4 --log-steps 100"
        " --save-steps 2 --output run --resume",
        ["run"],
    ),
    "plan": ("plan --model model", ["model/config.json"]),
    "features": (
        "features --model model --source a=a.jsonl,b.jsonl --source b=c.jsonl,d.jsonl --output out",
        ["a.jsonl", "model"],
    ),
    "probe": ("probe --features states --seeds 2 --json out", ["states"]),
    "align sample": (
        "align sample --model model --input a.jsonl --samples 2 --max-new-tokens 4 --output out",
        ["a.jsonl", "model"],
    ),
    "align sample, resumed": (
        "align sample --model model --input a.jsonl --samples 2 --max-new-tokens 4"
        " --batch-size 4 --output half --resume",
        ["half.unfinished"],
    ),
    "align select": (
        "align select --model reward --input samples.jsonl --output out",
        ["samples.jsonl", "reward"],
    ),
    "align finetune": (
        "align finetune --model model --input samples.jsonl --batch-size 4 --output out",
        ["samples.jsonl", "model"],
    ),
    "align perplexity": (
        "align perplexity --model model --input a.jsonl --json out",
        ["a.jsonl", "model"],
    ),
    "align compare, a model": (
        "align compare --model reward --input first.jsonl --other second.jsonl --json out",
        ["first.jsonl", "second.jsonl", "reward"],
    ),
    "align compare, verdicts": (
        "align compare --judge verdicts:verdicts.jsonl --input first.jsonl --other second.jsonl"
        " --json out",
        ["verdicts.jsonl"],
    ),
    "align compare, the world": (
        "align compare --judge world:. --input first.jsonl --other second.jsonl --json out",
        ["world.json", "first.jsonl"],
    ),
    "align compare, answers": (
        "align compare --judge endpoint:x --base-url http://localhost:9 --input first.jsonl"
        " --other second.jsonl --json out",
        ["answers.jsonl", "second.jsonl"],
    ),
}


class Reply:
    """What the client of an endpoint makes of a reply: attributes of nested dictionaries."""

    def __init__(self, value):
        self.value = value

    def __getattr__(self, name):
        return unpacked(self.value[name])


def unpacked(value):
    if isinstance(value, dict):
        return Reply(value)
    return [unpacked(item) for item in value] if isinstance(value, list) else value


ANSWER = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "A"}}]}


@pytest.fixture
def answers(monkeypatch):
    """The replies of an endpoint: the last one stays."""
    replies = [ANSWER]
    monkeypatch.setattr(
        endpoint.InferenceClient, "chat_completion", lambda *_, **__: unpacked(replies[-1])
    )
    monkeypatch.setattr(endpoint.time, "sleep", lambda _: None)
    monkeypatch.setenv("MINIMORE_API_KEY", "secret-secret")
    return replies


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A world, a policy, a reward model, and all that the doors read, undamaged."""
    home = tmp_path_factory.mktemp("home")
    paths = World(annotators=("ana", "ben"), train_pairs=(8,), test_pairs=8).write(home)
    pairs = [json.loads(line) for line in paths["ana"][0].read_text().splitlines()]
    (home / "model" / "README.md").unlink(missing_ok=True)
    shutil.copytree(home / "model", home / "reward")
    weights = home / "reward" / "model.safetensors"
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    write_tensors(weights, load_file(weights) | {"score.weight": head})
    for name, path in zip("abcd", [*paths["ana"], *paths["ben"]]):
        shutil.copy(path, home / f"{name}.jsonl")
    files = {name: [] for name in ("samples", "first", "second", "verdicts")}
    for i, pair in enumerate(pairs):
        prompt, sides = pair["prompt"], [pair["chosen"], pair["rejected"]]
        ended = [True, i % 2 == 0]
        files["samples"].append({"prompt": prompt, "responses": sides, "finished": ended})
        files["first"].append({"prompt": prompt, "response": sides[0]})
        files["second"].append({"prompt": prompt, "response": sides[1]})
        named = dict(zip(("first", "second"), sides))
        files["verdicts"].append({"prompt": prompt, **named, "verdict": "first"})
    for name, records in files.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr("minimore.train.finish", lambda *_: None)
        assert main(DOORS["train, resumed"][0].split()) == 0
        features = DOORS["features"][0].replace("--output out", "--output states").split()
        assert main(features) == 0
        sample = "minimore.alignment.sample"
        patch.setattr(f"{sample}.records_written_whole", interrupted)
        with pytest.raises(RuntimeError, match="interrupted"):
            main(DOORS["align sample, resumed"][0].split())
    return home


def interrupted(*_):
    raise RuntimeError("interrupted")


def damage(root, chance):
    """Damage one file of a directory, or the file itself; returns its name and what it holds."""
    files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    file = chance.choice(files)
    lines = file.read_text("utf-8").splitlines() if file.suffix == ".jsonl" else []
    if lines and chance.random() < 0.7:  # one value of one line
        i = chance.randrange(len(lines))
        lines[i] = json.dumps(damage_value(json.loads(lines[i]), chance))
        file.write_text("\n".join(lines) + "\n")
    elif file.stat().st_size:
        damage_file(file, chance)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_what_is_damaged_ends_in_one_line(door, home, answers, tmp_path, capsys, monkeypatch):
    words, damageable = DOORS[door][0].split(), DOORS[door][1]
    chance, refused = random.Random(door), 0
    for case in range(COUNT // len(DOORS)):
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(home, place)
        monkeypatch.chdir(place)
        if "endpoint:x" in words:
            answers[-1] = damage_value(ANSWER, chance)
            made = main(words) == 0 and (place / "out").unlink() is None
            assert made or not (place / "out").exists()
            answers[-1] = ANSWER
        root = place / chance.choice(damageable)
        file = damage(root, chance) if root.exists() and root.stat().st_size else root
        held = file.read_bytes()[:300] if file.exists() else b""
        capsys.readouterr()
        with within_limits(f"{door}, case {case}, {file.name}, {held!r}"):
            code = main(words)
        said = capsys.readouterr().err.splitlines()
        label = f"{door}, case {case}, {file.name}, {held!r}: {code} {said}"
        verb = " ".join(words[: 2 if words[0] == "align" else 1])
        last = said[-1] if said else ""
        assert code in (0, 1, 2), label
        assert code == 0 or last.startswith(f"minimore {verb}: "), label
        assert sum(line.startswith("minimore ") for line in said) == (code != 0), label
        if code != 0:
            assert not list(place.rglob("*.partial")), label
        refused += code != 0
    assert refused or case < 20


def test_the_damage_is_real():
    chance = random.Random(0)
    assert damage_bytes(b"abc", chance) != b"abc" and damage_value({"a": 1}, chance) != {"a": 1}
