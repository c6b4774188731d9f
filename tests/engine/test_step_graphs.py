"""Recorded steps against the same model run as it is. On a CPU recorded means run again, on a GPU a CUDA graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pyralis.engine.flat_parameters import flatten_parameters
from pyralis.engine.optimizer import FlatAdamW
from pyralis.engine.recorders import CudaGraphs, Rerun
from pyralis.engine.step_graphs import WARM_UP, StepGraphs, use_step_graphs
from pyralis.models.causal_lm import causal_lm_loss, causal_lm_of
from pyralis.models.fast_path import backbone_state
from pyralis.models.surgery import accelerate, restore
from pyralis.ops.attention_backends import BACKENDS
from tests.engine.tape import TapeRecorder
from tests.models.fast_models import padding_computed
from tests.tiny import FAMILIES, build_tiny_model

ALL_ROWS = 1 << 20  # more than there are: none is left out
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Heads of 64, which every attention backend of a GPU takes.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def attention_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's attention over packed rows reads their bounds, as no capture could."""
    monkeypatch.setitem(BACKENDS, "flash_cpu", BACKENDS["math"])


def make(device: torch.device, family: str = "llama", dropout: float = 0.0, **lora: Any) -> Any:
    sizes = SIZES if "head_dim" not in FAMILIES[family] else {**SIZES, "head_dim": 64}
    model = build_tiny_model(family, **sizes)
    torch.manual_seed(3)
    tuned: Any = get_peft_model(
        model, LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False, target_modules="all-linear", **lora)
    )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    tuned.get_base_model().to(dtype=dtype)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    tuned.to(device)
    accelerate(tuned)
    return tuned.train()


def graphs(model: nn.Module, device: torch.device) -> StepGraphs:
    made = use_step_graphs(model, recorder=CudaGraphs(device) if device.type == "cuda" else TapeRecorder())
    assert made is not None
    return made


