"""Chat templates that would take for ever: refused before, or stopped."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pyralis.data import jinja_limits
from pyralis.data.jinja_limits import check_jinja, in_time
from pyralis.data.jinja_template import JinjaTemplate
from pyralis.data.types import Message
from pyralis.errors import TemplateError
from tests.data import chat_jinja
from tests.data.tokenizers import tiny_tokenizer

TURNS = (Message("user", "q"), Message("assistant", "a"))


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize("name", chat_jinja.TEMPLATES)
def test_real_templates_pass(name: str) -> None:
    check_jinja(chat_jinja.TEMPLATES[name])


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{{ 9 ** 9 ** 9 }}", r"a power \(\*\*\) \(line 1\)"),
        ("\n{{ 'a' * 999999999999 }}", r"a number above 100,000,000 \(line 2\)"),
        ("{{ 'a'|center(9999999999) }}", "a number above"),
        ("{{ 1.5|round(messages|length * 99999999, 'ceil') }}", "round to a computed precision"),
        ("{{ 1.5|round(precision=99999) }}", "round to a computed precision"),
        ("{% for m in messages %}", "not valid Jinja: Unexpected end of template"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "not valid Jinja: it is nested too deeply"),
        ("{{ " + "9" * 5000 + " }}", "not valid Jinja"),
        (None, "is a NoneType; expected text"),
    ],
)
def test_endless_steps_are_refused(jinja: Any, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        JinjaTemplate(jinja, tiny_tokenizer("byte_level"))


def test_harmless_sums_pass() -> None:
    check_jinja("{{ ' ' * 80 }}{{ 2.55|round(1) }}{{ 3.5|round(0, 'floor')|int }}{{ 100000000 }}{% generation %}"
                "{% for i in range(9) %}{% break %}{% endfor %}{% endgeneration %}")  # fmt: skip


@pytest.mark.parametrize(
    "jinja",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for i in range(99999) %}{{ f(n) if n < 9 }}{% endfor %}{% endmacro %}{{ f(0) }}",
        "{% set ns = namespace(n=3) %}{% for i in range(99999) %}{% set ns.n = ns.n * ns.n % (ns.n * ns.n + 1) %}"
        "{% endfor %}",
    ],
    ids=["loops", "macros", "growing numbers"],
)
def test_a_template_without_end_is_stopped(jinja: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_limits, "RENDER_SECONDS", 0.3)
    template = JinjaTemplate(jinja, tiny_tokenizer("byte_level"))
    with pytest.raises(TemplateError, match=r"not done after 0\.3 s|refuses a conversation"):
        template.render(TURNS)


@pytest.mark.parametrize("raised", [SyntaxError, MemoryError, RecursionError, AssertionError])
def test_what_a_template_raises_is_named(raised: type[Exception]) -> None:
    jinja = {
        SyntaxError: "{% break %}",
        MemoryError: "{% set n = 99999999 %}{{ 'a' * (n * n) }}",
        RecursionError: "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        AssertionError: "{{ messages|batch(0)|list }}",
    }[raised]
    template = JinjaTemplate(jinja, tiny_tokenizer("byte_level"))
    with pytest.raises(TemplateError):
        template.render(TURNS)


def test_other_threads_are_stopped_and_nothing_else() -> None:
    found: list[Exception] = []

    def work(call: Callable[[], object], seconds: float) -> None:
        try:
            in_time(call, seconds)
        except TemplateError as error:
            found.append(error)

    threads = [threading.Thread(target=work, args=(spin, 0.2)), threading.Thread(target=work, args=(lambda: 1, 0.2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 1
    time.sleep(0.3)  # nothing arrives later
    assert in_time(lambda: "done", 0.1) == "done"


def test_errors_pass_and_waiting_does_not_count() -> None:
    with pytest.raises(KeyError):
        in_time(lambda: {}["x"])
    if os.name == "posix":
        assert in_time(lambda: time.sleep(0.6) or "done", 0.2) == "done"


def test_a_forked_process_is_watched_too() -> None:
    in_time(lambda: 1)
    child = os.fork()
    if child == 0:
        try:
            in_time(spin, 0.2)
        except TemplateError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
