"""A file of answers that were paid for: whatever is in it is never asked again.

Every answer is one JSON line and on the disk before the next question is asked:

    {"key": "5f1c...", "model": "...", "answer": "A", "crc32": "..."}

The key is a hash of the question: of the model's name and of all that it was asked. So one file
serves any number of comparisons. A line that a kill cut short, or that is damaged, is passed over,
and its question is asked again.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checksums import CHECKSUM, checksum
from ..data.messages import Messages
from ..files import make_directory, to_disk
from ..options import require


def question_hash(model: str, messages: Messages) -> str:
    """SHA-256 of a model's name and of what it is asked: the key of its answer in the file."""
    return hashlib.sha256(json.dumps([model, messages], sort_keys=True).encode()).hexdigest()


@dataclass
class Answers:
    """The answers of a file. stored: by `question_hash`. damaged: lines that were passed over."""

    path: Path
    stored: dict[str, str] = field(default_factory=dict)
    damaged: int = 0

    @classmethod
    def open(cls, path: str) -> "Answers":
        """Read a file of answers, or begin one. Raises InputError for a file of something else."""
        answers = cls(Path(path))
        make_directory(answers.path.parent)
        with open(path, "ab"):  # a file that cannot be written to fails before anything is paid for
            pass
        to_disk(answers.path.absolute().parent)
        lines = answers.path.read_bytes().split(b"\n")
        for line in lines:
            record = record_of(line)
            if record is not None:
                answers.stored[record["key"]] = record["answer"]
            elif line.strip():
                answers.damaged += 1
        is_foreign = len(lines) > 1 and answers.damaged and not answers.stored
        require(
            not is_foreign,
            f"{path}: is no file of answers; expected one that this command wrote, or a new name",
        )
        return answers

    def add(self, key: str, model: str, answer: str) -> None:
        """Store one answer and bring it to the disk; key: see `question_hash`."""
        line = json.dumps(with_checksum({"key": key, "model": model, "answer": answer})) + "\n"
        with open(self.path, "a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a line was cut short; do not write behind it
                    line = "\n" + line
            file.write(line.encode())  # at the end, wherever that is by now
            file.flush()
            os.fsync(file.fileno())
        self.stored[key] = answer


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the checksum of all else as its last key."""
    return record | {CHECKSUM: checksum(json.dumps(record).encode())}


def record_of(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if it is damaged."""
    try:
        record = json.loads(line)
        others = {key: value for key, value in record.items() if key != CHECKSUM}
        is_whole = record == with_checksum(others)
    except (ValueError, AttributeError, RecursionError):
        return None
    return record if is_whole and {"key", "answer"} <= set(record) else None