def batch(device: torch.device, tokens: int = 50, kind: str = "right", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 290, (1 if kind == "packed" else 2, tokens), generator=generator)
    labels = ids.clone()
    labels[:, :7] = -100
    inputs = {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    if kind == "packed":
        first = 11 + seed
        inputs["position_ids"] = torch.cat([torch.arange(first), torch.arange(tokens - first)])[None]
        labels[:, first] = -100
    elif kind == "right":
        mask[1, 33 + seed :] = 0
    else:
        mask[1, : 9 + seed] = 0
        labels[1, 9 + seed] = -100
    if kind != "packed":
        labels[mask == 0] = -100
        inputs["attention_mask"] = mask
    return {name: value.to(device) for name, value in inputs.items()}


def loss_of(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    device = inputs["input_ids"].device.type
    if device == "cpu":  # else the rows that are learnt would be counted, a number that no capture could read
        settings.setdefault("supervised_rows", ALL_ROWS)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return causal_lm_loss(model, rest, inputs["labels"], **settings)


def run(model: nn.Module, inputs: dict[str, Tensor], factor: float = 1.0, **settings: Any) -> float:
    loss = loss_of(model, inputs, **settings)
    (loss * factor).backward()
    return loss.item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        # Sums of other lengths are rounded in other places.
        bound = 1e-5 if value.device.type == "cpu" else 2e-2
        assert (got[name] - value).norm() <= bound * value.norm(), name


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma"])
def test_equals_the_step_as_it_is(device: torch.device, family: str, kind: str) -> None:
    plain, recorded = make(device, family), make(device, family)
    engine = graphs(recorded, device)
    for seed in range(WARM_UP + 3):
        inputs = batch(device, kind=kind, seed=seed)
        for model in (plain, recorded):
            model.zero_grad()
        losses = [run(model, inputs) for model in (plain, recorded)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5 if device.type == "cpu" else 2e-3)
        same(gradients(recorded), gradients(plain))
    assert engine.replays == 3
    assert engine.reason is None


def test_accumulation_and_every_kind_of_gradient(device: torch.device) -> None:
    plain, recorded = make(device), make(device)
    graphs(recorded, device)
    for round_ in range(4):
        for model in (plain, recorded):
            model.zero_grad(set_to_none=round_ != 2)
            for i, p in enumerate(model.parameters()):
                if p.requires_grad and round_ == 3 and i % 3 == 0:
                    p.grad = torch.full_like(p, 0.5)  # somebody else's tensor
        for seed in range(3):
            inputs = batch(device, seed=seed)
            for model in (plain, recorded):
                run(model, inputs, factor=0.25, num_items=torch.tensor(70.0, device=device))
        same(gradients(recorded), gradients(plain))


def test_one_bucket_serves_many_lengths(device: torch.device) -> None:
    plain, recorded = make(device), make(device)
    engine = graphs(recorded, device)
    for seed, tokens in enumerate((64, 41, 50, 61, 64)):
        inputs = batch(device, tokens, seed=seed)
        for model in (plain, recorded):
            model.zero_grad()
        assert run(recorded, inputs) == pytest.approx(run(plain, inputs), rel=1e-5 if device.type == "cpu" else 2e-3)
        same(gradients(recorded), gradients(plain))
    assert engine.replays == 5 - WARM_UP
    run(recorded, batch(device, 65))
    assert "first steps" in str(engine.reason)


def test_an_adapter_switched_off_and_on(device: torch.device) -> None:
    plain, recorded = make(device), make(device)
    engine = graphs(recorded, device)
    inputs = batch(device)

    def both(times: int = WARM_UP + 2) -> None:
        for _ in range(times):
            for model in (plain, recorded):
                model.zero_grad()
            assert run(recorded, inputs) == pytest.approx(
                run(plain, inputs), rel=1e-5 if device.type == "cpu" else 2e-3
            )
            same(gradients(recorded), gradients(plain))

    both()
    with torch.no_grad(), plain.disable_adapter(), recorded.disable_adapter():
        values = [loss_of(model, inputs).item() for model in (plain, recorded)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        assert "no gradient" in str(engine.reason)
    both(1)
    for model in (plain, recorded):
        torch.manual_seed(9)
        model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
        model.set_adapter("other")
        for name, p in model.named_parameters():
            if ".other." in name:
                p.data = p.data.float().to(device)
    before = engine.replays
    both()
    assert engine.replays == before + 2


def test_weights_moved_are_noticed(device: torch.device) -> None:
    plain, recorded = make(device), make(device)
    engine = graphs(recorded, device)
    inputs = batch(device)
    for _ in range(WARM_UP + 1):
        run(recorded, inputs)
    for model in (plain, recorded):
        model.zero_grad()
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.data = p.data * 2
    assert run(recorded, inputs) == pytest.approx(run(plain, inputs), rel=1e-5 if device.type == "cpu" else 2e-3)
    assert engine.reason is not None
    same(gradients(recorded), gradients(plain))


def test_dropout_is_drawn_anew(device: torch.device) -> None:
    model = make(device, dropout=0.3)
    engine = graphs(model, device)
    inputs = batch(device)
    losses = [run(model, inputs) for _ in range(WARM_UP + 8)]
    assert engine.replays == 8
    assert len(set(losses)) > 8
    model.eval()
    model.zero_grad()
    losses = [run(model, inputs) for _ in range(WARM_UP + 2)]
    assert max(losses) - min(losses) < 1e-4


def test_a_second_forward_before_the_backward(device: torch.device) -> None:
    model = make(device)
    engine = graphs(model, device)
    inputs = batch(device)
    for _ in range(WARM_UP + 1):
        run(model, inputs)
    first, second = loss_of(model, inputs), loss_of(model, inputs)
    assert "still to come" in str(engine.reason)
    (first + second).backward()
    with pytest.raises(RuntimeError, match="second time"):
        first.backward()
    del first, second
    run(model, inputs)
    assert engine.reason is None


def test_trained_embeddings_and_head(device: torch.device) -> None:
    plain, recorded = (make(device, modules_to_save=["embed_tokens", "lm_head"]) for _ in range(2))
    engine = graphs(recorded, device)
    for seed in range(WARM_UP + 2):
        inputs = batch(device, seed=seed)
        for model in (plain, recorded):
            model.zero_grad()
        assert run(recorded, inputs) == pytest.approx(run(plain, inputs), rel=1e-5 if device.type == "cpu" else 2e-3)
        same(gradients(recorded), gradients(plain))
    assert engine.replays == 2


def test_checkpointed_layers(device: torch.device) -> None:
    plain, recorded = make(device), make(device)
    engine = graphs(recorded, device)
    recorded.gradient_checkpointing_enable()
    recorded.enable_input_require_grads()
    for seed in range(WARM_UP + 2):
        inputs = batch(device, seed=seed)
        for model in (plain, recorded):
            model.zero_grad()
        run(plain, inputs)
        run(recorded, inputs)
        same(gradients(recorded), gradients(plain))
    assert engine.replays == 2


def test_supervised_rows_and_smoothing(device: torch.device) -> None:
    plain, recorded = make(device), make(device)
    engine = graphs(recorded, device)
    for seed in range(WARM_UP + 2):
        inputs = batch(device, 192, seed=seed)
        inputs["labels"][:, :150] = -100
        rows = int((inputs["labels"][:, 1:] != -100).sum())
        settings = {"supervised_rows": rows, "label_smoothing": 0.1}
        for model in (plain, recorded):
            model.zero_grad()
        losses = [run(model, inputs, **settings) for model in (plain, recorded)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5 if device.type == "cpu" else 2e-3)
        same(gradients(recorded), gradients(plain))
    assert engine.replays == 2


def test_what_is_not_recorded_says_why(device: torch.device) -> None:
    model = make(device)
    engine = graphs(model, device)
    inputs = batch(device)
    base = causal_lm_of(model)
    handle = base.model.norm.register_forward_hook(lambda *_: None)
    run(model, inputs)
    assert "hook" in str(engine.reason)
    handle.remove()
    rest = {"inputs_embeds": base.model.embed_tokens(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}
    causal_lm_loss(model, rest, inputs["labels"]).backward()
    assert "inputs_embeds" in str(engine.reason)
    assert use_step_graphs(model, "off") is None
    restore(model)
    assert use_step_graphs(model, recorder=Rerun()) is None


def test_a_copy_records_for_itself(device: torch.device) -> None:
    model = make(device)
    graphs(model, device)
    inputs = batch(device)
    losses = [run(model, inputs) for _ in range(WARM_UP + 1)]
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.grad = None
    assert run(twin, inputs) == pytest.approx(losses[0], rel=1e-5)
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)


def test_training_with_the_flat_optimizer(device: torch.device) -> None:
    """Ten steps of two micro-steps, clipped: the same weights as without recording."""
    models = make(device), make(device)
    engine = graphs(models[1], device)
    ends = []
    for model in models:
        trained = [p for p in model.parameters() if p.requires_grad]
        flatten_parameters(trained)
        optimizer = FlatAdamW(trained, lr=3e-3, max_norm=1.0)
        for step in range(10):
            for half in range(2):
                run(model, batch(device, seed=2 * step + half), factor=0.5)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in trained]))
    assert engine.replays > 10
    difference = (ends[1] - ends[0]).norm() / ends[0].norm()
    assert difference < (1e-5 if device.type == "cpu" else 2e-2)


