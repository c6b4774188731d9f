"""The tables of docs/config.md, made from the code.

`python -m pyralis.train.config.config_docs docs/config.md` renews them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from pyralis.train.config.field_types import describe_type
from pyralis.train.config.fields import TEMPLATE_NAMES, OwnFields
from pyralis.train.config.old_names import OLD_NAMES, OLD_VALUES
from pyralis.train.config.schema import default_text, explain
from pyralis.train.config.train_config import TrainConfig


def fields_table() -> str:
    """Markdown table of Pyralis's own fields."""
    lines = ["| field | default | takes | meaning | from |", "|---|---|---|---|---|"]
    for name in OwnFields.model_fields:
        field = TrainConfig.model_fields[name]
        takes = describe_type(field.annotation, field.metadata)
        cells = (f"`{name}`", default_text(field), takes, field.description or "", explain(name).origin)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def old_names_table() -> str:
    """Markdown table of the old and foreign names that are understood."""
    lines = ["| name | from | read as | why |", "|---|---|---|---|"]
    for name, old in OLD_NAMES.items():
        read_as = ", ".join(f"`{new}`" for new in old.new) or "-"
        lines.append(f"| `{name}` | {old.origin} | {read_as} | {old.why} |")
    for (name, value), new in OLD_VALUES.items():
        lines.append(f"| `{name}: {value}` | transformers 4 | `{name}: {new.new}` | {new.why} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "fields": fields_table,
    "old names": old_names_table,
    "templates": lambda: ", ".join(f"`{name}`" for name in TEMPLATE_NAMES),
}


def renew(text: str) -> str:
    """The page with every table between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page lacks {start} ... {end}")
        text = f"{before}{start}\n{make()}\n{end}{after}"
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(renew(page.read_text(encoding="utf-8")), encoding="utf-8")
