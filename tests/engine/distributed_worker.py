"""Two processes whose steps are recorded get the gradients of two that run theirs. Run by test_step_distributed.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyralis.cli.processes import end_if_grouped
from pyralis.engine.step_graphs import WARM_UP
from pyralis.ops.attention_backends import BACKENDS
from tests.engine.steps import batch, gradients, graphs, make, run, same

CPU = torch.device("cpu")
STEPS = WARM_UP + 3


def trained(recorded: bool, saved: bool, bucket_views: bool) -> list[dict[str, Tensor]]:
    """Gradients of each step; every second one accumulates two micro-batches, the first without synchronisation."""
    model = make(CPU, modules_to_save=["embed_tokens", "lm_head"] if saved else None)
    parallel: nn.Module = DistributedDataParallel(model, gradient_as_bucket_view=bucket_views)
    engine = graphs(parallel, CPU) if recorded else None
    found = []
    for step in range(STEPS):
        if step % 2:
            with parallel.no_sync():  # type: ignore[operator]
                run(parallel, batch(CPU, seed=10 * dist.get_rank() + step))
        run(parallel, batch(CPU, seed=5 + 10 * dist.get_rank() + step))
        found.append(gradients(model))
        parallel.zero_grad(set_to_none=step != 2)
    if engine is not None:
        assert engine.reason is None, engine.reason
        assert engine.replays == STEPS + STEPS // 2 - WARM_UP
    return found


def main() -> None:
    dist.init_process_group("gloo")
    BACKENDS["flash_cpu"] = BACKENDS["math"]  # which reads no bounds of packed rows
    for saved in (False, True):
        for bucket_views in (False, True):
            wanted = trained(False, saved, bucket_views)
            for got, want in zip(trained(True, saved, bucket_views), wanted, strict=True):
                same(got, want)
    end_if_grouped(0)


if __name__ == "__main__":
    main()
