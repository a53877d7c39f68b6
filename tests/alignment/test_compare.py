"""Two files of responses to the same prompts, and what a reward model says.

Other judges have tests of their own: test_judges.py, test_endpoint.py.
"""

import json

import numpy as np
import pytest

from minimore.alignment.compare import verdict_of
from minimore.cli import main
from minimore.data.world import World


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model, and the better and the worse of two responses to each of 60 prompts."""
    home = tmp_path_factory.mktemp("judge")
    world = World(annotators=("ana",), train_pairs=(40,), test_pairs=60)
    (train_path, test_path) = world.write(home)["ana"]
    command = ["train", "--model", home / "model", "--source", f"a={train_path}"]
    command += ["--learning-rate", "2e-3", "--batch-size", 8, "--output", home / "run"]
    assert main([str(word) for word in command]) == 0
    command = ["score", "--model", home / "run", "--input", test_path, "--output", home / "scored"]
    assert main([str(word) for word in command]) == 0
    lines = {"good": [], "bad": []}
    for record in map(json.loads, (home / "scored").read_text().splitlines()):
        sides = sorted(("chosen", "rejected"), key=lambda side: record[f"{side}_reward"])
        for name, side in zip(("bad", "good"), sides):
            lines[name].append({"prompt": record["prompt"], "response": record[side]})
    for name, records in lines.items():
        (home / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return home


def compared(judge, tmp_path, first, second, code=0):
    out = tmp_path / "verdict.json"
    out.unlink(missing_ok=True)
    command = ["align", "compare", "--model", judge / "run", "--input", first, "--other", second]
    assert main([str(word) for word in (*command, "--json", out)]) == code
    return json.loads(out.read_text()) if code == 0 else None


def test_better_responses_win_and_the_other_way_round_they_lose(judge, tmp_path, capsys):
    found = compared(judge, tmp_path, judge / "good", judge / "bad")
    assert found["verdict"] == "win" and found["win"] + found["tie"] + found["lose"] == 60
    assert found["win_rate"] == (found["win"] + found["tie"] / 2) / 60
    low, high = found["win_rate_interval"]
    assert 0.5 < low <= found["win_rate"] <= high <= 1
    assert "win" in capsys.readouterr().out
    other = compared(judge, tmp_path, judge / "bad", judge / "good")
    assert other["verdict"] == "lose" and other["win"] == found["lose"]
    assert other["mean_difference"] == pytest.approx(-found["mean_difference"])


def test_a_file_against_itself_is_a_tie(judge, tmp_path):
    found = compared(judge, tmp_path, judge / "good", judge / "good")
    assert (found["win"], found["tie"], found["lose"]) == (0, 60, 0)
    assert found["verdict"] == "tie" and found["win_rate"] == 0.5


def test_the_order_of_a_file_does_not_matter(judge, tmp_path):
    lines = (judge / "bad").read_text().splitlines(keepends=True)
    (tmp_path / "other").write_text("".join(lines[::-1]))
    found, other = (
        compared(judge, tmp_path, judge / "good", path)
        for path in (judge / "bad", tmp_path / "other")
    )
    for name in ("win", "tie", "lose", "win_rate_interval", "verdict"):
        assert found[name] == other[name]
    assert found["mean_difference"] == pytest.approx(other["mean_difference"], rel=1e-5)


def test_older_rewards_in_a_file_are_no_evidence(judge, tmp_path):
    lines = [json.loads(line) for line in (judge / "bad").read_text().splitlines()]
    bought = [line | {"reward": 1e3, "rewards": [1e3]} for line in lines]
    (tmp_path / "bought").write_text("".join(json.dumps(line) + "\n" for line in bought))
    found = compared(judge, tmp_path, tmp_path / "bought", judge / "bad")
    assert found["verdict"] == "tie" and found["mean_difference"] == 0


def test_several_responses_to_a_prompt_are_judged_by_their_rewards(judge, tmp_path):
    """The oracle is `minimore score`, which scores each file on its own."""
    good, bad = (
        [json.loads(line) for line in (judge / name).read_text().splitlines()]
        for name in ("good", "bad")
    )
    files = {"first": (good, bad, good), "second": (bad, good, good)}
    rewards = []
    for name, sides in files.items():
        records = [
            {"prompt": lines[0]["prompt"], "responses": [line["response"] for line in lines]}
            for lines in zip(*sides)
        ]
        path, scored = tmp_path / name, tmp_path / f"{name}.scored"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        command = ["score", "--model", judge / "run", "--input", path, "--output", scored]
        assert main([str(word) for word in command]) == 0
        rewards.append([json.loads(line)["rewards"] for line in scored.read_text().splitlines()])
    found = compared(judge, tmp_path, tmp_path / "first", tmp_path / "second")
    margins = np.array(rewards[0]) - np.array(rewards[1])
    assert found["pairs"] == margins.size == 180 and found["counts"]["equal_responses"] == 60
    assert found["win"] == (margins[:, :2] > 0).sum() == found["lose"]
    assert found["mean_difference"] == pytest.approx(margins.mean(), abs=1e-5)
    command = ["align", "compare", "--judge", f"reward:{judge / 'run'}"]
    command += ["--input", tmp_path / "first", "--other", tmp_path / "second"]
    assert main([str(word) for word in (*command, "--json", tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == found


def test_intervals_are_over_prompts():
    """Ten copies of every response are no more evidence than one."""
    random = np.random.default_rng(0)
    margins = random.normal(0.2, 1, 100)
    one = verdict_of(margins, np.arange(100))
    ten = verdict_of(np.repeat(margins, 10), np.repeat(np.arange(100), 10))
    width = [f["win_rate_interval"][1] - f["win_rate_interval"][0] for f in (one, ten)]
    assert width[1] > 0.9 * width[0]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda lines: lines[1:], "no response to 1 of the other file's prompts"),
        (lambda lines: [*lines, lines[0]], "2 responses to"),
        (lambda lines: [], "is empty"),
        (lambda lines: ['{"text": ["a", "b"]}\n'], 'expected "prompt"'),
    ],
)
def test_files_that_do_not_belong_together_are_one_line(judge, tmp_path, capsys, change, words):
    lines = (judge / "bad").read_text().splitlines(keepends=True)
    (tmp_path / "other").write_text("".join(change(lines)))
    compared(judge, tmp_path, judge / "good", tmp_path / "other", code=2)
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_model_without_a_head_is_no_judge(judge, tmp_path, capsys):
    command = ["align", "compare", "--model", judge / "model", "--input", judge / "good"]
    assert main([str(word) for word in (*command, "--other", judge / "bad")]) == 2
    assert "cannot judge" in capsys.readouterr().err
