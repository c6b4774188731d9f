"""A model that follows the memory plan: when it is planned for, what its layers then do, how it goes down a notch."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pyralis.memory import plan as memory_plan
from pyralis.memory.auto import Planner, chunk_of, follow_plan, forget_plan, planner_of
from pyralis.memory.calibrate import keep_rates, measure_rates, read_rates
from pyralis.memory.cost import Batch
from pyralis.memory.plan import fixed_plan
from pyralis.memory.shape import describe_model
from pyralis.models.causal_lm import causal_lm_loss
from pyralis.models.checkpointing import choose_save_policy, mlp_tile, save_policy
from pyralis.models.policy import POLICIES
from pyralis.models.residency import residency
from pyralis.models.surgery import accelerate, decoder_layers
from pyralis.ops._triton import Gpu
from pyralis.train.out_of_memory import retried
from tests.memory.pretend import RATES, Full, pretended
from tests.tiny import build_tiny_model

IDS = torch.arange(4, 68).view(2, 32)


def build(**config: Any) -> Any:
    model = build_tiny_model(**config)
    tuned = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    accelerate(tuned)
    return tuned.train()


def bytes_of(model: Any, tokens: int, policy: Any = "keep") -> int:
    shape = describe_model(model.get_base_model(), decoder_layers(model), Gpu((8, 0), 2))
    return fixed_plan(shape, Batch(1, tokens), policy, RATES).memory.reserved


def policies(model: Any) -> list[str]:
    return [save_policy(layer) for layer in decoder_layers(model)]


def loss_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return causal_lm_loss(model, {"input_ids": ids}, ids)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_first_batch_is_planned_for_and_larger_ones_again() -> None:
    model = build()
    between = (bytes_of(model, 64) + bytes_of(model, 512)) // 2
    planner = follow_plan(model.get_base_model(), Planner(look=pretended(between)))
    assert policies(model) == ["recompute_layer"] * 2  # until it is known what comes
    loss_of(model).backward()
    assert (planner.plan.batch.tokens, policies(model)) == (64, ["keep"] * 2)
    first = planner.plan
    loss_of(model, IDS[:1]).backward()
    assert planner.plan is first
    loss_of(model, IDS.repeat(8, 1)).backward()
    assert planner.plan.batch.tokens == 512
    assert policies(model) != ["keep"] * 2
    assert planner.plan.fits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_every_plan_gives_the_same_gradients(family: str) -> None:
    model = build(family=family)
    loss_of(model).backward()
    expected = gradients(model)
    low, high = bytes_of(model, 64, "offload_input"), bytes_of(model, 64)
    seen = set()
    for share in (0.0, 0.3, 0.6, 1.0):
        model.zero_grad()
        follow_plan(model.get_base_model(), Planner(look=pretended(int(low + share * (high - low)) + 1)))
        loss_of(model).backward()
        seen.add(tuple(policies(model)))
        for name, gradient in gradients(model).items():
            assert torch.equal(gradient, expected[name]), (share, name)
    assert len(seen) > 1


def test_where_nothing_fits_whole_the_mlp_runs_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "TILES", (32, 24, 8))
    model = build()
    planner = follow_plan(model.get_base_model(), Planner(look=pretended(1 << 40)))
    loss_of(model).backward()
    assert planner.plan.tile is None
    expected = gradients(model)
    shape = describe_model(model.get_base_model(), decoder_layers(model), Gpu((8, 0), 2))
    whole, tiled = (
        memory_plan.fixed_plan(shape, Batch(1, 64), "offload_input", RATES, tile=tile).memory.reserved
        for tile in (None, 8)
    )
    assert tiled < whole
    for budget, failures in (((tiled + whole) // 2, 0), (whole, 3)):  # planned for, and gone down to
        model.zero_grad()
        planner = follow_plan(model.get_base_model(), Planner(look=pretended(budget)))
        loss_of(model).backward()
        if failures:
            assert planner.plan.tile is None
            assert planner.notch_down(model.get_base_model(), failures)
            model.zero_grad()
            loss_of(model).backward()
        assert planner.plan.tile is not None
        assert [mlp_tile(layer) for layer in decoder_layers(model)] == [planner.plan.tile] * 2
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    forget_plan(model.get_base_model())
    assert [mlp_tile(layer) for layer in decoder_layers(model)] == [None] * 2


def test_what_is_trained_not_is_not_planned_for() -> None:
    model = build()
    planner = follow_plan(model.get_base_model(), Planner(look=pretended(1 << 40)))
    with torch.no_grad():
        loss_of(model)
    model.eval()
    loss_of(model)
    assert planner.plan is None
    assert policies(model) == ["keep"] * 2


def test_without_a_gpu_everything_is_kept() -> None:
    model = build()
    planner = follow_plan(model.get_base_model())
    loss_of(model).backward()
    assert planner.plan is None
    assert policies(model) == ["keep"] * 2


def test_a_choice_by_hand_holds_again_when_the_plan_is_forgotten() -> None:
    model = build()
    base = model.get_base_model()
    choose_save_policy(decoder_layers(model), "recompute_cheap")
    base.gradient_checkpointing_enable({"use_reentrant": False})
    follow_plan(base, Planner(look=pretended(1 << 40)))
    loss_of(model).backward()
    assert policies(model) == ["keep"] * 2
    assert [residency(layer) for layer in decoder_layers(model)] == ["at once"] * 2  # plain weights are not made
    forget_plan(base)
    assert policies(model) == ["recompute_cheap"] * 2
    assert planner_of(base) is None


def test_stock_logits_take_their_share() -> None:
    model = build(vocab_size=4096)
    budget = bytes_of(model, 64) + 64 * 4096
    for call, expected in ((lambda: loss_of(model), True), (lambda: model(IDS, labels=IDS).loss, False)):
        follow_plan(model.get_base_model(), Planner(look=pretended(budget)))
        call().backward()
        assert (policies(model) == ["keep"] * 2) is expected


def test_a_model_that_runs_stock_says_why_there_is_no_plan() -> None:
    model = build()
    planner = follow_plan(model.get_base_model(), Planner(look=pretended(1 << 40)))
    decoder_layers(model)[1].self_attn.register_forward_hook(lambda *given: None)
    loss_of(model).backward()
    assert planner.plan is None
    assert "layer 1 runs stock" in planner.reason
    assert policies(model) == ["recompute_layer"] * 2


def test_a_copy_follows_a_plan_of_its_own() -> None:
    model = build()
    follow_plan(model.get_base_model(), Planner(look=pretended(1 << 40)))
    twin = copy.deepcopy(model)
    loss_of(twin).backward()
    assert planner_of(twin.get_base_model()).plan is not None
    assert planner_of(model.get_base_model()).plan is None


def test_a_small_chunk_of_logits_reaches_the_head() -> None:
    model = build()
    planner = follow_plan(model.get_base_model(), Planner(look=pretended(1)))
    loss_of(model).backward()
    assert not planner.plan.fits
    assert chunk_of(model.get_base_model()) == 64 << 20


# ---- out of memory ----


def micro_steps(model: Any, seed: int) -> None:
    """Two micro-batches of one step, with dropout."""
    torch.manual_seed(seed)
    for part in (IDS[:1], IDS[1:]):
        retried(model, lambda part=part: loss_of(model, part).backward())


CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    ("allowed", "error"), [({"recompute_cheap"}, CUBLAS), ({"recompute_layer", "offload_input"}, None)]
)
def test_a_micro_batch_that_does_not_fit_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, allowed: set[str], error: str | None
) -> None:
    model = build()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.2)
    expected_model = copy.deepcopy(model)
    micro_steps(expected_model, 3)
    base = model.get_base_model()
    planner = follow_plan(base, Planner(look=pretended(1 << 40)))
    torch.manual_seed(3)
    loss_of(model, IDS[:1]).backward()  # fits; the second micro-batch does not
    full = Full(monkeypatch, allowed)
    full.error = full.error if error is None else RuntimeError(error)
    with caplog.at_level("WARNING"):
        retried(model, lambda: loss_of(model, IDS[1:]).backward())
    assert full.failures >= 1
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == full.failures
    assert said[0].startswith("Out of memory with ")
    assert policies(model)[0] in allowed
    assert planner.plan.fits
    for name, gradient in gradients(expected_model).items():
        assert torch.equal(dict(model.named_parameters())[name].grad, gradient), name


def test_what_cannot_go_down_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    planner = follow_plan(model.get_base_model(), Planner(look=pretended(1 << 40)))
    full = Full(monkeypatch, set())
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        retried(model, lambda: loss_of(model).backward())
    assert 2 <= full.failures <= 6
    assert POLICIES[-1] in planner.plan.policies
    assert all(p.grad is None for p in model.parameters())


def test_a_choice_by_hand_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    full = Full(monkeypatch, {"recompute_layer"})
    with pytest.raises(torch.OutOfMemoryError):
        retried(model, lambda: loss_of(model).backward())
    assert full.failures == 1


# ---- calibration ----


def test_rates_are_measured_and_kept(tmp_path: Any) -> None:
    before = torch.get_rng_state()
    rates = measure_rates(torch.device("cpu"), scale=1e-3)
    assert torch.equal(torch.get_rng_state(), before)  # a run is the same whether the rates were known or not
    assert rates.measured
    assert min(rates.copy_bytes_per_s, rates.matmul_flops_per_s, rates.launch_seconds) > 0
    path = tmp_path / "gpus" / "one.json"
    assert read_rates(path) is None
    keep_rates(path, rates)
    assert read_rates(path) == rates
    path.write_text("{}")
    assert read_rates(path) is None
    keep_rates(path / "in a file", replace(rates, name="x"))  # no reason to stop
