"""What a command line asks for."""

from __future__ import annotations

import pytest

from pyralis.bench.train.peers import PEERS
from pyralis.bench.train.settings import (
    Case,
    PeerChoice,
    Shape,
    TrainBench,
    cases,
    parse_loops,
    parse_mode,
    parse_peers,
    parse_shapes,
)
from pyralis.errors import ConfigError


def test_shapes_loops_and_modes() -> None:
    assert parse_shapes("1x1024, 2x2048") == (Shape(1, 1024), Shape(2, 2048))
    assert str(Shape(2, 2048)) == "2x2048"
    assert parse_loops("trainer,bare") == ("trainer", "bare")
    assert parse_mode("lora") == "lora"


@pytest.mark.parametrize("text", ["", "1024", "0x12", "2x1", "ax2", "2x"])
def test_bad_shapes(text: str) -> None:
    with pytest.raises(ConfigError, match="expected batch x tokens, as "):
        parse_shapes(text)


def test_bad_loops_and_modes() -> None:
    with pytest.raises(ConfigError, match="expected bare or trainer"):
        parse_loops("bare,sideways")
    with pytest.raises(ConfigError, match="expected one of qlora, lora, full"):
        parse_mode("dora")


def test_peers_have_defaults_and_variants_in_their_own_order() -> None:
    assert parse_peers("pyralis,hf", [], "qlora") == (
        PeerChoice("pyralis", ("keep", "keep+graph", "offload_input")),
        PeerChoice("hf", ("False", "True", "True+kbit")),
    )
    assert parse_peers("hf", ["hf=True+kbit,True"], "qlora") == (PeerChoice("hf", ("True", "True+kbit")),)
    assert parse_peers("hf,hf", [], "lora") == (PeerChoice("hf", ("False", "True")),)


@pytest.mark.parametrize(
    ("peers", "checkpointing", "message"),
    [
        ("nobody", [], "unknown peer nobody; expected one of pyralis, hf"),
        ("hf", ["unsloth=True"], "expected PEER=VARIANT,... of one of hf"),
        ("hf", ["hf"], "hf has the variants False, True with --mode lora"),
        ("hf", ["hf=True+kbit"], "hf has the variants False, True with --mode lora"),
    ],
)
def test_bad_peers(peers: str, checkpointing: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        parse_peers(peers, checkpointing, "lora")


def test_cases_go_variant_by_variant_and_a_peer_without_the_loop_has_its_own() -> None:
    bench = TrainBench("tiny", "qlora", (Shape(1, 8), Shape(2, 8)), (), loops=("bare",))
    found = cases(bench, PeerChoice("hf", ("True", "False")))
    assert found[:2] == [Case("hf", "True", "bare", Shape(1, 8)), Case("hf", "True", "bare", Shape(2, 8))]
    assert [case.variant for case in found] == ["True", "True", "False", "False"]
    assert {case.loop for case in cases(bench, PeerChoice("hf-trl", ("True",)))} == {"trainer"}


def test_every_default_is_a_variant() -> None:
    for info in PEERS.values():
        assert set(info.defaults) <= set(info.variants)
