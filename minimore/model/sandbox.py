"""What a chat template may compute: a few numbers and texts, in a few seconds.

jinja2's own sandbox keeps a template from the system. This one keeps it from filling the memory
and from running for ever, and takes from it what is random. Three things do that together:

    before an operation    its arguments may not ask for too much            bounds.py
    after it               what it makes may not be too large, written out   `checked`
    all the while          a clock looks at the time and at the memory       `watched`
"""

import inspect
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import Environment, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .bounds import KEYED, extent, require_bounded, require_small, require_small_result

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

SECONDS = 10  # for one conversation
MEMORY = 500_000_000  # bytes for one conversation, beyond the most that the process had before
TICK = 0.05  # seconds between two looks at the clock


# ---- what is compiled differently ----------------------------------------------------------------


class BoundedCode(CodeGenerator):
    """Compiles what makes a text, a list or a dictionary to a call of the sandbox."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Write the code of `a ~ b`."""
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        """Write the code of `[a, b]`."""
        self.write("environment.checked(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """Write the code of `{a: b}`."""
        self.write("environment.checked(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """Write the code of `(a, b)`, and of several names that are set at once."""
        is_value = node.ctx == "load"
        self.write("environment.checked(" if is_value else "")
        super().visit_Tuple(node, frame)
        self.write(")" if is_value else "")


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with bounds. A template that exceeds one gets a SecurityError."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})
    code_generator_class = BoundedCode

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        del self.filters["random"], self.globals["lipsum"]
        for name, function in self.filters.items():
            self.filters[name] = bounded(name, function)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """left operator right, if the result is not too large."""
        require_small_result(operator, left, right)
        return checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
        """Call a function or method whose arguments ask for nothing too large."""
        method = getattr(function, "__wrapped__", function)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)  # the text whose method is called
        name = getattr(function, "__name__", "")
        # A macro sees them as one list. Each may be large, all together ten times as large.
        require_small(sum(map(extent, (*arguments, *named.values()))) / 10)
        if name in LISTING:
            arguments = tuple(map(listed, arguments))
        has_owner = isinstance(owner, (str, int, float))
        values = [*([owner] if has_owner else []), *arguments, *named.values()]
        require_bounded(name, *values)
        return checked(super().call(context, function, *arguments, **named))

    def concatenated(self, parts: tuple) -> str:
        """The parts as one text."""
        return self.concat([str(part) for part in parts])

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """The pieces as one text: what a block, a macro or a filter's block has written."""
        texts = list(pieces)
        require_small(sum(map(len, texts)))
        return "".join(texts)

    def checked(self, value: Any) -> Any:
        """A list or dictionary that the template has written down."""
        return checked(value)


# ---- before and after an operation ---------------------------------------------------------------

LISTING = ("join", *KEYED)  # go through what is given to them in one call


def bounded(name: str, function: Callable) -> Callable:
    """A filter whose arguments ask for nothing too large, and whose result is not too large."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if name in LISTING:
            arguments = tuple(map(listed, arguments))
        values: Sequence[Any] = arguments
        if named:  # in the order in which the filter names them
            values = list(inspect.signature(function).bind(*arguments, **named).arguments.values())
        # jinja2 may pass things of its own in front.
        own = (Context, EvalContext, Environment)
        require_bounded(name, *(value for value in values if not isinstance(value, own)))
        return checked(function(*arguments, **named))

    return call


def listed(value: Any) -> Any:
    """What is still to be computed, item by item, as a list; everything else as it is."""
    return list(value) if is_unfinished(value) else value


def is_unfinished(value: Any) -> bool:
    """Whether the items of a value are computed when they are asked for."""
    return isinstance(value, Iterator) and not isinstance(value, LoopContext)


def checked(value: Any) -> Any:
    """A value that is not too large. The items of an iterator are looked at as they come."""
    if is_unfinished(value):
        return checked_items(value)
    extent(value)
    return value


def checked_items(items: Iterator) -> Iterator:
    """The same items, which may not be too large together."""
    together = 0.0
    for item in items:
        together += 1 + extent(item)
        require_small(together)
        yield item


# ---- all the while -------------------------------------------------------------------------------


@contextmanager
def watched(seconds: float = SECONDS, memory: float = MEMORY) -> Iterator[None]:
    """Interrupt the body if it takes longer, or much memory, where signals can be used.

    memory: bytes beyond the most that the process has had. Raises TimeoutError and MemoryError.
    """
    can_interrupt = hasattr(signal, "setitimer") and (
        threading.current_thread() is threading.main_thread()
    )
    if not can_interrupt:
        yield
        return
    end, most = time.monotonic() + seconds, peak_memory() + memory

    def look(*_: Any) -> None:
        if time.monotonic() > end:
            raise TimeoutError(f"it took more than {seconds:g} s")
        if peak_memory() > most:
            raise MemoryError(f"it took more than {memory / 1e6:,.0f} MB of memory")

    handler_before = signal.signal(signal.SIGALRM, look)
    tick = min(TICK, seconds)
    signal.setitimer(signal.ITIMER_REAL, tick, tick)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler_before)


def peak_memory() -> int:
    """The most bytes that this process has had in memory; 0 where nobody counts them."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
