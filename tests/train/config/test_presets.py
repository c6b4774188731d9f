from __future__ import annotations

from pathlib import Path

import pytest

from pyralis.train.config.presets import MODELS, MODES, TASKS, ZERO3_CONFIG, preset_text, presets, write_presets
from pyralis.train.config.recipes import billions_of
from pyralis.train.config.train_config import config_from_dict

TRAIN_ARGS = Path(__file__).parents[3] / "train_args"


def test_train_args_hold_exactly_the_presets() -> None:
    expected = {name: preset_text(values) for name, values in presets().items()}
    found = {
        str(path.relative_to(TRAIN_ARGS)): path.read_text(encoding="utf-8")
        for path in sorted(TRAIN_ARGS.rglob("*.json"))
    }
    assert found == expected, "run: make train-args"
    assert len(found) == len(MODELS) * len(TASKS) * len(MODES) + 1 == 163


def test_writing_presets(tmp_path: Path) -> None:
    assert write_presets(tmp_path) == 163
    written = (tmp_path / "sft/qlora/llama3-8b-sft-qlora.json").read_text(encoding="utf-8")
    assert written == (TRAIN_ARGS / "sft/qlora/llama3-8b-sft-qlora.json").read_text(encoding="utf-8")


def test_every_preset_is_a_valid_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TRAIN_ARGS.parent)
    configs = {name: values for name, values in presets().items() if values is not ZERO3_CONFIG}
    for name, values in configs.items():
        loaded = config_from_dict(values)
        config = loaded.config
        assert loaded.notes == (), name
        assert config.architecture.native, name
        task, mode, file = name.split("/")
        assert (config.task_type, config.train_mode) == (task, mode)
        assert file.endswith(f"-{task}-{mode}.json")
        assert config.output_dir == f"output/{file.removesuffix('.json')}"
        assert bool(config.deepspeed) == (mode == "full" and any(m.name in file and m.billions >= 6 for m in MODELS))
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 0.135),
        ("meta-llama/Llama-3.2-1B", 1),
        ("mistralai/Mixtral-8x7B-v0.1", 56),
        ("a/b", 7),
    ],
)
def test_sizes_in_names(name: str, billions: float) -> None:
    assert billions_of(name) == billions
