"""Records: what preference data look like on disk -> checked texts. Every error names the file, the line and what was found.

A line is one of

    {"prompt": ..., "chosen": ..., "rejected": ...}
    {"chosen": ..., "rejected": ...}                whole dialogues; the prompt is their common beginning (Anthropic HH)
    {"text": [...], "score": [...]}                 k responses with scores: every ordered pair of unequal scores

Instead of a string, `prompt`, `chosen` and `rejected` may be lists of messages {"role": ..., "content": ...}, which go through the
checkpoint's chat template; `rejected` may be a list of several responses. Other keys are tolerated.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..model.tokenizer import Tokenizer
from ..options import InputError

ASSISTANT = (
    "\n\nAssistant:",
    "## Assistant:",
)  # what ends the prompt of a dialogue that is given whole
MOST_RESPONSES = 100  # to one prompt: they make up to 4,950 pairs


class Pair(NamedTuple):
    """One preference as texts; the model reads prompt + response, joined with nothing between.

    rendered: the texts were written by a chat template, so the markers in them are special tokens. blank: a response without
    a visible character; None means look.
    """

    prompt: str
    chosen: str
    rejected: str
    rendered: bool = False
    blank: bool | None = None

    @property
    def is_blank(self) -> bool:
        return (
            not (self.chosen.strip() and self.rejected.strip())
            if self.blank is None
            else self.blank
        )


def read_records(path: str) -> Iterator[tuple[str, dict]]:
    """("file:line", object) for each line of a JSON lines file, plain or .gz; blank lines are passed over.

    A file that begins with [ is one JSON list, and "file:item" is yielded. A directory stands for the data files in it, in order
    of name. Raises InputError, naming file and line, for anything that is not UTF-8 JSON objects.
    """
    if os.path.isdir(path):
        for file in _data_files(path):
            yield from read_records(file)
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
                    yield (
                        f"{path}:{line}",
                        _object(
                            _parse(text, f"{path}:{line}", "one object a line"), f"{path}:{line}"
                        ),
                    )
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{line}: not UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _data_files(directory):
    names = sorted(
        n
        for n in os.listdir(directory)
        if n.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz"))
        and os.path.isfile(os.path.join(directory, n))
    )
    if not names:
        raise InputError(f"{directory}: a directory without a .jsonl or .json file (.gz too)")
    words = [set(re.split(r"[^a-z]+", n.lower())) for n in names]
    if any("train" in w for w in words) and any("test" in w for w in words):
        raise InputError(
            f"{directory}: holds training and test files ({', '.join(names[:4])}); name the files"
        )
    return [os.path.join(directory, n) for n in names]


def _list_items(text, path):
    for item, value in enumerate(_parse(text, path, "a list of objects, or one object a line"), 1):
        yield f"{path}:{item}", _object(value, f"{path}:{item}")


def _parse(text, where, expected):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); expected {expected}") from None


def _object(value, where):
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON {type(value).__name__}; expected an object")
    return value


def text_of(record: dict, key: str, where: str) -> str:
    """record[key] as a string that can be encoded, or an InputError that shows the keys found."""
    if key not in record:
        raise InputError(
            f'{where}: "{key}" is missing; found keys: {", ".join(map(str, record)) or "none"}'
        )
    return _text(record[key], f'{where}: "{key}"')


def _text(value, where):
    if not isinstance(value, str):
        raise InputError(f"{where} is {json.dumps(value)[:60]}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{where} holds half of a surrogate pair; expected valid Unicode"
        ) from None
    return value


def record_pairs(
    record: dict, where: str, tokenizer: Tokenizer | None = None
) -> tuple[list[Pair], int]:
    """The pairs of one line and the number of its label ties. tokenizer: needed for messages only."""
    if "text" in record and "chosen" not in record:
        return _scored_pairs(record, where)
    if tokenizer is not None and any(
        is_conversation(record.get(key)) for key in ("prompt", "chosen", "rejected")
    ):
        return _conversation_pairs(record, where, tokenizer), 0
    chosen, several = text_of(record, "chosen", where), record.get("rejected")
    if not isinstance(several, list) or not several or not isinstance(several[0], str):
        several = [text_of(record, "rejected", where)]
    several = [_text(r, f'{where}: "rejected"[{i}]') for i, r in enumerate(several)]
    if "prompt" in record:
        return [Pair(text_of(record, "prompt", where), chosen, rejected) for rejected in several], 0
    cut = prompt_end([chosen, *several])
    return [Pair(chosen[:cut], chosen[cut:], rejected[cut:]) for rejected in several], 0


def is_conversation(value) -> bool:
    """Whether a value is meant as messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def messages_of(value, where: str, tokenizer: Tokenizer, role: str) -> list[dict]:
    """A list of {"role", "content"}, checked; a string is one message of the given role.

    Where a chat template will render it, a content that holds one of its markers is refused: it could end its own turn.
    """
    value = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not is_conversation(value):
        raise InputError(
            f"{where} is {json.dumps(value)[:60]}; expected a list of messages with role and content"
        )
    found = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise InputError(
                f"{where}[{i}] is {json.dumps(message)[:60]}; expected a message with role and content"
            )
        found.append({key: text_of(message, key, f"{where}[{i}]") for key in ("role", "content")})
        for key, text in found[-1].items() if tokenizer.template else ():
            marker = next((m for m in tokenizer.markers if m in text), None)
            if marker is not None:
                raise InputError(
                    f"{where}[{i}]: the {key} holds {marker!r}, a marker of the chat template; remove it"
                )
    return found


def _conversation_pairs(record, where, tokenizer):
    for key in ("chosen", "rejected"):
        if key not in record:
            text_of(record, key, where)  # says that it is missing
    chosen, several = (
        messages_of(record["chosen"], f'{where}: "chosen"', tokenizer, "assistant"),
        record["rejected"],
    )
    nested = isinstance(several, list) and several and not isinstance(several[0], dict)
    several = [
        messages_of(r, f'{where}: "rejected"', tokenizer, "assistant")
        for r in (several if nested else [several])
    ]
    if "prompt" in record:
        prompt = messages_of(record["prompt"], f'{where}: "prompt"', tokenizer, "user")
        return [_render(prompt, chosen, rejected, tokenizer) for rejected in several]
    pairs = []
    for rejected in several:
        turns = next(
            (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b),
            min(len(chosen), len(rejected)) - 1,
        )
        pairs.append(_render(chosen[:turns], chosen[turns:], rejected[turns:], tokenizer))
    return pairs


def _render(prompt, chosen, rejected, tokenizer):
    """Messages as a Pair; where its prompt ends matters for counts only, since tokens are shared by what they are."""
    texts = [tokenizer.render(prompt + response) for response in (chosen, rejected)]
    head = tokenizer.render(prompt, prompt=True) if prompt else ""
    cut = len(head) if all(t.startswith(head) for t in texts) else len(os.path.commonprefix(texts))
    blank = not all(any(m["content"].strip() for m in response) for response in (chosen, rejected))
    return Pair(
        texts[0][:cut], texts[0][cut:], texts[1][cut:], tokenizer.template is not None, blank
    )


def texts_of(record: dict, where: str) -> list[str]:
    """record["text"]: two or more whole texts."""
    texts = record["text"]
    if not isinstance(texts, list) or not 2 <= len(texts) <= MOST_RESPONSES:
        raise InputError(
            f'{where}: "text" is {json.dumps(texts)[:60]}; expected a list of two or more strings, at most {MOST_RESPONSES}'
        )
    return [_text(t, f'{where}: "text"[{i}]') for i, t in enumerate(texts)]


def _scored_pairs(record, where):
    texts, scores = texts_of(record, where), record.get("score")
    if (
        not isinstance(scores, list)
        or len(scores) != len(texts)
        or not all(type(s) in (int, float) and abs(s) < 1e300 for s in scores)
    ):
        found = "is missing" if "score" not in record else f"is {json.dumps(scores)[:60]}"
        raise InputError(
            f'{where}: "score" {found}; expected a list of {len(texts)} numbers, one a text'
        )
    cut = prompt_end(texts)
    k = range(len(texts))
    pairs = [
        Pair(texts[0][:cut], texts[i][cut:], texts[j][cut:])
        for i in k
        for j in k
        if scores[i] > scores[j]
    ]
    return pairs, sum(scores[i] == scores[j] for i in k for j in k if i < j)


def prompt_end(texts: Sequence[str]) -> int:
    """Where the shared prompt of whole dialogues ends: after the last assistant mark inside their common beginning.

    Without such a mark the whole texts are responses. (Sharing of tokens is found later, from the tokens.)

    >>> prompt_end(["\\n\\nHuman: hi\\n\\nAssistant: yes", "\\n\\nHuman: hi\\n\\nAssistant: yo"])
    23
    """
    common = os.path.commonprefix(list(texts))
    return max((common.rfind(mark) + len(mark) for mark in ASSISTANT if mark in common), default=0)
