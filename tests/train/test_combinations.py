"""Fields together: each run learns what stock transformers and PEFT would from the same batches, every text alone.

The reference has no padding, packing, fused layer, checkpointing or micro-batches: a step is the sum over the texts of
its micro-batches, one forward each, over their supervised tokens; clipped; AdamW. Then the result is loaded by stock
PEFT, merged, and opened for chat: the same logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from pyralis.export.merge import merge_adapter
from pyralis.serve.load import ChatModelSettings, load_chat
from pyralis.train.report.metrics import StepMetrics, read_metrics
from pyralis.train.trainer import PyralisTrainer
from tests.tiny import make_tiny_model
from tests.train.runs import run

RATE, STEPS = 1e-2, 3
FIELDS = ("input_ids", "labels", "attention_mask", "position_ids")
LINEAR = ["q_proj", "v_proj", "down_proj"]
PACKED = {"packing": True, "max_seq_length": 300, "gradient_accumulation_steps": 2}
PRETRAIN = {"task_type": "pretrain", "max_seq_length": 64}
EVALUATED = {
    "eval_split": 0.25, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1,
    "load_best_model_at_end": True,
}  # fmt: skip
BACKWARD = {"train_mode": "full", "optimizer_in_bwd": True, "max_grad_norm": 0.0}


@dataclass(frozen=True)
class Case:
    family: str = "llama"
    lora: dict[str, Any] = field(default_factory=dict)  # of PEFT's LoraConfig
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)  # of the model's config


FAST = {
    "DoRA, packed, every layer recomputed": Case(
        "qwen3", {"use_dora": True}, PACKED | {"gradient_checkpointing": "full"}
    ),
    "embedding and head whole, at their own rate": Case(
        lora={"modules_to_save": ["embed_tokens", "lm_head"]},
        config={"embedding_learning_rate": 1e-3, "gradient_accumulation_steps": 3, "optim": "adamw_8bit"},
    ),
    "full, in the backward, tied": Case(config=BACKWARD, model={"tie_word_embeddings": True}),
    "a stream of weighted sources": Case(
        "gemma3_text", {"use_rslora": True}, PRETRAIN | {"streaming": True, "source_weights": [0.7, 0.3]}
    ),
    "groups of like lengths, smoothed labels": Case(
        "phi3", {"target_modules": ["qkv_proj", "down_proj"]},
        {"train_sampling_strategy": "group_by_length", "label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    ),
}  # fmt: skip
SLOWER = {
    "DoRA with a head, evaluated, the best kept": Case(
        lora={"use_dora": True, "modules_to_save": ["lm_head"]}, config=EVALUATED
    ),
    "full, packed, its own rate": Case(
        "gemma2", config=PACKED | {"train_mode": "full", "embedding_learning_rate": 1e-3, "optim": "paged_adamw_32bit"}
    ),
    "full, in the backward, packed, recomputed": Case(
        "qwen2", config=BACKWARD | {"packing": True, "max_seq_length": 300, "gradient_checkpointing": "full"}
    ),
    "biases, rows split": Case("qwen2", {"bias": "all"}, {"on_overlong": "split", "max_seq_length": 48}),
    "smoothed, packed, evaluated": Case(
        "granite", {"use_dora": True}, PACKED | EVALUATED | {"label_smoothing_factor": 0.2}
    ),
    "windows, packed": Case("mistral", {}, PACKED, {"sliding_window": 16}),
    "a model without a fast path, packed": Case(
        "gpt2", {"target_modules": ["c_attn", "c_proj"]}, PACKED,
        dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
    ),
    "documents in batches with padding": Case(
        "qwen3", {"modules_to_save": ["embed_tokens"]}, PRETRAIN | {"packing": False, "gradient_accumulation_steps": 2}
    ),
    "asked while it learns": Case(
        lora={"use_dora": True}, config={"sample_prompts": ["Say red", "再说"], "sample_max_new_tokens": 4}
    ),
}  # fmt: skip
CASES = [pytest.param(case, id=name) for name, case in FAST.items()]
CASES += [pytest.param(case, id=name, marks=pytest.mark.full) for name, case in SLOWER.items()]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Every micro-batch that is trained on, as it was collated."""
    seen: list[dict[str, Tensor]] = []
    original = PyralisTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *arguments: Any, **others: Any) -> Any:
        if model.training:
            seen.append({name: inputs[name].clone() for name in FIELDS if name in inputs})
        return original(self, model, inputs, *arguments, **others)

    monkeypatch.setattr(PyralisTrainer, "compute_loss", compute_loss)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_it_learns_what_stock_libraries_would(
    case: Case, chats: Path, documents: Path, tmp_path: Path, batches: list[dict[str, Tensor]]
) -> None:
    model = make_tiny_model(tmp_path / "model", case.family, **case.model)
    config = {"logging_steps": 1, "max_steps": STEPS, "learning_rate": RATE, "weight_decay": 0.0} | case.config
    if config.get("source_weights"):
        config["train_file"] = [str(documents / "a.jsonl"), str(documents / "b.jsonl")]
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if config.get("train_mode") != "full":
        lora = LoraConfig(
            **{"r": 4, "target_modules": LINEAR, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | case.lora
        )
        reference = get_peft_model(reference, lora)
        reference.save_pretrained(tmp_path / "start")
        config["load_adapter"] = str(tmp_path / "start")
    data = documents if config.get("task_type") == "pretrain" else chats
    run(model, data, tmp_path / "out", **config)

    logged = [m.loss for m in read_metrics(tmp_path / "out" / "metrics.jsonl") if isinstance(m, StepMetrics)]
    assert len(logged) == STEPS
    torch.testing.assert_close(logged, list(stock_losses(reference, batches, config)), rtol=1e-5, atol=1e-5)
    if "eval_split" not in config:  # else the best may not be the last
        check_result(tmp_path / "out", model, reference, tmp_path / "merged")


def stock_losses(model: Any, batches: list[dict[str, Tensor]], config: dict[str, Any]) -> Iterator[float]:
    """The loss of each step, after which the model has taken it."""
    model.train()
    whole = config.get("embedding_learning_rate", RATE)
    groups: dict[float, list[Tensor]] = {RATE: [], whole: []}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            groups[whole if "embed_tokens" in name or "lm_head" in name else RATE].append(weight)
    optimizer = torch.optim.AdamW([{"params": g, "lr": rate} for rate, g in groups.items()], weight_decay=0.0)
    smoothing, size = config.get("label_smoothing_factor", 0.0), config.get("gradient_accumulation_steps", 1)
    for at in range(0, len(batches), size):
        texts = [text for batch in batches[at : at + size] for text in texts_of(batch)]
        loss = sum(loss_sum(model, *text, smoothing) for text in texts)
        loss = loss / sum(int((labels[1:] != -100).sum()) for _, labels in texts)
        loss.backward()
        if limit := config.get("max_grad_norm", 1.0):
            torch.nn.utils.clip_grad_norm_([p for g in groups.values() for p in g], limit)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def texts_of(batch: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids [S], labels [S]) of each text in a batch, padded or packed."""
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"])):
        if "position_ids" in batch:
            starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], len(ids)]):
                yield ids[start:end], labels[start:end]
        else:
            real = batch["attention_mask"][row].bool()
            yield ids[real], labels[real]


def loss_sum(model: Any, ids: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    scores = log_softmax(model(ids[None]).logits[0, :-1].float(), -1)
    learnt = labels[1:] != -100
    scores, labels = scores[learnt], labels[1:][learnt]
    right = -scores.gather(-1, labels[:, None]).sum()
    return (1 - smoothing) * right - smoothing * scores.mean(-1).sum()


@torch.no_grad()
def check_result(out: Path, base: Path, reference: Any, merged: Path) -> None:
    """Stock libraries, a merged folder and chat compute what the run came to, which is what the reference did."""
    ids = torch.arange(4, 44).view(2, 20)
    expected = reference.eval()(ids).logits
    stock: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if (out / "adapter_config.json").is_file():
        stock = PeftModel.from_pretrained(stock, out)
        opened = [AutoModelForCausalLM.from_pretrained(merge_adapter(out, merged), dtype=torch.float32)]
    else:
        stock, opened = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), []
    loaded = stock.eval()(ids).logits
    assert (loaded - expected).norm() < 2e-2 * expected.norm()  # AdamW makes much of the last bit of small gradients
    opened.append(load_chat(ChatModelSettings(str(out), dtype="float32")).model)
    for other in opened:
        torch.testing.assert_close(other.eval()(ids).logits, loaded, rtol=1e-4, atol=1e-4)
