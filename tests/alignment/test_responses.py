"""Responses as ids: which are learned, where they end, what is cut."""

import json

import pytest
from conftest import write_checkpoint
from reference import reference_model

from minimore.alignment.responses import cut_to_length, encoded, read_responses, texts_to_learn
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
    "messages": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "yes"},
            ]
        },
        [(HH, [" yes"], [True])],
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
        ({"prompt": "p", "responses": []}, '"responses" is empty or no list'),
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
