"""Prompt keys: where a record has its prompt, also under another name, or inside of dialogues.

A prompt under another name is read where its meaning is plain, and refused where it is not.
"""

from collections.abc import Sequence
from typing import Any

from ..options import InputError, require
from .dialogues import prompt_end
from .messages import begins_with_system, is_conversation, is_response
from .records import Record

# Other names under which data keep a prompt; what stands in front of one.
PROMPT_KEYS = ("question", "query", "instruction", "input", "conversations", "messages")
BEFORE_A_PROMPT = ("system", "history")


def with_prompt(record: Record, where: str, chat: bool = False) -> Record:
    """The record with its prompt under "prompt", also where it has it under another name.

    A "system" text becomes the first message. Raises InputError where something that looks like a
    part of the prompt would be dropped.
    """
    in_front = [key for key in BEFORE_A_PROMPT if record.get(key)]
    if "prompt" not in record and is_whole(record):
        _require_inside_dialogues(record, in_front, where)
        return record
    key = _prompt_key(record, where)
    if key is None:
        if in_front:
            raise InputError(
                f'{where}: "{in_front[0]}" stands in front of no "prompt"; expected one'
            )
        return record
    prompt = record[key]
    if in_front == ["system"] and (chat or is_conversation(prompt)):
        prompt = _with_system(record["system"], prompt)
    elif in_front:
        advice = ", or give --chat, which makes messages of both" if in_front == ["system"] else ""
        raise InputError(
            f'{where}: "{in_front[0]}" would not be read; write it into "prompt" as a message'
            + advice
        )
    return record | {"prompt": prompt}


def _require_inside_dialogues(record: Record, in_front: Sequence[str], where: str) -> None:
    """Refuse what stands in front of a prompt beside dialogues that do not hold it."""
    if not in_front or (in_front == ["system"] and begins_with_system(record["chosen"])):
        return
    raise InputError(
        f'{where}: "{in_front[0]}" beside whole dialogues would not be read; write it into them, or'
        " remove it"
    )


def _prompt_key(record: Record, where: str) -> str | None:
    """The key under which a record has its prompt; None if it has none.

    Raises InputError where that may be one key or another, or where another one would be dropped.
    """
    others = [key for key in PROMPT_KEYS if record.get(key)]
    if "prompt" in record and (record["prompt"] or not others):
        for other in others:
            _require_part_of_prompt(record, other, where)
        return "prompt"
    if not others:
        return None
    require(
        len(others) == 1,
        f"{where}: the prompt may be in {' or '.join(map(repr, others))}; expected it in"
        ' "prompt", as a string or as messages',
    )
    return others[0]


def _with_system(system: Any, prompt: Any) -> list[Any]:
    """A prompt as messages, of which the first is the system's."""
    if isinstance(prompt, str):
        prompt = {"role": "user", "content": prompt}
    messages = [prompt] if isinstance(prompt, dict) else prompt
    return [{"role": "system", "content": system}, *messages]


def refuse_unread_system(record: Record, where: str, key: str) -> None:
    """Refuse a text beside a whole conversation that belongs in front of it (InputError)."""
    for name in BEFORE_A_PROMPT:
        has_system = name == "system" and begins_with_system(record[key])
        require(
            not record.get(name) or has_system,
            f'{where}: "{name}" beside "{key}" would not be read; write it into them as a message,'
            " or remove it",
        )


def _require_part_of_prompt(record: Record, key: str, where: str) -> None:
    """Refuse a text under another key that is not inside "prompt", since it would be dropped.

    Where one of the two is no string, the other key is taken for something else.
    """
    prompt, value = record["prompt"], record[key]
    are_texts = isinstance(prompt, str) and isinstance(value, str)
    require(
        not are_texts or value.strip() in prompt,
        f'{where}: "{key}" beside "prompt" would not be read; write it into "prompt", or remove it',
    )


def is_whole(record: Record) -> bool:
    """Whether "chosen" is a whole dialogue, which has its prompt in it."""
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if is_conversation(chosen):
        return not is_response(chosen)
    return (
        isinstance(chosen, str) and isinstance(rejected, str) and prompt_end([chosen, rejected]) > 0
    )
