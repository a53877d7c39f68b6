"""The world and a file of verdicts as judges, and what all judges have alike."""

import json
import math

import numpy as np
import pytest

from minimore.cli import main
from minimore.data.world import WORDS, World

PROMPT = "\n\nHuman: amber\n\nAssistant:"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The directory of a world, and the world."""
    world = World(annotators=("ana", "ben"), train_pairs=(5,), test_pairs=5)
    home = tmp_path_factory.mktemp("world")
    world.write(home)
    return home, world


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def responses(path, texts):
    """A file with one response to each of some prompts."""
    return write(
        path, [{"prompt": f"{PROMPT} {i}", "response": text} for i, text in enumerate(texts)]
    )


def compared(tmp_path, judge, first, second, code=0):
    out = tmp_path / "verdict.json"
    out.unlink(missing_ok=True)
    command = ["align", "compare", "--judge", judge, "--input", first, "--other", second]
    assert main([str(word) for word in (*command, "--json", out)]) == code
    return json.loads(out.read_text()) if code == 0 else None


# ---- the world -----------------------------------------------------------------------------------


@pytest.mark.parametrize("annotator", [None, "ana", "ben"])
def test_the_world_judges_by_its_true_rewards(world, tmp_path, annotator):
    """A response of one known word is worth that word's value / √n; others are worth nothing."""
    home, truth = world
    shared, drifts = truth.values()
    values = shared if annotator is None else shared + drifts[truth.annotators.index(annotator)]
    worth = dict(zip(WORDS, values / math.sqrt(truth.response_words)))
    texts = [("amber", "basil"), ("amber amber", "amber"), ("cedar", "nonsense"), ("x", "y z")]
    expected = [
        worth["amber"] - worth["basil"],
        worth["amber"],
        worth["cedar"],
        0.0,
    ]
    first, second = (
        responses(tmp_path / str(side), [pair[side] for pair in texts]) for side in (0, 1)
    )
    judge = f"world:{home}" + (f":{annotator}" if annotator else "")
    report = compared(tmp_path, judge, first, second)
    assert report["win"] == sum(margin > 0 for margin in expected)
    assert report["lose"] == sum(margin < 0 for margin in expected)
    assert report["tie"] == 1
    assert report["mean_difference"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert report["judge"] == judge


def test_the_world_reads_messages(world, tmp_path):
    home, _ = world
    texts = ["amber", "basil"]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    for name, values in (("texts", texts), ("messages", messages)):
        (tmp_path / name).mkdir()
        first, second = (
            responses(tmp_path / name / str(side), [value]) for side, value in enumerate(values)
        )
        report = compared(tmp_path / name, f"world:{home}", first, second)
        assert report["mean_difference"] != 0
    assert report == json.loads((tmp_path / "texts/verdict.json").read_text()) | {
        "first": str(first),
        "second": str(second),
    }


def test_two_samples_of_one_policy_are_a_tie(world, tmp_path):
    home, _ = world
    random = np.random.default_rng(0)
    files = [
        responses(tmp_path / name, [" ".join(random.choice(WORDS, 14)) for _ in range(400)])
        for name in ("a", "b")
    ]
    report = compared(tmp_path, f"world:{home}", *files)
    low, high = report["win_rate_interval"]
    assert report["verdict"] == "tie" and low < 0.5 < high and report["tie"] == 0
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400), rel=0.15)


# ---- a file of verdicts --------------------------------------------------------------------------


def verdict(i, first, second, word):
    return {"prompt": f"{PROMPT} {i}", "first": first, "second": second, "verdict": word}


def test_votes_are_counted_in_whichever_order_they_name_the_responses(tmp_path):
    first, second = (
        responses(tmp_path / name, [f"{name}{i}" for i in range(5)]) for name in ("a", "b")
    )
    votes = [
        verdict(0, "a0", "b0", "first"),
        verdict(1, "b1", "a1", "first"),  # the other way round: a loss
        verdict(2, "a2", "b2", "tie"),
        verdict(3, "a3", "b3", "first"),  # two votes against one
        verdict(3, "a3", "b3", "second"),
        verdict(3, "b3", "a3", "second"),
        verdict(4, "a4", "b4", "first"),  # one against one
        verdict(4, "b4", "a4", "first"),
        verdict(9, "a9", "b9", "first"),
    ]
    path = write(tmp_path / "votes.jsonl", votes)
    report = compared(tmp_path, f"verdicts:{path}", first, second)
    assert (report["win"], report["tie"], report["lose"]) == (2, 2, 1)
    assert report["win_rate"] == (2 + 2 / 2) / 5
    assert report["mean_difference"] is None
    assert report["counts"] == {"equal_responses": 0, "votes": 8, "unused_votes": 1}


