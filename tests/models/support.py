"""What runs fast for which family, found by running it: `python -m tests.models.support` writes docs/models.json and
from it the table of docs/models.md, in English and in Chinese.

A cell is a model of the family with the feature, stock and fast, both against float64. "fast": every layer was, and no
number was worse than stock's. Else the reason why it ran stock. A wrong number is an AssertionError, and no table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model

from pyralis.models.families import FAMILIES
from pyralis.models.load import ModelSettings, load_model
from pyralis.models.surgery import accelerate, report
from pyralis.verify.batches import LAYOUTS, Example, Layout, make_batches
from pyralis.verify.measure import measure_fast, measure_stock, measure_truth
from tests.models.fast_models import fill_lora
from tests.models.test_parity import EVERY
from tests.models.test_parity_half import errors
from tests.tiny import VARIANTS, build_tiny_model, make_tiny_model

ROOT = Path(__file__).parents[2]
FACTS = ROOT / "docs/models.json"
CHINESE = {  # of the table's words; names are the same in both languages
    "fast": "快速",
    "stock": "原版",
    "full": "全参数",
    "left padding": "左侧填充",
    "packed": "打包",
    "windows": "滑动窗口",
    "q/k norms": "q、k 归一化",
    "biases": "偏置",
    "RoPE scaling": "RoPE 缩放",
}
PAGES: dict[Path, Mapping[str, str]] = {ROOT / "docs/models.md": {}, ROOT / "docs/zh/models.md": CHINESE}
BEGIN, END = "<!-- support -->", "<!-- /support -->"
ALL = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite")
TITLES = dict(zip(ALL, (family.name for family in FAMILIES), strict=True))
IDS = torch.randint(4, 300, (5, 24), generator=torch.Generator().manual_seed(5)).tolist()
BATCHES = dict(
    zip(LAYOUTS, make_batches([Example(ids, [-100] * 3 + ids[3:]) for ids in IDS], 2, 24, torch.device("cpu")))
)
LINEAR: dict[str, Any] = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}


@dataclass(frozen=True)
class Feature:
    """A column. configs: the families that have it, with fields of the config that bring it out; None: all, as is."""

    mode: Literal["lora", "qlora", "full"] = "lora"
    dtype: torch.dtype = torch.float32
    layout: Layout = "right"
    lora: Mapping[str, Any] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] | None = None


FEATURES: dict[str, Feature] = {
    "LoRA": Feature(),
    "QLoRA": Feature("qlora"),
    "full": Feature("full"),
    "DoRA": Feature(lora={"use_dora": True}),
    "QDoRA": Feature("qlora", lora={"use_dora": True}),
    "rsLoRA": Feature(lora={"use_rslora": True}),
    "left padding": Feature(layout="left"),
    "packed": Feature(layout="packed"),
    "bfloat16": Feature(dtype=torch.bfloat16),
    "float16": Feature(dtype=torch.float16),
    "windows": Feature(
        configs={
            "mistral": VARIANTS["mistral-window"][1],
            "qwen2": VARIANTS["qwen2-windows"][1],
            "qwen3": VARIANTS["qwen3-windows"][1],
            "gemma2": VARIANTS["gemma2-window"][1],
            "gemma3_text": {"sliding_window": 8},
            "phi3": VARIANTS["phi3-window"][1],
        }
    ),
    "softcaps": Feature(configs={"gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}}),
    "q/k norms": Feature(configs={"qwen3": {}, "gemma3_text": {}}),
    "biases": Feature(
        configs={
            "llama": VARIANTS["llama-biases"][1],
            "qwen2": {},
            **{name: {"attention_bias": True} for name in ("qwen3", "gemma", "gemma2", "gemma3_text")},
            "granite": {"attention_bias": True, "mlp_bias": True},
        }
    ),
    "RoPE scaling": Feature(
        configs={
            "llama": VARIANTS["llama-llama3-rope"][1],
            **dict.fromkeys(("mistral", "gemma", "gemma2", "granite"), LINEAR),
            **dict.fromkeys(("qwen2", "qwen3"), VARIANTS["llama-yarn-rope"][1]),
            "phi3": VARIANTS["phi3-longrope"][1],
        }
    ),
}


def cells() -> list[tuple[str, str]]:
    """(family, feature) of all that there are."""
    return [(name, title) for name in ALL for title, f in FEATURES.items() if f.configs is None or name in f.configs]


def run(name: str, title: str) -> str:
    """ "fast", or why some layer ran stock."""
    feature = FEATURES[title]
    inputs = BATCHES[feature.layout]
    with TemporaryDirectory() as folder:
        model = _build(name, feature, Path(folder))
    truth, stock = measure_truth(model, inputs), measure_stock(model, inputs, feature.dtype)
    accelerate(model, families=EVERY)
    fast = measure_fast(model, inputs, feature.dtype)
    floor = 1e-5 if feature.dtype == torch.float32 else 0.0
    got, allowed = errors(fast, truth), errors(stock, truth)
    assert all(a <= max(1.5 * b, floor) for a, b in zip(got, allowed)), (name, title, got, allowed)
    reasons = sorted({layer.reason.partition(" has ")[2] or layer.reason for layer in report(model).layers} - {""})
    return "; ".join(reasons) or "fast"


def _build(name: str, feature: Feature, folder: Path) -> Any:
    fields = {} if feature.configs is None else dict(feature.configs[name])
    if feature.mode == "full":
        return build_tiny_model(name, **fields).train()
    if feature.mode == "qlora":
        make_tiny_model(folder, name, **fields)
        settings = ModelSettings(str(folder), train_mode="qlora")
        model: Any = load_model(settings, device=torch.device("cpu"), dtype=feature.dtype).model
    else:
        model = build_tiny_model(name, **fields).to(feature.dtype)
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, **feature.lora))
    fill_lora(tuned)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return tuned.train()


def render(facts: Mapping[str, Mapping[str, str]], words: Mapping[str, str]) -> str:
    """The table: a row a feature, a column a family, reasons below (as the program gives them, in English)."""

    def say(word: str) -> str:
        return words.get(word, word)

    lines = ["| | " + " | ".join(TITLES[name] for name in ALL) + " |", "|---|" + "---|" * len(ALL)]
    reasons: list[str] = []
    for title in FEATURES:
        row = []
        for name in ALL:
            found = facts[name].get(title, "")
            if found not in ("", "fast") and found not in reasons:
                reasons.append(found)
            known = {"": "", "fast": say("fast")}
            row.append(known[found] if found in known else f"{say('stock')} ({reasons.index(found) + 1})")
        lines.append(f"| {say(title)} | " + " | ".join(row) + " |")
    notes = [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def page_with(table: str, page: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main() -> None:
    facts: dict[str, dict[str, str]] = {name: {} for name in ALL}
    for name, title in cells():
        facts[name][title] = run(name, title)
    FACTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for page, words in PAGES.items():
        page.write_text(page_with(render(facts, words), page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
