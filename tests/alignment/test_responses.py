"""Responses as ids: which are learned, where they end, what is cut."""

import json
import shutil

import pytest
from conftest import edit_json, write_checkpoint
from reference import reference_model

from minimore.alignment import responses
from minimore.alignment.perplexity import PerplexityOptions, read_sides
from minimore.alignment.responses import (
    cut_to_length,
    encoded,
    eos_of,
    read_responses,
    texts_to_learn,
)
from minimore.model.checkpoint import Checkpoint
from minimore.options import InputError

HH = "\n\nHuman: q\n\nAssistant:"


@pytest.fixture(scope="module")
def checkpoint(transformers, tmp_path_factory):
    """A LLaMA, whose tokenizer puts a BOS in front; its EOS has the id 2."""
    return write_checkpoint(
        reference_model("llama", head="ForCausalLM"), tmp_path_factory.mktemp("llama")
    )


def texts_of(record, checkpoint, which="chosen", chat=False):
    learned = texts_to_learn(record, "file:1", checkpoint.tokenizer, which, chat)
    return [(texts.prompt, texts.responses, texts.ends) for texts in learned]


PAIR = {"prompt": "p ", "chosen": "good", "rejected": "bad"}
THREE = {"prompt": "p ", "responses": ["a", "b", "c"], "scores": [1, 3, 2]}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
RECORDS = {
    "a pair": (PAIR, [("p ", ["good"], [True])]),
    "whole dialogues": (
        {"chosen": f"{HH} yes", "rejected": f"{HH} no"},
        [(HH, [" yes"], [True])],
    ),
    "scored texts": ({"text": ["p a", "p b"], "score": [0, 1]}, [("", ["p b"], [True])]),
    "a label tie": ({"text": ["p a", "p b"], "score": [1, 1]}, []),
    "three scored responses": (THREE, [("p ", ["b"], [True])]),
    "two best": (THREE | {"scores": [3, 3, 2]}, [("p ", ["a", "b"], [True, True])]),
    "a sample": (
        {"prompt": "p ", "response": "x", "finished": False, "reward": 1.5},
        [("p ", ["x"], [False])],
    ),
    "samples": (
        {"prompt": "p ", "responses": ["x", "y"], "finished": [True, False]},
        [("p ", ["x", "y"], [True, False])],
    ),
    "messages": ({"messages": TURNS}, [(HH, [" yes"], [True])]),
    "messages that are the prompt of a pair": (
        {"messages": TURNS[:1], "chosen": "yes", "rejected": "no"},
        [(HH, [" yes"], [True])],
    ),
    "messages that are the prompt of a sample": (
        {"messages": TURNS[:1], "response": "yes", "finished": False},
        [(HH, [" yes"], [False])],
    ),
    "a prompt of messages": (
        {"prompt": [{"role": "user", "content": "q"}], "responses": ["yes", "no"]},
        [(HH, [" yes", " no"], [True, True])],
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_learned_of_a_record(checkpoint, name):
    record, expected = RECORDS[name]
    assert texts_of(record, checkpoint) == expected


def test_all_responses_of_a_pair_and_strings_as_messages(checkpoint):
    assert texts_of(PAIR, checkpoint, "all") == [("p ", ["good", "bad"], [True, True])]
    assert texts_of(THREE, checkpoint, "all")[0][1] == ["b", "a", "c"]  # each once
    sample = {"prompt": "q", "response": "yes"}
    assert texts_of(sample, checkpoint, chat=True) == [(HH, [" yes"], [True])]


@pytest.mark.parametrize(
    "record, said",
    [
        ({"response": "x"}, '"prompt" is missing; found keys: response'),
        ({"prompt": "p", "responses": []}, r'"responses" is \[\]; expected a list'),
        ({"prompt": "p", "responses": ["x"] * 101}, "at most 100"),
        ({"system": "s", "messages": TURNS}, '"system" beside "messages" would not be read'),
        (THREE | {"finished": [True, False, True]}, '"finished" is not read beside "scores"'),
        ({"prompt": "q", "response": [*TURNS[1:], *TURNS[:1]]}, "a conversation does not end with"),
        ({"prompt": "p", "responses": ["x"], "finished": [True, True]}, '"finished" is not true'),
        ({"prompt": "p", "response": "x", "finished": "yes"}, '"finished" is not true or false'),
        ({"prompt": "p", "response": 3}, '"response" is 3; expected a string, or messages'),
        ({"prompt": "p", "responses": ["x", 3]}, r'"responses"\[1\] is 3; expected a string'),
        ({"messages": [{"role": "user", "content": "q"}]}, "does not end with an answer"),
        ({"a": 1}, "is missing"),
    ],
)
def test_what_cannot_be_read(checkpoint, record, said):
    with pytest.raises(InputError, match=said) as error:
        texts_of(record, checkpoint)
    assert str(error.value).startswith("file:1")


# ---- what a chat template writes around a response ----------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content.strip() }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CHANGING = (  # it writes a thought where the last turn begins, and none where it is answered
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: <think>{% endif %}"
)


@pytest.fixture
def chatting(checkpoint, tmp_path):
    """chatting(template): the checkpoint with a chat template; <s> and </s> are special tokens."""

    def copy(template):
        directory = tmp_path / "chatting"
        shutil.copytree(checkpoint.directory, directory)
        (directory / "chat_template.jinja").write_text(template)
        return Checkpoint(str(directory))

    return copy


def test_a_response_that_was_cut_does_not_get_the_end_of_its_template(chatting, tmp_path):
    checkpoint = chatting(TEMPLATE)
    responses = ["a </s", "cut off \n", "</", "one\ntwo"]
    record = {"prompt": TURNS[:1], "responses": responses, "finished": [True] * 3 + [False]}
    turned = record | {"finished": [False] * 3 + [True]}
    file = read_responses(write(tmp_path / "in", [record, turned]), checkpoint, 512)
    decode = checkpoint.tokenizer.file.decode
    texts = [
        [decode(ids, skip_special_tokens=False) for ids in item.responses] for item in file.items
    ]
    said = [response.strip() for response in responses]
    ended = [f"{text}</s>\n" for text in said]
    assert texts == [[*ended[:3], said[3]], [*said[:3], ended[3]]]
    assert [2 in ids for item in file.items for ids in item.responses] == [True] * 3 + [
        False
    ] * 4 + [True]


def test_what_says_nothing_is_blank_whatever_its_template_writes(chatting, tmp_path):
    checkpoint = chatting(TEMPLATE)
    nothing = {"role": "assistant", "content": " "}
    records = [
        {"prompt": TURNS[:1], "responses": ["", "yes"]},
        {"messages": [*TURNS[:1], nothing]},
        {"prompt": TURNS[:1], "chosen": "", "rejected": "no"},
    ]
    file = read_responses(write(tmp_path / "in", records), checkpoint, 512)
    assert file.blank == 3 and sum(len(item.responses) for item in file.items) == 1
    both = read_responses(write(tmp_path / "in", records[2:]), checkpoint, 512, "all")
    assert both.blank == 1 and len(both.items[0].responses) == 1


def test_a_template_that_hides_where_a_response_begins_is_refused(chatting, tmp_path):
    """The texts of the two responses share "ye", which must not count as the prompt."""
    checkpoint = chatting(CHANGING)
    pair = {"prompt": TURNS[:1], "chosen": "yes", "rejected": "yellow"}
    for record in (pair, {"prompt": TURNS[:1], "response": "yes"}):
        with pytest.raises(InputError, match="file:1: the chat template writes the prompt other"):
            texts_of(record, checkpoint)
    options = PerplexityOptions(model="", input=write(tmp_path / "in", [pair]))
    with pytest.raises(InputError, match="in:1: the chat template writes the prompt otherwise"):
        read_sides(options, checkpoint.tokenizer)


# ---- from a file to ids -------------------------------------------------------------------------


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_an_end_is_learned_where_a_response_ended(checkpoint, tmp_path):
    records = [
        {"prompt": "p ", "responses": ["x", "y"], "finished": [True, False]},
        {"prompt": "p ", "response": " \n"},
        {"prompt": "p ", "chosen": "x", "rejected": "y"},
    ]
    file = read_responses(write(tmp_path / "in", records), checkpoint, 512)
    (prompt, (ended, cut)), (_, (chosen,)) = file.items
    assert prompt[0] == 1 and ended[-1] == chosen[-1] == 2 and 2 not in cut
    assert chosen == ended and file.blank == 1
    assert "3 responses to 2 prompts" in file.line() and "1 blank" in file.line()
    other = read_responses(write(tmp_path / "in", records[2:]), checkpoint, 512)
    assert other.digest() != file.digest()
    with pytest.raises(InputError, match="no usable response"):
        read_responses(write(tmp_path / "in", records[1:2]), checkpoint, 512)


def test_a_cut_takes_from_the_prompt_and_leaves_the_response(checkpoint):
    learned = texts_to_learn(
        {"prompt": "one two three four five six ", "responses": ["seven", "eight nine"]},
        "file:1",
        checkpoint.tokenizer,
    )
    ((prompt, *texts),) = encoded(learned, checkpoint.tokenizer)
    whole, was_cut = cut_to_length(prompt, texts, [2, 2], 1, 512)
    assert not was_cut and all(response[-1] == 2 for response in whole.responses)
    longest = max(map(len, whole.responses))
    for max_length in (longest + len(whole.prompt), longest + 5, longest + 2):
        cut, was_cut = cut_to_length(prompt, texts, [2, 2], 1, max_length)
        assert cut.responses == whole.responses and cut.prompt[0] == whole.prompt[0] == 1
        assert len(cut.prompt) + longest == max_length
        assert was_cut == (max_length < longest + len(whole.prompt))
        assert cut.prompt[1:] == whole.prompt[1 - len(cut.prompt) :]


def test_a_response_that_is_too_long_loses_its_end():
    item, was_cut = cut_to_length([1, 5], [[1, 5, 6, 7, 8, 9]], [2], 1, 4)
    assert item == ([1, 5], [[6, 7]]) and was_cut
    assert cut_to_length([1, 5], [[1, 5]], [2], 1, 9) == (None, False)  # no token of its own
    assert cut_to_length([], [[6]], [2], 0, 9) == (None, False)  # nothing in front of it
    assert cut_to_length([1, 5], [[1, 5, 6]], [2], 1, 2) == (None, False)  # no room
    assert cut_to_length([1, 5], [[1, 5, 6, 2, 3]], [2], 1, 9)[0] == (
        [1, 5],
        [[6, 2, 3]],
    )  # has its end


def test_records_that_prefer_no_response_are_counted(checkpoint, tmp_path):
    tie = {"text": ["p a", "p b"], "score": [1, 1]}
    alike = {"prompt": "p ", "chosen": "x", "rejected": "x"}
    file = read_responses(write(tmp_path / "in", [tie, alike, PAIR]), checkpoint, 512)
    assert file.ties == 2 and file.line().endswith("; 2 records prefer no response")
    with pytest.raises(InputError, match="2 records that prefer none"):
        read_responses(write(tmp_path / "in", [tie, alike]), checkpoint, 512)


@pytest.mark.parametrize("limit", ["ENCODED_AT_ONCE", "CHARACTERS_AT_ONCE"])
def test_texts_are_encoded_some_at_a_time(checkpoint, tmp_path, monkeypatch, limit):
    records = [{"prompt": f"p {i} ", "responses": ["x" * i, "y"]} for i in range(1, 9)]
    path = write(tmp_path / "in", records)
    expected = read_responses(path, checkpoint, 512)
    monkeypatch.setattr(responses, limit, 3)
    texts = [one for record in records for one in texts_to_learn(record, "", checkpoint.tokenizer)]
    portions = list(responses.in_portions(texts))
    assert [one for portion in portions for one in portion] == texts and len(portions) > 2
    assert read_responses(path, checkpoint, 512).digest() == expected.digest()


@pytest.mark.parametrize(
    "stored, expected",
    [(2, 2), (None, None), (300, None), (-1, None), ([400, 5, 6], 5), ("2", None), (True, None)],
)
def test_an_end_is_a_row_of_the_embedding(checkpoint, tmp_path, stored, expected):
    directory = tmp_path / "model"
    shutil.copytree(checkpoint.directory, directory)
    edit_json(directory / "config.json", {"eos_token_id": stored})
    assert eos_of(Checkpoint(str(directory))) == expected
