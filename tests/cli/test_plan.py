"""`pyralis plan CONFIG --gpu GPU`: what is predicted of configs as they are shipped, on GPUs that are not here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyralis.cli.main import build_app
from pyralis.errors import ConfigError, ModelError
from pyralis.models.published import published_config
from pyralis.train.config.train_config import config_from_dict, load_config
from pyralis.train.plan_run import PlannedRun, plan_run
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "train_args").glob("*/*/*.json"))
CONFIGS = {  # billions of parameters, of which in 4 bits
    "sft/qlora/llama3-8b-sft-qlora": (8.03, 6.98),
    "sft/lora/qwen2.5-7b-sft-lora": (7.62, 0.0),
    "sft/full/llama3.2-1b-sft-full": (1.24, 0.0),
    "dpo/qlora/gemma2-9b-dpo-qlora": (9.24, 8.32),
    "pretrain/qlora/mistral-7b-pretrain-qlora": (7.25, 6.98),
    "sft/qlora/phi3-mini-sft-qlora": (3.82, 3.62),
}
QLORA = "sft/qlora/llama3-8b-sft-qlora"
GPUS = ["t4", "rtx4090", "h100"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("pyralis.train.plan_run.hub_is_reachable", lambda: False)
    monkeypatch.setattr("pyralis.train.plan_run.prepare_data", _no_tokenizer)


def _no_tokenizer(config: Any) -> Any:
    raise ModelError("the hub is not asked in tests")


def planned(name: str, gpu: str, **more: Any) -> PlannedRun:
    return plan_run(load_config(ROOT / "train_args" / f"{name}.json").config, gpu, **more)


@pytest.mark.parametrize("name", CONFIGS)
def test_six_configs_on_three_gpus(name: str) -> None:
    runs = [planned(name, gpu) for gpu in GPUS]
    size, packed = CONFIGS[name]
    for run in runs:
        memory = run.plan.memory
        expected = 2 * (size - packed) + 0.516 * packed
        full_on_a_t4 = run.config.train_mode == "full" and run.rates.capability < (8, 0)  # float32 master weights
        assert memory.standing.weights / 1e9 == pytest.approx(expected * (2 if full_on_a_t4 else 1), rel=0.01)
        assert run.plan.fits == (run.largest_batch >= run.config.per_device_train_batch_size)
        if run.plan.fits:
            assert memory.reserved < run.rates.memory_bytes
            assert run.longest >= run.length // 64 * 64
        assert run.hours is not None
    speeds = [run.tokens_per_second for run in runs]
    assert speeds == sorted(speeds)
    assert speeds[2] > 8 * speeds[0]
    assert [run.largest_batch for run in runs] == sorted(run.largest_batch for run in runs)
    assert runs[2].plan.fits


def test_every_preset_of_the_package_has_a_shape() -> None:
    names = {json.loads(path.read_text())["model_name_or_path"] for path in PRESETS}
    assert len(names) > 20
    for name in names:
        assert published_config(name) is not None, name


def test_a_folder_is_read_and_its_data_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    rows = [{"messages": [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b" * 20}]}] * 6
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = config_from_dict(
        {
            "model_name_or_path": str(folder),
            "train_file": str(tmp_path / "rows.jsonl"),
            "output_dir": str(tmp_path / "out"),
            "max_seq_length": 512,
            "train_mode": "lora",
            "per_device_train_batch_size": 2,
        }
    ).config
    run = plan_run(config, "t4")
    assert run.data is not None
    assert run.data.exact
    assert run.data.longest == run.length < 200
    assert run.data.tokens == 6 * run.length
    assert run.plan.batch.rows == 2
    assert plan_run(config, "t4", batch=3, length=64).plan.batch.tokens == 192


def test_what_cannot_be_planned_says_why(tmp_path: Path) -> None:
    values = {"train_file": "data/sample_sft.jsonl", "output_dir": str(tmp_path), "max_seq_length": 64}
    with pytest.raises(ModelError, match="its shape is not known"):
        plan_run(config_from_dict({**values, "model_name_or_path": "someone/some-model"}).config, "t4")
    stock = config_from_dict({**values, "model_name_or_path": str(make_tiny_model(tmp_path / "gpt2", "gpt2"))})
    with pytest.raises(ModelError, match="layer 0 runs stock"):
        plan_run(stock.config, "t4")
    with pytest.raises(ConfigError, match="--gpu"):
        planned(QLORA, "gpu-of-tomorrow")


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_the_command(columns: int, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = CliRunner().invoke(
        build_app(),
        ["plan", f"train_args/{QLORA}.json", "--gpu", "24GB", "--json", str(out)],
        env={"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "\x1b" not in text
    for words in ("Memory at the peak", "Time of a micro-batch", "tokens/s", "largest batch", "longest context"):
        assert words in text
    tables = [line for line in text.splitlines() if line.startswith("  ")]
    assert max(map(len, tables)) <= columns
    values = json.loads(out.read_text())
    assert values["plan"]["fits"]
    assert len(values["plan"]["policies"]) == 32
    assert values["tokens_per_second"] > 100


def test_a_plan_that_does_not_fit_fails() -> None:
    result = CliRunner().invoke(build_app(), ["plan", f"train_args/{QLORA}.json", "--gpu", "6GB"])
    assert result.exit_code == 1
    assert "it does not fit" in result.stdout
    assert "tokens/s" not in result.stdout


def test_the_page_shows_what_the_command_prints() -> None:
    page = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    ((command, shown),) = re.findall(r"```bash\npyralis (plan .*)\n```\n\n```\n(.*?)```", page, re.DOTALL)
    result = CliRunner().invoke(build_app(), command.split(), env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
    assert [line.rstrip() for line in result.stdout.rstrip().splitlines()] == shown.rstrip().splitlines()
