"""One response of several: the same as by hand, whoever decides, and the same after a kill."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from power_cut import Disk, restore
from runs import slow_but

import minimore.alignment.selection as selection
from minimore.alignment.selection import combined, on_one_scale, random_place
from minimore.cli import main
from minimore.data.world import World
from minimore.reward import ModelOptions, open_reward_model, text_rewards

WORDS = ["amber", "basil", "coral", "cedar", "ember", "falcon", "fennel", "ginger"]
JUDGES = (GOLDENS / "gpt_neox", GOLDENS / "llama")  # two tokenizers


def samples(prompts=7, seed=0):
    """Records such as `align sample` writes, with 1 to 5 responses each."""
    random = np.random.default_rng(seed)
    records = []
    for i in range(prompts):
        count = 1 + (i + 2) % 5
        responses = [" " + " ".join(random.choice(WORDS, 1 + j + i % 3)) for j in range(count)]
        finished = [bool(flag) for flag in random.integers(2, size=count)]
        records.append({"prompt": f"{WORDS[i % 8]} {i}:", "responses": responses})
        records[-1] |= {"finished": finished}
    return records


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(tmp_path, *more, models=JUDGES[:1], output="out"):
    words = ["align", "select", "--input", tmp_path / "in.jsonl", "--output", tmp_path / output]
    words += [word for model in models for word in ("--model", model)]
    return [str(word) for word in (*words, *more)]


def selected(tmp_path, records, *more, models=JUDGES[:1]):
    write(tmp_path / "in.jsonl", records)
    (tmp_path / "out").unlink(missing_ok=True)
    assert main(command(tmp_path, *more, models=models)) == 0
    return read(tmp_path / "out")


def rewards_by_hand(records, directory):
    """Every text on its own, tokenised by the model's own tokenizer."""
    model, checkpoint = open_reward_model(ModelOptions(model=str(directory), device="cpu"))
    encode = checkpoint.tokenizer.encode
    return [
        [
            text_rewards(model, encode([record["prompt"] + response], False)).item()
            for response in record["responses"]
        ]
        for record in records
    ]


# ---- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["best", "worst"])
def test_one_model_chooses_as_a_naive_loop_does(tmp_path, by):
    records = samples()
    chosen = selected(tmp_path, records, "--by", by)
    for record, rewards, choice in zip(
        records, rewards_by_hand(records, JUDGES[0]), chosen, strict=True
    ):
        in_order = sorted(rewards, reverse=by == "best")
        place = rewards.index(in_order[0])
        assert list(choice) == ["prompt", "response", "reward", "margin", "finished"]
        assert choice["prompt"] == record["prompt"]
        assert choice["response"] == record["responses"][place]
        assert choice["finished"] is record["finished"][place]
        assert choice["reward"] == pytest.approx(rewards[place], abs=1e-5)
        if len(rewards) > 1:
            assert choice["margin"] == pytest.approx(abs(rewards[place] - in_order[1]), abs=1e-5)
        else:
            assert choice["margin"] is None


def test_best_is_what_score_best_keeps(tmp_path):
    chosen = selected(tmp_path, samples())
    words = ["score", "--model", JUDGES[0], "--input", tmp_path / "in.jsonl", "--best"]
    assert main([str(word) for word in (*words, "--output", tmp_path / "scored")]) == 0
    assert chosen == read(tmp_path / "scored")


@pytest.mark.slow
@pytest.mark.parametrize("pessimism", [0, 0.7, 1])
def test_two_models_choose_as_a_naive_loop_does(tmp_path, pessimism):
    records = samples()
    chosen = selected(tmp_path, records, "--pessimism", pessimism, models=JUDGES)
    scaled = []
    for directory in JUDGES:
        centred = [
            [reward - statistics.fmean(rewards) for reward in rewards]
            for rewards in rewards_by_hand(records, directory)
        ]
        everything = [value for values in centred for value in values]
        deviation = math.sqrt(statistics.fmean(value**2 for value in everything))
        scaled.append([[value / deviation for value in values] for values in centred])
    for record, first, second, choice in zip(records, *scaled, chosen, strict=True):
        rewards = [
            statistics.fmean(z) - pessimism * statistics.pstdev(z) for z in zip(first, second)
        ]
        place = rewards.index(max(rewards))
        assert choice["response"] == record["responses"][place]
        assert choice["reward"] == pytest.approx(rewards[place], abs=1e-4)
        if pessimism == 1:
            lower = max(map(min, zip(first, second)))
            assert choice["reward"] == pytest.approx(lower, abs=1e-4)


