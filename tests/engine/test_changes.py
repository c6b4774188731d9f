"""What may happen to a model between the recording of a step and a replay: no replay ever computes what was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pyralis.engine.step_graphs import WARM_UP
from pyralis.models.causal_lm import causal_lm_of
from pyralis.models.surgery import accelerate
from tests.engine.steps import SIZES, batch, gradients, graphs, loss_of, make, run, same
from tests.tiny import build_tiny_model

CPU = torch.device("cpu")


def both(plain: Any, recorded: Any, inputs: Any, times: int = 1, seed: int | None = None) -> None:
    for _ in range(times):
        losses = []
        for model in (plain, recorded):
            model.zero_grad()
            if seed is not None:
                torch.manual_seed(seed)
            losses.append(run(model, inputs))
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert gradients(plain).keys() == {name for name, p in plain.named_parameters() if p.requires_grad}
        same(gradients(recorded), gradients(plain))


@torch.no_grad()
def stepped(model: Any) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p -= 0.05 * p.grad / (p.grad.norm() + 1e-12)


def new_objects(model: Any) -> None:
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.requires_grad:
                module._parameters[name] = nn.Parameter(p.data)


def loaded(model: Any, assign: bool) -> None:
    state = {name: value.clone() * 1.1 for name, value in model.state_dict().items() if "lora_" in name}
    model.load_state_dict(state, strict=False, assign=assign)
    for name, p in model.named_parameters():
        if assign and "lora_" in name:
            p.requires_grad_()


@torch.no_grad()
def base_in_place(model: Any) -> None:
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p *= 1.03


def frozen(model: Any) -> None:
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)


def merged_and_back(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def scaled(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 3.0


def resized(model: Any) -> None:
    torch.manual_seed(5)
    causal_lm_of(model).resize_token_embeddings(310, mean_resizing=False)  # type: ignore[operator]


def norm_eps(model: Any) -> None:
    causal_lm_of(model).model.norm.variance_epsilon = 0.5  # type: ignore[union-attr, assignment]


def offloaded_and_back(model: Any) -> None:
    """Moves gradients as well, in place of their tensors."""
    model.to(torch.float64).to(torch.float32)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an optimizer's step": stepped,
    "new parameters over the same memory": new_objects,
    "loaded in place": lambda m: loaded(m, False),
    "loaded by assignment": lambda m: loaded(m, True),
    "base weights in place": base_in_place,
    "lora_A frozen": frozen,
    "merged and unmerged": merged_and_back,
    "scaling": scaled,
    "eps of the last norm": norm_eps,
    "vocabulary resized": resized,
    "moved away and back": offloaded_and_back,
}
KINDS: list[Any] = [
    pytest.param({}, id="lora"),
    pytest.param({"use_dora": True}, id="dora", marks=pytest.mark.full),
    pytest.param({"modules_to_save": ["embed_tokens", "lm_head"]}, id="saved", marks=pytest.mark.full),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_two_steps(change: Callable[[Any], Any], kind: dict[str, Any]) -> None:
    if change is resized and "modules_to_save" in kind:
        pytest.skip("transformers refuses")
    plain, recorded = make(CPU, **kind), make(CPU, **kind)
    engine, inputs = graphs(recorded, CPU), batch(CPU)
    both(plain, recorded, inputs, WARM_UP + 1)
    assert engine.replays == 1
    for model in (plain, recorded):
        change(model)
    both(plain, recorded, inputs)
    for model in (plain, recorded):
        stepped(model)
    both(plain, recorded, inputs, WARM_UP)
    assert engine.replays > 1
    assert engine.reason is None


def test_dropout_changed_switched_off_and_a_random_state_restored() -> None:
    """Masks are those of a step that is run: the batch fills its bucket, and torch's generator starts alike."""
    plain, recorded = (make(CPU, dropout=0.3, target_modules=["q_proj"]) for _ in range(2))
    engine, inputs = graphs(recorded, CPU), batch(CPU, 64, "packed")
    for seed in (1, 1, 2, 3, 1):
        both(plain, recorded, inputs, seed=seed)
    assert engine.replays == 5 - WARM_UP
    for model in (plain, recorded):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.6
    both(plain, recorded, inputs, WARM_UP + 1, seed=4)
    for model in (plain, recorded):
        model.eval()
    both(plain, recorded, inputs, WARM_UP + 1)
    assert engine.reason is None


def test_checks_draw_nothing() -> None:
    """Who recorded steps draws the same random numbers afterwards as who did not."""
    states = []
    for record in (False, True):
        torch.manual_seed(1)
        model = make(CPU, dropout=0.2, target_modules=["q_proj"])
        if record:
            graphs(model, CPU)
        torch.manual_seed(7)
        for _ in range(WARM_UP + 2):
            run(model, batch(CPU))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_trained_base_weights_stepped() -> None:
    """Tied embeddings, norms and all: full fine-tuning."""
    models = []
    for _ in range(2):
        model = build_tiny_model("llama", **SIZES, tie_word_embeddings=True)
        accelerate(model)
        models.append(model.train())
    engine, inputs = graphs(models[1], CPU), batch(CPU)
    for _ in range(WARM_UP + 3):
        both(*models, inputs)
        for model in models:
            stepped(model)
    assert engine.replays == 3


def test_two_models_take_turns() -> None:
    models = [make(CPU, "llama"), make(CPU, "qwen2")]
    inputs = batch(CPU)
    wanted = []
    for model in models:
        run(model, inputs)
        wanted.append(gradients(model))
    engines = [graphs(model, CPU) for model in models]
    for _ in range(WARM_UP + 2):
        for model in models:
            model.zero_grad()
        losses = [loss_of(model, inputs) for model in models]
        for loss in reversed(losses):
            loss.backward()
        for model, want in zip(models, wanted):
            same(gradients(model), want)
    assert [engine.replays for engine in engines] == [2, 2]


def test_an_embedding_s_adapter_scaled() -> None:
    """LoRA around the layers, whose scale is a number in a dictionary of a module's."""
    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
        model = get_peft_model(build_tiny_model("llama", **SIZES), config)  # type: ignore[arg-type]
        accelerate(model)
        models.append(model.train())
    engine, inputs = graphs(models[1], CPU), batch(CPU)
    both(*models, inputs, WARM_UP + 1)
    assert engine.replays == 1
    for model in models:
        causal_lm_of(model).model.embed_tokens.scaling["default"] = 5.0  # type: ignore[union-attr, index]
    both(*models, inputs, WARM_UP + 1)
    assert engine.replays == 2
