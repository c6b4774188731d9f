"""Names that differ between library versions: the installed libraries take what we call, and warn of none of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from pyralis.compat import checkpointing_argument, demand_checkpointing, switch_checkpointing
from pyralis.models.surgery import decoder_layers
from pyralis.train.sft_trainer import SFTConfig
from tests.tiny import build_tiny_model


@pytest.fixture(autouse=True)
def nothing_old() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


def test_a_model_is_checkpointed_and_no_longer() -> None:
    model = build_tiny_model()
    layers: Any = decoder_layers(model)
    for on in (True, False, True):
        switch_checkpointing(model, on)
        assert all(layer.gradient_checkpointing is on for layer in layers)
    assert layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": False}


@pytest.mark.parametrize("on", [True, False])
def test_arguments_take_checkpointing(tmp_path: Path, on: bool) -> None:
    name = checkpointing_argument("gradient_checkpointing")
    given: dict[str, Any] = {name: on}
    assert getattr(TrainingArguments(str(tmp_path), use_cpu=True, **given), name) is on


def test_arguments_that_are_built_are_told_later(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    demand_checkpointing(arguments)
    assert arguments.gradient_checkpointing is True
    assert getattr(arguments, checkpointing_argument("gradient_checkpointing")) is True


@pytest.mark.parametrize("value", [None, True, False])
def test_a_config_after_trls_says_nothing_of_the_older_name(tmp_path: Path, value: bool | None) -> None:
    given: dict[str, Any] = {} if value is None else {"gradient_checkpointing": value}
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, **given)
    assert config.gradient_checkpointing is (value is not False)  # TRL's default is True
    assert getattr(config, checkpointing_argument("gradient_checkpointing")) is config.gradient_checkpointing
