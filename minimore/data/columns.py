"""Columns: records from files of tables (CSV, tab-separated, Parquet), row by row.

A row is a record whose keys are the names of the columns. Every value of a CSV file is a string.
"""

import csv
import gzip
import io
import os
import zlib
from collections.abc import Generator, Iterator
from itertools import chain
from typing import TextIO

from ..files import one_line, refuse_pointer
from ..options import InputError, require
from .records import (
    DATA_FILES,
    LONGEST_LINE,
    MOST_BLANK_LINES,
    PARQUET,
    TABLES,
    TEXT_TABLES,
    Record,
    data_files,
    read_records,
    too_many_blank,
)

ROWS_AT_ONCE = 1024  # of a Parquet file


def read_rows(path: str) -> Generator[tuple[str, Record], None, None]:
    """("file:line", record) for each row of a table, or for each line of a file of JSON.

    The ending of the name says which it is. A directory stands for the data files in it, in order
    of name. Raises InputError, which names file and line, for anything that cannot be read.
    """
    if os.path.isdir(path):
        for file_path in data_files(path, (*DATA_FILES, *TABLES)):
            yield from read_rows(file_path)
        return
    name = str(path).lower()
    if name.endswith(TEXT_TABLES):
        yield from _rows_of_text(path)
    elif name.endswith(PARQUET):
        yield from _rows_of_parquet(path)
    else:
        yield from read_records(path)


def _rows_of_text(path: str) -> Iterator[tuple[str, Record]]:
    """The rows of a CSV or a tab-separated file.

    A header line with a tab in it makes the file tab-separated, whatever its name, and one with
    more semicolons than commas is separated by semicolons, as spreadsheets write it where 0,5 is a
    number. A file with tabs is read without quoting: in those that people publish, a field may
    begin with a quotation mark.
    """
    line = blank_lines = 0
    try:
        refuse_pointer(path)
        with _opened(path) as file:
            names: list[str] | None = None
            for last_line, cells in _rows(path, file):
                where, line = f"{path}:{line + 1}", last_line
                if not cells:
                    blank_lines += 1
                    require(blank_lines <= MOST_BLANK_LINES, too_many_blank(where))
                    continue
                if names is None:
                    names = _checked_names(cells, where)
                    continue
                require(
                    len(cells) == len(names),
                    f"{where}: has {len(cells)} fields; expected {len(names)}, as in the header",
                )
                yield where, dict(zip(names, cells))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{line + 1}: not UTF-8 ({error.reason})") from None
    except csv.Error as error:
        raise InputError(f"{path}:{line + 1}: no row of a table ({one_line(error)})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None


def _opened(path: str) -> TextIO:
    opened = (gzip.open if str(path).endswith(".gz") else open)(path, "rb")
    return io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")  # type: ignore[arg-type]


class Lines:
    """The lines of a table, and how many characters the present row has so far.

    A row goes on over several lines where a quoted field does. It is bounded as a line is.
    """

    def __init__(self, path: str, file: TextIO):
        self.path, self.file, self.number, self.row_length = path, file, 0, 0

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(LONGEST_LINE + 1):
            self.number += 1
            self.row_length += len(line)
            require(
                self.row_length <= LONGEST_LINE,
                f"{self.path}:{self.number}: a row of more than {LONGEST_LINE / 1e6:.0f} million"
                " characters; is a quotation mark missing?",
            )
            yield line


def _rows(path: str, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, fields) of each row. The header shows the kind of table."""
    csv.field_size_limit(LONGEST_LINE)
    lines = Lines(path, file)
    remaining = iter(lines)
    header = next(remaining, "")
    every_line = chain([header], remaining)
    if "\t" in header:
        reader = csv.reader(every_line, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        mark = ";" if header.count(";") > header.count(",") else ","
        reader = csv.reader(every_line, delimiter=mark, strict=True)
    for cells in reader:
        yield lines.number, cells
        lines.row_length = 0


def _checked_names(names: list[str], where: str) -> list[str]:
    """The names of the columns; InputError if two are the same, one is empty, or it is alone."""
    require(
        len(names) > 1,
        f"{where}: has one column only, {names[0][:100]!r}; expected several, separated by commas,"
        " semicolons or tabs",
    )
    is_header = all(name.strip() for name in names) and len(set(names)) == len(names)
    require(
        is_header,
        f"{where}: the header is {', '.join(names)[:200]!r}; expected a different name for every"
        " column",
    )
    return names


def _rows_of_parquet(path: str) -> Iterator[tuple[str, Record]]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            f"{path}: Parquet files need pyarrow, which is not installed; pip install pyarrow, or"
            " write the table as JSON lines"
        ) from None
    try:
        row = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=ROWS_AT_ONCE):
            for record in batch.to_pylist():
                row += 1
                yield f"{path}:{row}", record
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, NotImplementedError, LookupError) as error:  # those of pyarrow
        raise InputError(f"{path}: not readable as Parquet ({one_line(error)})") from None