def test_pessimism_by_hand():
    first = [[0.0, 1.0, 2.0], [5.0]]
    second = [[30.0, 20.0, -50.0], [7.0]]  # another offset and another scale
    a, b = math.sqrt(2 / 4), math.sqrt((900 + 400 + 2500) / 4)
    z = [[-1 / a, 0.0, 1 / a], [30 / b, 20 / b, -50 / b]]
    middle = [(x + y) / 2 for x, y in zip(*z)]
    apart = [abs(x - y) / 2 for x, y in zip(*z)]
    for k in (0, 0.5, 2):
        expected = [m - k * d for m, d in zip(middle, apart)]
        three, one = combined([first, second], k)
        assert three == pytest.approx(expected) and one == [0.0]
    assert combined([first], 0) is first


def test_scale_and_offset_of_a_model_change_nothing():
    """Nor does what is alike for all responses to a prompt, and a model without an opinion."""
    random = np.random.default_rng(0)
    rewards = [random.normal(size=(20, 4)) for _ in range(3)]
    offsets = random.normal(size=(20, 1))
    plain = combined([r.tolist() for r in rewards], 0.5)
    changed = [rewards[0] * 50 + 7, rewards[1] / 9 + offsets, rewards[2]]
    assert np.allclose(plain, combined([r.tolist() for r in changed], 0.5), atol=1e-12)
    silent = [[3.1] * 4] * 20
    assert all((z == 0).all() for z in on_one_scale(silent))
    best = np.argmax(combined([rewards[0].tolist(), silent]), 1)
    assert (best == np.argmax(rewards[0], 1)).all()


def test_equal_responses_take_the_first(tmp_path):
    records = [
        {"prompt": "amber", "responses": [" b", " b", " b"], "finished": [True, False, False]}
    ]
    for by in ("best", "worst", "longest"):
        models = JUDGES[:1] if by != "longest" else ()
        (choice,) = selected(tmp_path, records, "--by", by, models=models)
        assert choice["finished"] is True


# ---- the controls --------------------------------------------------------------------------------


def test_longest_counts_characters_and_needs_no_model(tmp_path):
    records = [{"prompt": "a", "responses": ["xx", "äöüß", "xxx", "yyyy"], "note": 1}]
    (choice,) = selected(tmp_path, records, "--by", "longest", models=())
    empty = {"reward": None, "margin": None}
    assert choice == {"prompt": "a", "note": 1, "response": "äöüß"} | empty
    assert not list(tmp_path.glob("*.unfinished"))


def test_random_is_a_function_of_seed_and_prompt(tmp_path):
    records = samples(40)
    chosen = selected(tmp_path, records, "--by", "random", models=())
    assert selected(tmp_path, records[::-1], "--by", "random", models=()) == chosen[::-1]
    assert selected(tmp_path, records[3:], "--by", "random", models=()) == chosen[3:]
    assert selected(tmp_path, records, "--by", "random", "--seed", 1, models=()) != chosen
    for record, choice in zip(records, chosen):
        place = record["responses"].index(choice["response"])
        assert choice["finished"] is record["finished"][place]


def test_every_place_is_as_likely_as_the_others():
    counts = np.bincount([random_place(0, f"prompt {i}", 5) for i in range(10_000)], minlength=5)
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert len(counts) == 5 and chi_square < 18.5  # 0.1% of 4 degrees of freedom


class KnownRewards:
    """Stands in for a scorer: the reward of a response is the number that it says."""

    def __init__(self, *_):
        self.counts = type("Counts", (), {"truncated": 0})

    def scored(self, records):
        for where, record in records:
            yield where, record | {"rewards": [float(text) for text in record["responses"]]}


