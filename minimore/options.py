"""Options: a frozen dataclass is the single description of a command; argparse is generated from it.

Also the one error type that a user can cause. Standard library only.
"""

import argparse
import dataclasses
import json
import os
import types
import typing
from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used: one line saying what, where, expected, what next. Exit code 2."""

    def __init__(self, message: str):
        super().__init__("\\n".join(message.splitlines()))       # a name may hold a line break; the message may not


def option(default=dataclasses.MISSING, help="", choices=None, repeat=False, value="VALUE"):
    """A dataclass field that is also a command-line option; without a default it is required. value: its name in the help."""
    metadata = {"help": help, "choices": choices, "repeat": repeat, "value": value}
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
        if not required and field.default not in (None, ()):
            text += f" (default: {field.default})"
        parser.add_argument(name, type=_parser_type(kind) if kind in (int, float) else kind, required=required,
                            default=None if required else [] if field.metadata["repeat"] else field.default, choices=field.metadata["choices"],
                            action="append" if field.metadata["repeat"] else "store", help=text,
                            metavar=None if field.metadata["choices"] else {int: "N", float: "X"}.get(kind, field.metadata["value"]))


def from_arguments(options_class, arguments):
    """Build the frozen dataclass from an argparse namespace; repeated options become tuples."""
    values = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(options_class)}
    return options_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2, without the usage block; no abbreviations."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, allow_abbrev=False, **keywords)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse_sources(values, test_only=False):
    """`NAME=TRAIN[,TEST]` strings -> {name: (train, test or None)}; with test_only `NAME=TEST` -> {name: path}."""
    expected = "NAME=TEST.jsonl" if test_only else "NAME=TRAIN.jsonl[,TEST.jsonl]"
    sources = {}
    for value in values:
        name, equals, paths = value.partition("=")
        parts = [paths] if test_only else paths.split(",")
        if not (name and equals and all(parts) and len(parts) <= 2):
            raise InputError(f"--source {value}: expected {expected}")
        if name in sources:
            raise InputError(f"--source {value}: source {name!r} is named twice; give each source one --source")
        sources[name] = paths if test_only else (parts[0], parts[1] if len(parts) == 2 else None)
    if not sources:
        raise InputError(f"--source is missing: expected at least one {expected}")
    return sources


def refuse_existing(path, flag="--output"):
    """Outputs are never overwritten: refuse a path that exists or cannot be created."""
    if path is not None and os.path.lexists(path):
        raise InputError(f"{flag} {path}: exists already; choose another name or remove it")
    parent = Path(path).absolute().parent if path is not None else None
    if parent is not None and parent.exists() and not parent.is_dir():
        raise InputError(f"{flag} {path}: {parent} is not a directory")


def write_text(path, text):
    """Write a whole file or nothing: beside it first, then renamed into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path, value):
    """`write_text` of indented strict JSON (no NaN)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
