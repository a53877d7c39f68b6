"""Conversion: a public file of preferences as files of house records, with counts that add up.

    read     a file -> records                     columns.py, records.py
    compare  records -> comparisons                shapes.py and its readers, trees.py, rows.py
    sift     comparisons -> those that make a pair, or a label tie; the others are counted
    write    one file of JSON lines for every split and taste, and converted.json

Every two responses that a file compares are a pair, a label tie, or left out for a reason. The
three numbers add up, and everything that is written can be read by training.
"""

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ... import __version__
from ...checksums import (
    file_checksum,
    read_checked_json,
    require_directory_as_written,
    write_checked_json,
    write_checksums,
)
from ...files import directory_written_whole, refuse_existing
from ...options import InputError, check_ranges, option, require
from ...tables import Table
from ..columns import read_rows
from ..records import CONVERTED, Record, json_line
from ..values import keys_of
from .comparisons import Item, LeftOut, Note
from .fields import Fields, are_rows, fields_of_options
from .proposal import RECORDS_LOOKED_AT, proposal
from .rows import KEYS_OF, items_of_rows
from .shapes import BY_NAME, Shape, items_of, require_shape, shape_named, shape_of
from .sift import FileCounts, sifted
from .trees import WRITTEN, TreeRules, items_of_messages, items_of_tree

PLAIN_NAME = "pairs"  # of the file, where there is neither a split nor a taste
FILE_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
MOST_FILES = 100


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What `data convert` takes."""

    file: str = option(
        value="FILE",
        positional=True,
        help="JSON lines (.gz too), a JSON list, CSV, tab-separated or Parquet; or a directory",
    )
    output: str = option(
        value="DIR", help="directory to write; must not exist, or hold this very conversion"
    )
    shape: str | None = option(
        None, choices=tuple(BY_NAME), help="shape of the records, if it is not to be recognised"
    )
    language: tuple[str, ...] = option(
        (),
        repeat=True,
        value="CODE",
        help="OASST: use messages of this language alone, as in en; may be repeated",
    )
    skip_deleted: bool = option(False, help="OASST: leave out what holds a deleted message")
    turns: str = option(
        "marks",
        choices=WRITTEN,
        help='OASST: write a thread with role marks ("\\n\\nHuman:"), or as messages for a chat '
        "template",
    )
    prompt_field: str | None = option(
        None, value="KEY", help="where the prompt is, in a file of no known shape"
    )
    chosen_field: str | None = option(
        None,
        value="KEY",
        help="where the better response is; with a winner or scores, the first of two responses, "
        "or the only one: a list, or one response a record",
    )
    rejected_field: str | None = option(
        None,
        value="KEY",
        help="where the worse response is; with a winner or scores, the second of two",
    )
    score_field: str | None = option(
        None,
        value="KEY[,KEY]",
        help="where the scores are: S,T for two responses; S for a list of responses, or for one "
        "response a record, which is compared with the others to its prompt",
    )
    winner_field: str | None = option(
        None,
        value="KEY[=VALUES]",
        help="what says which of two responses is better: KEY, or KEY=FIRST,SECOND,NEITHER with "
        "its values, as in label=1,2,0",
    )


class Rules(NamedTuple):
    """How a file is read. fields: of a file of no known shape."""

    trees: TreeRules = TreeRules()
    fields: Fields | None = None


# ---- counts --------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of a file: its records, its shape, the counts of every file, and notes.

    unused: in how many records a field stands that is not named, where fields are.
    """

    records: int = 0
    shape: str = ""
    what: str = ""
    unused: Counter[str] = field(default_factory=Counter)
    files: dict[str, FileCounts] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def of_file(self, name: str) -> FileCounts:
        """The counts of a file, by its name without an ending."""
        return self.files.setdefault(name, FileCounts())

    def total(self) -> FileCounts:
        """The counts of all files together."""
        total = FileCounts()
        for counts in self.files.values():
            total.add(counts)
        return total


# ---- from a file to house records ----------------------------------------------------------------


def converted(
    path: str,
    shape: str | None = None,
    rules: Rules | None = None,
    tally: Tally | None = None,
) -> Iterator[tuple[str, Record]]:
    """("file:line", house record) of a file of any shape, without what makes no pair and no tie.

    A record may have a "taste" or a "split", which are the files that `minimore data convert`
    writes. shape: a name of BY_NAME; by default the first record decides. tally: counts what was
    read and left out. Raises InputError for an unknown shape, for a line that has another shape
    than the first, and for anything malformed.
    """
    tally, rules = tally or Tally(), rules or Rules()
    for where, item in _items(path, shape, rules, tally):
        if isinstance(item, Note):
            tally.notes[item.what] += 1
        elif isinstance(item, LeftOut):
            name = file_of({"taste": item.taste}, where)
            tally.of_file(name).left_out[item.reason] += item.comparisons
        else:
            counts = tally.of_file(file_of(item, where))
            for record in sifted(item, where, counts):
                yield where, record