@pytest.fixture(scope="module")
def uniform():
    """16 responses to each of 2,000 prompts, whose rewards are uniform from 0 to 1."""
    rewards = np.random.default_rng(0).random((2000, 16))
    return [
        {"prompt": f"p{i}", "responses": [f"{reward:.8f}" for reward in row]}
        for i, row in enumerate(rewards)
    ]


@pytest.mark.parametrize("n", slow_but([4], [1, 4, 16]))
def test_best_of_n_is_the_order_statistic(tmp_path, monkeypatch, uniform, n):
    """Of n uniform rewards the i-th highest has the mean (n + 1 - i) / (n + 1)."""
    monkeypatch.setattr(selection, "Scorer", KnownRewards)
    deviation = math.sqrt(n / ((n + 1) ** 2 * (n + 2)))  # of the highest, and of the lowest
    expected = {"best": n / (n + 1), "worst": 1 / (n + 1)}
    for by, mean in expected.items():
        chosen = selected(tmp_path, uniform, "--by", by, "--first", n)
        rewards = [choice["reward"] for choice in chosen]
        assert abs(np.mean(rewards) - mean) < 4 * deviation / math.sqrt(len(rewards))
        assert [float(choice["response"]) for choice in chosen] == rewards
        if n > 1:  # two neighbours are 1 / (n + 1) apart, with the same deviation
            margins = [choice["margin"] for choice in chosen]
            error = deviation / math.sqrt(len(margins))
            assert abs(np.mean(margins) - 1 / (n + 1)) < 4 * error
    chosen = selected(tmp_path, uniform, "--by", "random", "--first", n, models=())
    values = [float(choice["response"]) for choice in chosen]
    assert abs(np.mean(values) - 1 / 2) < 4 * math.sqrt(1 / 12 / len(values))


# ---- what survives a kill ------------------------------------------------------------------------


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.mark.slow
def test_a_command_killed_at_every_portion_ends_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selection, "RESPONSES_AT_ONCE", 10)  # two prompts
    write(tmp_path / "in.jsonl", samples())
    more = ("--pessimism", 0.5)
    assert main(command(tmp_path, *more, models=JUDGES, output="whole")) == 0
    calls, killed = [], {}

    class DyingScorer(selection.Scorer):
        def scored(self, records):
            calls.append(1)
            if len(calls) == killed.get("at"):
                raise Killed
            return super().scored(records)

    monkeypatch.setattr(selection, "Scorer", DyingScorer)
    for portion in range(1, 9):  # four of each of two models
        calls.clear()
        killed["at"] = portion
        (tmp_path / "out").unlink(missing_ok=True)
        with pytest.raises(Killed):
            main(command(tmp_path, *more, models=JUDGES))
        assert not (tmp_path / "out").exists()
        with (tmp_path / "out.unfinished").open("a") as file:
            file.write('0badc0de {"rewards"')  # a line that was cut short
        assert main(command(tmp_path, *more, "--resume", models=JUDGES)) == 0
        assert len(calls) == 9  # the portion that was killed is the only one asked for twice
        assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
        assert not (tmp_path / "out.unfinished").exists()
    calls.clear()
    (tmp_path / "out").unlink()
    with pytest.raises(Killed):
        main(command(tmp_path, *more, models=JUDGES))
    capsys.readouterr()
    assert main(command(tmp_path, *more, models=JUDGES)) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert main(command(tmp_path, "--pessimism", 0.6, "--resume", models=JUDGES)) == 2
    assert "begun with other options" in capsys.readouterr().err
    write(tmp_path / "in.jsonl", samples(seed=1))
    assert main(command(tmp_path, *more, "--resume", models=JUDGES)) == 2
    assert "begun with other options, another model or another input" in capsys.readouterr().err


