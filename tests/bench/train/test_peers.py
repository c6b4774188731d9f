"""The runners that need no other library: what they compute is the same, from one start, in every way of running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyralis.bench.train import made_model as module
from pyralis.bench.train.losses import excess
from pyralis.bench.train.made_model import made_model
from pyralis.bench.train.peers.base import Peer
from pyralis.bench.train.peers.hugging_face import Compiled, HuggingFace, Trl
from pyralis.bench.train.peers.ours import Pyralis
from pyralis.bench.train.settings import Job, Loop, Mode, PeerChoice, Shape, TrainBench
from pyralis.models.surgery import report

SHAPE = Shape(2, 24)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compute_in", lambda: (torch.device("cpu"), torch.float32))


def peer(kind: type[Peer], mode: Mode, tmp_path: Path, **bench: Any) -> Peer:
    settings = TrainBench("tiny", mode, (SHAPE,), (), rank=4, steps=3, **bench)
    made = made_model("tiny", mode, 4, tmp_path)
    return kind(Job(settings, made, PeerChoice("", ()), tmp_path / "results.jsonl", 0.0, None))


def losses(ran: Peer, variant: str, loop: Loop = "bare") -> tuple[float, ...]:
    ran.load(variant)
    measured = ran.run(variant, loop, SHAPE, warmup=1)
    assert len(measured.seconds) == len(measured.cpu_seconds) == 3
    assert all(0 < cpu <= wall for cpu, wall in zip(measured.cpu_seconds, measured.seconds))
    assert measured.first_step > 0
    return measured.losses


@pytest.mark.parametrize("mode", ["qlora", "lora", "full"])
def test_all_learn_the_same(mode: Mode, tmp_path: Path) -> None:
    hf, ours = peer(HuggingFace, mode, tmp_path), peer(Pyralis, mode, tmp_path)
    expected = losses(hf, "False")
    assert len(expected) == 3
    assert expected[2] < expected[1] < expected[0]
    for variant in ("True", *(("True+kbit",) if mode == "qlora" else ())):
        assert losses(hf, variant) == pytest.approx(expected, abs=2e-5)
    for variant in ("keep", "recompute_cheap", "recompute_layer", "offload_input"):
        assert losses(ours, variant) == pytest.approx(expected, abs=2e-5), variant
        assert report(ours.model).fast_layers == 2


@pytest.mark.parametrize("kind", [HuggingFace, Pyralis])
def test_a_trainer_learns_what_a_bare_loop_does(kind: type[Peer], tmp_path: Path) -> None:
    ran = peer(kind, "qlora", tmp_path)
    variant = "keep" if kind is Pyralis else "False"
    assert losses(ran, variant, "trainer") == pytest.approx(losses(ran, variant), abs=2e-4)


def test_trl(tmp_path: Path) -> None:
    """It rounds the adapter to bfloat16, which shows, and is tolerated."""
    expected = losses(peer(HuggingFace, "qlora", tmp_path), "False")
    ran = peer(Trl, "qlora", tmp_path)
    found = losses(ran, "True", "trainer")
    assert excess(found, expected) < 1
    assert losses(ran, "True", "trainer") == found  # from the start again


@pytest.mark.full
def test_compiled(tmp_path: Path) -> None:
    expected = losses(peer(HuggingFace, "lora", tmp_path), "False")
    ran = peer(Compiled, "lora", tmp_path)
    assert losses(ran, "False") == pytest.approx(expected, abs=1e-4)


def test_every_run_starts_anew(tmp_path: Path) -> None:
    ran = peer(Pyralis, "lora", tmp_path)
    assert losses(ran, "keep") == losses(ran, "keep")


@pytest.mark.parametrize("silent", ["lora_A", "layers.0", "down_proj"])
def test_a_lost_gradient_is_noticed(silent: str, tmp_path: Path) -> None:
    hf = peer(HuggingFace, "qlora", tmp_path, learning_rate=2e-3)
    expected = losses(hf, "False")
    for name, parameter in hf.model.named_parameters():
        if parameter.requires_grad and silent in name:
            parameter.register_hook(torch.zeros_like)
    assert excess(losses(hf, "False"), expected) > 1
