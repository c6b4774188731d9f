"""HTML pages of one file: they open offline, and their content policy lets no script run but their own."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pyralis import __version__
from pyralis.train.report import format as numbers

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("page.js", "chart.js")


def render_page(name: str, **values: Any) -> str:
    """`NAME.html.j2` with `report.css`, `NAME.css` where there is one, and the script of all pages. Every value is
    escaped but what is Markup."""
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {
        "bytes": numbers.bytes_text,
        "count": numbers.count_text,
        "duration": numbers.duration_text,
        "gib": numbers.gib_text,
        "loss": numbers.loss_text,
        "number_of": numbers.number_of,
        "percent": numbers.percent_text,
        "value": value_text,
    }
    script = "".join(map(_read, SCRIPTS))
    styles = dict.fromkeys(["report.css", f"{name}.css"])
    return jinja.get_template(f"{name}.html.j2").render(
        **values,
        style=Markup("".join(_read(style) for style in styles if (TEMPLATES / style).is_file())),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def value_text(value: Any) -> str:
    """A setting as a config writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
