"""Weights laid out for the fused block: what the modules, their state dicts and optimizers see of it."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pyralis.engine.flat_parameters import flatten_parameters
from pyralis.engine.optimizer import FlatAdamW
from pyralis.errors import ModelError
from pyralis.models.gradients import FlatGradients, stacked_view
from pyralis.models.group_state import LayoutOptions
from pyralis.models.model_weights import ModelWeights
from pyralis.models.nf4 import dequantize_weight, settle_four_bit
from pyralis.models.residency import keep_matrices
from pyralis.models.weights import LayerWeights
from tests.models.block_harness import (
    ALL,
    Fused,
    assert_close,
    build,
    change,
    decoder,
    make_batch,
    relative_error,
    run_stock,
    specs_of,
    stock_forward,
    true_output,
    truth_of,
)


def layout(model: Any, **options: Any) -> Fused:
    fused = Fused(model, options=LayoutOptions(**{"concatenate": True, **options}))
    assert fused.weights.refresh() == [None, None]
    return fused


def bytes_of(model: nn.Module) -> int:
    """Of the distinct memory behind all parameters."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


# Plain weights


@pytest.mark.parametrize("concatenate", [True, False])
def test_parameters_become_views_and_nothing_is_stored_twice(concatenate: bool) -> None:
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size = bytes_of(model)
    fused = layout(model, concatenate=concatenate)
    layer = fused.weights.layers[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    attention = decoder(model).layers[0].self_attn
    matrix, *_ = layer.matrices(layer.state)
    with torch.no_grad():
        attention.k_proj.base_layer.weight[1, 2] = 42
    assert matrix[64 + 1, 2] == 42
    groups = [group for layer in fused.weights.layers for group in layer.state.groups]
    room = sum(g.rows * g.columns - g.group.out_features * g.group.in_features for g in groups) * 4
    assert (room > 0) == concatenate
    assert bytes_of(model) == size + room


@pytest.mark.parametrize("concatenate", [None, True])
def test_saving_and_loading_are_stock(tmp_path: Path, concatenate: bool | None) -> None:
    model = build("qwen2", None).requires_grad_(False)
    model = get_peft_model(model, copy.deepcopy(ALL))
    names = [name.replace(".base_layer", "") for name in model.get_base_model().state_dict() if "lora_" not in name]
    weights = layout(model, concatenate=concatenate).weights
    if concatenate:
        weights.release()
    merged: Any = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = make_batch("full")
    outputs = [stock_forward(m, batch.x.float(), batch, specs_of(m)) for m in (merged, loaded)]
    assert relative_error(*outputs) <= 1e-6
    assert list(loaded.state_dict()) == names


def test_loading_a_state_dict_is_seen() -> None:
    model, other, batch = build("qwen2"), build("qwen2", seed=5), make_batch("full")
    fused = layout(model)
    model.load_state_dict(other.state_dict())
    assert_close(fused.run(batch), truth_of(other, batch), batch.real)


def test_trained_weights_in_another_s_buffer() -> None:
    """A flat optimizer's buffer is used where it lies if it has stacks side by side; else it is left alone."""
    model, batch = build("llama", None), make_batch("full")
    fused = layout(model)
    parameters = fused.weights.parameters
    flatten(parameters)
    places = [p.data_ptr() for p in parameters]
    assert_close(fused.run(batch), truth_of(model, batch), batch.real)
    assert places == [p.data_ptr() for p in parameters]
    flatten(tuple(reversed(parameters)))
    reasons = fused.weights.refresh()
    assert all(reason is not None and "order the parameters" in reason for reason in reasons)


def test_a_trained_weight_that_moved_alone() -> None:
    model, batch = build("llama", None), make_batch("full")
    fused = layout(model)
    weight = decoder(model).layers[1].self_attn.k_proj.weight
    weight.data = weight.data * 2
    assert_close(fused.run(batch), truth_of(model, batch), batch.real)


def flatten(parameters: tuple[nn.Parameter, ...]) -> None:
    buffer = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, buffer.split([p.numel() for p in parameters])):
        p.data = part.view(p.shape)


