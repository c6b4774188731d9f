"""The proofs themselves must be able to fail."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from tests.ops.harness import Accuracy, assert_deterministic, guarded, oracle_gradients, random

CPU = torch.device("cpu")


def test_accuracy_accepts_rounding_and_nothing_more() -> None:
    oracle = random(400, dtype=torch.float64, device=CPU, seed=0)
    good = Accuracy()
    good.add("x", oracle.bfloat16(), oracle.bfloat16(), oracle)
    good.check()
    for wrong in (oracle.bfloat16() * 1.01, oracle.bfloat16() + 0.01, oracle.bfloat16().roll(1)):
        bad = Accuracy()
        bad.add("x", wrong, oracle.bfloat16(), oracle)
        with pytest.raises(AssertionError, match=r"x: .*error"):
            bad.check()


def test_one_bad_element_is_found() -> None:
    oracle = random(10000, dtype=torch.float64, device=CPU, seed=0)
    ours = oracle.bfloat16()
    ours[77] += 0.1
    accuracy = Accuracy()
    accuracy.add("x", ours, oracle.bfloat16(), oracle)
    with pytest.raises(AssertionError, match="largest error"):
        accuracy.check()


def test_a_comparison_too_coarse_for_one_percent_fails() -> None:
    oracle = random(400, dtype=torch.float64, device=CPU, seed=0)
    accuracy = Accuracy()
    accuracy.add("x", oracle.float(), (oracle * 1.05).float(), oracle)
    with pytest.raises(AssertionError, match="an error of 1 % is not noticed"):
        accuracy.check()


def test_nan_and_nothing_fail() -> None:
    oracle = random(4, dtype=torch.float64, device=CPU, seed=0)
    with pytest.raises(AssertionError, match="NaN"):
        Accuracy().add("x", torch.full((4,), float("nan")), oracle.float(), oracle)
    with pytest.raises(AssertionError, match="nothing was compared"):
        Accuracy().check()


def test_guards() -> None:
    buffer = guarded(3, 5, dtype=torch.bfloat16, device=CPU, stride=8)
    with pytest.raises(AssertionError, match="unwritten"):
        buffer.check()
    buffer.view.zero_()
    buffer.check()
    torch.as_strided(buffer.storage, (1,), (1,), buffer.view.storage_offset() + 5).zero_()  # just past the first row
    with pytest.raises(AssertionError, match="outside"):
        buffer.check()


def test_determinism() -> None:
    runs = count()
    assert_deterministic(lambda: (torch.ones(3),))
    with pytest.raises(AssertionError, match="two runs differ"):
        assert_deterministic(lambda: (torch.full((3,), next(runs)),))


def test_oracle_gradients() -> None:
    x = torch.tensor([2.0, 3.0], dtype=torch.float64)
    outputs, gradients = oracle_gradients(lambda x: x**2, (x,), (torch.ones(2),))
    assert outputs[0].tolist() == [4.0, 9.0]
    assert gradients[0].tolist() == [4.0, 6.0]
