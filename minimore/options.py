"""Options: a frozen dataclass is the one description of a command; argparse is generated from it.

Also here: the one error that a user can cause, and what it may look like. Standard library only.
"""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

LONGEST_MESSAGE = 1000  # characters
MOST = 10**9  # of anything that is counted
FLAG = re.compile(r"--?[A-Za-z][^ ]*", re.DOTALL)


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what, where, what was expected and what to do next. A command
    that ends in it has the exit code 2.
    """

    def __init__(self, message: str):
        super().__init__(printable(message)[:LONGEST_MESSAGE])


def require(condition: object, message: str) -> None:
    """Raise InputError unless the condition holds: a check reads as a sentence."""
    if not condition:
        raise InputError(message)


def printable(text: str) -> str:
    """The text with line breaks and other control characters as escapes, so that it is one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- one option ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that an option may take, both ends included; `above` and `below` exclude theirs.

    >>> 0 in Range(above=0), 1 in Range(above=0, most=1)
    (False, True)
    >>> print(Range(above=0, most=1))
    more than 0, at most 1
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    words: str | None = None  # what a message says instead of the numbers

    def __contains__(self, value: float) -> bool:
        return not (
            (self.least is not None and value < self.least)
            or (self.most is not None and value > self.most)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        if self.words is not None:
            return self.words
        if self.least is not None and self.most is not None:
            return f"{self.least} to {self.most}"
        limits = (
            ("at least", self.least),
            ("more than", self.above),
            ("at most", self.most),
            ("less than", self.below),
        )
        return ", ".join(f"{words} {limit}" for words, limit in limits if limit is not None)


COUNT = Range(least=1, most=MOST)  # of anything that is counted


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    choices: Sequence[str] | None = None,
    repeat: bool = False,
    value: str = "VALUE",
    positional: bool = False,
    within: Range | None = None,
    parse: Callable[[str], Any] | None = None,
    prints: Callable[[], object] | None = None,
) -> Any:
    """A dataclass field that is also a command-line option; without a default it is required.

    value: what its value is called in the help. positional: it may be given without its name, too.
    within: the numbers it may take, which `check_ranges` checks. parse: makes its value of a text,
    where the type of the field does not say it. prints: what a switch prints instead of all else
    that the command does, as --version does.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "repeat": repeat,
        "value": value,
        "positional": positional,
        "within": within,
        "parse": parse,
        "prints": prints,
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(name: str) -> str:
    """The flag of a field: `learning_rate` is `--learning-rate`, and `from_` is `--from`."""
    return "--" + name.rstrip("_").replace("_", "-")


def check_ranges(options: Any) -> None:
    """Raise InputError for the first option of a dataclass that lies outside its range."""
    for field in dataclasses.fields(options):
        within, value = field.metadata.get("within"), getattr(options, field.name)
        if within is not None and value is not None and value not in within:
            raise InputError(f"{flag_of(field.name)} {value}: expected {within}")


def check_types(options: Any) -> None:
    """Raise InputError for what a command line would not let through: for options from Python.

    These are a value that is none of the choices, and one of another type than the field.
    """
    for field in dataclasses.fields(options):
        value, choices = getattr(options, field.name), field.metadata.get("choices")
        if value is None and field.default is None:
            continue
        if choices is not None and (type(value) is not str or value not in choices):
            raise InputError(f"{field.name} {value!r}: expected one of {', '.join(choices)}")
        expected = next((kind for kind in (bool, int, str) if is_of(field.type, kind)), None)
        if expected is not None and type(value) is not expected:
            raise InputError(f"{field.name} {value!r}: expected {expected.__name__}")


def is_of(annotation: Any, kind: type) -> bool:
    """Whether a field's type is this one, or this one or None."""
    return annotation in (kind, kind | None)