@pytest.mark.parametrize("concatenate", [True, False])
def test_copies_have_their_own_weights(concatenate: bool) -> None:
    model, batch = build("gemma2"), make_batch("full")
    fused = layout(model, concatenate=concatenate)
    truth = truth_of(model, batch)
    fused.run(batch)
    model.zero_grad()
    twin, weights = copy.deepcopy((model, fused.weights))
    assert weights.layers[1].layer is decoder(twin).layers[1]
    for a, b in zip(model.parameters(), twin.parameters()):
        assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
        if not concatenate or a.requires_grad:
            assert b.untyped_storage().nbytes() == b.numel() * b.element_size()
    copied = Fused(twin)
    copied.weights = weights
    assert_close(copied.run(batch), truth, batch.real)
    file = io.BytesIO()
    torch.save((twin, weights), file)
    file.seek(0)
    loaded, weights = torch.load(file, weights_only=False)
    loaded.zero_grad()
    unpickled = Fused(loaded)
    unpickled.weights = weights
    assert_close(unpickled.run(batch), truth, batch.real)


# Adapters


def test_moved_adapters_are_found() -> None:
    model, batch = build("llama"), make_batch("full")
    fused = layout(model)
    truth = truth_of(model, batch)
    change(model, lambda p: p.data.clone())
    assert_close(fused.run(batch), truth, batch.real)
    model.zero_grad()
    change(model, lambda p: p.data.bfloat16())  # TRL does so to QLoRA's
    got = fused.run(batch)
    assert {grad.dtype for grad in got.grads.values()} == {torch.bfloat16}
    assert len({p.grad.untyped_storage().data_ptr() for p in fused.weights.parameters if p.grad is not None}) == 1
    model.zero_grad()
    change(model, lambda p: p.data.float())
    assert_close(fused.run(batch), truth_of(model, batch), batch.real)


def test_an_update_in_place_is_seen_without_a_version() -> None:
    model, batch = build("llama"), make_batch("full")
    fused = layout(model)
    fused.run(batch)
    model.zero_grad()
    change(model, lambda p: p.data.mul_(1.5))
    assert_close(fused.run(batch), truth_of(model, batch), batch.real)


@pytest.mark.parametrize("concatenate", [True, False])
def test_another_adapter_between_forward_and_backward(concatenate: bool) -> None:
    """As in DPO: a reference, which is another adapter or none, between the policy's forward and its backward."""
    model, batch = build("llama"), make_batch("full")
    model.add_adapter("reference", LoraConfig(r=4, target_modules=["v_proj", "o_proj"], init_lora_weights=False))
    truth = truth_of(model, batch)
    fused = layout(model, concatenate=concatenate)
    x = batch.x.float().requires_grad_()
    y = fused.forward(x, batch)
    model.set_adapter("reference", inference_mode=True)
    with torch.no_grad():
        other = fused.forward(batch.x.float(), batch)
    assert relative_error(other, true_output(model, batch)) <= 1e-6
    with model.disable_adapter(), torch.no_grad():
        base = fused.forward(batch.x.float(), batch)
        assert relative_error(base, true_output(model, batch)) <= 1e-6
    model.set_adapter("default")
    y.backward(batch.dy.float())
    for name, grad in truth.grads.items():
        assert relative_error(model.get_parameter(name).grad, grad) <= 1e-5, name


def test_merging_and_unmerging() -> None:
    model, batch = build("llama"), make_batch("full")
    fused = layout(model)
    model.merge_adapter()
    merged = fused.forward(batch.x.float(), batch).detach()
    model.unmerge_adapter()
    assert relative_error(merged, truth_of(model, batch).y) <= 1e-5
    assert_close(fused.run(batch), truth_of(model, batch), batch.real)


