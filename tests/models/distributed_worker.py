"""Several processes: gradients with the fused block are those without. Run by test_distributed.py."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pyralis.cli.processes import end_if_grouped
from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.surgery import accelerate, decoder_layers, report
from tests.models.spec_block import CountedFused, block_in_place
from tests.tiny import build_tiny_model


def build(lora: bool, accelerated: bool) -> nn.Module:
    model: nn.Module = build_tiny_model().train()
    if lora:
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)
        model = get_peft_model(model, config)  # type: ignore[arg-type]
    if accelerated:
        assert accelerate(model, families=[family.name for family in SERVED]).fast_layers == 2
    return model


def batch(step: int) -> Tensor:
    return torch.randint(4, 300, (2, 16), generator=torch.Generator().manual_seed(100 * dist.get_rank() + step))


def data_parallel(lora: bool, accelerated: bool, *, bucket_views: bool) -> list[dict[str, Tensor]]:
    """Of three steps; the second accumulates two micro-batches, the first without synchronisation."""
    model = build(lora, accelerated)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=bucket_views)
    found = []
    for step in range(3):
        for micro in range(1 + (step == 1)):
            last = micro == (step == 1)
            context: AbstractContextManager[None] = nullcontext() if last else parallel.no_sync()
            with context:
                parallel(batch(step), use_cache=False).logits.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        parallel.zero_grad(set_to_none=step == 0)
    return found


def fully_sharded(lora: bool, accelerated: bool, *, each_layer: bool) -> list[dict[str, Tensor]]:
    """FSDP2. Layers sharded one by one hold pieces of weights when the decoder looks at them: they run stock."""
    model = build(lora, accelerated)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in decoder_layers(model) if each_layer else []:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = []
    for step in range(2):
        model(batch(step), use_cache=False).logits.square().mean().backward()
        found.append({name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    if accelerated:
        assert report(model).fast_layers == (0 if each_layer else 2), report(model).lines
    return found


def same(fast: list[dict[str, Tensor]], stock: list[dict[str, Tensor]]) -> None:
    for a, b in zip(fast, stock, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-6, msg=name)


def main() -> None:
    dist.init_process_group("gloo")
    for lora in (True, False):
        for flag in (True, False):
            with block_in_place(CountedFused()) as block:
                same(data_parallel(lora, True, bucket_views=flag), data_parallel(lora, False, bucket_views=flag))
                assert block.calls == 8, block.calls
                same(fully_sharded(lora, True, each_layer=flag), fully_sharded(lora, False, each_layer=flag))
    print(f"rank {os.environ['RANK']}: equal")
    end_if_grouped(0)


if __name__ == "__main__":
    main()
