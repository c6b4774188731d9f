"""The flat AdamW in the place of Trainer's: taken where the arithmetic is the same, left alone elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from pyralis.engine.optimizer import FlatAdamW
from pyralis.models.causal_lm import causal_lm_loss
from pyralis.models.surgery import accelerate, report
from pyralis.train import lean
from pyralis.train.flat_optimizer import flat_adamw, flat_optimizer
from tests.tiny import build_tiny_model
from tests.train.test_lean import history, lora_model, make


def groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": trained[:5], "weight_decay": 0.1}, {"params": trained[5:], "lr": 3e-3}, {"params": []}]


OPTIMIZERS = {
    "torch": torch.optim.AdamW,
    "torch fused": partial(torch.optim.AdamW, fused=True),
    "bitsandbytes": bitsandbytes.optim.AdamW,
    "paged": bitsandbytes.optim.PagedAdamW32bit,
    "8 bit": bitsandbytes.optim.AdamW8bit,
    "paged, 8 bit": partial(bitsandbytes.optim.AdamW, optim_bits=8, is_paged=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_are_taken_over(name: str) -> None:
    model = lora_model()
    stock = OPTIMIZERS[name](groups(model), lr=2e-3, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.2)
    assert flat_optimizer(stock, model, 1.0) is stock, "on a CPU nothing is gained"
    flat = flat_optimizer(stock, model, 0.5, gpu_only=False)
    assert isinstance(flat, FlatAdamW)
    assert flat.max_norm == 0.5
    assert ("state1" in flat.state[flat.parameters[0]]) is ("8" in name)
    assert len(flat.parameters) == 28
    for ours, theirs in zip(flat.param_groups, stock.param_groups):
        assert all(ours[key] == theirs[key] for key in ("lr", "eps", "weight_decay"))
        assert tuple(ours["betas"]) == tuple(theirs["betas"])
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
    assert len({p.untyped_storage().data_ptr() for p in flat.parameters}) == 1


def half(model: nn.Module) -> nn.Module:
    trained = next(p for p in model.parameters() if p.requires_grad)
    trained.data = trained.data.bfloat16()
    return model


def with_embeddings() -> Any:
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    return get_peft_model(build_tiny_model(), lora)


CASES: dict[str, tuple[Any, Any]] = {
    "amsgrad": (lora_model, partial(torch.optim.AdamW, amsgrad=True)),
    "Adam": (lora_model, torch.optim.Adam),
    "SGD": (lora_model, torch.optim.SGD),
    "several dtypes": (lambda: half(lora_model()), torch.optim.AdamW),
    "full": (build_tiny_model, torch.optim.AdamW),
    "bias": (lambda: get_peft_model(build_tiny_model("qwen2"), LoraConfig(bias="all")), torch.optim.AdamW),
    "prompt tuning": (
        lambda: get_peft_model(build_tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        torch.optim.AdamW,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_others_stay(name: str) -> None:
    build, optimizer = CASES[name]
    model = build()
    made = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    assert flat_optimizer(made, model, 1.0, gpu_only=False) is made


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, bitsandbytes.optim.AdamW8bit])
def test_embeddings_keep_32_bits(optimizer: Any) -> None:
    model = with_embeddings()
    made = optimizer([p for p in model.parameters() if p.requires_grad])
    flat = flat_optimizer(made, model, 1.0, gpu_only=False)
    assert isinstance(flat, FlatAdamW)
    embedding = model.get_input_embeddings().modules_to_save["default"].weight
    state = flat.state[embedding]
    assert state["exp_avg" if optimizer is torch.optim.AdamW else "state1"].dtype == torch.float32


def test_whole_models_in_bfloat16_are_taken_anywhere() -> None:
    """In the order of the fused layers' products, which then lie where they did: in one buffer of all weights."""
    model = build_tiny_model().bfloat16()
    accelerate(model)
    made = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert flat_optimizer(made, model, 1.0, rounding="nearest") is made
    flat = flat_optimizer(made, model, 1.0)
    assert flat.state[model.lm_head.weight]["low_bits"].dtype == torch.int16
    layer = model.model.layers[1]
    attention = layer.self_attn
    k = attention.k_proj.weight
    assert attention.q_proj.weight.data_ptr() + 2 * attention.q_proj.weight.numel() == k.data_ptr()
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    assert report(model).fast_layers == 2
    ids = torch.arange(4, 20)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    views = {id(p): view for p, view in zip(flat.parameters, flat.grad_views)}
    assert k.grad.data_ptr() == views[id(k)].data_ptr()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.0, "weight_decay": 0.1}], ids=str)
def test_a_run_with_it(fast: bool, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, norms before clipping and weights as by torch's; a checkpoint goes on with either optimizer."""
    runs = []
    for flat in (False, True):
        monkeypatch.setattr(lean, "flat_optimizer", partial(flat_optimizer, gpu_only=not flat))
        model = lora_model()
        if fast:
            accelerate(model)
        folder = tmp_path / str(flat)
        trainer = make(lean.LeanTrainer, folder, model, max_steps=4, save_strategy="steps", save_steps=2, **settings)
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, FlatAdamW) is flat
        assert report(model).fast_layers == (2 if fast else 0)
        runs.append(trainer)
    stock, ours = runs
    for entry, expected in zip(history(ours), history(stock)):
        assert entry.keys() == expected.keys()
        for name, value in expected.items():
            assert entry[name] == pytest.approx(value, rel=1e-4), (name, entry)
    for a, b in zip(ours.model.parameters(), stock.model.parameters()):
        assert torch.allclose(a, b, rtol=0, atol=1e-4)  # a hundredth of a step: AdamW divides small gradients

    # monkeypatched still: the flat optimizer goes on from torch's checkpoint, and torch's from the flat one's
    for flat, folder in ((True, tmp_path / "False"), (False, tmp_path / "True")):
        monkeypatch.setattr(lean, "flat_optimizer", partial(flat_optimizer, gpu_only=not flat))
        resumed = make(lean.LeanTrainer, folder, lora_model(), max_steps=4, save_strategy="no", **settings)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert isinstance(resumed.optimizer.optimizer, FlatAdamW) is flat
        assert resumed.state.log_history[-2]["loss"] == pytest.approx(history(stock)[-2]["loss"], rel=1e-4)


def test_gradients_are_written_where_they_are_read() -> None:
    """Those of fused layers go straight into the optimizer's buffer, those of LoRA's A of q, k and v side by side."""
    model: Any = get_peft_model(build_tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear"))
    accelerate(model)
    optimizer = flat_adamw(model, [p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.arange(4, 44)[None]
    causal_lm_loss(model, {"input_ids": ids}, ids).backward()
    for parameter, view in zip(optimizer.parameters, optimizer.grad_views):
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() == view.data_ptr()
    attention = model.get_base_model().model.layers[1].self_attn
    places = [getattr(attention, f"{name}_proj").lora_A["default"].weight.grad.data_ptr() for name in "qkv"]
    assert places == [places[0] + i * 4 * 64 * 4 for i in range(3)]
