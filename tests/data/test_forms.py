"""Files as other people write them are read rightly, or refused by name; never wrongly in silence.

The rows have the shapes of public preference sets; the texts are made up.
"""

import json

import pytest
from conftest import GOLDENS

from minimore.data.forms import record_pairs
from minimore.data.pairs import load_source
from minimore.model.tokenizer import Tokenizer
from minimore.options import InputError

Q, A, B = "What is 2+2?", "It is 4.", "It is 5."
USER, GOOD, BAD = (
    {"role": role, "content": content}
    for role, content in (("user", Q), ("assistant", A), ("assistant", B))
)
SYSTEM = {"role": "system", "content": "Be brief."}
PLAIN = (f"\n\nHuman: {Q}\n\nAssistant: {A}", f"\n\nHuman: {Q}\n\nAssistant: {B}")


@pytest.fixture(scope="module")
def plain():
    """A tokenizer without a chat template: conversations are written as Human and Assistant."""
    return Tokenizer(GOLDENS / "gpt_neox")


def texts(record, tokenizer, chat=False):
    """The whole texts of the pairs of a record."""
    pairs, _ = record_pairs(record, "x:1", tokenizer, chat)
    return [(pair.prompt + pair.chosen, pair.prompt + pair.rejected) for pair in pairs]


ONE_CONVERSATION = {
    "messages": dict(prompt=[USER], chosen=[GOOD], rejected=[BAD]),
    "whole conversations": dict(chosen=[USER, GOOD], rejected=[USER, BAD]),
    "UltraFeedback: the prompt is there twice": dict(
        prompt=Q, chosen=[USER, GOOD], rejected=[USER, BAD], messages=[USER, GOOD], score_chosen=8.5
    ),
    "white space at the end of the prompt": dict(
        prompt=Q + "\n", chosen=[USER, GOOD], rejected=[USER, BAD]
    ),
    "single messages": dict(prompt=USER, chosen=GOOD, rejected=BAD),
    "ShareGPT": dict(
        conversations=[{"from": "human", "value": Q}],
        chosen={"from": "gpt", "value": A},
        rejected={"from": "gpt", "value": B},
    ),
    "parts of text": dict(
        prompt=[{"role": "user", "content": [{"type": "text", "text": Q}]}],
        chosen=[GOOD],
        rejected=[BAD],
    ),
    "messages beside responses": dict(messages=[USER], chosen=A, rejected=B),
}


@pytest.mark.parametrize("name", ONE_CONVERSATION)
def test_a_conversation_is_read(plain, name):
    assert texts(ONE_CONVERSATION[name], plain) == [PLAIN]


def test_a_system_message_stays(plain):
    system = "\n\nSystem: Be brief."
    expected = [tuple(system + text for text in PLAIN)]
    whole = dict(chosen=[SYSTEM, USER, GOOD], rejected=[SYSTEM, USER, BAD])
    assert texts(whole, plain) == expected
    assert texts(whole | {"prompt": Q}, plain) == expected
    asked = dict(system="Be brief.", question=Q, chosen=A, rejected=B)
    assert texts(asked, plain, chat=True) == expected
    assert texts(asked | {"question": [USER]}, plain) == expected


@pytest.mark.parametrize("key", ["question", "query", "instruction", "input"])
def test_a_prompt_under_another_name_is_read(plain, key):
    assert texts({key: Q + " ", "chosen": A, "rejected": B}, plain) == [(f"{Q} {A}", f"{Q} {B}")]
    assert texts({key: Q, "chosen": A, "rejected": B}, plain, chat=True) == [PLAIN]


