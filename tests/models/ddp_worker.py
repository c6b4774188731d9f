"""Two processes of DistributedDataParallel: gradients with the fused block are those without. Run by test_ddp.py."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.surgery import accelerate
from tests.models.spec_block import CountedFused, block_in_place
from tests.tiny import build_tiny_model


def gradients(lora: bool, accelerated: bool, *, bucket_views: bool) -> list[dict[str, Tensor]]:
    """Of three steps; the second accumulates two micro-batches, the first without synchronisation."""
    model = build_tiny_model().train()
    if lora:
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)
        model = get_peft_model(model, config)
    if accelerated:
        assert accelerate(model, families=[family.name for family in SERVED]).fast_layers == 2
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=bucket_views)
    found = []
    for step in range(3):
        for micro in range(1 + (step == 1)):
            last = micro == (step == 1)
            context: AbstractContextManager[None] = nullcontext() if last else parallel.no_sync()
            ids = torch.randint(4, 300, (2, 16), generator=torch.Generator().manual_seed(100 * dist.get_rank() + step))
            with context:
                parallel(ids, use_cache=False).logits.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        parallel.zero_grad(set_to_none=step == 0)
    return found


def main() -> None:
    dist.init_process_group("gloo")
    for lora in (True, False):
        for bucket_views in (True, False):
            stock = gradients(lora, False, bucket_views=bucket_views)
            with block_in_place(CountedFused()) as block:
                fast = gradients(lora, True, bucket_views=bucket_views)
            assert block.calls == 8, block.calls
            for a, b in zip(fast, stock, strict=True):
                assert a.keys() == b.keys()
                for name in a:
                    torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-6, msg=name)
    print(f"rank {os.environ['RANK']}: equal")


if __name__ == "__main__":
    main()