def _items(
    path: str, shape_name: str | None, rules: Rules, tally: Tally
) -> Iterator[tuple[str, Item]]:
    """The comparisons of a file, by the reader of its shape."""
    records = _counted(read_rows(path), tally)
    first = next(records, None)
    if first is None:
        raise InputError(f"{path}: is empty; expected at least one record")
    shape = _shape(first, records, shape_name, path, rules.fields)
    tally.shape, tally.what = shape.name, shape.what
    require(
        rules.trees == TreeRules() or shape.name.startswith("oasst"),
        f"--language, --skip-deleted and --turns are for OASST; the shape of the file is"
        f" {shape.name!r}",
    )
    yield from _compared(chain([first], records), shape, rules, tally)


def _compared(
    records: Iterable[tuple[str, Record]], shape: Shape, rules: Rules, tally: Tally
) -> Iterator[tuple[str, Item]]:
    """The comparisons of records of one shape: of all of them together, or of one by one."""
    located = _of_one_shape(records, shape)
    if rules.fields is not None:
        located = _unused_counted(located, rules.fields, tally)
    if shape.name == "oasst-messages":
        yield from items_of_messages(located, rules.trees)
    elif shape.name in KEYS_OF:
        yield from items_of_rows(located, KEYS_OF[shape.name])
    elif rules.fields is not None and shape.read is None:
        yield from items_of_rows(located, rules.fields.rows())
    else:
        for where, record in located:
            if shape.name == "oasst-tree":
                items: Iterable[Item] = items_of_tree(record, where, rules.trees)
            else:
                items = items_of(shape, record, where)
            for item in items:
                yield where, item


def _counted(records: Iterator[tuple[str, Record]], tally: Tally) -> Iterator[tuple[str, Record]]:
    """The records, each of which is counted as it passes."""
    for located in records:
        tally.records += 1
        yield located


def _unused_counted(
    located: Iterable[tuple[str, Record]], fields: Fields, tally: Tally
) -> Iterator[tuple[str, Record]]:
    """The records; the fields that are not named are counted."""
    for where, record in located:
        tally.unused.update(key for key in record if key not in fields.keys)
        yield where, record


def _of_one_shape(
    located: Iterable[tuple[str, Record]], shape: Shape
) -> Iterator[tuple[str, Record]]:
    """The records, each of which is refused unless it has the shape."""
    for where, record in located:
        require_shape(shape, record, where)
        yield where, record


def _shape(
    first: tuple[str, Record],
    others: Iterator[tuple[str, Record]],
    name: str | None,
    path: str,
    fields: Fields | None,
) -> Shape:
    """The shape of a file: the one that is named, or the one of its first record.

    Where it is unknown, some of the other records are read, too, to say what would read it.
    """
    where, record = first
    if fields is not None:
        read = None if are_rows(fields, record) else fields.items
        return Shape("fields", "named fields", fields.keys, read)
    if name is not None:
        return shape_named(name)
    shape = shape_of(record)
    if shape is None:
        some = [record, *(other for _, other in islice(others, RECORDS_LOOKED_AT - 1))]
        raise InputError(
            f"{where}: has no known shape; found keys: {keys_of(record)}. Name its fields:"
            f" minimore data convert {shlex.quote(path)} --output DIR {proposal(some)}; if a field"
            " says which response is better, add --winner-field KEY; if there are scores, add"
            " --score-field KEY[,KEY]"
        )
    return shape


# ---- the verb ------------------------------------------------------------------------------------


def convert(options: ConvertOptions) -> None:
    """Write the pairs of a public file as house records, and what was left out and why.

    A second run of a finished conversion says so. An interrupted one leaves no directory; the same
    command begins again.
    """
    check_ranges(options)
    rules = rules_of(options)
    output = Path(options.output)
    identity = identity_of(options)
    if is_converted(output, identity):
        print(f"{output}: is finished; it holds the conversion of {options.file} already")
        return
    refuse_existing(options.output)
    tally = Tally()
    with directory_written_whole(output) as unfinished:
        written = write_files(converted(options.file, options.shape, rules, tally), unfinished)
        total = tally.total()
        require(
            written,
            f"{options.file}: has no pair and no label tie: of {tally.records} records,"
            f" {total.line()}",
        )
        write_checksums(unfinished, {file.name: file_checksum(file) for file in written})
        write_checked_json(unfinished / CONVERTED, description(identity, tally, written))
    print_report(options, tally)


