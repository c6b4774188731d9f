"""Steps taken in the backward: those of the flat optimizer, bit by bit, with a layer's gradients held at a time."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyralis.engine.backward_optimizer import BackwardAdamW
from pyralis.engine.flat_parameters import flatten_parameters
from pyralis.engine.optimizer import FlatAdamW
from pyralis.errors import ConfigError, ModelError
from pyralis.ops._triton import INTERPRETED, kernels_on_cpu

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROUNDINGS = {"float32": torch.float32, "stochastic": torch.bfloat16, "split": torch.bfloat16}


class Net(nn.Module):
    """Layers with padding between their parameters; `odd` is used in every other step, `never` in none."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 64))
        self.second = nn.Sequential(nn.Linear(64, 130), nn.Linear(130, 30))
        self.odd, self.never = nn.Linear(30, 30), nn.Linear(30, 30)
        self.scale = nn.Parameter(torch.ones(30))
        self.to(device, dtype)
        flatten_parameters([*self.parameters()])

    def forward(self, x: Tensor, step: int) -> Tensor:
        y = self.second(self.first(x).relu()) * self.scale
        return self.odd(y) if step % 2 else y

    @property
    def parts(self) -> list[list[nn.Parameter]]:
        """`odd` and `never` together: a part that always lacks gradients."""
        rest = [*self.odd.parameters(), *self.never.parameters()]
        return [[*self.first.parameters()], [*self.second.parameters()], rest]


def groups(net: Net) -> list[dict[str, Any]]:
    params = [*net.parameters()]
    return [{"params": params[:5], "lr": 1e-2, "weight_decay": 0.0}, {"params": params[5:], "weight_decay": 0.1}]


def make(cls: type[FlatAdamW], net: Net, bits: int, rounding: str) -> Any:
    settings: dict[str, Any] = {"rounding": "nearest" if rounding == "float32" else rounding}
    if cls is BackwardAdamW:
        settings["parts"] = net.parts
    made = cls(groups(net), lr=3e-3, bits=bits, min_8bit_size=1000, seed=5, **settings)
    if isinstance(made, BackwardAdamW):
        made.attach()
    return made


def run(net: Net, optimizer: FlatAdamW, steps: range, schedule: bool = True) -> list[float]:
    losses = []
    for step in steps:
        if schedule:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        x = torch.randn(8, 30, generator=torch.Generator().manual_seed(step)).to(net.scale)
        loss = net(x, step).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
    return losses


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_is_the_flat_optimizers_step_bit_by_bit(bits: int, rounding: str, device: str) -> None:
    plain, ours = (Net(ROUNDINGS[rounding], device) for _ in range(2))
    first, second = make(FlatAdamW, plain, bits, rounding), make(BackwardAdamW, ours, bits, rounding)
    assert run(plain, first, range(7)) == run(ours, second, range(7))
    assert_same(plain, ours)
    for p, q in zip(plain.parameters(), ours.parameters()):
        theirs, mine = first.state[p], second.state[q]
        for name in theirs.keys() - {"step", "qmap1", "qmap2"}:
            assert torch.equal(theirs[name], mine[name]), name


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, and run on the GPU above")
@pytest.mark.parametrize(("bits", "rounding"), [(32, "stochastic"), (8, "split")])
def test_kernels_take_parts_as_the_whole(bits: int, rounding: str) -> None:
    plain, ours = (Net(torch.bfloat16) for _ in range(2))
    with kernels_on_cpu():
        run(plain, make(FlatAdamW, plain, bits, rounding), range(3))
        run(ours, make(BackwardAdamW, ours, bits, rounding), range(3))
    assert_same(plain, ours)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("into", [BackwardAdamW, FlatAdamW])
def test_resumes_bit_by_bit_in_either(bits: int, rounding: str, into: type[FlatAdamW]) -> None:
    whole, half = Net(ROUNDINGS[rounding]), Net(ROUNDINGS[rounding])
    run(whole, make(BackwardAdamW, whole, bits, rounding), range(8))
    optimizer = make(BackwardAdamW, half, bits, rounding)
    run(half, optimizer, range(4))
    file = io.BytesIO()
    torch.save([half.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, states = torch.load(file, weights_only=True)
    resumed = Net(ROUNDINGS[rounding])
    resumed.load_state_dict(weights)
    optimizer = make(into, resumed, bits, rounding)
    optimizer.load_state_dict(states)
    run(resumed, optimizer, range(4, 8))
    assert_same(resumed, whole)


def test_gradients_are_gone_when_the_backward_is_done() -> None:
    net = Net(torch.float32)
    optimizer = make(BackwardAdamW, net, 32, "float32")
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.ones(2, 30), 0).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    changed = [not torch.equal(p, q) for p, q in zip(before, net.parameters())]
    assert changed == [not name.startswith(("odd", "never")) for name, _ in net.named_parameters()]
    sizes = [sum(-(-p.numel() // 256) * 256 for p in part) for part in net.parts]
    assert optimizer.grads.numel() == max(sizes)


def test_norm_is_that_of_all_gradients() -> None:
    plain, ours = Net(torch.float32), Net(torch.float32)
    first, second = make(FlatAdamW, plain, 32, "float32"), make(BackwardAdamW, ours, 32, "float32")
    for step in range(3):
        run(plain, first, range(step, step + 1))
        run(ours, second, range(step, step + 1))
        torch.testing.assert_close(second.grad_norm, first.grad_norm)


def test_a_part_whose_gradient_is_not_finite_is_left_as_it_is() -> None:
    net = Net(torch.float32)
    optimizer = make(BackwardAdamW, net, 32, "float32")
    with torch.no_grad():
        net.scale.fill_(1e30)  # what lies below gets gradients that overflow
    before = [p.detach().clone() for p in net.first.parameters()]
    (1e10 * net(torch.ones(2, 30), 0)).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, net.first.parameters()))
    assert float(optimizer.skipped) == 1.0
    steps = {name: int(optimizer.state[p]["step"]) for name, p in net.named_parameters()}
    assert steps["scale"] == 1
    assert steps["first.0.weight"] == 0


def test_detached_it_leaves_backwards_alone() -> None:
    net = Net(torch.float32)
    optimizer = make(BackwardAdamW, net, 32, "float32")
    optimizer.detach()
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.ones(2, 30), 0).sum().backward()
    assert net.scale.grad is not None
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters()))


def test_refuses() -> None:
    net = Net(torch.float32)
    with pytest.raises(ConfigError, match="cannot clip"):
        BackwardAdamW(net.parameters(), max_norm=1.0)
    with pytest.raises(ModelError, match="others lie between"):
        BackwardAdamW(net.parameters(), parts=[[net.first[0].weight, net.second[0].weight]])
