"""Chat templates come from a hub: what may not be in one, and how long one may take.

Jinja runs them in a sandbox, which keeps them from files and code, not from loops of 99,999 times 99,999. Those are
stopped by a thread that looks on. A single operation of Python cannot be stopped, so what can make one endless is
refused before anything is rendered: powers, and numbers without measure.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from pyralis.errors import TemplateError

T = TypeVar("T")

# What a template can raise: its own raise_exception, or a bug in it; a `break` outside of a loop is a SyntaxError.
RENDER_ERRORS = (
    *(JinjaError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, SyntaxError),
    *(MemoryError, AssertionError),
)
RENDER_SECONDS = 3.0  # of CPU time; a conversation takes less than a millisecond, one of a million characters 0.05 s
LARGEST_NUMBER = 10**8
_LOOK_SECONDS = 0.1
_IDLE_LOOKS = 50  # after so many without a render the thread ends


class _Generation(Extension):
    """transformers' `{% generation %}` block, for parsing alone."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_jinja(jinja: str) -> None:
    """Raise TemplateError for what does not parse, and for what no chat template needs and a single step of which may
    take for ever: `**`, `round` to a computed precision, numbers above 10^8."""
    if not isinstance(jinja, str):
        raise TemplateError(f"the tokenizer's chat template is a {type(jinja).__name__}; expected text.")
    try:
        tree = Environment(extensions=[_Generation, loopcontrols]).parse(jinja)
        found = next(_endless(tree), None)
    except RENDER_ERRORS as error:
        raise TemplateError(f"the tokenizer's chat template is not valid Jinja: {_words(error)}.") from error
    if found is not None:
        what, line = found
        raise TemplateError(
            f"the tokenizer's chat template uses {what} (line {line}), which may take any time or memory, and which no "
            "chat template needs. Set template_name to a named template."
        )


def _endless(tree: nodes.Template) -> Iterator[tuple[str, int]]:
    for node in tree.find_all((nodes.Pow, nodes.Const, nodes.Filter)):
        if isinstance(node, nodes.Pow):
            yield "a power (**)", node.lineno
        elif isinstance(node, nodes.Const) and isinstance(node.value, int | float) and abs(node.value) > LARGEST_NUMBER:
            yield f"a number above {LARGEST_NUMBER:,}", node.lineno
        elif isinstance(node, nodes.Filter) and node.name == "round":
            given = [*node.args, *(keyword.value for keyword in node.kwargs), node.dyn_args, node.dyn_kwargs]
            if any(
                value is not None and not (isinstance(value, nodes.Const) and value.value in _PRECISIONS)
                for value in given
            ):
                yield "round to a computed precision", node.lineno


_PRECISIONS = (*range(20), "common", "ceil", "floor")


def _words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).rstrip(".") or type(error).__name__


class _TooLong(BaseException):
    """Raised inside of a render by the thread that looks on. No Exception: a template's helpers may catch those."""


@dataclass(slots=True)
class _Render:
    """limit: the value of its clock at which it is stopped."""

    clock: Callable[[], float]
    limit: float
    stopped: bool = False


class _Watch:
    """One thread for all renders: starting one for each would take longer than most of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._renders: dict[int, _Render] = {}  # by the thread that they are in
        self._thread: threading.Thread | None = None

    def run(self, render: Callable[[], T], seconds: float) -> T:
        clock = _clock_of_this_thread()
        mine = _Render(clock, clock() + seconds)
        try:
            try:
                self._enter(mine)
                return render()
            finally:
                self._leave()
                if mine.stopped and not isinstance(sys.exception(), _TooLong):
                    time.sleep(1)  # it is on its way, and must not arrive anywhere else
                    raise _TooLong
        except _TooLong:
            raise TemplateError(
                f"the tokenizer's chat template was not done after {seconds:g} s of computing. Set template_name to a "
                "named template."
            ) from None

    def _enter(self, render: _Render) -> None:
        with self._lock:
            self._renders[threading.get_ident()] = render
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="pyralis-render-limit", daemon=True)
                self._thread.start()

    def _leave(self) -> None:
        with self._lock:
            self._renders.pop(threading.get_ident(), None)

    def _look(self) -> None:
        idle = 0
        while True:
            time.sleep(_LOOK_SECONDS)
            with self._lock:
                idle = 0 if self._renders else idle + 1
                if idle >= _IDLE_LOOKS:
                    self._thread = None
                    return
                for thread, render in self._renders.items():
                    if not render.stopped and render.clock() > render.limit:
                        render.stopped = True
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooLong))


def _clock_of_this_thread() -> Callable[[], float]:
    """CPU time where the system tells it of other threads, so that a machine that is busy stops nothing."""
    if sys.platform == "linux":
        clock = time.pthread_getcpuclockid(threading.get_ident())
        return lambda: time.clock_gettime(clock)
    return time.monotonic


_watch = _Watch()


def _forget() -> None:
    """A forked process has neither the thread nor anyone to give back the lock."""
    global _watch
    _watch = _Watch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def in_time(render: Callable[[], T], seconds: float | None = None) -> T:
    """What `render` gives. Raises TemplateError when that takes longer than `seconds` of CPU time (RENDER_SECONDS)."""
    return _watch.run(render, RENDER_SECONDS if seconds is None else seconds)
