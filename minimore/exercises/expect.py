"""What a check says: the case, what was expected of a function, and what came out instead."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

SHOWN = 6  # numbers of an array that a line shows whole


class WrongAnswer(Exception):
    """A function does not do what its exercise asks. The message is one line."""


def expect(condition: object, case: str, expected: str, result: str) -> None:
    """Raise WrongAnswer unless the condition holds."""
    if not condition:
        raise WrongAnswer(f"{case}: expected {expected}, got {result}")


def expect_close(case: str, result: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Raise WrongAnswer unless both have the same shape and the same numbers; NaN equals NaN.

    tolerance: relative for numbers above 1, absolute for those below.
    """
    right, answer = as_array(case, expected), as_array(case, result)
    expect(answer.shape == right.shape, case, f"shape {right.shape}", f"shape {answer.shape}")
    is_close = np.isclose(answer, right, rtol=tolerance, atol=tolerance, equal_nan=True)
    if is_close.all():
        return
    if right.size > SHOWN:
        place = tuple(int(i) for i in np.argwhere(~is_close)[0])
        case, right, answer = f"{case}, entry {list(place)}", right[place], answer[place]
    digits = 6 if text_of(right, 6) != text_of(answer, 6) else 17
    raise WrongAnswer(f"{case}: expected {text_of(right, digits)}, got {text_of(answer, digits)}")


def expect_refused(case: str, call: Callable[[], Any]) -> None:
    """Raise WrongAnswer unless a call raises ValueError."""
    try:
        result = call()
    except ValueError:
        return
    raise WrongAnswer(f"{case}: expected a ValueError, got {' '.join(repr(result).split())[:80]}")


def as_array(case: str, value: Any) -> np.ndarray:
    """Numbers of any kind as float64; raises WrongAnswer for what is no number."""
    if value is None:
        raise WrongAnswer(f"{case}: expected numbers, got None; is a `return` missing?")
    if isinstance(value, Tensor):
        return value.detach().double().numpy()
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise WrongAnswer(f"{case}: expected numbers, got {type(value).__name__}") from None


def text_of(value: Any, digits: int) -> str:
    """Numbers on one line."""
    array = np.asarray(value)
    if array.ndim == 0:
        return f"{float(array):.{digits}g}"
    return f"[{', '.join(text_of(part, digits) for part in array)}]"
