"""What a chat template may compute: a few numbers and texts, in a few seconds.

jinja2's own sandbox keeps a template from the system. This one keeps it from filling the memory
and from running for ever, and takes from it what is random.
"""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

LARGEST = 10**7  # characters of a text, items of a list, and numbers that ask for such
MULTIPLYING = ("translate", "indent", "wordwrap", "expandtabs", "tojson")  # by an argument
WIDE = (  # whose numbers are lengths
    *("center", "ljust", "rjust", "zfill", "indent", "wordwrap", "expandtabs", "truncate"),
    *("tojson", "slice", "batch"),
)
WIDEST = 10**4  # characters of a field, or spaces of an indentation
SECONDS = 10  # for one conversation


class BoundedConcatenation(CodeGenerator):
    """Compiles `a ~ b` to a method of the sandbox."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Write the code of a concatenation."""
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with bounds. A template that exceeds one gets a SecurityError."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = BoundedConcatenation

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        del self.filters["random"], self.globals["lipsum"]
        for name, function in self.filters.items():
            self.filters[name] = bounded(name, function)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """left operator right, if the result is not too large."""
        if operator == "%" and isinstance(left, str):
            require_small_format(left, right)
        if operator == "**":
            require_small(left)
            require_small(size(right) * (LARGEST / 1000))  # so an exponent is at most 1000
        are_numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "*" and not are_numbers:
            require_small(size(left) * size(right))
        if operator == "*" and are_numbers and max(abs(left), abs(right)) > 2.0**1000:
            raise SecurityError("it multiplies numbers of more than 300 digits")
        if operator == "+" and not are_numbers:
            require_small(size(left) + size(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
        """Call a function or method whose arguments ask for nothing too large."""
        method = getattr(function, "__wrapped__", function)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)  # the text whose method is called
        name = getattr(function, "__name__", "")
        require_bounded(name, owner, *arguments, *named.values())
        return super().call(context, function, *arguments, **named)

    def concatenated(self, parts: tuple) -> str:
        """The parts as one text."""
        texts = [str(part) for part in parts]
        require_small(sum(map(len, texts)))
        return "".join(texts)


def bounded(name: str, function: Callable) -> Callable:
    """A filter whose arguments ask for nothing too large."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        values = [*arguments, *named.values()]  # jinja2 may pass things of its own in front
        require_bounded(name, *(v for v in values if isinstance(v, (str, int, float, list, tuple))))
        return function(*arguments, **named)

    return call


def require_bounded(name: str, *values: Any) -> None:
    """Refuse what makes a text or a list too large: a wide field, many repetitions."""
    if name in WIDE:
        widths = [value for value in values[1:] if isinstance(value, (int, float))]
        require_small(*(width * (LARGEST / WIDEST) for width in widths))
    if name == "range":
        require_small(*values)
    if name in ("format", "format_map") and values and isinstance(values[0], str):
        require_small_format(values[0], *values[1:])
    if name == "sum" and any(isinstance(value, (list, tuple)) for value in values[1:]):
        raise SecurityError("it adds up lists")  # which takes the square of their length
    if name == "replace" and all(isinstance(value, str) for value in values[:3]):
        text, old, new = (*values, "", "", "")[:3]
        require_small(len(text) + text.count(old) * len(new))
    elif name == "join" and values:
        parts = [value for value in values if isinstance(value, (list, tuple))]
        count = max([1, *map(len, parts)])
        between = max([0, *(len(value) for value in values if isinstance(value, str))])
        require_small(sum(size(part) for part in parts) + count * between)
    elif name in MULTIPLYING and values:
        sizes = [size(value) for value in values]
        require_small(sizes[0] * max([1, *sizes[1:]]))


def require_small(*numbers: Any) -> None:
    """Refuse numbers above LARGEST."""
    for number in numbers:
        if isinstance(number, (int, float)) and abs(number) > LARGEST:
            raise SecurityError(f"it asks for more than {LARGEST:,} of something")


def require_small_format(form: str, *values: Any) -> None:
    """Refuse a format with a very wide field, or whose fields together become too long."""
    parts = [part for value in values for part in parts_of(value)]
    widths = re.findall(r"(?:%[^a-zA-Z%]*?|:[^{}]*?)([0-9]+)", form)
    require_small(*(int(digits[:12]) for digits in widths))
    if "*" in form:  # a width may be a value
        require_small(*(part for part in parts if isinstance(part, (int, float))))
    longest = max((size(part) for part in parts if not isinstance(part, (int, float))), default=0)
    require_small(len(form) + (form.count("%") + form.count("{")) * longest)


def parts_of(value: Any) -> list[Any]:
    """The values in a container; a lone value is its own part."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else [value]


def size(value: Any) -> float:
    """How much of something a value stands for: its length, or itself if it is a number."""
    if isinstance(value, (int, float)):
        return abs(value)
    if isinstance(value, (list, tuple)):
        return sum(len(part) if isinstance(part, str) else 1 for part in value)
    return len(value) if hasattr(value, "__len__") else 1


@contextmanager
def within_seconds(seconds: float = SECONDS) -> Iterator[None]:
    """Raise TimeoutError if the body takes longer, where signals can be used."""
    can_interrupt = hasattr(signal, "setitimer") and (
        threading.current_thread() is threading.main_thread()
    )
    if not can_interrupt:
        yield
        return

    def interrupt(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    handler_before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler_before)
