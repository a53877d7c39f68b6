"""Numbers with their units, as people read them."""

import math


def in_bytes(number: float) -> str:
    """A number of bytes with its unit: 1 GB is 10^9.

    >>> in_bytes(2.4e10), in_bytes(500)
    ('24.0 GB', '0.5 kB')
    """
    return _with_unit(number, {"GB": 1e9, "MB": 1e6, "kB": 1e3})


def in_time(seconds: float) -> str:
    """A duration in hours, minutes, seconds or milliseconds.

    >>> in_time(5400), in_time(90), in_time(2), in_time(0.0003)
    ('1.5 h', '1.5 min', '2.0 s', '0.3 ms')
    """
    return _with_unit(seconds, {"h": 3600, "min": 60, "s": 1, "ms": 1e-3})


def in_whole_time(seconds: float) -> str:
    """A duration that is only guessed: whole seconds, at least one, or minutes, or hours.

    >>> in_whole_time(0.3), in_whole_time(90), in_whole_time(200), in_whole_time(9000)
    ('1 s', '90 s', '3 min', '2.5 h')
    """
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{round(seconds / 60)} min" if seconds < 7200 else in_time(seconds)


def in_flops(number: float) -> str:
    """A number of FLOPs with its unit.

    >>> in_flops(1.0637e15), in_flops(5.67e9)
    ('1,063.7 TFLOPs', '5.67 GFLOPs')
    """
    if number >= 1e11:
        return f"{number / 1e12:,.1f} TFLOPs"
    return f"{number / 1e9:,.2f} GFLOPs"


def _with_unit(number: float, units: dict[str, float]) -> str:
    """A number in the first, largest, unit of which it is at least one, or else in the last."""
    fitting = [(unit, size) for unit, size in units.items() if number >= size]
    unit, size = fitting[0] if fitting else list(units.items())[-1]
    return f"{number / size:.1f} {unit}"
