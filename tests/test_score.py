"""Rewards of texts from Python: the same as those of the verb, and clear about what is no text."""

import json

import pytest
import torch
from conftest import GOLDENS

import minimore
from minimore.cli import main
from minimore.options import InputError

PROMPTS = ["\n\nHuman: hi\n\nAssistant:", "amber", ""]
RESPONSES = [[" a b c", " d", " a b"], [" basil", " cedar coral basil"], [" e"]]
TURNS = [{"role": "user", "content": "hi"}]
ANSWER = {"role": "assistant", "content": "yes"}


@pytest.fixture(scope="module")
def opened():
    options = minimore.ModelOptions(model=str(GOLDENS / "llama"), device="cpu")
    model, checkpoint = minimore.open_reward_model(options)
    return model, checkpoint.tokenizer


def scored(records, tmp_path, *more):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    out.unlink(missing_ok=True)
    command = ["score", "--model", str(GOLDENS / "llama"), "--input", str(path), "--device", "cpu"]
    assert main([*command, "--output", str(out), *more]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_one_response_each(opened, tmp_path):
    responses = [each[0] for each in RESPONSES]
    records = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, responses)]
    expected = [record["reward"] for record in scored(records, tmp_path)]
    rewards = minimore.score_texts(*opened, PROMPTS, responses)
    assert rewards.dtype == torch.float32 and rewards.tolist() == expected
    assert minimore.score_texts(*opened, tuple(PROMPTS), tuple(responses)).tolist() == expected


def test_several_responses_each(opened, tmp_path):
    records = [{"prompt": p, "responses": r} for p, r in zip(PROMPTS, RESPONSES)]
    rewards = minimore.score_texts(*opened, PROMPTS, RESPONSES)
    assert [each.tolist() for each in rewards] == [
        record["rewards"] for record in scored(records, tmp_path)
    ]
    for prompt, responses, best in zip(PROMPTS, RESPONSES, scored(records, tmp_path, "--best")):
        choice = minimore.best_of(*opened, prompt, responses)
        assert responses[choice.place] == best["response"]
        assert choice.reward == pytest.approx(best["reward"], abs=1e-5)
        assert choice.margin == pytest.approx(best["margin"], abs=1e-5)


def test_more_prompts_than_are_scored_at_a_time(opened):
    prompts = [f"amber {i % 7}" for i in range(600)]
    responses = [[" b", " c"][: 1 + i % 2] for i in range(600)]
    rewards = minimore.score_texts(*opened, prompts, responses)
    for i in (0, 1, 255, 256, 599):
        (alone,) = minimore.score_texts(*opened, prompts[i : i + 1], responses[i : i + 1])
        assert torch.allclose(rewards[i], alone, atol=1e-5)


def test_messages_cuts_and_chat_are_those_of_the_verb(opened, tmp_path):
    records = [
        {"prompt": TURNS, "responses": [[ANSWER], [*TURNS, ANSWER]]},
        {"prompt": "hi", "responses": ["yes", "no " * 60]},
    ]
    prompts = [record["prompt"] for record in records]
    responses = [record["responses"] for record in records]
    expected = scored(records, tmp_path, "--max-length", "9", "--chat")
    rewards = minimore.score_texts(*opened, prompts, responses, max_length=9, chat=True)
    assert [each.tolist() for each in rewards] == [record["rewards"] for record in expected]
    (one,) = minimore.score_texts(*opened, [TURNS], [[ANSWER]])
    assert one.item() == minimore.best_of(*opened, TURNS, [ANSWER]).reward


def test_equal_rewards_take_the_first_and_one_has_no_margin(opened):
    place, _, margin = minimore.best_of(*opened, "a", [" b", " b", " b"])
    assert place == 0 and margin == pytest.approx(0, abs=1e-6)
    assert minimore.best_of(*opened, "a", [" b"]).margin is None


def test_empty_lists_have_empty_rewards(opened):
    assert minimore.score_texts(*opened, [], []).shape == (0,)
    empty, one = minimore.score_texts(*opened, ["a", "b"], [[], [" c"]])
    assert empty.shape == (0,) and one.shape == (1,)
    (only,) = minimore.score_texts(*opened, ["a"], [[]])
    assert only.shape == (0,)


@pytest.mark.parametrize(
    "prompts, responses, words",
    [
        ("a", ["b"], "prompts is of type str"),
        (["a"], "b", "responses is of type str"),
        (["a"], None, "responses is of type NoneType"),
        (["a", "b"], ["c"], "2 prompts and 1 responses"),
        (["a", 5], ["b", "c"], r'prompts\[1\]: "prompt" is 5; expected a string'),
        (["a"], [None], r'prompts\[0\]: "response" is null'),
        (["a", "b"], [" c", [" d"]], "expected one kind"),
        (["a"], [[" b", 3]], r'"responses"\[1\]: "response" is 3'),
        ([b"a"], [" b"], '"prompt" is of type bytes; expected a string'),
        (["a"], [{"role": "assistant"}], '"content" is missing'),
        (["<s>a"], [" b"], "which the tokenizer adds itself"),
    ],
)
def test_what_is_no_text_is_named(opened, prompts, responses, words):
    with pytest.raises(InputError, match=words):
        minimore.score_texts(*opened, prompts, responses)


def test_what_is_no_model_and_no_response_is_named(opened):
    model, tokenizer = opened
    with pytest.raises(
        InputError, match="a Tokenizer of tokenizers; expected the tokenizer of a Check"
    ):
        minimore.score_texts(model, tokenizer.file, ["a"], [" b"])
    with pytest.raises(InputError, match="model is of type str; expected what open_reward"):
        minimore.score_texts("runs/more", tokenizer, ["a"], [" b"])
    for responses in ([], " b", None):
        with pytest.raises(InputError, match="expected a list of one or more responses"):
            minimore.best_of(model, tokenizer, "a", responses)


def test_best_keeps_whether_the_best_had_ended(tmp_path):
    records = [
        {"prompt": "amber", "responses": r, "finished": [True, False]} for r in RESPONSES[1:2]
    ]
    (rewards,) = [record["rewards"] for record in scored(records, tmp_path)]
    (best,) = scored(records, tmp_path, "--best")
    assert best["finished"] == [True, False][rewards.index(max(rewards))]
    assert list(best) == ["prompt", "response", "reward", "margin", "finished"]
    path, out = tmp_path / "in.jsonl", str(tmp_path / "other")
    path.write_text(json.dumps(records[0] | {"finished": [True]}))
    command = ["score", "--model", str(GOLDENS / "llama"), "--input", str(path), "--output", out]
    assert main([*command, "--best"]) == 2
