"""README.md of a result: what it is, how it was trained, how to use it. PEFT's own is a form with empty fields."""

from __future__ import annotations

import json
from pathlib import PurePath

from pyralis import __version__
from pyralis.train.report.format import loss_text, percent_text
from pyralis.train.report.panel import StartupInfo
from pyralis.train.report.summary import RunSummary

TASKS = {"sft": "supervised fine-tuning", "pretrain": "continued pretraining", "dpo": "preference training (DPO)"}

_LOADING = """from {package} import {model_class}
from transformers import AutoTokenizer

model = {model_class}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""


def model_card(info: StartupInfo, summary: RunSummary) -> str:
    """Markdown with a hub's front matter. A base model on this machine is named without its path, and no data file is
    named: the card goes wherever the result goes."""
    adapter = info.mode != "full"
    local = PurePath(info.model).is_absolute() or info.model.startswith((".", "~")) or info.model.count("/") > 1
    base = PurePath(info.model).name if local else info.model
    front = {
        **({} if local else {"base_model": base}),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pyralis", info.task, *(["lora"] if adapter else [])],
    }
    lines = ["---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items()), "---", ""]
    kind = "A LoRA adapter of" if adapter else "A model trained from"
    lines += [f"# {info.output_dir.name}", "", f"{kind} {base}, by Pyralis {__version__}.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _facts(info, summary)]
    lines += ["", "## Use", "", "```bash", "pyralis chat FOLDER", "```", "", "```python"]
    package, model_class = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    lines += [_LOADING.format(package=package, model_class=model_class), "```", ""]
    lines += [
        "The chat template of the training is in the tokenizer's files, the whole config in `pyralis_config.json`."
    ]
    lines += ["The licences of the base model and of the data hold.", ""]
    return "\n".join(lines)


def _facts(info: StartupInfo, summary: RunSummary) -> list[tuple[str, str]]:
    rows = info.micro_batch_size * info.grad_accum_steps * info.world_size
    length = f" of up to {info.max_seq_length:,} tokens" if info.max_seq_length else ""
    facts = [("task", TASKS.get(info.task, info.task)), ("method", f"{info.mode}, {info.dtype}")]
    for data in info.data:
        learnt = percent_text(data.supervised_tokens / max(data.tokens, 1))
        facts.append((f"{data.name} data", f"{data.rows:,} rows, {data.tokens:,} tokens, {learnt} of them learnt"))
    facts += [
        ("steps", f"{summary.steps:,}, with {rows:,} rows each{length}"),
        ("optimizer", f"{info.optimizer}, learning rate {info.learning_rate:.3g}, {info.schedule}"),
        ("loss", f"{loss_text(summary.first_loss)} at first, {loss_text(summary.last_loss)} at last"),
    ]
    if summary.last_eval_loss is not None:
        facts.append(("evaluation loss", loss_text(summary.last_eval_loss)))
    return facts
