"""TRL's own trainers on a fast model: the same losses as on a stock one. They replace the causal LM's forward, call the
decoder themselves, cast adapters, pack without padding and switch adapters off for DPO's reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig

from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.surgery import accelerate, report
from tests.tiny import build_tiny_model, make_tiny_tokenizer

pytestmark = pytest.mark.full
trl = pytest.importorskip("trl")

LORA = LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"])
CHATS = [
    {"messages": [{"role": "user", "content": f"q{i}" * 5}, {"role": "assistant", "content": f"a{i}" * (3 + i)}]}
    for i in range(8)
]
COMPLETIONS = [{"prompt": f"hello {i} " * (1 + i % 2), "completion": " good" * (1 + i % 3)} for i in range(8)]
PREFERENCES = [
    {"prompt": f"hello {i}", "chosen": " good" * (1 + i % 3), "rejected": " bad" * (1 + i % 4)} for i in range(8)
]
JUDGED = [row | {"label": i % 3 > 0} for i, row in enumerate(COMPLETIONS)]
ROWS: dict[str, list[dict[str, Any]]] = {"SFT": CHATS, "DPO": PREFERENCES, "KTO": JUDGED}


def losses(kind: str, accelerated: bool, folder: Path, rows: Any = None, **settings: Any) -> list[float]:
    model = build_tiny_model()
    if accelerated:
        assert accelerate(model, families=[family.name for family in SERVED]).fast_layers == 2
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False,
        logging_steps=1, learning_rate=1e-2, save_strategy="no", disable_tqdm=True, **{"max_length": 64} | settings,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows or ROWS[kind]),
        processing_class=make_tiny_tokenizer(),
        peft_config=copy.deepcopy(LORA),
    )
    trainer.train()
    if accelerated:
        assert report(model).fast_layers == 2, report(model).lines
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("SFT", {"packing": False, "gradient_checkpointing": False}),
        ("SFT", {"packing": True, "gradient_checkpointing": True}),
        ("SFT", {"padding_free": True, "max_length": None}),
        ("SFT", {"rows": COMPLETIONS, "gradient_accumulation_steps": 2}),
        ("SFT", {"rows": COMPLETIONS, "neftune_noise_alpha": 5, "label_smoothing_factor": 0.1}),
        ("DPO", {}),
        ("DPO", {"loss_type": ["ipo"], "padding_free": True}),
        ("KTO", {}),
    ],
    ids=str,
)
def test_losses_are_those_of_stock(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    stock = losses(kind, False, tmp_path / "stock", **settings)
    assert losses(kind, True, tmp_path / "fast", **settings) == pytest.approx(stock, rel=1e-5)
    assert len(set(stock)) == 3
