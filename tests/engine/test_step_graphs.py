"""Recorded steps against the same model run as it is: on a CPU recorded on `tape.py`, on a GPU as CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig

from pyralis.engine.flat_parameters import flatten_parameters
from pyralis.engine.optimizer import FlatAdamW
from pyralis.engine.step_graphs import WARM_UP
from pyralis.models.checkpointing import choose_save_policy
from pyralis.models.policy import SavePolicy
from pyralis.models.surgery import decoder_layers
from tests.engine.steps import batch, gradients, graphs, loss_of, make, run, same
from tests.models.fast_models import padding_computed


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


@pytest.mark.parametrize("policy", ["recompute_layer", "recompute_cheap", "offload_input"])
def test_checkpointed_layers(device: torch.device, policy: SavePolicy) -> None:
    plain, recorded = make(device), make(device)
    engine = graphs(recorded, device)
    recorded.gradient_checkpointing_enable()
    recorded.enable_input_require_grads()
    choose_save_policy(decoder_layers(recorded), policy)
    for seed in range(WARM_UP + 3):
        inputs = batch(device, 50 if seed % 2 else 120, seed=seed // 2)  # two shapes, one host memory
        for model in (plain, recorded):
            model.zero_grad()
        for _ in range(2):
            run(plain, inputs)
            run(recorded, inputs)
        same(gradients(recorded), gradients(plain))
    assert engine.replays == 6


def test_a_scaled_loss(device: torch.device) -> None:
    """As of a GradScaler, whose scale changes between steps."""
    plain, recorded = make(device), make(device)
    engine = graphs(recorded, device)
    inputs = batch(device)
    run(plain, inputs)
    for factor in (2.0**14,) * WARM_UP + (2.0**14, 2.0**13):
        recorded.zero_grad()
        run(recorded, inputs, factor=factor)
        same({name: grad / factor for name, grad in gradients(recorded).items()}, gradients(plain))
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
