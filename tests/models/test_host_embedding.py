"""The embedding in host memory: what forbids it anywhere, and on a GPU the same model with less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pyralis.errors import ModelError
from pyralis.memory.shape import describe_model
from pyralis.models.causal_lm import causal_lm_loss
from pyralis.models.host_embedding import embedding_on_host, embedding_to_host
from pyralis.models.surgery import accelerate, decoder_layers
from pyralis.ops._triton import Gpu
from tests.tiny import build_tiny_model

IDS = torch.arange(4, 68).view(2, 32)


def build(device: str = "cpu", **config: Any) -> Any:
    model = build_tiny_model(tie_word_embeddings=config.pop("tie", False), **config).to(device)
    torch.manual_seed(0)  # of LoRA's B
    tuned = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    accelerate(tuned)
    return tuned.train()


def test_what_forbids_it() -> None:
    with pytest.raises(ModelError, match="is trained"):
        embedding_to_host(build_tiny_model(tie_word_embeddings=False))
    with pytest.raises(ModelError, match="tied"):
        embedding_to_host(build(tie=True).get_base_model())
    model = get_peft_model(
        build_tiny_model(tie_word_embeddings=False), LoraConfig(r=4, modules_to_save=["embed_tokens"])
    )
    with pytest.raises(ModelError, match="ModulesToSaveWrapper"):
        embedding_to_host(model.get_base_model())


def test_without_a_gpu_it_stays() -> None:
    base = build().get_base_model()
    before = base.get_input_embeddings().weight.data_ptr()
    assert embedding_to_host(base) == 0
    assert not embedding_on_host(base)
    assert base.get_input_embeddings().weight.data_ptr() == before


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_step_in_less_memory(family: str, dtype: torch.dtype) -> None:
    ids = IDS.cuda()
    results = []
    for on_host in (False, True):
        model = build("cuda", family=family, vocab_size=32_000)
        base = model.get_base_model()
        for p in base.parameters():
            if not p.requires_grad:
                p.data = p.data.to(dtype)
        table = base.get_input_embeddings().weight
        size, before = table.nbytes, table.detach().clone()
        allocated = torch.cuda.memory_allocated()
        described = describe_model(base, decoder_layers(model), Gpu((8, 0), 2)).outside
        if on_host:
            assert embedding_to_host(base) == size
            assert embedding_to_host(base) == 0
            assert torch.cuda.memory_allocated() == allocated - size
            assert describe_model(base, decoder_layers(model), Gpu((8, 0), 2)).outside == described - size
            assert base.device.type == "cuda"
            assert torch.equal(base.state_dict()["model.embed_tokens.weight"], before)
        loss = causal_lm_loss(model, {"input_ids": ids}, ids)
        loss.backward()
        results.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert torch.equal(results[1][1][name], gradient), name
