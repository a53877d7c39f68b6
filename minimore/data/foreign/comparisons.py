"""Comparisons: what a record of any shape is turned into.

A reader of a shape (readers.py, trees.py, ...) gives *items*: house records, as forms.py reads
them, and in their place `LeftOut` where a comparison has no label. Nothing else may happen to a
comparison: what a reader cannot understand is an InputError.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ...options import require
from ..dialogues import prompt_end
from ..messages import Messages, is_conversation, messages_of
from ..records import Record
from ..values import string_of


class LeftOut(NamedTuple):
    """Comparisons of two responses that become no pair, and why.

    taste: the name of the file in which they would have been, if there are several.
    """

    reason: str
    comparisons: int = 1
    taste: str = ""


class Note(NamedTuple):
    """Something worth knowing that changes no comparison."""

    what: str


Item = Record | LeftOut | Note


# ---- from two or more responses to a house record ------------------------------------------------


def preferred(prompt: Any, two: Sequence[Any], first_is_better: bool | None) -> Record:
    """Two responses of which one is better, or neither (None): then they have equal scores.

    >>> preferred("P", ["a", "b"], False)
    {'prompt': 'P', 'chosen': 'b', 'rejected': 'a'}
    >>> preferred("P", ["a", "b"], None)
    {'prompt': 'P', 'responses': ['a', 'b'], 'scores': [0, 0]}
    """
    if first_is_better is None:
        return scored(prompt, list(two), [0, 0])
    chosen, rejected = two if first_is_better else reversed(two)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def voted(prompt: Any, two: Sequence[Any], votes: list[float]) -> Record:
    """Two responses with how many annotators prefer each; as many for both are a label tie.

    A tie has scores, not votes: nobody may take its first response for the better one.

    >>> voted("P", ["a", "b"], [1, 2])
    {'prompt': 'P', 'chosen': 'b', 'rejected': 'a', 'votes': [2, 1]}
    """
    if votes[0] == votes[1]:
        return scored(prompt, list(two), votes)
    record = preferred(prompt, two, votes[0] > votes[1])
    return record | {"votes": sorted(votes, reverse=True)}


def scored(prompt: Any, responses: list[Any], scores: list[float]) -> Record:
    """Several responses with a score each; the higher is the better."""
    return {"prompt": prompt, "responses": responses, "scores": scores}


def votes_of(opinions: Iterable[bool | None]) -> list[float]:
    """How many annotators prefer the first of two responses, and how many the second.

    opinions: of each annotator whether the first is better; None is neither, half a vote for each.

    >>> votes_of([True, True, None])
    [2.5, 0.5]
    """
    for_first = [0.5 if opinion is None else float(opinion) for opinion in opinions]
    return [sum(for_first), len(for_first) - sum(for_first)]


def rated(
    prompt: Any, responses: Sequence[Any], scores: Sequence[float | None], reason: str, **keys: str
) -> Iterator[Item]:
    """Several responses of which some may have no score (None): those are compared with none.

    reason: why comparisons with them are left out. keys: go along with the record.

    >>> left_out, record = rated("P", ["a", "b", "c"], [2, None, 1], "no score")
    >>> left_out.comparisons, record["responses"]
    (2, ['a', 'c'])
    """
    with_score = [response for response, score in zip(responses, scores) if score is not None]
    missing = twos(len(responses)) - twos(len(with_score))
    if missing:
        yield LeftOut(reason, missing, keys.get("taste", ""))
    if len(with_score) > 1:
        yield scored(prompt, with_score, [score for score in scores if score is not None]) | keys


def twos(responses: int) -> int:
    """How many comparisons of two there are among so many responses.

    >>> twos(4)
    6
    """
    return responses * (responses - 1) // 2


def apart(texts: Sequence[Any], where: str) -> tuple[Any, list[Any]]:
    """Whole texts, or whole conversations, as the prompt that they share and the rest of each.

    Texts are cut behind the last assistant mark that they share, conversations behind the last turn
    that they share. Raises InputError for conversations that begin differently.
    """
    if not any(map(is_conversation, texts)):
        strings = [string_of(text, where, "a text, or messages") for text in texts]
        end = prompt_end(strings)
        return strings[0][:end], [text[end:] for text in strings]
    conversations = [messages_of(text, where, tokenizer=None, role="assistant") for text in texts]
    end = _shared_turns(conversations)
    require(
        end > 0 and all(len(turns) > end for turns in conversations),
        f"{where}: the conversations do not answer the same turns; expected one beginning for both",
    )
    return conversations[0][:end], [turns[end:] for turns in conversations]


def _shared_turns(conversations: Sequence[Messages]) -> int:
    """How many messages conversations share at their beginning, up to one that asks for an answer.

    It may be all messages of one of them.
    """
    shared = 0
    for turns in zip(*conversations):
        if any(turn != turns[0] for turn in turns):
            break
        shared += 1
    while shared and conversations[0][shared - 1]["role"] == "assistant":
        shared -= 1
    return shared


def carried(record: Record, **keys: str) -> Record:
    """The strings of a record that go along with its pairs, under the names that they have here.

    >>> carried({"worker": "w7", "note": ""}, annotator="worker", remark="note")
    {'annotator': 'w7'}
    """
    return {
        name: record[key]
        for name, key in keys.items()
        if isinstance(record.get(key), str) and record[key]
    }