def test_verdicts_on_messages(tmp_path):
    prompt = [{"role": "user", "content": "hi"}]
    first = write(tmp_path / "a", [{"prompt": prompt, "responses": ["x", "same"]}])
    second = write(tmp_path / "b", [{"prompt": prompt, "responses": ["y", "same"]}])
    line = {"prompt": prompt, "first": "x", "second": "y", "verdict": "first"}
    path = write(tmp_path / "votes.jsonl", [line])
    report = compared(tmp_path, f"verdicts:{path}", first, second)
    assert (report["win"], report["tie"]) == (1, 1)
    assert report["counts"]["equal_responses"] == 1


@pytest.mark.parametrize(
    "votes, words",
    [
        ([verdict(0, "a", "b", "first")], "no verdict on 1 of 2 pairs"),
        ([verdict(0, "a", "b", "A")], '"verdict" is "A"; expected "first", "second" or "tie"'),
        ([verdict(0, "a", "b", ["tie"])], '"verdict" is ["tie"]'),
        ([{"prompt": "p", "first": "a", "verdict": "tie"}], '"second" is missing'),
        ([], "is empty"),
    ],
)
def test_verdicts_that_are_none_are_one_line(tmp_path, capsys, votes, words):
    first, second = (responses(tmp_path / name, [name, name]) for name in ("a", "b"))
    path = write(tmp_path / "votes.jsonl", votes)
    compared(tmp_path, f"verdicts:{path}", first, second, code=2)
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


# ---- all judges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", ["world", "world:ana", "verdicts", "endpoint"])
def test_a_file_against_itself_is_a_tie(world, tmp_path, monkeypatch, judge):
    """Nobody is asked about equal responses, so no address needs to answer."""
    home, _ = world
    monkeypatch.setenv("MINIMORE_BASE_URL", "http://localhost:9/v1")
    monkeypatch.chdir(tmp_path)
    names = {
        "world": f"world:{home}",
        "world:ana": f"world:{home}:ana",
        "verdicts": f"verdicts:{write(tmp_path / 'v', [verdict(7, 'a', 'b', 'first')])}",
        "endpoint": "endpoint:m",
    }
    path = responses(tmp_path / "a", ["amber", "basil", "cedar", "x"])
    report = compared(tmp_path, names[judge], path, path)
    assert report["verdict"] == "tie" and report["tie"] == 4 and report["win_rate"] == 0.5
    assert report["counts"]["equal_responses"] == 4


@pytest.mark.parametrize(
    "more, words",
    [
        ((), "--judge is missing: expected reward:DIR|HUB, world:DIR[:ANNOTATOR]"),
        (("--judge", "gpt"), "--judge gpt: expected reward:DIR|HUB"),
        (("--judge", "world:"), "or endpoint:MODEL"),
        (("--judge", "world:nowhere"), "nowhere/world.json: no such file"),
        (("--judge", "world:nowhere:ana"), "nowhere/world.json: no such file"),
        (("--judge", "world:HOME:eve"), "no annotator 'eve'; expected one of ana, ben"),
        (("--judge", "verdicts:nowhere"), "nowhere: no such file"),
        (("--judge", "reward:HOME/model"), "cannot judge"),
        (("--judge", "world:HOME", "--model", "m"), "name two judges"),
        (("--judge", "world:HOME", "--question", "harmless"), "--question: is for --judge endp"),
        (("--model", "m", "--max-calls", "5"), "--max-calls: is for --judge endpoint:MODEL only"),
    ],
)
def test_judges_that_do_not_exist_are_one_line(world, tmp_path, capsys, more, words):
    path = responses(tmp_path / "a", ["amber"])
    more = [word.replace("HOME", str(world[0])) for word in more]
    assert main(["align", "compare", "--input", str(path), "--other", str(path), *more]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.parametrize("value", [7, None, ["x"], "\ud800"])
def test_responses_that_are_no_text_are_one_line(world, tmp_path, capsys, value):
    good, bad = responses(tmp_path / "a", ["amber"]), responses(tmp_path / "b", [value])
    compared(tmp_path, f"world:{world[0]}", good, bad, code=2)
    said = capsys.readouterr().err
    assert '"response"' in said and said.count("\n") == 1
