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
from pyralis.engine.recorders import Rerun
from pyralis.engine.step_graphs import use_step_graphs
from pyralis.errors import ModelError
from pyralis.models.surgery import decoder_layers, report
from tests.tiny import make_tiny_model

SHAPE = Shape(2, 24)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compute_in", lambda: (torch.device("cpu"), torch.float32))


def peer(kind: type[Peer], mode: Mode, tmp_path: Path, model: str = "tiny", **bench: Any) -> Any:
    settings = TrainBench(model, mode, (SHAPE,), (), rank=4, **{"steps": 3} | bench)
    made = made_model(model, mode, 4, tmp_path)
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
    for variant in ("keep", "recompute_cheap", "recompute_layer", "offload_input", "keep+resident+graph"):
        assert losses(ours, variant) == pytest.approx(expected, abs=2e-5), variant
        assert report(ours.model).fast_layers == 2


@pytest.mark.parametrize("family", ["gemma2", "qwen2", "phi3"])
def test_a_folder_of_another_family(family: str, tmp_path: Path) -> None:
    """Its weights are quantised by each peer as it loads them."""
    folder = str(make_tiny_model(tmp_path / family, family))
    expected = losses(peer(HuggingFace, "qlora", tmp_path, folder), "True")
    assert losses(peer(Pyralis, "qlora", tmp_path, folder), "keep") == pytest.approx(expected, abs=5e-5)


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


def test_what_ran_stock_is_not_measured_as_ours(tmp_path: Path) -> None:
    ran = peer(Pyralis, "lora", tmp_path)
    ran.load("keep")
    decoder_layers(ran.model)[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match=r"1 of 2 layers stock: .*hook"):
        ran.run("keep", "bare", SHAPE, warmup=1)


def test_what_was_not_replayed_is_not_measured_as_such(tmp_path: Path) -> None:
    ran = peer(Pyralis, "lora", tmp_path, steps=1)
    ran.load("keep+graph")
    ran.graphs = use_step_graphs(ran.model, recorder=Rerun())
    assert len(ran.run("keep+graph", "bare", SHAPE, warmup=4).losses) == 3
    with pytest.raises(ModelError, match="were not replayed: the first steps of a shape"):
        ran.run("keep+graph", "bare", Shape(1, 8), warmup=1)


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
