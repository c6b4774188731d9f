"""A fast model computes what the stock one does, however it is called and whatever hangs on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from pyralis.models.load import ModelSettings, load_model
from pyralis.models.surgery import accelerate, report, restore
from tests.models.fast_models import (
    CLOSE,
    EVERY,
    IDS,
    Block,
    fast,
    give_lora,
    logits,
    reasons,
    same_step,
)
from tests.models.spec_block import CountedFused, block_in_place
from tests.tiny import build_tiny_model, build_tiny_variant, make_tiny_model


def test_hidden_states_and_attentions(block: Block) -> None:
    stock, model = build_tiny_model("qwen3"), fast(build_tiny_model("qwen3"))
    expected = stock(IDS, use_cache=False, output_hidden_states=True).hidden_states
    found = model(IDS, use_cache=False, output_hidden_states=True).hidden_states
    assert (len(found), block.calls) == (3, 2)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, **CLOSE)
    logits(model)  # transformers has put hooks on the attention modules for good
    assert block.calls == 4
    model.set_attn_implementation("eager")
    stock.set_attn_implementation("eager")
    maps = model(IDS, use_cache=False, output_attentions=True).attentions
    assert block.calls == 4
    assert reasons(model) == ["attention maps are asked for, which the fast path never has"] * 2
    torch.testing.assert_close(maps[1], stock(IDS, use_cache=False, output_attentions=True).attentions[1], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gemma3_text", "phi3"])
def test_generation(name: str, block: Block) -> None:
    stock, model = build_tiny_variant(name), fast(build_tiny_variant(name))
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(IDS, attention_mask=mask, **options), stock.generate(IDS, attention_mask=mask, **options)
    )
    assert block.calls == 0
    assert reasons(model) == ["a KV cache is in use"] * 2


def test_a_cache_is_returned_when_asked_for(block: Block) -> None:
    model = fast(build_tiny_model())
    assert model(IDS).past_key_values is not None  # the config's use_cache, in eval mode
    model.train()
    assert model(IDS, use_cache=True).past_key_values is not None
    assert block.calls == 0
    assert model(IDS).past_key_values is None  # training: nobody could read it
    assert block.calls == 2


def test_hooks_of_a_layer_are_called(block: Block) -> None:
    model = fast(build_tiny_model())
    seen: list[str] = []
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    logits(model).sum().backward()
    assert seen == ["forward", "backward"]
    assert block.calls == 2


def test_hooks_inside_a_layer_force_it_stock(block: Block) -> None:
    model, stock = fast(build_tiny_model()), build_tiny_model()
    seen: list[int] = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0  # the stock layer needs the mask that the fast one does without
    found = logits(model, attention_mask=mask)
    torch.testing.assert_close(found[:, 6:], logits(stock, attention_mask=mask)[:, 6:], **CLOSE)
    assert (seen, block.calls) == ([1], 1)
    assert reasons(model) == ["mlp.up_proj has hooks, which would not be called", ""]
    assert report(model).lines[1] == "1 of 2 layers fast"
    handle.remove()
    logits(model)
    assert block.calls == 3
    assert report(model).fast_layers == 2
    model.model.layers[0].self_attn.register_full_backward_hook(lambda *_: None)
    logits(model)
    assert reasons(model)[0] == "self_attn has hooks, which would not be called"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, block: Block) -> None:
    stock, model = build_tiny_model().train(), fast(build_tiny_model()).train()
    for m in (stock, model):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        m.enable_input_require_grads()
        logits(m).square().mean().backward()
    assert (block.calls, block.recomputed) == (2, 2)  # the block keeps little by itself; torch recomputes nothing
    for (name, a), b in zip(model.named_parameters(), stock.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    model.eval()
    logits(model)
    assert block.recomputed == 2
    model.train().gradient_checkpointing_disable()
    logits(model)
    assert block.recomputed == 2


def test_gradient_checkpointing_of_a_layer_that_runs_stock(block: Block) -> None:
    model, stock = fast(build_tiny_model()).train(), build_tiny_model().train()
    seen: list[int] = []
    for m in (stock, model):
        m.gradient_checkpointing_enable({"use_reentrant": False})
        m.model.layers[0].mlp.register_forward_pre_hook(lambda *_, m=m: seen.append(m is model))
        m(IDS).logits.square().mean().backward()
    assert seen.count(True) == seen.count(False) == 2  # once more in the backward
    assert block.calls == 1
    for a, b in zip(model.parameters(), stock.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_a_layer_called_by_hand_runs_stock(block: Block) -> None:
    model = fast(build_tiny_model())
    hidden = torch.randn(1, 5, 64)
    angles = model.model.rotary_emb(hidden, torch.arange(5)[None])
    found = model.model.layers[0](hidden, position_embeddings=angles)
    restore(model)
    assert torch.equal(found, model.model.layers[0](hidden, position_embeddings=angles))
    assert block.calls == 0


def test_ways_to_call(block: Block) -> None:
    model = fast(build_tiny_model())
    expected = logits(model)
    mask = torch.ones_like(IDS)
    assert torch.equal(model(IDS, mask, use_cache=False).logits, expected)
    assert torch.equal(model.model(IDS, mask, use_cache=False)[0], model.model(input_ids=IDS, use_cache=False)[0])
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeds, use_cache=False).logits, expected)
    assert torch.equal(model(IDS, use_cache=False, return_dict=False)[0], expected)
    assert torch.equal(logits(model, attention_mask=mask, padding_side="right"), expected)
    assert block.calls == 14
    torch.testing.assert_close(logits(model, something=1), expected, **CLOSE)
    assert reasons(model)[0] == "the argument something is not understood"
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(use_cache=False)


def test_masks_that_are_not_understood_run_stock(block: Block) -> None:
    model, stock = fast(build_tiny_model()), build_tiny_model()
    mask = torch.ones_like(IDS)
    mask[0, 5] = 0
    assert torch.equal(logits(model, attention_mask=mask), logits(stock, attention_mask=mask))
    assert reasons(model)[0] == "a mask with padding on both sides, or with holes"
    square = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    assert torch.equal(logits(model, attention_mask=square), logits(stock, attention_mask=square))
    assert reasons(model)[0] == "an attention mask of its own making"


def test_torch_compile_traces_stock_layers(block: Block) -> None:
    model = fast(build_tiny_model())
    expected = logits(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected, **CLOSE)
    assert block.calls == 2


@pytest.mark.parametrize("lora", [True, False])
def test_training(lora: bool, block: Block) -> None:
    """Steps, accumulation, gradients set to None and to zero, weights loaded and replaced in between."""
    model, stock = (give_lora(build_tiny_model()) if lora else build_tiny_model() for _ in range(2))
    fast(model)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2) for m in (model, stock)]
    for number in range(4):
        same_step(model, stock)
        if number % 2:  # every other step is made of two
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=number == 1)
    state = {name: tensor + 0.01 for name, tensor in stock.state_dict().items()}
    for m in (model, stock):
        m.zero_grad()
        m.load_state_dict(state)
    same_step(model, stock)
    for m in (model, stock):
        m.zero_grad()
        for parameter in m.parameters():
            parameter.data = 0.9 * parameter.data  # as a merge does: views into a buffer are lost
    same_step(model, stock)
    assert report(model).fast_layers == 2


def test_inference_first(block: Block) -> None:
    model, stock = fast(give_lora(build_tiny_model())), give_lora(build_tiny_model())
    for m in (model, stock):
        with torch.inference_mode():
            logits(m)
        with torch.no_grad():
            logits(m)
    same_step(model, stock)
    assert report(model).fast_layers == 2


def test_replicas_of_data_parallel_run_stock(block: Block) -> None:
    model = fast(build_tiny_model())
    model.model._is_replica = True
    logits(model)
    assert block.calls == 0
    assert reasons(model)[0].startswith("a replica of nn.DataParallel")


class TestWhatTheFusedBlockDoesNotServe:
    """Runs stock, with the reason."""

    @pytest.fixture(autouse=True)
    def fused(self) -> Iterator[None]:
        with block_in_place(CountedFused()):
            yield

    def check(self, model: Any, expected: str, layers: int = 2) -> None:
        logits(model).square().mean().backward()
        assert [expected in reason for reason in reasons(model)] == [True] * layers + [False] * (2 - layers)

    def test_hooks_on_gradients(self) -> None:
        model = fast(give_lora(build_tiny_model()))
        seen: list[int] = []
        parameter = model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
        for register in (parameter.register_hook, parameter.register_post_accumulate_grad_hook):
            handle = register(lambda _: seen.append(1))
            self.check(model, "a trained parameter has hooks on its gradient", layers=1)
            handle.remove()
        assert seen == [1, 1]
        logits(model)
        assert report(model).fast_layers == 2

    def test_autocast_over_other_four_bit_layers(self, tmp_path: Path) -> None:
        folder = make_tiny_model(tmp_path)
        model = load_model(ModelSettings(str(folder), train_mode="qlora", dtype="float32")).model
        with torch.autocast("cpu", torch.bfloat16):
            self.check(fast(give_lora(model)), "autocast to bfloat16 over 4-bit weights that compute in float32")

    def test_norms_of_another_dtype(self) -> None:
        model = build_tiny_model().bfloat16()
        for name, module in model.named_modules():
            if name.endswith("norm") and "layers" in name:
                module.float()
        assert accelerate(model, families=EVERY).fast_layers == 2
        with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
            logits(model)  # as stock does
        assert "norms in float32 between layers in bfloat16" in reasons(model)[0]

    def test_a_variant_of_lora(self) -> None:
        self.check(fast(give_lora(build_tiny_model(), alora_invocation_tokens=[5])), "has ALora, a variant of LoRA")

    def test_several_adapters(self) -> None:
        model = fast(give_lora(build_tiny_model()))
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"], r=2))
        model.base_model.set_adapter(["default", "second"])
        self.check(model, "several active adapters (default, second)")

    def test_a_second_backward_is_refused(self) -> None:
        loss = logits(fast(build_tiny_model())).square().mean()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="asked for its gradient a second time"):
            loss.backward()