def test_what_is_not_served_has_a_reason() -> None:
    specs = specs_of(build("llama"))

    def reasons(model: Any) -> list[str | None]:
        return ModelWeights(list(zip(decoder(model).layers, specs))).refresh()

    variant = build("llama", LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[1]))
    assert all(reason is not None and "ALora, a variant of LoRA" in reason for reason in reasons(variant))
    two = build("llama")
    two.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    two.base_model.set_adapter(["default", "other"])
    assert all(reason is not None and "several active adapters" in reason for reason in reasons(two))
    one = build("llama")
    decoder(one).layers[1].mlp.up_proj = nn.Sequential(decoder(one).layers[1].mlp.up_proj)
    first, second = reasons(one)
    assert first is None
    assert second is not None
    assert "mlp.up_proj is a torch.nn.modules.container.Sequential" in second
    mixed = build("llama", None)
    decoder(mixed).layers[0].mlp.up_proj.half()
    first, second = reasons(mixed)
    assert (first, second) == (
        "the linear layers of a decoder layer compute in different dtypes: float16, float32",
        None,
    )
    emptied = build("llama", None)
    decoder(emptied).layers[0].mlp.up_proj.weight.data = torch.empty(0)
    first, _ = reasons(emptied)
    assert first is not None
    assert "ZeRO-3" in first


def test_a_layer_alone_raises_its_reason() -> None:
    model = build("llama", LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[1]))
    with pytest.raises(ModelError, match="ALora"):
        LayerWeights(decoder(model).layers[0], specs_of(model)[0]).refresh()


# Gradients


def test_gradients_lie_in_one_buffer_side_by_side() -> None:
    model, batch = build("llama"), make_batch("full")
    fused = layout(model)
    fused.run(batch)
    parameters = fused.weights.parameters
    assert len(parameters) == 2 * 7 * 2
    grads = [p.grad for p in parameters]
    assert len({g.untyped_storage().data_ptr() for g in grads if g is not None}) == 1
    attention = decoder(model).layers[0].self_attn
    stacked = stacked_view([getattr(attention, f"{x}_proj").lora_A["default"].weight.grad for x in "qkv"])
    assert stacked is not None, "one product yields the gradients of all three"
    assert stacked.shape == (24, 64)


def test_another_s_gradient_views() -> None:
    model, batch = build("llama"), make_batch("full")
    fused = layout(model)
    parameters = fused.weights.parameters
    buffer = torch.full((sum(p.numel() for p in parameters),), torch.nan)
    parts = buffer.split([p.numel() for p in parameters])
    fused.weights.use_gradients(FlatGradients(parameters, [part.view(p.shape) for part, p in zip(parts, parameters)]))
    assert_close(fused.run(batch), truth_of(model, batch), batch.real)
    assert not buffer.isnan().any()


def test_a_flat_optimizer_updates_masters_and_reads_gradients_in_place() -> None:
    model, batch = build("llama"), make_batch("full")
    twin = copy.deepcopy(model)
    fused = layout(model)
    flatten_parameters(fused.weights.parameters)
    ours = FlatAdamW(fused.weights.parameters, lr=1e-2)
    fused.weights.use_gradients(FlatGradients(fused.weights.parameters, ours.grad_views))
    theirs = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        fused.run(batch)
        grads = [p.grad for p in fused.weights.parameters]
        assert all(g is not None and g.data_ptr() == view.data_ptr() for g, view in zip(grads, ours.grad_views))
        run_stock(twin, batch, dtype=torch.float32, specs=fused.specs)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert torch.allclose(p, q, rtol=0, atol=1e-4), name  # a hundredth of a step: AdamW divides small gradients


def doubled(seen: dict[int, Tensor], bucket: Any) -> torch.futures.Future[Tensor]:
    """What DDP would send, twice: as the sum of two ranks that agree."""
    seen[bucket.index()] = bucket.buffer().clone()
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer().mul_(2))
    return done


def test_ddp_reads_them(tmp_path: Path) -> None:
    model, batch = build("llama"), make_batch("full")
    truth, fused = truth_of(model, batch), layout(model)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = decoder(model).layers

        def forward(self, x: Tensor) -> Tensor:
            return fused.forward(x, batch)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for as_views in (False, True):
            model.zero_grad()
            wrapped = nn.parallel.DistributedDataParallel(Layers(), gradient_as_bucket_view=as_views)
            seen: dict[int, Tensor] = {}

            wrapped.register_comm_hook(seen, lambda seen, bucket: doubled(seen, bucket))
            wrapped(batch.x.float().requires_grad_()).backward(batch.dy.float())
            assert seen
            for name, grad in truth.grads.items():
                assert relative_error(model.get_parameter(name).grad, 2 * grad) <= 1e-5, name
    finally:
        torch.distributed.destroy_process_group()