@pytest.mark.parametrize(
    "record, word",
    [
        (dict(instruction=Q, input="2+2"), "instruction"),
        (dict(system="Be brief.", question=Q), "system"),
        (dict(system="Be brief.", prompt=Q), "system"),
        (dict(system="Be brief.", chosen=PLAIN[0], rejected=PLAIN[1]), "system"),
        (dict(history=[1], chosen=[USER, GOOD], rejected=[USER, BAD]), "history"),
        (dict(history=[["hi", "hello"]], prompt=Q), "history"),
        (dict(history=[["hi", "hello"]]), "history"),
        (dict(prompt="Something else", chosen=[USER, GOOD], rejected=[USER, BAD]), "prompt"),
        (dict(prompt=Q, chosen=[USER, GOOD], rejected=[BAD]), "prompt"),
        (dict(prompt=[{"role": "user", "content": [{"type": "image"}]}]), "image"),
        (dict(chosen=[USER, {"role": "assistant", "content": None, "tool_calls": [1]}]), "tools"),
        (dict(chosen=["a", 5], prompt=Q), "messages"),
        (dict(chosen=5, prompt=Q), "messages"),
        (dict(prompt=Q, chosen=["a"] * 101), "101"),
        (dict(prompt="Summarise:", input="a long text"), "input"),
        (dict(prompt=[USER], chosen=[GOOD, GOOD], rejected=[BAD]), "one response"),
        (dict(prompt=[USER, GOOD], chosen=[GOOD], rejected=[BAD]), "turn of the assistant"),
        (dict(chosen=[USER, GOOD], rejected=[BAD]), "same turn"),
        (dict(chosen=[USER, GOOD], rejected=[USER | {"content": "other"}, BAD]), "same turn"),
        (dict(conversations=[{"from": ["human"], "value": Q}], chosen="a"), "from"),
    ],
    ids=str,
)
def test_what_would_be_dropped_or_misread_is_refused_by_name(plain, record, word):
    with pytest.raises(InputError, match=word):
        record_pairs({"chosen": A, "rejected": B} | record, "x:1", plain)


def test_whole_dialogues_keep_their_own_prompt_whatever_stands_beside_them(plain):
    record = dict(chosen=PLAIN[0], rejected=PLAIN[1], question="another", messages=[USER])
    assert texts(record, plain) == [PLAIN]


def test_an_empty_prompt_gives_way_to_one_under_another_name(plain):
    record = dict(prompt="", question=Q + " ", chosen=A, rejected=B)
    assert texts(record, plain) == [(f"{Q} {A}", f"{Q} {B}")]
    scored = dict(question="P", responses=["a", "b"], scores=[0, 1])
    assert texts(scored, plain) == [("Pb", "Pa")]


def test_several_chosen_and_several_rejected_make_all_their_pairs(plain):
    record = dict(prompt="P", chosen=["a", "b"], rejected=["c", "d"])
    assert texts(record, plain) == [("Pa", "Pc"), ("Pa", "Pd"), ("Pb", "Pc"), ("Pb", "Pd")]


def test_responses_with_scores(plain):
    record = dict(prompt="P", responses=["a", "b", "c"], scores=[1, 3, 1])
    pairs, ties = record_pairs(record, "x:1", plain)
    assert [(p.chosen, p.rejected) for p in pairs] == [("b", "a"), ("b", "c")] and ties == 1
    conversation = dict(prompt=Q, responses=[[BAD], [GOOD]], scores=[0, 1])
    assert texts(conversation, plain) == [PLAIN]
    for wrong in (dict(scores=[1]), dict(scores=None), dict(responses=["a"])):
        with pytest.raises(InputError, match="expected a list of"):
            record_pairs(record | wrong, "x:1", plain)


def test_characters_are_shown_as_they_are(plain):
    with pytest.raises(InputError, match="你好"):
        record_pairs(dict(prompt=["你好"], chosen="a", rejected="b"), "x:1", plain)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prompts_that_run_into_their_responses_are_told(plain, tmp_path):
    glued = dict(prompt="What is 2+2?", chosen="4", rejected="5")
    line = load_source("s", write(tmp_path / "a", glued, glued), plain, 50).line()
    assert "2 prompts run into their responses" in line and "What is 2+2?4" in line
    assert "--chat" in line
    fine = [glued | {"prompt": p} for p in ("Q: 2+2? A:", "2+2?\n", "<|assistant|>")]
    assert "run into" not in load_source("s", write(tmp_path / "b", *fine, glued), plain, 50).line()
    assert "run into" not in load_source("s", tmp_path / "a", plain, 50, chat=True).line()


def test_prompts_that_stand_again_in_their_responses_are_told(plain, tmp_path):
    again = dict(prompt="Say hi. ", chosen="Say hi. Hi", rejected="Say hi. No")
    assert "stand again" in load_source("s", write(tmp_path / "a", again), plain, 50).line()


def test_a_pointer_is_no_file(plain, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    with pytest.raises(InputError, match="git lfs pull"):
        load_source("s", path, plain, 50)
