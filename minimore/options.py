"""Options: a frozen dataclass is the single description of a command; argparse is generated from it.

Also the one error type that a user can cause. Standard library only.
"""

import argparse
import dataclasses
import json
import os
import secrets
import types
import typing
from pathlib import Path

MESSAGE = 1000  # characters of the longest message


def printable(text: str) -> str:
    """Line breaks and other control characters, which a name or a file may hold, as escapes: a message is one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class InputError(ValueError):
    """Something the user gave cannot be used: one line saying what, where, expected, what next. Exit code 2."""

    def __init__(self, message: str):
        super().__init__(printable(message)[:MESSAGE])


def option(
    default=dataclasses.MISSING,
    help="",
    choices=None,
    repeat=False,
    value="VALUE",
    positional=False,
):
    """A dataclass field that is also a command-line option; without a default it is required. value: its name in the help.

    positional: it may be given without its name, too.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "repeat": repeat,
        "value": value,
        "positional": positional,
    }
    return dataclasses.field(default=default, metadata=metadata)


def _value_type(annotation):
    """The type that parses one value: `int` for `int | None`, `str` for `tuple[str, ...]`."""
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is tuple:
        annotation = typing.get_args(annotation)[0]
    return annotation


def _parser_type(kind):
    """Whole numbers may be written 40_000; floats must be finite."""

    def parse(text):
        value = kind(text)
        if kind is float and not -float("inf") < value < float("inf"):
            raise ValueError(text)
        return value

    parse.__name__ = {"int": "whole number", "float": "number"}.get(kind.__name__, kind.__name__)
    return parse


def add_options(parser, options_class):
    """Add one argument per field of the dataclass: `learning_rate` becomes `--learning-rate`."""
    hints = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        name, kind = "--" + field.name.replace("_", "-"), _value_type(hints[field.name])
        required = field.default is dataclasses.MISSING
        text = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            parser.add_argument(name, action="store_true", default=field.default, help=text)
            continue
        if field.metadata["positional"]:
            choices = field.metadata["choices"]
            parser.add_argument(
                field.name,
                nargs="?",
                default=argparse.SUPPRESS,
                help=text,
                metavar="{" + ",".join(choices) + "}" if choices else field.metadata["value"],
            )
            parser.add_argument(name, default=None, help=argparse.SUPPRESS)
            continue
        if not required and field.default not in (None, ()):
            text += f" (default: {field.default})"
        parser.add_argument(
            name,
            type=_parser_type(kind) if kind in (int, float) else kind,
            required=required,
            default=None if required else [] if field.metadata["repeat"] else field.default,
            choices=field.metadata["choices"],
            action="append" if field.metadata["repeat"] else "store",
            help=text,
            metavar=None
            if field.metadata["choices"]
            else {int: "N", float: "X"}.get(kind, field.metadata["value"]),
        )


def from_arguments(options_class, arguments):
    """Build the frozen dataclass from an argparse namespace; repeated options become tuples."""
    values = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(options_class)}
    for f in dataclasses.fields(options_class):
        if f.metadata["positional"] and values[f.name] is None:
            raise InputError(f"{f.name.upper()} is missing: {f.metadata['help']}")
        if (
            f.metadata["positional"]
            and f.metadata["choices"]
            and values[f.name] not in f.metadata["choices"]
        ):
            raise InputError(
                f"{f.name} {values[f.name]}: expected one of {', '.join(f.metadata['choices'])}"
            )
    return options_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2, without the usage block; no abbreviations."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, allow_abbrev=False, **keywords)

    def error(self, message):
        self.exit(2, f"{self.prog}: {printable(message)[:MESSAGE]} (see {self.prog} --help)\n")


def parse_sources(values, test_only=False, flag="--source"):
    """`NAME=TRAIN[,TEST]` strings -> {name: (train, test or None)}; with test_only `NAME=TEST` -> {name: path}."""
    expected = "NAME=TEST.jsonl" if test_only else "NAME=TRAIN.jsonl[,TEST.jsonl]"
    sources = {}
    for value in values:
        name, equals, paths = value.partition("=")
        parts = [paths] if test_only else paths.split(",")
        if not (name and equals and all(parts) and len(parts) <= 2):
            raise InputError(f"{flag} {value}: expected {expected}")
        if not name.isprintable():
            raise InputError(f"{flag} {value}: expected a name of printable characters")
        if name in sources:
            raise InputError(
                f"{flag} {value}: source {name!r} is named twice; give each source one {flag}"
            )
        sources[name] = paths if test_only else (parts[0], parts[1] if len(parts) == 2 else None)
    if not sources:
        raise InputError(f"{flag} is missing: expected at least one {expected}")
    return sources


def require_tests(paths: dict[str, tuple[str, str | None]]):
    """Refuse a source without a test file, or whose test file is not there or is its training file."""
    for name, (train, test) in paths.items():
        if test is None:
            raise InputError(f"--source {name}: has no test file; expected NAME=TRAIN,TEST")
        for path in (train, test):
            if not Path(path).exists():
                raise InputError(f"--source {name}: {path}: no such file")
        if Path(train).resolve() == Path(test).resolve():
            raise InputError(f"--source {name}: {test} is both training and test file")


def refuse_existing(path, flag="--output", make_parents=False):
    """Outputs are never overwritten: refuse a path that exists, that is empty, or that lies in no directory."""
    if path is None:
        return
    if not path or os.path.lexists(path):
        raise InputError(
            f"{flag} {path}: exists already; choose another name or remove it"
            if path
            else f"{flag}: the path is empty"
        )
    parent = Path(path).absolute().parent
    while make_parents and not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{flag} {path}: {parent} is not a directory; make it first")


def one_line(error) -> str:
    """An error's text on one line, at most 160 characters."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def read_json(path, kind=dict):
    """A JSON object (or a list) from a file, or one clear line."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path}: not a plain file; expected a file of JSON")
        value = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file"
            + (
                "; expected a Hugging Face checkpoint directory"
                if Path(path).name == "config.json"
                else ""
            )
        ) from None
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(value, kind):
        raise InputError(
            f"{path}: holds {type(value).__name__}; expected a JSON {'object' if kind is dict else 'list'}"
        )
    return value


def beside(path: Path) -> Path:
    """A name next to path that nobody else uses; what is written there whole is then renamed to path."""
    return path.with_name(f"{path.name[:200]}.{secrets.token_hex(4)}.partial")


def write_text(path, text):
    """Write a whole file or nothing: beside it first, then renamed into place."""
    path = Path(path)
    unfinished = beside(path)
    try:
        with open(unfinished, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path, value):
    """`write_text` of indented strict JSON (no NaN; escapes only where UTF-8 has no bytes for a character)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    if any("\ud800" <= c <= "\udfff" for c in text):
        text = json.dumps(value, indent=2, allow_nan=False)
    write_text(path, text + "\n")