# ---- from a dataclass to a command line, and back ------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; its errors are one line, without usage, and exit code 2.

    An option that a command does not have is an error before one that is missing: who writes
    --modle has forgotten nothing.
    """

    def __init__(self, **keywords: Any):
        super().__init__(allow_abbrev=False, **keywords)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; those that a command does not know are an error."""
        arguments = list(sys.argv[1:] if args is None else args)
        for flag in self.flags_among(arguments):
            if flag not in self._option_string_actions:
                self.error(self.unknown(flag))
        parsed, unexpected = super().parse_known_args(arguments, namespace)
        if unexpected:
            self.error(f"unexpected {' '.join(unexpected)}; expected no further arguments")
        return parsed, unexpected

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or an error. argparse would pass over a device too full for the help."""
        if file is sys.stdout:
            print(message, end="", flush=True)
        else:
            super()._print_message(message, file)

    def flags_among(self, arguments: Sequence[str]) -> list[str]:
        """The flags, as argparse tells them from values; where a command follows, those before."""
        flags = []
        for argument in arguments:
            is_flag = FLAG.fullmatch(argument) is not None
            if argument == "--" or (self._subparsers is not None and not is_flag):
                break
            if is_flag:
                flags.append(argument.partition("=")[0])
        return flags

    def unknown(self, flag: str) -> str:
        """What is said of a flag that there is not, with the one that is most like it."""
        alike = difflib.get_close_matches(flag, self._option_string_actions, 1)
        return f"unknown option {flag}" + (f"; did you mean {alike[0]}?" if alike else "")

    def error(self, message: str) -> NoReturn:
        """Print the one line and leave."""
        text = printable(message)[:LONGEST_MESSAGE]
        self.exit(2, f"{self.prog}: {text} (see {self.prog} --help)\n")


def add_options(parser: argparse.ArgumentParser, options_class: type) -> None:
    """Add one argument for every field of the dataclass."""
    types_of = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        kind = _value_type(types_of[field.name])
        if kind is bool:
            _add_switch(parser, field)
        elif field.metadata["positional"]:
            _add_positional(parser, field)
        else:
            _add_flag(parser, field, kind)


class PrintAndLeave(argparse.Action):
    """A switch that prints a text and leaves, whatever other option is missing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print and leave."""
        print(self.const())
        parser.exit()


def _add_switch(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    prints = field.metadata["prints"]
    if prints is not None:
        parser.add_argument(
            flag_of(field.name),
            action=PrintAndLeave,
            nargs=0,
            const=prints,
            default=field.default,
            help=_help_of(field),
        )
        return
    parser.add_argument(
        flag_of(field.name), action="store_true", default=field.default, help=_help_of(field)
    )


def _add_positional(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """The same value without its name or with it; `from_arguments` says if both are missing.

    Several values have no names.
    """
    choices = field.metadata["choices"]
    shown = "{" + ",".join(choices) + "}" if choices else field.metadata["value"]
    if field.metadata["repeat"]:
        parser.add_argument(field.name, nargs="*", help=_help_of(field), metavar=shown)
        return
    parser.add_argument(
        field.name, nargs="?", default=argparse.SUPPRESS, help=_help_of(field), metavar=shown
    )
    parser.add_argument(flag_of(field.name), default=None, help=argparse.SUPPRESS)


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: type) -> None:
    required = field.default is dataclasses.MISSING
    repeated, choices = field.metadata["repeat"], field.metadata["choices"]
    default: Any = [] if repeated else field.default
    shown, parse = field.metadata["value"], field.metadata["parse"] or kind
    if parse in (int, float):
        shown, parse = {int: "N", float: "X"}[kind], _parser_of(kind)
    text = _help_of(field)
    if not required and field.default not in (None, ()):
        text += f" (default: {field.default})"
    parser.add_argument(
        flag_of(field.name),
        dest=field.name,
        type=parse,
        required=required,
        default=None if required else default,
        choices=choices,
        action="append" if repeated else "store",
        help=text,
        metavar=None if choices else shown,
    )


def _help_of(field: dataclasses.Field) -> str:
    return field.metadata["help"].replace("%", "%%")


def _value_type(annotation: Any) -> type:
    """The type that parses one value: `int` for `int | None`, `str` for `tuple[str, ...]`."""
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is tuple:
        annotation = typing.get_args(annotation)[0]
    return annotation


def _parser_of(kind: type) -> Any:
    """A parser of numbers: whole ones may be written 40_000, others must be finite."""

    def parse(text: str) -> Any:
        value = kind(text)
        if kind is float and not -float("inf") < value < float("inf"):
            raise ValueError(text)
        return value

    names = {"int": "whole number", "float": "number"}
    parse.__name__ = names.get(kind.__name__, kind.__name__)  # argparse prints it
    return parse


def from_arguments(options_class: type, arguments: argparse.Namespace) -> Any:
    """Build the frozen dataclass from an argparse namespace; repeated options become tuples."""
    values = {}
    for field in dataclasses.fields(options_class):
        value = getattr(arguments, field.name)
        if field.metadata["positional"]:
            _check_positional(field, value)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return options_class(**values)


def to_arguments(options_class: type, values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give these values, as `from_arguments` would read them.

    values: by field, as JSON holds them. What is None or False has no words, and what is not a
    field of the class is left out.
    """
    words = []
    for field in dataclasses.fields(options_class):
        flag, value = flag_of(field.name), values.get(field.name)
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            several = value if isinstance(value, list) else [value]
            words += [f"{flag}={single}" for single in several]
    return words


