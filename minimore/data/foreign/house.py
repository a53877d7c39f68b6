"""House readers: shapes that are forms of forms.py already, or become one by naming their fields.

Each takes a record and "file:line", and gives items (comparisons.py); shapes.py has the table.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

from ...options import require
from ..dialogues import prompt_end
from ..forms import record_pairs, texts_of
from ..messages import is_conversation
from ..prompt_keys import BEFORE_A_PROMPT, PROMPT_KEYS, with_prompt
from ..records import Record
from ..values import list_of, object_of, string_of, text_at, value_of
from .comparisons import Item, apart, carried, preferred, scored

PAIR_KEYS = ("prompt", "chosen", "rejected", "votes", "margin", "weight")
SCORED_KEYS = ("prompt", "responses", "scores", "votes")
STYLES = ("easy", "normal", "hard")  # of RM-Bench: chosen dressed better, alike, worse


# ---- forms that training reads as they are -------------------------------------------------------


def pairs(record: Record, where: str) -> Iterator[Item]:
    """A prompt with what was chosen and what was rejected, or two whole dialogues.

    Several responses on a side make all their pairs.
    """
    for key in ("chosen", "rejected"):
        value_of(record, key, where)
    record = with_prompt(record, where)
    chosen, rejected = record["chosen"], record["rejected"]
    if "prompt" not in record and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, (chosen, rejected) = apart([chosen, rejected], where)
        record = {"prompt": prompt} | record
    house = with_single_values(record, PAIR_KEYS)
    twos_of_sides = list(product(_several(chosen, where), _several(rejected, where)))
    require(
        len(twos_of_sides) == 1 or record.get("votes") is None,
        f'{where}: "votes" beside several responses; expected one "chosen" and one "rejected"',
    )
    if len(twos_of_sides) > 1:
        record_pairs(house, where)  # refuses more of them than anybody could write
    for chosen, rejected in twos_of_sides:
        yield house | {"chosen": chosen, "rejected": rejected}


def _several(value: Any, where: str) -> list[Any]:
    """The responses of one side: those of a list, or the single one."""
    if not isinstance(value, list) or is_conversation(value):
        return [value]
    return list_of(value, f"{where}: the responses of a side")


def scored_responses(record: Record, where: str) -> Iterator[Item]:
    """A prompt with several responses and a score each."""
    yield with_single_values(with_prompt(record, where), SCORED_KEYS)


def scored_texts(record: Record, where: str) -> Iterator[Item]:
    """Whole texts with a score each."""
    texts = texts_of(record, where)
    end = prompt_end(texts)
    house = scored(texts[0][:end], [text[end:] for text in texts], record["score"])
    yield house | with_single_values(record, ("votes",))


def rm_bench(record: Record, where: str) -> Iterator[Item]:
    """RM-Bench: three styles of a right and of a wrong response, each against each.

    It is easy where the right one has the richer style, and hard where the wrong one has.
    """
    for i, chosen in enumerate(record["chosen"]):
        for j, rejected in enumerate(record["rejected"]):
            level = STYLES[1 + (j > i) - (j < i)]
            item = preferred(record["prompt"], [chosen, rejected], True)
            yield item | {"subset": level} | carried(record, domain="domain")


def with_single_values(record: Record, keys: tuple[str, ...]) -> Record:
    """Of a record these keys, and what else is one value and no part of the prompt."""
    parts = {*PROMPT_KEYS, *BEFORE_A_PROMPT, "text", "score"}
    return {
        key: value
        for key, value in record.items()
        if key in keys or (key not in parts and isinstance(value, (str, int, float)))
    }


# ---- a prompt under other names ------------------------------------------------------------------


def with_input(record: Record, where: str) -> str:
    """An instruction and, on the next line, its input, if there is one."""
    instruction = text_at(record, "instruction", where)
    value = record.get("input")
    text = "" if value is None else string_of(value, f'{where}: "input"')
    return f"{instruction}\n{text}" if text.strip() else instruction


def alpaca(record: Record, where: str) -> Iterator[Item]:
    """An instruction with an input, and what was chosen and rejected."""
    others = {key: record[key] for key in record if key not in ("instruction", "input")}
    yield from pairs({"prompt": with_input(record, where)} | others, where)


def orca(record: Record, where: str) -> Iterator[Item]:
    """A question with a system text; they become messages, also where the system text is empty."""
    system, question = record["system"] or "", value_of(record, "question", where)
    if is_conversation(question):
        prompt = [question] if isinstance(question, dict) else question
    else:
        prompt = [{"role": "user", "content": text_at(record, "question", where)}]
    if string_of(system, f'{where}: "system"').strip():
        prompt = [{"role": "system", "content": system}, *prompt]
    others = {key: record[key] for key in record if key not in ("system", "question")}
    yield from pairs({"prompt": prompt} | others, where)


def openai(record: Record, where: str) -> Iterator[Item]:
    """OpenAI's files for preference tuning: messages, then one answer of each kind."""
    messages = object_of(record["input"], f'{where}: "input"')
    prompt = value_of(messages, "messages", f'{where}: "input"')
    first, second = record["preferred_output"], record["non_preferred_output"]
    yield preferred(prompt, [first, second], True)