@pytest.mark.slow
def test_a_power_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "RESPONSES_AT_ONCE", 10)
    root = tmp_path / "disk"
    root.mkdir()
    path = write(tmp_path / "in.jsonl", samples())
    words = command(tmp_path, models=JUDGES)
    words[words.index(str(tmp_path / "out"))] = str(root / "out")
    assert words[3] == str(path)
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        assert main(words) == 0
    expected = (root / "out").read_bytes()
    assert disk.lazy["out"] == expected
    root.rename(tmp_path / "first")
    for i, state in enumerate(disk.states):
        restore(state, root)
        if "out" in state:
            assert state["out"] == expected
        else:
            assert main([*words, "--resume"]) == 0
            assert (root / "out").read_bytes() == expected
        root.rename(tmp_path / f"after-{i}")


# ---- bad input -----------------------------------------------------------------------------------

GOOD = {"prompt": "a", "responses": [" b", " c"], "finished": [True, True]}


@pytest.mark.parametrize(
    "records, more, words",
    [
        ([], (), "is empty; expected at least one line"),
        ([GOOD, GOOD | {"responses": []}], (), 'in.jsonl:2: "responses" is []; expected a list'),
        ([GOOD | {"responses": "b"}], (), 'in.jsonl:1: "responses" is "b"; expected a list'),
        ([GOOD | {"responses": [" b", 5]}], (), 'in.jsonl:1: "responses" holds 5'),
        ([{"prompt": "a", "response": "b"}], (), 'align select needs a list "responses"'),
        ([{"responses": ["b"]}], (), '"prompt" is missing'),
        ([GOOD | {"finished": [True]}], (), "lists of different lengths"),
        ([GOOD, GOOD | {"id": float("nan")}], (), "in.jsonl:2: holds a number that is not finite"),
        (
            [GOOD | {"responses": ["a", {"role": "assistant", "content": "b", "x": float("nan")}]}],
            (),
            "in.jsonl:1: holds a number that is not finite",
        ),
        ([GOOD, GOOD], ("--first", 3), "--first 3: "),
        ([GOOD], ("--first", 0), "--first 0: expected"),
        ([GOOD], ("--pessimism", 1), "--pessimism 1.0: expected more than one --model"),
        ([GOOD], ("--pessimism", -1), "--pessimism -1.0: expected at least 0"),
        ([GOOD], ("--by", "random"), "--by random: uses no --model"),
        ([GOOD], ("--by", "longest"), "--by longest: uses no --model"),
        ([GOOD], ("--model", JUDGES[0]), "expected every model once"),
        ([GOOD], ("--model", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, records, more, words):
    write(tmp_path / "in.jsonl", records)
    assert main(command(tmp_path, *more)) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_messages_are_chosen_but_have_no_length(tmp_path, capsys):
    turns = [{"role": "user", "content": "hi"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    records = [{"prompt": turns, "responses": answers}]
    for by in ("best", "random"):
        (choice,) = selected(
            tmp_path, records, "--by", by, models=JUDGES[:1] if by == "best" else ()
        )
        assert choice["response"] in answers and choice["prompt"] == turns
    (tmp_path / "out").unlink()
    assert main(command(tmp_path, "--by", "longest", models=())) == 2
    assert "expected strings" in capsys.readouterr().err


def test_without_a_reward_head_nothing_is_selected(tmp_path, capsys):
    write(tmp_path / "in.jsonl", [GOOD])
    assert main(command(tmp_path, models=())) == 2
    assert "expected at least one --model" in capsys.readouterr().err
    World(annotators=("ana", "ben"), train_pairs=(20,), test_pairs=5).write(tmp_path / "world")
    assert main(command(tmp_path, models=(*JUDGES, tmp_path / "world" / "model"))) == 2
    said = capsys.readouterr().err
    assert "cannot select" in said and said.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_a_model_whose_rewards_are_not_finite_says_so(tmp_path, capsys, damaged):
    def overflowing(weights):
        return weights | {"score.weight": torch.full_like(weights["score.weight"], 3e38)}

    write(tmp_path / "in.jsonl", [GOOD])
    assert main(command(tmp_path, models=(damaged("llama", weights=overflowing),))) == 1
    assert "not finite" in capsys.readouterr().err
