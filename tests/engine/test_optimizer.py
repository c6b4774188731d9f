from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from pyralis.engine.flat_parameters import flatten_parameters
from pyralis.engine.optimizer import FlatAdamW
from pyralis.errors import ConfigError, ModelError

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
SHAPES = ((40, 30), (7,), (64, 80), (1, 3, 5), (256,))


def parameters(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def flat(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    made = parameters(device, dtype)
    flatten_parameters(made)
    return made


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:2], "lr": 1e-2, "weight_decay": 0.0},
        {"params": params[2:], "lr": 3e-3, "weight_decay": 0.1},
    ]


def set_gradients(params: list[nn.Parameter], step: int, absent: tuple[int, ...] = (), scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grads = 0.1 * torch.randn(p.shape, generator=generator)
        p.grad = None if i in absent else (scale * grads).to(p.device, p.dtype)


def run(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range, absent: tuple[int, ...] = ()
) -> None:
    for step in steps:
        set_gradients(params, step, absent)
        optimizer.step()
        optimizer.zero_grad()


def assert_near(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_is_torchs_adamw_with_groups_and_a_schedule(device: torch.device) -> None:
    ours, theirs = flat(device), parameters(device)
    for params, optimizer in ((ours, FlatAdamW(groups(ours))), (theirs, torch.optim.AdamW(groups(theirs)))):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(20):
            run(optimizer, params, range(step, step + 1))
            schedule.step()
    assert_near(ours, theirs)


def test_clips_the_norm_of_all_gradients() -> None:
    ours, theirs = flat(), parameters()
    optimizer, stock = FlatAdamW(ours, lr=1e-2, max_norm=0.5), torch.optim.AdamW(theirs, lr=1e-2)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        optimizer.step()
        stock.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
    assert_near(ours, theirs)


def test_parameters_without_gradients_are_left_alone() -> None:
    ours, theirs = flat(), parameters()
    run(FlatAdamW(ours, weight_decay=0.3), ours, range(6), absent=(1, 2))
    run(torch.optim.AdamW(theirs, weight_decay=0.3), theirs, range(6), absent=(1, 2))
    assert_near(ours, theirs)
    before = [p.detach().clone() for p in ours]
    optimizer = FlatAdamW(ours, weight_decay=0.3)
    optimizer.step()  # no gradient anywhere
    assert int(optimizer.scalars.step) == 0
    run(optimizer, ours, range(1), absent=(0,))
    run(optimizer, ours, range(1), absent=(0, 3))
    assert torch.equal(ours[0], before[0])
    assert not torch.equal(ours[3], before[3])


def test_gradients_written_into_the_flat_buffer_are_read_there() -> None:
    ours, theirs = flat(), flat()
    optimizer, other = FlatAdamW(ours), FlatAdamW(theirs)
    for step in range(3):
        set_gradients(theirs, step)
        for p, view, q in zip(ours, optimizer.grad_views, theirs):
            assert q.grad is not None
            view.copy_(q.grad)
            p.grad = view
        optimizer.step()
        other.step()
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "split"])
def test_resumes_bit_by_bit(device: torch.device, bits: int, rounding: Any) -> None:
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    whole, first, second = (flat(device, dtype) for _ in range(3))

    def make(params: list[nn.Parameter]) -> FlatAdamW:
        return FlatAdamW(groups(params), bits=bits, rounding=rounding, min_8bit_size=1000)

    run(make(whole), whole, range(10))
    optimizer = make(first)
    run(optimizer, first, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    for p, q in zip(second, first):
        p.data.copy_(q)
    resumed = make(second)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(resumed, second, range(5, 10))
    for a, b in zip(second, whole):
        assert torch.equal(a, b)


def _torch(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def _bitsandbytes(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return bitsandbytes.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=1000)


def _ours(bits: int) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda params: FlatAdamW(params, lr=1e-2, bits=bits, min_8bit_size=1000)


@pytest.mark.parametrize(
    ("write", "read", "tolerance"),
    [
        (_torch, _ours(32), 1e-6), (_ours(32), _torch, 1e-6), (_torch, _ours(8), 2e-2),
        (_bitsandbytes, _ours(8), 2e-3), (_ours(8), _bitsandbytes, 2e-3),
        (_bitsandbytes, _ours(32), 2e-2), (_ours(8), _ours(32), 2e-2), (_ours(32), _ours(8), 2e-2),
    ],
    ids=["torch-32", "32-torch", "torch-8", "bnb-8", "8-bnb", "bnb-32", "8-32", "32-8"],
)  # fmt: skip
def test_checkpoints_are_read_by_others(
    write: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    read: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    tolerance: float,
) -> None:
    """The next step after loading is the one the writer would have taken, but for how states are rounded."""
    first, second = flat(), flat()
    writer = write(first)
    run(writer, first, range(4))
    for p, q in zip(second, first):
        p.data.copy_(q)
    reader = read(second)
    reader.load_state_dict(copy.deepcopy(writer.state_dict()))
    before = [p.detach().clone() for p in first]
    run(writer, first, range(4, 5))
    run(reader, second, range(4, 5))
    for a, b, start in zip(second, first, before):
        moved = float((b.detach() - start).norm())
        assert moved > 0
        assert float((a.detach() - b.detach()).norm()) <= tolerance * moved + 1e-6


def test_8_bit_state_is_small_and_small_parameters_keep_32_bits() -> None:
    params = flat()
    optimizer = FlatAdamW(params, bits=8, min_8bit_size=1000)
    run(optimizer, params, range(2))
    kinds = [optimizer.state[p]["state1"].dtype for p in params]
    assert kinds == [torch.uint8, torch.float32, torch.uint8, torch.float32, torch.float32]
    assert all(optimizer.state[p]["state1"].shape == p.shape for p in params)


@pytest.mark.parametrize("device", DEVICES)
def test_under_a_gradient_scaler(device: torch.device) -> None:
    """Unscaled in the launch; an overflow skips the step and lowers the scale."""
    ours, theirs = flat(device), parameters(device)
    optimizer, stock = FlatAdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for step in range(6):
        scale = scaler.get_scale()
        scaler.scale(torch.ones((), device=device))
        set_gradients(ours, step, scale=scale)
        if step == 3:
            assert ours[2].grad is not None
            ours[2].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (512.0 if step >= 3 else 1024.0)
        assert bool(optimizer.skipped) == (step == 3)
        if step != 3:
            set_gradients(theirs, step)
            stock.step()
    assert_near(ours, theirs)
    assert int(optimizer.scalars.step) == 5


def test_refreshes_the_compute_copy() -> None:
    params = flat()
    buffer = torch.zeros(sum(-(-p.numel() // 256) * 256 for p in params), dtype=torch.bfloat16)
    optimizer = FlatAdamW(params, compute_copy=buffer)
    run(optimizer, params, range(2))
    for i, p in enumerate(params):
        assert torch.equal(buffer[optimizer.layout.part(i)].view(p.shape), p.detach().bfloat16())


def test_through_accelerate() -> None:
    from accelerate import Accelerator

    ours, theirs = flat(), flat()
    prepared = Accelerator(cpu=True).prepare_optimizer(FlatAdamW(ours, bits=8, min_8bit_size=1000))
    run(prepared, ours, range(3))
    run(FlatAdamW(theirs, bits=8, min_8bit_size=1000), theirs, range(3))
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)


def test_says_what_is_wrong() -> None:
    with pytest.raises(ModelError, match="flatten_parameters"):
        FlatAdamW(parameters())
    buffer = torch.zeros(300)
    with pytest.raises(ModelError, match="multiple of 256"):
        FlatAdamW([nn.Parameter(buffer[:100]), nn.Parameter(buffer[100:])])
    with pytest.raises(ModelError, match="one dtype"):
        flatten_parameters([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float16))])
    with pytest.raises(ConfigError, match="8 or 32"):
        FlatAdamW(flat(), bits=16)
    with pytest.raises(ConfigError, match="bfloat16"):
        FlatAdamW(flat(), rounding="split")
    with pytest.raises(ModelError, match="compute copy"):
        FlatAdamW(flat(), compute_copy=torch.zeros(3))
    params = flat()
    optimizer = FlatAdamW(params)
    with pytest.raises(ConfigError, match="all its parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ModelError, match="groups of"):
        optimizer.load_state_dict(FlatAdamW(groups(flat())).state_dict())
    mixed = FlatAdamW([{"params": params[:1], "betas": (0.8, 0.9)}, {"params": params[1:]}])
    set_gradients(params, 0)
    with pytest.raises(ConfigError, match="share betas"):
        mixed.step()
    params[1].data = params[1].data.clone()
    with pytest.raises(ModelError, match="moved out of"):
        optimizer.step()


@pytest.mark.gpu
def test_a_captured_step_follows_the_schedule() -> None:
    device = torch.device("cuda")
    eager, captured = flat(device), flat(device)
    results: list[Tensor] = []
    for params, graphed in ((eager, False), (captured, True)):
        optimizer = FlatAdamW(params, bits=8, min_8bit_size=1000, max_norm=1.0)
        graph = torch.cuda.CUDAGraph()
        if graphed:
            with torch.cuda.graph(graph):
                optimizer.update()
        for step in range(5):
            set_gradients(params, step)
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.gather()
            optimizer.sync_groups()
            graph.replay() if graphed else optimizer.update()
        results.append(optimizer.layout.values.clone())
    assert torch.equal(*results)
