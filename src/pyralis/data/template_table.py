"""The named templates as Markdown, for docs/templates.md: `python -m pyralis.data.template_table`."""

from __future__ import annotations

from pyralis.data.named_templates import TEMPLATES, TemplateSpec

_SHORT_TEXT = 40


def template_table() -> str:
    """One block a template, templates of the same form together."""
    groups: dict[tuple[str, ...], list[TemplateSpec]] = {}
    for spec in TEMPLATES.values():
        groups.setdefault((*_forms(spec).values(), spec.differs), []).append(spec)
    return "\n".join(_block(specs) for specs in groups.values())


def _forms(spec: TemplateSpec) -> dict[str, str]:
    where = "system text, inside the first user message" if spec.system_inside_user else "system"
    answer = spec.answer + (spec.stop or "{eos}")
    forms = {
        "begins with": spec.bos,
        where: spec.system,
        "user": spec.user,
        "between turns": spec.between,
        "generation prompt": spec.header,
        "answer, learnt": answer,
        "behind it": spec.after,
    }
    return {name: form for name, form in forms.items() if form}


def _block(specs: list[TemplateSpec]) -> str:
    lines = ["### " + ", ".join(f"`{spec.name}`" for spec in specs), "", "| part | text |", "|---|---|"]
    lines += [f"| {name} | {_code(form)} |" for name, form in _forms(specs[0]).items()]
    for text in dict.fromkeys(spec.default_system for spec in specs if spec.default_system):
        short = text if len(text) <= _SHORT_TEXT else text[:_SHORT_TEXT] + "..."
        whose = ", ".join(spec.name for spec in specs if spec.default_system == text)
        lines.append(f"| default system text of {whose} | {_code(short)} |")
    if specs[0].differs:
        lines += ["", f"Other than in Firefly: {specs[0].differs}."]
    return "\n".join([*lines, ""])


def _code(text: str) -> str:
    """Text as inline code in a table: line breaks as \\n, bars escaped; double backticks keep spaces at the ends."""
    return "`` " + text.replace("\n", "\\n").replace("|", "\\|") + " ``"


if __name__ == "__main__":
    print(template_table())
