"""How to do a run again: what the report says is enough to do it."""

from __future__ import annotations

import shlex
from pathlib import Path

from pyralis.train.checkpoints.checkpoint import CONFIG_NAME, run_record
from pyralis.train.config.train_config import load_config
from pyralis.train.report.reproduction import reproduction
from pyralis.train.run import train
from tests.train.runs import quiet, run


def test_the_command_gives_the_same_losses(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    first = run(tiny_llama, chats, tmp_path / "my run", max_steps=2, seed=7)
    found = reproduction(first.output_dir, {})
    assert (found.seed, found.exact) == (7, True)
    assert found.data_digest == run_record(first.output_dir)["data_digest"]
    program, command, config, override = shlex.split(found.command)
    assert (program, command) == ("pyralis", "train")
    again = train(config, [override.replace("NEW_FOLDER", str(tmp_path / "again"))], console=quiet())
    assert again.summary.last_loss == first.summary.last_loss
    assert run_record(again.output_dir)["data_digest"] == found.data_digest
    assert found.command in (first.output_dir / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    assert load_config(first.output_dir / CONFIG_NAME).config.seed == 7


def test_on_a_gpu_bits_are_the_same_where_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "pyralis_run.json").write_text('{"status": "finished", "device": "NVIDIA H100, 79 GiB"}')
    assert not reproduction(tmp_path, {}).exact
    assert reproduction(tmp_path, {"deterministic": True}).exact
    assert reproduction(tmp_path, {}).seed is None