# 4-bit weights


def four_bit(family: str, lora: LoraConfig | None, *, nested: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose linear layers are bitsandbytes', quantised from weights of `dtype`, computing in float32."""
    model = build(family, None)
    module: Any
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                packed = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, module.bias is not None, torch.float32, nested, "nf4"
                )  # fmt: skip
                packed.weight = bnb.nn.Params4bit(
                    module.weight.data.to(dtype), requires_grad=False, compress_statistics=nested, quant_type="nf4"
                )
                packed.bias = module.bias
                layer.set_submodule(name, packed.to("cpu"))
    settle_four_bit(model, torch.float32)
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    if lora is None:
        return model
    torch.manual_seed(1)
    return get_peft_model(model, copy.deepcopy(lora))


def plain_twin(model: Any) -> Any:
    """The same model with the weights that the packed ones stand for, as bitsandbytes rounds them."""
    twin = copy.deepcopy(model)
    module: Any
    for layer in decoder(twin).layers:
        for name, module in list(layer.named_modules()):
            if type(module) is bnb.nn.Linear4bit:
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
                values = dequantize_weight(module).to(module.weight.quant_state.dtype).float()
                plain.weight, plain.bias = nn.Parameter(values, requires_grad=False), module.bias
                layer.set_submodule(name, plain)
    return twin


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("concatenate", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma3_text"])
def test_four_bit_base(family: str, concatenate: bool, resident: bool) -> None:
    model, batch = four_bit(family, ALL), make_batch("left")
    truth = truth_of(plain_twin(model), batch)
    fused = layout(model, concatenate=concatenate, resident=resident)
    assert_close(fused.run(batch, "recompute_layer"), truth, batch.real)
    stock = copy.deepcopy(model)
    stock.zero_grad()
    peft = run_stock(stock, batch, dtype=torch.float32, specs=fused.specs)
    assert relative_error(peft.y[batch.real], truth.y[batch.real]) <= 1e-6  # the twin is bitsandbytes' model
    model.zero_grad()
    change(model, lambda p: p.data.mul_(0.5))
    assert_close(fused.run(batch), truth_of(plain_twin(model), batch), batch.real)
    with model.disable_adapter(), torch.no_grad():
        base = fused.forward(batch.x.float(), batch)
        want = true_output(plain_twin(model), batch)
    assert relative_error(base[batch.real], want[batch.real]) <= 1e-6


def test_weights_quantised_from_bfloat16_are_rounded_to_it() -> None:
    model, batch = four_bit("llama", ALL, nested=False, dtype=torch.bfloat16), make_batch("full")
    assert_close(layout(model).run(batch), truth_of(plain_twin(model), batch), batch.real)


def test_layers_share_one_workspace() -> None:
    model = four_bit("llama", ALL)
    fused = layout(model)
    first, second = (layer.matrices(layer.state) for layer in fused.weights.layers)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first, second))
    kept = layout(model, resident=True)
    first, second = (layer.matrices(layer.state) for layer in kept.weights.layers)
    assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(first, second))


def test_some_layers_keep_their_matrices() -> None:
    """Chosen and given up between two calls, with the results of the plain twin."""
    model, batch = four_bit("llama", ALL), make_batch("right")
    truth = truth_of(plain_twin(model), batch)
    fused = layout(model)
    places = []
    for kept in ((), (1,), (0, 1), ()):
        for index, layer in enumerate(decoder(model).layers):
            keep_matrices([layer], index in kept)
        model.zero_grad()
        assert_close(fused.run(batch), truth, batch.real)
        places.append([layer.state.plan[0].arena.data_ptr() for layer in fused.weights.layers])
    assert [len(set(pair)) for pair in places] == [1, 2, 2, 1]
    assert places[1][0] == places[0][0], "who does not keep its own goes on as before"
