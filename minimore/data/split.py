"""Splitting: one file into training, validation and test, of which none shares a prompt.

    read      every line                 -> its group: the prompt, or what the human says first
    place     hash of seed and group     -> a number from 0 to 1, by which the group falls to a part
    write     every line, byte for byte  -> train.jsonl, validation.jsonl, test.jsonl

Where a group falls depends on the seed and on its own text alone. So several sources that are split
with one seed share no prompt across parts either, and a file that has grown is split as before.
"""

import gzip
import json
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..checksums import file_checksum, write_checked_json, write_checksums
from ..files import directory_written_whole, refuse_existing
from ..options import Range, check_ranges, option, require
from ..tables import Table
from .dialogues import opening_of
from .foreign.shapes import house_records, refuse_part_of_pair
from .forms import Pair, record_pairs
from .labels import AS_WRITTEN
from .prompts import normalised, seeded_hash
from .records import BYTE_ORDER_MARK, Record, read_records

PARTS = ("train", "validation", "test")
NEITHER = 255  # stands for the part of a blank line
TIES_TOO = AS_WRITTEN._replace(ties="half")  # what annotators saw as a tie has a prompt, too
SHARE = Range(least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """What `data split` takes."""

    file: str = option(
        value="FILE", positional=True, help="JSON lines of pairs (.jsonl, .jsonl.gz)"
    )
    output: str = option(value="DIR", help="directory for the parts; must not exist")
    validation: float = option(0.0, within=SHARE, help="share of prompts for validation")
    test: float = option(0.1, within=SHARE, help="share of prompts for the test")
    by: str = option(
        "prompt",
        choices=("prompt", "opening"),
        help="what may stand in one part only: a whole prompt, or what the human says first in it, "
        "so that no dialogue is cut in two",
    )
    seed: int = option(
        0, within=Range(least=0, most=2**63 - 1), help="other seeds make other parts"
    )

    def shares(self) -> tuple[float, float, float]:
        """The share of every part; training may have none."""
        train = round(1 - self.validation - self.test, 12)  # .9 + .1 is 1
        return (train, self.validation, self.test)


def split(options: SplitOptions) -> None:
    """Split a file by prompt; print how many lines and prompts each part has."""
    check_options(options)
    before = file_checksum(Path(options.file))
    parts, groups = parts_of_lines(options)
    _, first_line = next(lines_of(options.file), (0, b""))
    require(
        not first_line.lstrip().startswith(b"["),
        f"{options.file}: is one JSON list, which has no lines; expected JSON lines, which"
        " `minimore data convert` makes of it",
    )
    prompts, wanted = sum(map(len, groups)), [share for share in options.shares() if share]
    require(
        prompts >= len(wanted),
        f"{options.file}: prompts in it: {prompts}; expected one for each of {len(wanted)} parts,"
        " as parts share none",
    )
    for part, share in enumerate(options.shares()):
        require(
            bool(groups[part]) == bool(share),
            f"{options.file}: no prompt of {sum(map(len, groups))} falls to {PARTS[part]}; expected"
            " a larger share, or another --seed",
        )
    with directory_written_whole(Path(options.output)) as directory:
        write_parts(options, parts, directory)
        require(
            file_checksum(Path(options.file)) == before,
            f"{options.file}: was changed while it was split; give the same command again",
        )
        counts = {
            name: {"lines": parts.count(part), "prompts": len(groups[part])}
            for part, name in enumerate(PARTS)
        }
        description = {"file": options.file, "seed": options.seed, "by": options.by}
        write_checksums(
            directory, {file.name: file_checksum(file) for file in directory.glob("*.jsonl")}
        )
        write_checked_json(directory / "split.json", description | {"parts": counts})
    table = Table("part", "lines", "prompts")
    for name, count in counts.items():
        table.add(name, count["lines"], count["prompts"])
    print(f"{table}\n{options.output}: no prompt stands in two parts")


def check_options(options: SplitOptions) -> None:
    """Refuse what cannot be split (InputError)."""
    check_ranges(options)
    require(
        options.shares()[0] >= 0,
        f"--validation {options.validation} and --test {options.test}: expected shares of which the"
        " sum is at most 1",
    )
    require(
        options.validation or options.test, "--validation and --test are 0: there is nothing to do"
    )
    refuse_existing(options.output)
    require(
        Path(options.file).is_file(),
        f"{options.file}: not a file; expected one file of JSON lines",
    )


# ---- where a line falls --------------------------------------------------------------------------


def parts_of_lines(options: SplitOptions) -> tuple[array, list[set[bytes]]]:
    """The part of every line, from the first, and the groups of every part.

    A group is known by a hash of 16 bytes.
    """
    parts, groups = array("B"), [set[bytes]() for _ in PARTS]
    for where, record in read_records(options.file):
        digest = seeded_hash(group_of(record, where, options.by), options.seed)
        part = part_of(int.from_bytes(digest[:8], "little") / 2**64, options.shares())
        line = int(where.rpartition(":")[2])
        parts.extend([NEITHER] * (line - 1 - len(parts)))  # blank lines
        parts.append(part)
        groups[part].add(digest)
    return parts, groups


def group_of(record: Record, where: str, by: str) -> str:
    """What must not cross parts: the normalised prompt of a record, or its opening.

    A record without a prompt is known by its first response, and one without a pair by all that it
    holds. Raises InputError for a record with several prompts.
    """
    pairs = pairs_and_ties_of(record, where)
    if not pairs:
        return json.dumps(record)
    prompts = [pair.prompt if by == "prompt" else opening_of(pair.prompt) for pair in pairs]
    groups = set(map(normalised, prompts))
    require(
        len(groups) == 1,
        f"{where}: holds comparisons under {len(groups)} prompts, which may not share a line;"
        " expected one prompt a line, as `minimore data convert` writes them",
    )
    (group,) = groups
    return group or normalised(pairs[0].chosen)


def pairs_and_ties_of(record: Record, where: str) -> list[Pair]:
    """The pairs of a record of any shape, and its label ties as if they were pairs."""
    refuse_part_of_pair(record, where)
    return [
        pair
        for house in house_records(record, where)
        for pair in record_pairs(house, where, rules=TIES_TOO)[0]
    ]


def part_of(position: float, shares: tuple[float, float, float]) -> int:
    """The part to which a position from 0 to 1 falls: test, then validation, then training.

    >>> [PARTS[part_of(position, (0.7, 0.2, 0.1))] for position in (0.05, 0.15, 0.5)]
    ['test', 'validation', 'train']
    """
    train, validation, test = shares
    if position < test:
        return 2
    return 1 if position < test + validation or not train else 0


# ---- lines as they are ---------------------------------------------------------------------------


def lines_of(path: str) -> Iterator[tuple[int, bytes]]:
    """Every line of a file, plain or .gz, from 0, without a byte order mark."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        for number, line in enumerate(file):
            yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line


def write_parts(options: SplitOptions, parts: array, directory: Path) -> None:
    """Write every line into the file of its part; a part without a share gets no file."""
    with ExitStack() as stack:
        files = [
            stack.enter_context(open(directory / f"{name}.jsonl", "xb")) if share else None
            for name, share in zip(PARTS, options.shares())
        ]
        for number, line in lines_of(options.file):
            part = parts[number] if number < len(parts) else NEITHER
            file = None if part == NEITHER else files[part]
            if file:
                file.write(line if line.endswith(b"\n") else line + b"\n")
