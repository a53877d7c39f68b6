"""Runs the reader's function against its check, and says in one line what came of it."""

import importlib.util
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..files import one_line
from ..model.sandbox import watched
from .expect import WrongAnswer

SECONDS = 10.0  # that a reader's code may take; a right answer takes less than one


class Verdict(NamedTuple):
    """Whether an answer is right, and one line about it."""

    is_right: bool
    line: str


def judge(path: Path, name: str, check: Callable, seconds: float = SECONDS) -> Verdict:
    """Load a reader's file, and check the function `name` in it.

    Code that raises, exits or does not end in time is wrong, too. A blank body is "still blank".
    """
    try:
        with watched(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(function_of(path, name))
    except WrongAnswer as wrong:
        return Verdict(False, f"wrong: {wrong}")
    except NotImplementedError as error:
        return Verdict(False, f"still blank: {where(error, path)}: {one_line(error)}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a reader's code may raise
        return Verdict(False, f"wrong: {where(error, path)}: {named(error)}")
    return Verdict(True, f"right: {name} passes every case")


def function_of(path: Path, name: str) -> Callable:
    """The function `name` of a file; raises WrongAnswer if the file has none."""
    spec = importlib.util.spec_from_file_location(f"exercise_{name}", path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    keeps_no_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # nothing is left beside the reader's file
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = keeps_no_bytecode
    function = getattr(module, name, None)
    if not callable(function):
        raise WrongAnswer(f"{path}: has no function {name}; write the exercise anew elsewhere")
    return function


def where(error: BaseException, path: Path) -> str:
    """FILE:LINE of the last line of the reader's file that an error has passed."""
    own = str(path.absolute())  # by which Python knows the file
    if isinstance(error, SyntaxError) and error.filename == own:
        return f"{path}:{error.lineno}"
    passed = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in passed if frame.filename == own]
    return f"{path}:{lines[-1]}" if lines else str(path)


def named(error: BaseException) -> str:
    """The kind of an error and what it says."""
    kind = type(error).__name__
    text = one_line(error)
    return kind if text == kind else f"{kind}: {text}"
