"""A fast model is the stock model to everybody but the clock.

Each test runs with a block that is exact by definition (`spec_block.py`), so that whatever differs is the swap's fault,
and with the fused one.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.load import ModelSettings, load_model
from pyralis.models.surgery import (
    STOCK_CLASS,
    AccelerationReport,
    accelerate,
    decoder_backbone,
    decoder_layers,
    report,
    restore,
)
from pyralis.models.swap import FAST_STATE, is_fast, swap
from tests.models.spec_block import CountedFused, SpecBlock, block_in_place
from tests.tiny import FAMILIES, build_tiny_model, build_tiny_variant, make_tiny_model

EVERY = tuple(family.name for family in SERVED)
IDS = torch.arange(4, 52).view(2, 24)
# Tolerance of "equal to stock" in float32: sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


Block = SpecBlock | CountedFused


@pytest.fixture(params=[SpecBlock, CountedFused])
def block(request: pytest.FixtureRequest) -> Iterator[Block]:
    with block_in_place(request.param()) as counted:
        yield counted


def fast(model: Any) -> Any:
    assert accelerate(model, families=EVERY).fast_layers == len(decoder_layers(model))
    return model


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    return model(IDS, **{"use_cache": False, **inputs}).logits


def reasons(model: nn.Module) -> list[str]:
    return [layer.reason for layer in report(model).layers]


def give_lora(model: PreTrainedModel, **config: Any) -> Any:
    """LoRA whose B is not zero, else it would go unseen; the same for every model."""
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4, **config))
    fill_lora(tuned)
    return tuned


def fill_lora(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_touched_that_is_not_proven(family: str, block: Block) -> None:
    model = build_tiny_model(family)
    classes = [type(module) for module in model.modules()]
    found = accelerate(model, families=())
    assert [layer.index for layer in found.layers] == [0, 1]
    assert found.fast_layers == 0
    assert found.lines[0].startswith("2 of 2 layers stock: ")
    assert [type(module) for module in model.modules()] == classes
    assert restore(model) == 0


def test_off_and_on(block: Block) -> None:
    model = build_tiny_model()
    assert accelerate(model, "off", families=EVERY).lines == ("2 of 2 layers stock: acceleration is off",)
    assert accelerate(model, "on", families=EVERY).lines == ("2 of 2 layers fast",)
    assert accelerate(model, "off").fast_layers == 0
    assert not any(is_fast(module) for module in model.modules())
    with pytest.raises(ValueError, match="expected 'auto', 'on' or 'off'"):
        accelerate(model, "fast")  # type: ignore[arg-type]


def test_without_a_block_all_is_stock() -> None:
    with block_in_place(None):
        model = build_tiny_model()
        assert accelerate(model, families=EVERY).lines == ("2 of 2 layers stock: there is no fused block",)


def test_through_peft() -> None:
    model = build_tiny_model()
    layers = decoder_layers(model)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert decoder_layers(tuned) == layers
    assert decoder_backbone(tuned) is model.model


def test_no_layers() -> None:
    assert accelerate(nn.Linear(2, 2)).lines == ("no decoder layers found: all stock",)
    assert report(nn.Linear(2, 2)).lines == AccelerationReport(()).lines


def test_restore_gives_stock_classes_back(block: Block) -> None:
    model = build_tiny_model()
    stock = [type(module) for module in model.modules()]
    logits(fast(model))
    assert restore(model) == 4
    assert [type(module) for module in model.modules()] == stock
    assert not any(FAST_STATE in vars(module) for module in model.modules())
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    assert report(model).lines == ("2 of 2 layers stock: the model is not accelerated",)


def test_the_class_passes_for_the_stock_one(block: Block) -> None:
    model = build_tiny_model()
    keys = list(model.state_dict())
    stock = [type(model), type(model.model), type(model.model.layers[0])]
    fast(model)
    assert model._supports_logits_to_keep()
    for module, cls in zip((model, model.model, model.model.layers[0]), stock):
        assert isinstance(module, cls)
        assert type(module) is not cls
        assert (type(module).__name__, type(module).__qualname__) == (cls.__name__, cls.__qualname__)
        assert str(type(module)) == str(cls)
        assert "forward" in vars(type(module))
        assert "forward" not in vars(module)
        assert getattr(type(module), STOCK_CLASS) is cls
        assert inspect.signature(module.forward) == inspect.signature(cls.forward.__get__(module))
    assert list(model.state_dict()) == keys


def test_two_models_can_differ(block: Block) -> None:
    one, two = build_tiny_model(), build_tiny_model()
    fast(one)
    expected = logits(two)
    assert block.calls == 0
    torch.testing.assert_close(logits(one), expected, **CLOSE)
    assert block.calls == 2


def test_saving(tmp_path: Path, block: Block) -> None:
    model = fast(build_tiny_model())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    model.model.save_pretrained(tmp_path / "decoder")
    assert json.loads((tmp_path / "decoder/config.json").read_text())["architectures"] == ["LlamaModel"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(is_fast(module) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), expected, **CLOSE)


def test_deepcopy_and_pickle(block: Block) -> None:
    model = fast(give_lora(build_tiny_model()))
    expected = logits(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(saved, weights_only=False),
    }
    for name, other in copies.items():
        assert not any(FAST_STATE in vars(module) for module in other.modules()), name
        calls = block.calls
        assert torch.equal(logits(other), expected), name
        assert block.calls == calls + 2, name
        nn.init.zeros_(other.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer.weight)
        assert not torch.equal(logits(other), expected), name
        assert torch.equal(logits(model), expected), f"{name} shares weights with the original"
        assert restore(other) == 4


def test_deepcopy_of_four_bit_layers(tmp_path: Path, block: Block) -> None:
    folder = make_tiny_model(tmp_path)
    model = fast(give_lora(load_model(ModelSettings(str(folder), train_mode="qlora", dtype="float32")).model))
    expected = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), expected)
    assert block.calls == 4
    packed = [m.get_submodule("base_model.model.model.layers.0.mlp.up_proj").weight for m in (model, other)]
    assert packed[0].data_ptr() != packed[1].data_ptr()
    assert packed[1].untyped_storage().nbytes() == packed[1].numel()


@pytest.mark.full
def test_hugging_faces_trainer_finds_its_columns(tmp_path: Path, block: Block) -> None:
    rows = [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones(24), "other": i} for i, row in enumerate(IDS)
    ]
    losses = []
    for model in (build_tiny_model(), fast(build_tiny_model())):
        arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, logging_steps=1)
        trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert block.calls == 4


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


def test_a_class_that_checkpoints_in_call_does_not(block: Block) -> None:
    class Older(nn.Identity):  # as transformers 5.17's GradientCheckpointingLayer
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("checkpointed")

    module = Older()
    swap(module, double)
    assert module(torch.ones(1)) == 2


def double(module: nn.Module, x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize("first", [True, False])
def test_peft_before_and_after(first: bool, block: Block) -> None:
    expected = give_lora(build_tiny_model())
    if first:
        model = give_lora(fast(build_tiny_model()))
    else:
        model = fast(give_lora(build_tiny_model()))
    torch.testing.assert_close(logits(model), logits(expected), **CLOSE)
    assert block.calls == 2
    with model.disable_adapter(), expected.disable_adapter():
        disabled = logits(model)
        torch.testing.assert_close(disabled, logits(expected), **CLOSE)
    assert not torch.allclose(disabled, logits(model), **CLOSE)
    for m in (model, expected):
        m.add_adapter("second", LoraConfig(target_modules=["up_proj"], r=8))
        fill_lora(m)
        m.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(expected), **CLOSE)
    for m in (model, expected):
        m.set_adapter("default")
        m.merge_adapter()
    torch.testing.assert_close(logits(model), logits(expected), **CLOSE)
    for m in (model, expected):
        m.unmerge_adapter()
    torch.testing.assert_close(logits(model), logits(expected), **CLOSE)
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(expected), **CLOSE)
    assert all(layer.fast for layer in report(model).layers)


def test_saved_adapters_are_the_same(tmp_path: Path, block: Block) -> None:
    model, stock = give_lora(fast(build_tiny_model())), give_lora(build_tiny_model())
    for m, name in ((model, "fast"), (stock, "stock")):
        m.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "fast").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "stock").iterdir())
    weights = "adapter_model.safetensors"
    assert (tmp_path / "fast" / weights).read_bytes() == (tmp_path / "stock" / weights).read_bytes()


def test_adapters_of_other_kinds_run_stock(block: Block) -> None:
    from peft import IA3Config

    model = get_peft_model(
        fast(build_tiny_model()), IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    )
    logits(model)
    assert block.calls == 0
    assert "peft.tuners.ia3.layer.Linear" in reasons(model)[0]


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


def test_layers_under_another_caller_stay_stock(block: Block) -> None:
    model = build_tiny_model()

    class Mine(type(model.model)):  # type: ignore[misc]
        """Goes through the layers in its own way, for all that is known."""

    model.model.__class__ = Mine
    assert accelerate(model, families=EVERY).lines == (
        "2 of 2 layers stock: the layers are called by Mine, which is not understood",
    )


def test_data_types_and_moves(block: Block) -> None:
    model = fast(build_tiny_model())
    model.half().float()
    assert logits(model).dtype == torch.float32
    model.to(torch.float64)
    assert logits(model).dtype == torch.float64
    assert block.calls == 4


def step(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    loss = logits(model).square().mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_step(model: nn.Module, expected: nn.Module) -> None:
    (loss, gradients), (expected_loss, expected_gradients) = step(model), step(expected)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6, msg=name)


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


def test_adapters_cast_as_trl_does(block: Block) -> None:
    """`param.data =` takes the adapter out of whatever buffer it was in, and its gradients' dtype with it."""
    model = fast(give_lora(build_tiny_model()))
    adapters = [p for p in model.parameters() if p.requires_grad]
    step(model)
    for dtype in (torch.bfloat16, torch.float32):
        model.zero_grad()
        for parameter in adapters:
            parameter.data = parameter.data.to(dtype)
        stock = give_lora(build_tiny_model())
        for parameter, cast in zip([p for p in stock.parameters() if p.requires_grad], adapters):
            parameter.data = cast.data.float()
        loss, gradients = step(model)
        assert {gradient.dtype for gradient in gradients.values()} == {dtype}
        assert loss == pytest.approx(step(stock)[0], rel=0.02)


def test_dropout(block: Block) -> None:
    model = fast(give_lora(build_tiny_model(), lora_dropout=0.5)).train()
    state = torch.get_rng_state()
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)  # as resuming does
    assert torch.equal(logits(model), first)
    restore(model)
    fast(model)
    assert torch.equal(logits(model), second)
    model.eval()
    assert torch.equal(logits(model), logits(model))
    torch.testing.assert_close(logits(model), logits(give_lora(build_tiny_model()).eval()), **CLOSE)


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

    def test_dora(self) -> None:
        self.check(fast(give_lora(build_tiny_model(), use_dora=True)), "has DoRA")

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
