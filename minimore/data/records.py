"""Records: what preference data look like on disk, and the checked texts that come of them.

A line is one of

    {"prompt": ..., "chosen": ..., "rejected": ...}
    {"chosen": ..., "rejected": ...}        whole dialogues; the prompt is their common beginning,
                                            as in Anthropic HH
    {"text": [...], "score": [...]}         k responses with scores: every ordered pair of unequal
                                            scores

Instead of a string, `prompt`, `chosen` and `rejected` may be lists of messages {"role": ...,
"content": ...}, which go through the checkpoint's chat template. `rejected` may be a list of
several responses. Other keys are tolerated. Every error names the file, the line and what was
found there.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

from ..model.tokenizer import Tokenizer
from ..options import InputError, require

ASSISTANT = ("\n\nAssistant:", "## Assistant:")  # ends the prompt of a dialogue that is given whole
MOST_RESPONSES = 100  # to one prompt: they make up to 4,950 pairs
DATA_FILES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")

Record = dict[str, Any]
Messages = list[dict[str, str]]


class Pair(NamedTuple):
    """One preference as texts; the model reads prompt + response, joined with nothing between.

    rendered: the texts were written by a chat template, so the markers in them are special tokens.
    blank: a response has no visible character; None means that one has to look.
    """

    prompt: str
    chosen: str
    rejected: str
    rendered: bool = False
    blank: bool | None = None

    @property
    def is_blank(self) -> bool:
        """Whether a response has no visible character."""
        if self.blank is not None:
            return self.blank
        return not (self.chosen.strip() and self.rejected.strip())


# ---- from a file to objects ----------------------------------------------------------------------


def read_records(path: str) -> Generator[tuple[str, Record], None, None]:
    """("file:line", object) for each line of a JSON lines file, plain or .gz.

    Blank lines are passed over. A file that begins with [ is one JSON list, and "file:item" is
    yielded. A directory stands for the data files in it, in order of name. Raises InputError, which
    names file and line, for anything that is not UTF-8 JSON objects.
    """
    if os.path.isdir(path):
        for file_path in _data_files(path):
            yield from read_records(file_path)
        return
    line = 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for line, raw in enumerate(file, 1):
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                if line == 1 and text.lstrip().startswith("["):
                    yield from _list_items(text + file.read().decode("utf-8"), path)
                    return
                if text.strip():
                    where = f"{path}:{line}"
                    yield where, _object(_parse(text, where, "one object a line"), where)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{line}: not UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _data_files(directory: str) -> list[str]:
    """The data files of a directory. Training and test files in one directory are refused."""
    names = sorted(
        name
        for name in os.listdir(directory)
        if name.endswith(DATA_FILES) and os.path.isfile(os.path.join(directory, name))
    )
    require(names, f"{directory}: a directory without a .jsonl or .json file (.gz too)")
    words = {word for name in names for word in re.split(r"[^a-z]+", name.lower())}
    require(
        not {"train", "test"} <= words,
        f"{directory}: holds training and test files ({', '.join(names[:4])}); name the files",
    )
    return [os.path.join(directory, name) for name in names]


def _list_items(text: str, path: str) -> Iterator[tuple[str, Record]]:
    items = _parse(text, path, "a list of objects, or one object a line")
    for item, value in enumerate(items, 1):
        yield f"{path}:{item}", _object(value, f"{path}:{item}")


def _parse(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); expected {expected}") from None


def _object(value: Any, where: str) -> Record:
    require(isinstance(value, dict), f"{where}: a JSON {type(value).__name__}; expected an object")
    return value


# ---- texts ---------------------------------------------------------------------------------------


def text_of(record: Record, key: str, where: str) -> str:
    """record[key] as a string that can be encoded, or an InputError that shows the keys found."""
    if key not in record:
        keys = ", ".join(map(str, record)) or "none"
        raise InputError(f'{where}: "{key}" is missing; found keys: {keys}')
    return _text(record[key], f'{where}: "{key}"')


def texts_of(record: Record, where: str) -> list[str]:
    """record["text"]: two or more whole texts."""
    texts = record["text"]
    if not isinstance(texts, list) or not 2 <= len(texts) <= MOST_RESPONSES:
        raise InputError(
            f'{where}: "text" is {_shown(texts)}; expected a list of two or more strings,'
            f" at most {MOST_RESPONSES}"
        )
    return [_text(text, f'{where}: "text"[{i}]') for i, text in enumerate(texts)]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} is {_shown(value)}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{where} holds half of a surrogate pair; expected valid Unicode"
        ) from None
    return value


def _shown(value: Any) -> str:
    """The beginning of a value, as an error shows it."""
    return json.dumps(value)[:60]


def prompt_end(texts: Sequence[str]) -> int:
    """Where the shared prompt of whole dialogues ends.

    It ends after the last assistant mark inside their common beginning. Without such a mark the
    whole texts are responses. (Which tokens are shared is found later, from the tokens.)

    >>> prompt_end(["\\n\\nHuman: hi\\n\\nAssistant: yes", "\\n\\nHuman: hi\\n\\nAssistant: yo"])
    23
    """
    common = os.path.commonprefix(list(texts))
    return max((common.rfind(mark) + len(mark) for mark in ASSISTANT if mark in common), default=0)


# ---- pairs of a record ---------------------------------------------------------------------------


def record_pairs(
    record: Record, where: str, tokenizer: Tokenizer | None = None
) -> tuple[list[Pair], int]:
    """The pairs of one line, and how many it would have had but for equal scores: label ties.

    tokenizer: needed for messages only. Raises InputError for a record of no known form.
    """
    if "text" in record and "chosen" not in record:  # beside "chosen" it is a key like any other
        return _scored_pairs(record, where)
    values = [record.get(key) for key in ("prompt", "chosen", "rejected")]
    if tokenizer is not None and any(map(is_conversation, values)):
        return _conversation_pairs(record, where, tokenizer), 0
    return _text_pairs(record, where), 0


def _text_pairs(record: Record, where: str) -> list[Pair]:
    """Pairs of strings: with a prompt, or whole dialogues; one for each rejected response."""
    chosen = text_of(record, "chosen", where)
    value = record.get("rejected")
    if isinstance(value, list) and value and isinstance(value[0], str):  # several responses
        rejected = [_text(text, f'{where}: "rejected"[{i}]') for i, text in enumerate(value)]
    else:
        rejected = [text_of(record, "rejected", where)]
    if "prompt" in record:
        prompt = text_of(record, "prompt", where)
        return [Pair(prompt, chosen, text) for text in rejected]
    end = prompt_end([chosen, *rejected])  # whole dialogues begin with their prompt
    return [Pair(chosen[:end], chosen[end:], text[end:]) for text in rejected]


def _scored_pairs(record: Record, where: str) -> tuple[list[Pair], int]:
    """Every ordered pair of unequal scores; pairs of equal scores are label ties."""
    texts, scores = texts_of(record, where), record.get("score")
    is_whole = (
        isinstance(scores, list)
        and len(scores) == len(texts)
        and all(type(score) in (int, float) and abs(score) < 1e300 for score in scores)
    )
    if not is_whole or scores is None:
        what = f"is {_shown(scores)}" if "score" in record else "is missing"
        raise InputError(
            f'{where}: "score" {what}; expected a list of {len(texts)} numbers, one a text'
        )
    end = prompt_end(texts)
    pairs, ties = [], 0
    for i, score in enumerate(scores):
        for j, other in enumerate(scores):
            if score > other:
                pairs.append(Pair(texts[0][:end], texts[i][end:], texts[j][end:]))
            ties += score == other and i < j
    return pairs, ties


# ---- conversations -------------------------------------------------------------------------------


def is_conversation(value: Any) -> bool:
    """Whether a value is meant as messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def messages_of(value: Any, where: str, tokenizer: Tokenizer, role: str) -> Messages:
    """A list of {"role", "content"}, checked; a string is one message of the given role.

    Where a chat template will render it, a content that holds one of its markers is refused: it
    could end its own turn.
    """
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not is_conversation(value):
        raise InputError(
            f"{where} is {_shown(value)}; expected a list of messages with role and content"
        )
    return [_message(message, f"{where}[{i}]", tokenizer) for i, message in enumerate(value)]


def _message(message: Any, where: str, tokenizer: Tokenizer) -> dict[str, str]:
    if not isinstance(message, dict):
        raise InputError(f"{where} is {_shown(message)}; expected a message with role and content")
    checked = {key: text_of(message, key, where) for key in ("role", "content")}
    if tokenizer.template:
        for key, text in checked.items():
            for marker in tokenizer.markers:
                require(
                    marker not in text,
                    f"{where}: the {key} holds {marker!r}, a marker of the chat template;"
                    " remove it",
                )
    return checked


def _conversation_pairs(record: Record, where: str, tokenizer: Tokenizer) -> list[Pair]:
    for key in ("chosen", "rejected"):
        if key not in record:
            text_of(record, key, where)  # says that it is missing
    chosen = messages_of(record["chosen"], f'{where}: "chosen"', tokenizer, "assistant")
    value = record["rejected"]
    are_several = isinstance(value, list) and value and not isinstance(value[0], dict)
    rejected = [
        messages_of(response, f'{where}: "rejected"', tokenizer, "assistant")
        for response in (value if are_several else [value])
    ]
    if "prompt" in record:
        prompt = messages_of(record["prompt"], f'{where}: "prompt"', tokenizer, "user")
        return [_render(prompt, chosen, response, tokenizer) for response in rejected]
    pairs = []
    for response in rejected:
        turns = _shared_turns(chosen, response)
        pair = _render(chosen[:turns], chosen[turns:], response[turns:], tokenizer)
        pairs.append(pair)
    return pairs


def _shared_turns(chosen: Messages, rejected: Messages) -> int:
    """How many messages two dialogues share at their beginning; each keeps at least its last."""
    shortest = min(len(chosen), len(rejected))
    for i in range(shortest):
        if chosen[i] != rejected[i]:
            return i
    return shortest - 1


def _render(prompt: Messages, chosen: Messages, rejected: Messages, tokenizer: Tokenizer) -> Pair:
    """Messages as a Pair.

    Where its prompt ends matters for counts only, since tokens are shared by what they are.
    """
    texts = [tokenizer.render(prompt + response) for response in (chosen, rejected)]
    beginning = tokenizer.render(prompt, prompt=True) if prompt else ""
    if not all(text.startswith(beginning) for text in texts):
        beginning = os.path.commonprefix(texts)
    end = len(beginning)
    has_text = [
        any(message["content"].strip() for message in response) for response in (chosen, rejected)
    ]
    return Pair(
        prompt=texts[0][:end],
        chosen=texts[0][end:],
        rejected=texts[1][end:],
        rendered=tokenizer.template is not None,
        blank=not all(has_text),
    )
