"""Annotators: readers of public sets in which people disagree, and the set says who said what.

Each takes a record and "file:line", and gives items (comparisons.py); shapes.py has the table.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from ...options import require
from ..records import Record
from ..values import (
    choice_at,
    is_absent,
    list_of,
    number_or_none,
    object_of,
    text_at,
    value_of,
)
from .comparisons import Item, LeftOut, rated, twos, voted, votes_of
from .house import with_input

# What an annotator of MultiPref says, and whether the first response is the better one.
MULTIPREF_OPINIONS = {
    "A-is-clearly-better": True,
    "A-is-slightly-better": True,
    "Tie": None,
    "B-is-slightly-better": False,
    "B-is-clearly-better": False,
}
MULTIPREF_GROUPS = ("normal_worker_annotations", "expert_worker_annotations")


def multipref(record: Record, where: str) -> Iterator[Item]:
    """MultiPref: two responses, and what four annotators prefer overall, two of them experts."""
    opinions: list[bool | None] = []
    for group in MULTIPREF_GROUPS:
        named = f'{where}: "{group}"'
        annotations = value_of(record, group, where)
        for annotation in list_of(annotations, named) if annotations else []:
            said = value_of(object_of(annotation, named), "overall_pref", named)
            if is_absent(said):
                continue
            is_known = isinstance(said, str) and said in MULTIPREF_OPINIONS
            expected = ", ".join(MULTIPREF_OPINIONS)
            require(is_known, f'{named}: "overall_pref" is {said}; expected one of {expected}')
            opinions.append(MULTIPREF_OPINIONS[said])
    if not opinions:
        yield LeftOut("no label")
        return
    two = [text_at(record, f"completion_{side}", where) for side in "ab"]
    yield voted(text_at(record, "text", where), two, votes_of(opinions))


def prism(record: Record, where: str) -> Iterator[Item]:
    """PRISM: a conversation in which a person rates, at every turn, the replies of several models.

    The prompt of a turn is what was said before, with the reply that the person chose to go on
    with. What comes behind a turn without such a reply has no prompt, and is left out.
    """
    named = f'{where}: "conversation_history"'
    messages = [object_of(each, named) for each in list_of(record["conversation_history"], named)]
    thread: list[Any] | None = []
    for _, turn in groupby(messages, lambda message: value_of(message, "turn", named)):
        asked, replies = _turn_of(list(turn), named)
        texts = [text_at(reply, "content", named) for reply in replies]
        if thread is None:
            yield LeftOut("behind a turn without a chosen reply", twos(len(replies)))
            continue
        prompt = [*thread, {"role": "user", "content": text_at(asked, "content", named)}]
        scores = [number_or_none(reply.get("score"), f"{named}: score") for reply in replies]
        annotator = text_at(record, "user_id", where)
        yield from rated(prompt, texts, scores, "no score", annotator=annotator)
        chosen = [text for text, reply in zip(texts, replies) if reply.get("if_chosen") is True]
        thread = [*prompt, {"role": "assistant", "content": chosen[0]}] if chosen else None


def _turn_of(turn: list[Record], named: str) -> tuple[Record, list[Record]]:
    """What a person asks in one turn, and the replies of the models."""
    asked = [message for message in turn if value_of(message, "role", named) == "user"]
    replies = [message for message in turn if message["role"] == "model"]
    require(
        len(asked) == 1 and len(asked) + len(replies) == len(turn),
        f"{named}: a turn holds {len(asked)} questions among {len(turn)} messages; expected one,"
        " and replies of models",
    )
    return asked[0], replies


def pandalm(record: Record, where: str) -> Iterator[Item]:
    """PandaLM: labels of several annotators: 1 is the first response, 2 the second, 0 neither."""
    first, second = (text_at(record, f"response{side}", where) for side in "12")
    annotators = [key for key in record if re.fullmatch(r"annotator\d+", str(key))]
    labels = [choice_at(record, key, where, (0, 1, 2)) for key in annotators]
    opinions = [None if label == 0 else label == 1 for label in labels if label is not None]
    if not opinions:
        yield LeftOut("no label")
        return
    yield voted(with_input(record, where), [first, second], votes_of(opinions))
