"""Model FLOPs utilisation: what is counted, and which GPUs have a known peak."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pyralis.memory.gpus import GIB, known_gpu
from pyralis.train.report.mfu import flops_per_token, mfu_of
from tests.tiny import make_tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_each_weight_counts_by_what_is_computed_with_it(tied: bool, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "m", tie_word_embeddings=tied))
    embedding = model.get_input_embeddings().weight.numel()
    products = sum(p.numel() for p in model.parameters()) - (0 if tied else embedding)
    assert flops_per_token(model) == 6 * products

    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapters = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    assert flops_per_token(peft) == 4 * products + 6 * adapters


def test_a_copy_that_is_trained_stands_for_its_original(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "m", tie_word_embeddings=False))
    whole = flops_per_token(model)
    assert whole is not None
    head = model.get_output_embeddings().weight.numel()
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    peft = get_peft_model(model, settings)
    adapters = sum(p.numel() for name, p in peft.named_parameters() if "lora_" in name)
    assert flops_per_token(peft) == whole * 4 / 6 + 2 * head + 6 * adapters


def test_there_is_none_without_a_known_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "m"))
    assert mfu_of(model, torch.device("cpu"), torch.bfloat16, 1) is None
    assert mfu_of(model, torch.device("cuda"), torch.float32, 1) is None

    class Properties:
        name, total_memory = "NVIDIA H100 80GB HBM3", int(79.2 * GIB)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    mfu, flops = mfu_of(model, torch.device("cuda"), torch.bfloat16, 2), flops_per_token(model)
    assert mfu is not None
    assert flops is not None
    assert mfu(1e6) == pytest.approx(1e6 * flops / (2 * 989e12))
    model.config.num_experts = 8
    assert mfu_of(model, torch.device("cuda"), torch.bfloat16, 1) is None


@pytest.mark.parametrize(
    ("name", "memory", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "H100"),
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
        ("Tesla T4", 14.7, "T4"),
        ("Tesla V100-SXM2-16GB", 15.8, "V100-16GB"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX 4090"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.7, "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 3060", 11.8, "RTX 3060 12GB"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "RTX 6000 Ada"),
        ("NVIDIA L40S", 44.5, "L40S"),
        ("NVIDIA L40", 44.5, None),
        ("NVIDIA A10G", 22.0, None),
        ("NVIDIA H100 PCIe", 79.2, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA GeForce RTX 3080 Ti", 11.8, None),
        ("NVIDIA GeForce RTX 4060 Ti", 7.7, None),
        ("", 8.0, None),
    ],
)
def test_gpus_by_their_drivers_names(name: str, memory: float, known: str | None) -> None:
    gpu = known_gpu(name, int(memory * GIB))
    assert (gpu.name if gpu else None) == known