def _check_positional(field: dataclasses.Field, value: Any) -> None:
    if value is None and field.default is None:
        return  # it may be left out
    choices = field.metadata["choices"]
    is_missing = value is None or value == []
    require(not is_missing, f"{field.name.upper()} is missing: {field.metadata['help']}")
    require(
        not choices or value in choices,
        f"{field.name} {value}: expected one of {', '.join(choices or ())}",
    )


# ---- NAME=PATH -----------------------------------------------------------------------------------


def parse_sources(
    values: Iterable[str],
    test_only: bool = False,
    flag: str = "--source",
    held_out_groups: bool = False,
) -> dict[str, Any]:
    """`NAME=TRAIN[,TEST]` strings become {name: (train, test or None)}.

    With test_only, `NAME=TEST` strings become {name: path}. With held_out_groups, `NAME=,TEST` is a
    source that is only tested, whose train is None.
    """
    expected = "NAME=TEST.jsonl" if test_only else "NAME=TRAIN.jsonl[,TEST.jsonl]"
    expected += ", or NAME=,TEST.jsonl to test only" if held_out_groups else ""
    sources: dict[str, Any] = {}
    for value in values:
        name, equals, paths = value.partition("=")
        parts = [paths] if test_only else paths.split(",")
        is_held_out_group = held_out_groups and len(parts) == 2 and not parts[0]
        is_whole = name and equals and all(parts[is_held_out_group:]) and len(parts) <= 2
        require(is_whole, f"{flag} {value}: expected {expected}")
        require(name.isprintable(), f"{flag} {value}: expected a name of printable characters")
        require(
            name not in sources,
            f"{flag} {value}: source {name!r} is named twice; give each source one {flag}",
        )
        train_and_test = (parts[0] or None, parts[1] if len(parts) == 2 else None)
        sources[name] = paths if test_only else train_and_test
    require(sources, f"{flag} is missing: expected at least one {expected}")
    if not test_only:
        require(training_files(sources), f"{flag}: no source has a file to train on")
        require_other_tests(sources)
    return sources


def training_files(paths: dict[str, tuple[str | None, str | None]]) -> dict[str, str]:
    """The training file of every source that has one: not of those that are only tested."""
    return {name: train for name, (train, _) in paths.items() if train is not None}


def require_other_tests(paths: dict[str, tuple[str | None, str | None]]) -> None:
    """Refuse a test file that is a training file, of its own source or of another."""
    training = {os.path.realpath(train): name for name, train in training_files(paths).items()}
    for name, (_, test) in paths.items():
        trained_as = training.get(os.path.realpath(test)) if test else None
        owner = "" if trained_as == name else f", of source {trained_as!r}"
        require(
            trained_as is None, f"--source {name}: {test} is both training and test file{owner}"
        )


def require_tests(paths: dict[str, tuple[str, str | None]]) -> None:
    """Refuse a source that has no test file, or whose files do not exist."""
    for name, (train, test) in paths.items():
        if test is None:
            raise InputError(f"--source {name}: has no test file; expected NAME=TRAIN,TEST")
        for path in (train, test):
            require(Path(path).exists(), f"--source {name}: {path}: no such file")