def rules_of(options: ConvertOptions) -> Rules:
    """The rules that options ask for. Raises InputError where they contradict each other."""
    fields = fields_of_options(
        options.prompt_field,
        options.chosen_field,
        options.rejected_field,
        options.score_field,
        options.winner_field,
    )
    require(
        fields is None or options.shape is None,
        "--shape and the names of fields both say how records are read; give one",
    )
    return Rules(TreeRules(options.language, options.skip_deleted, options.turns), fields)


def identity_of(options: ConvertOptions) -> dict[str, Any]:
    """What a conversion is of: the files with their checksums, and how they are read."""
    path = Path(options.file)
    require(path.exists(), f"{path}: no such file")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    require(
        all(file.is_file() for file in files) or path.is_dir(),
        f"{path}: not a plain file; expected a file or a directory of files",
    )
    chosen = {key: value for key, value in asdict(options).items() if key not in ("file", "output")}
    return {
        "files": {file.name: file_checksum(file) for file in files if file.is_file()},
        "options": json.loads(json.dumps(chosen)),
        "version": __version__,
    }


def is_converted(output: Path, identity: dict[str, Any]) -> bool:
    """Whether a directory holds this very conversion, as it was written.

    Raises InputError if it holds another, or if one of its files was changed or is missing.
    """
    if not (output / CONVERTED).is_file():
        return False
    stored = read_checked_json(output / CONVERTED)
    for key, value in identity.items():
        require(
            stored.get(key) == value,
            f"--output {output}: holds a conversion with other {key}; choose another name or"
            " remove it",
        )
    require_directory_as_written(output)
    for name in stored["written"]:
        require((output / name).is_file(), f"{output / name}: no such file; remove {output}")
    return True


def file_of(record: Record, where: str) -> str:
    """The name of the file that a record belongs to, by its split and its taste."""
    parts = [record[key] for key in ("split", "taste") if isinstance(record.get(key), str)]
    name = ".".join(part for part in parts if part)
    require(
        not name or FILE_NAME.fullmatch(name),
        f"{where}: {name[:100]!r} names a split or a taste; expected letters, digits, - and _, as"
        " a file is named after it",
    )
    return name or PLAIN_NAME


def write_files(located: Iterable[tuple[str, Record]], directory: Path) -> list[Path]:
    """Write records to JSON-lines files by split and taste; returns the files."""
    files: dict[str, TextIO] = {}
    with ExitStack() as opened:
        for where, record in located:
            name = file_of(record, where)
            if name not in files:
                require(
                    len(files) < MOST_FILES,
                    f"{where}: more than {MOST_FILES} different splits and tastes; expected few",
                )
                path = directory / f"{name}.jsonl"
                file = open(path, "x", encoding="utf-8", newline="\n")  # noqa: SIM115
                files[name] = opened.enter_context(file)
            files[name].write(json_line(record, where) + "\n")
    return [directory / f"{name}.jsonl" for name in sorted(files)]


def description(identity: dict[str, Any], tally: Tally, files: list[Path]) -> dict[str, Any]:
    """What converted.json says."""
    counts = {file.name: tally.files[file.stem] for file in files}
    written = {
        name: {"pairs": of_file.pairs, "label_ties": of_file.ties}
        for name, of_file in counts.items()
    }
    return identity | {
        "shape": tally.shape,
        "records": tally.records,
        "written": written,
        "left_out": dict(sorted(tally.total().left_out.items())),
        "notes": dict(sorted(tally.notes.items())),
    }


def print_report(options: ConvertOptions, tally: Tally) -> None:
    """One line of counts; if there are several files, a table of them before it."""
    print(f"{options.file}: {tally.records} records of the shape {tally.shape!r} ({tally.what})")
    if len(tally.files) > 1:
        table = Table("file", "pairs", "label ties", "left out")
        for name, counts in sorted(tally.files.items()):
            table.add(f"{name}.jsonl", counts.pairs, counts.ties, counts.left_out.total())
        print(table)
    print(f"{os.path.join(options.output, '')}: {tally.total().line()}")
    for note, count in sorted(tally.notes.items()):
        print(f"{count} {note}")
    if tally.unused:
        print(f"fields not used: {', '.join(name for name, _ in tally.unused.most_common(20))}")
