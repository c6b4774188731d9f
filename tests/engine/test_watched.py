"""Whoever looks into a step or steps in between is called in each: such steps are not replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from pyralis.engine.step_graphs import WARM_UP
from pyralis.models.causal_lm import causal_lm_of
from tests.engine.steps import batch, gradients, graphs, make, run, same

CPU = torch.device("cpu")


@contextmanager
def layer_hook(base: Any) -> Iterator[None]:
    handle = base.layers[1].register_forward_hook(lambda module, given, out: out * 0.9)
    yield
    handle.remove()


@contextmanager
def hook_in_a_wrapper(base: Any) -> Iterator[None]:
    inner = base.embed_tokens.modules_to_save["default"]
    handle = inner.register_forward_hook(lambda module, given, out: out * 0.9)
    yield
    handle.remove()


@contextmanager
def neftune(base: Any) -> Iterator[None]:
    """Whose noise depends on the length of a row, padding included; none of it here, so that losses can be compared."""
    base.embed_tokens.neftune_noise_alpha = 0.0
    handle = base.embed_tokens.register_forward_hook(neftune_post_forward_hook)
    yield
    handle.remove()


@contextmanager
def gradient_hook(base: Any) -> Iterator[None]:
    """As when only new tokens are to be learnt."""
    weight = base.embed_tokens.modules_to_save["default"].weight
    handle = weight.register_hook(lambda grad: grad * 0.5)
    yield
    handle.remove()


@contextmanager
def after_gradient(base: Any) -> Iterator[None]:
    weight = base.embed_tokens.modules_to_save["default"].weight

    def halve(p: Any) -> None:
        p.grad.mul_(0.5)

    handle = weight.register_post_accumulate_grad_hook(halve)
    yield
    handle.remove()


@contextmanager
def hooks_on_all_modules(base: Any) -> Iterator[None]:
    def hook(module: nn.Module, given: Any, out: Any) -> Any:
        return out * 0.9 if module is base.embed_tokens else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    yield
    handle.remove()


@contextmanager
def anomalies(base: Any) -> Iterator[None]:
    with torch.autograd.set_detect_anomaly(True):
        yield


@contextmanager
def layer_replaced(base: Any) -> Iterator[None]:
    layer = base.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 0.9
    yield
    del layer.forward


@contextmanager
def norm_replaced(base: Any) -> Iterator[None]:
    forward = base.norm.forward
    base.norm.forward = lambda hidden: forward(hidden) * 0.9
    yield
    del base.norm.forward


@contextmanager
def attention_maps(base: Any) -> Iterator[None]:
    """The decoder then runs stock, which needs the mask that a bucket has none of."""
    base.config._attn_implementation, base.config.output_attentions = "eager", True
    yield
    base.config._attn_implementation, base.config.output_attentions = "sdpa", False


WATCHERS: dict[str, tuple[Callable[[Any], Any], str, bool]] = {
    "hook on a layer": (layer_hook, "has a hook", False),
    "hook in a wrapper": (hook_in_a_wrapper, "has a hook", True),
    "NEFTune": (neftune, "has a hook, neftune_post_forward_hook", False),
    "hook on a gradient": (gradient_hook, "hooks on its gradient", True),
    "hook after a gradient": (after_gradient, "hooks on its gradient", True),
    "hooks on all modules": (hooks_on_all_modules, "hooks on all modules", False),
    "anomaly mode": (anomalies, "anomalies", False),
    "a layer's forward replaced": (layer_replaced, "was replaced", False),
    "a norm's forward replaced": (norm_replaced, "was replaced", False),
    "attention maps": (attention_maps, "attention maps", False),
}


@pytest.mark.parametrize(("watcher", "why", "saved"), WATCHERS.values(), ids=WATCHERS)
@pytest.mark.parametrize("kind", ["left", "packed"])
def test_steps_that_are_watched_are_run(watcher: Callable[[Any], Any], why: str, saved: bool, kind: str) -> None:
    lora = {"modules_to_save": ["embed_tokens"]} if saved else {}
    plain, recorded = make(CPU, **lora), make(CPU, **lora)
    engine, inputs = graphs(recorded, CPU), batch(CPU, kind=kind)

    def both(times: int) -> None:
        for _ in range(times):
            for model in (plain, recorded):
                model.zero_grad()
            assert run(recorded, inputs) == pytest.approx(run(plain, inputs), rel=1e-5)
            same(gradients(recorded), gradients(plain))

    both(WARM_UP + 1)
    assert engine.replays == 1
    with watcher(causal_lm_of(plain).model), watcher(causal_lm_of(recorded).model):
        both(1)
        assert why in str(engine.reason)
    both(1)
    assert engine.reason is None or "first steps" in str(engine.reason)
