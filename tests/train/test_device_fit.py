"""What a GPU cannot follow, on GPUs that are not here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from pyralis.errors import ConfigError, ModelError
from pyralis.train.device_fit import check_gpu
from pyralis.train.lean import LeanTrainer
from pyralis.train.loss_scaling import warn_of_lost_gradients
from pyralis.train.old_trainer_names import say_once
from tests.tiny import build_tiny_model

GPU = torch.device("cuda", 0)


def arguments(device: torch.device = GPU, **values: Any) -> Any:
    return SimpleNamespace(device=device, **{"bf16": False, "bf16_full_eval": False, **values})


def mapped(*places: Any) -> Any:
    return SimpleNamespace(hf_device_map={str(number): place for number, place in enumerate(places)})


@pytest.fixture(params=[True, False], ids=["ampere", "turing"])
def has_bfloat16(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if request.param else (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    return bool(request.param)


@pytest.mark.parametrize("name", ["bf16", "bf16_full_eval"])
def test_bfloat16_that_is_emulated(has_bfloat16: bool, name: str) -> None:
    check_gpu(arguments(), None)
    check_gpu(arguments(torch.device("cpu"), **{name: True}), None)
    if has_bfloat16:
        check_gpu(arguments(**{name: True}), None)
        return
    with pytest.raises(ModelError, match="Tesla T4 has no bfloat16: use float16"):
        check_gpu(arguments(**{name: True}), None)


@pytest.mark.parametrize("place", ["cuda:1", 1, torch.device("cuda", 1)])
def test_a_model_on_another_gpu(place: Any) -> None:
    with pytest.raises(ConfigError, match=r"on cuda:1, this process trains on cuda:0.*CUDA_VISIBLE_DEVICES=1"):
        check_gpu(arguments(), mapped(place, place))


@pytest.mark.parametrize("places", [(), ("cuda:0",), ("cuda",), ("cpu",), (0, 1), (0, "disk"), ("cpu", 1)])
def test_maps_that_a_trainer_serves(places: tuple[Any, ...]) -> None:
    check_gpu(arguments(), mapped(*places))
    check_gpu(arguments(torch.device("cpu")), mapped(1))


class _OnGpu(TrainingArguments):
    device = property(lambda self: GPU)  # type: ignore[assignment]


def test_a_trainer_looks(tmp_path: Path) -> None:
    model = build_tiny_model()
    model.hf_device_map = {"": "cuda:1"}
    with pytest.raises(ConfigError, match="The model is on cuda:1"):
        LeanTrainer(model, _OnGpu(str(tmp_path), use_cpu=True, report_to="none"))


def test_float16_without_loss_scaling_is_said(caplog: pytest.LogCaptureFixture) -> None:
    half = build_tiny_model().half()
    for precision, model, said in (("no", half, True), ("fp16", half, False), ("no", build_tiny_model(), False)):
        say_once.cache_clear()
        caplog.clear()
        with caplog.at_level("WARNING"):
            warn_of_lost_gradients(precision, model)
        assert ("its loss is not scaled" in caplog.text) is said
    say_once.cache_clear()


def test_a_launcher_may_have_chosen_loss_scaling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`accelerate launch --mixed_precision fp16`, of which `args.fp16` says nothing."""
    rows = [{"input_ids": list(range(4, 12)), "labels": list(range(4, 12))}]
    for chosen in ("fp16", "no"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", chosen)
        say_once.cache_clear()
        caplog.clear()
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_strategy="no")
        with caplog.at_level("WARNING"):
            trainer = LeanTrainer(build_tiny_model().half(), args, train_dataset=rows)
            monkeypatch.setattr(Trainer, "train", lambda *_, **__: None)
            trainer.train()
        assert not args.fp16
        assert ("its loss is not scaled" in caplog.text) is (chosen == "no")
    say_once.cache_clear()