def test_an_earlier_loss_may_still_be_held(device: torch.device) -> None:
    """Its accumulators of gradients belong to the stream that it was computed on."""
    model = make(device)
    engine = graphs(model, device)
    inputs = batch(device)
    held = []
    for _ in range(WARM_UP + 2):
        held.append(loss_of(model, inputs))
        held[-1].backward()
    assert engine.reason is None
    assert engine.replays == 2


@pytest.mark.gpu
def test_many_replays_neither_drift_nor_leak() -> None:
    device = torch.device("cuda")
    model = make(device)
    engine = graphs(model, device)
    inputs = batch(device, 256)
    losses: list[float] = []
    memory: list[int] = []
    for step in range(WARM_UP + 200):
        model.zero_grad()
        losses.append(run(model, inputs))
        if step in (WARM_UP + 50, WARM_UP + 199):
            torch.cuda.synchronize()
            memory.append(torch.cuda.memory_reserved())
    assert engine.replays == 200
    assert len(set(losses[WARM_UP:])) == 1
    assert memory[0] == memory[1]


@pytest.mark.gpu
def test_a_larger_shape_takes_the_pool_over() -> None:
    device = torch.device("cuda")
    model = make(device)
    engine = graphs(model, device)
    for tokens in (64, 256, 128, 64, 256):
        for _ in range(WARM_UP + 1):
            model.zero_grad()
            run(model, batch(device, tokens))
        assert engine.reason is None
    kept = backbone_state(causal_lm_of(model).model).kept
    assert kept.weights.layers[0].served


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "granite"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_ragged_batches_share_few_steps(device: torch.device, family: str, side: str) -> None:
    """Padded batches of other lengths in each step, computed without their padding."""
    plain, recorded = make(device, family), make(device, family)
    engine = graphs(recorded, device)
    generator = torch.Generator().manual_seed(3)
    for seed in range(WARM_UP + 4):
        lengths = [75 + seed, *torch.randint(15, 25, (4,), generator=generator).tolist()]
        inputs = ragged(device, lengths, side, seed)
        hints = {"padding_side": side, "sequence_lengths": lengths}
        for model in (plain, recorded):
            model.zero_grad()
        with padding_computed():
            want = run(plain, inputs)
        assert run(recorded, {**inputs, **hints}) == pytest.approx(want, rel=1e-5 if device.type == "cpu" else 2e-3)
        same(gradients(recorded), gradients(plain))
    assert engine.replays == 4
    assert {tuple(step.static.input_ids.shape) for step in engine._steps.values()} == {(1, 192)}


def ragged(device: torch.device, lengths: list[int], side: str, seed: int) -> dict[str, Any]:
    """Rows of these lengths; the first four tokens of each are not learnt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 290, (len(lengths), max(lengths)), generator=generator)
    place = torch.arange(max(lengths)).expand_as(ids)
    if side == "left":
        place = place - (max(lengths) - torch.tensor(lengths))[:, None]
    mask = ((place >= 0) & (place < torch.tensor(lengths)[:, None])).long()
    labels = ids.masked_fill((mask == 0) | (place < 4), -100)
    given = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: value.to(device) for name, value in given.items()}
