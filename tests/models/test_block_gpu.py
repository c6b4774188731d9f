"""The fused block on a GPU: launches, the same bits from every policy, and capture in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pyralis.memory.offload import PinnedStore
from pyralis.models.block import fused_layer
from pyralis.models.group_state import LayoutOptions
from pyralis.models.model_weights import ModelWeights
from pyralis.models.policy import POLICIES, SavePolicy
from pyralis.ops.attention_spec import AttentionLayout
from tests.models.block_harness import ALL, build, decoder, specs_of

pytestmark = pytest.mark.gpu
ROWS, TOKENS = 2, 128


class OnGpu:
    """Two layers in bfloat16 with float32 adapters."""

    def __init__(self, family: str = "llama", *, concatenate: bool = True) -> None:
        self.model: Any = build(family, ALL).bfloat16().cuda()
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        layers = list(zip(decoder(self.model).layers, specs_of(self.model)))
        self.weights = ModelWeights(layers, options=LayoutOptions(concatenate=concatenate))
        generator = torch.Generator().manual_seed(0)
        self.x, self.dy = torch.randn((2, ROWS, TOKENS, 64), generator=generator).to("cuda", torch.bfloat16)
        self.x = self.x.clone().requires_grad_()
        positions = torch.arange(TOKENS, device="cuda")[None]
        self.cos, self.sin = decoder(self.model).rotary_emb(self.x, positions)
        self.store = PinnedStore()

    def step(self, policy: SavePolicy = "keep") -> Tensor:
        assert self.weights.refresh() == [None, None]
        layout, y = AttentionLayout.padded(ROWS, TOKENS), self.x
        for layer in self.weights.layers:
            y = fused_layer(
                y, self.cos, self.sin, layout, layer, self.weights.gradients, policy=policy, rng=self.weights.rng,
                store=self.store,
            )  # fmt: skip
        y.backward(self.dy)
        return y.detach()

    def clear(self) -> None:
        self.model.zero_grad()
        self.x.grad = None

    def gradients(self) -> list[Tensor]:
        found = [self.x.grad, *(p.grad for p in self.weights.parameters)]
        return [grad.clone() for grad in found if grad is not None]


@pytest.mark.parametrize("concatenate", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "granite"])
def test_policies_yield_the_same_bits(family: str, concatenate: bool) -> None:
    on_gpu, results = OnGpu(family, concatenate=concatenate), []
    for policy in POLICIES:
        on_gpu.clear()
        results.append([on_gpu.step(policy), *on_gpu.gradients()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_few_launches() -> None:
    on_gpu = OnGpu()
    for _ in range(2):
        on_gpu.clear()
        on_gpu.step()
    on_gpu.clear()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        on_gpu.step()
        torch.cuda.synchronize()
    launched = [event.name for event in profiler.events() if str(event.device_type).endswith("CUDA")]
    kernels = [name for name in launched if not name.startswith(("Memset", "Memcpy"))]
    assert len(kernels) <= 2 * 66, kernels


def test_capture_in_a_graph() -> None:
    on_gpu = OnGpu()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            on_gpu.clear()
            on_gpu.step()
    torch.cuda.current_stream().wait_stream(side)
    on_gpu.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = on_gpu.step()
    with torch.no_grad():
        on_gpu.x.mul_(0.5)
        for parameter in on_gpu.weights.parameters:
            parameter.mul_(1.5)
    graph.replay()
    replayed = [y.clone(), *on_gpu.gradients()]
    on_gpu.clear()
    eager = [on_gpu.step(), *on_gpu.gradients()]
    assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))
