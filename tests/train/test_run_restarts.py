"""Runs in a folder where something lies already: begun anew, resumed, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pyralis.errors import ConfigError
from pyralis.train.checkpoints.checkpoint import RUN_NAME, write_json
from pyralis.train.checkpoints.checksums import CHECKSUMS_NAME
from pyralis.train.checkpoints.lock import only_run_in
from tests.train.runs import run


def interrupt(output: Path) -> None:
    """As if the run had been stopped: it may go on from its checkpoint."""
    record = json.loads((output / RUN_NAME).read_text())
    write_json(output / RUN_NAME, record | {"status": "interrupted"})


def test_what_an_earlier_run_left_is_not_mixed_with_the_new_result(
    tiny_llama: Path, chats: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run(tiny_llama, chats, output, max_steps=1)
    (output / "notes.txt").write_text("mine")
    run(tiny_llama, chats, output, max_steps=1, train_mode="full", overwrite_output_dir=True)
    names = {path.name for path in output.iterdir()}
    assert "model.safetensors" in names
    assert "notes.txt" in names
    assert not [name for name in names if name.startswith("adapter_")]
    assert not hasattr(AutoModelForCausalLM.from_pretrained(output), "peft_config")

    run(tiny_llama, chats, output, max_steps=1, overwrite_output_dir=True)
    assert not (output / "config.json").exists()
    assert (output / "adapter_config.json").exists()


@pytest.mark.parametrize("key", ["model_name_or_path", "load_adapter"])
def test_a_run_does_not_write_over_what_it_starts_from(key: str, tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    start = tiny_llama
    if key == "load_adapter":
        start = tmp_path / "adapter"
        run(tiny_llama, chats, start, max_steps=1)
    values = {} if key == "model_name_or_path" else {key: str(start)}
    with pytest.raises(ConfigError, match=f"is the {key} itself"):
        run(tiny_llama, chats, start, cache_dir=str(tmp_path), **values)


def test_two_runs_do_not_share_a_folder(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with only_run_in(output), pytest.raises(ConfigError, match="another run is writing"):
        run(tiny_llama, chats, output)
    assert list(output.iterdir()) == []
    assert run(tiny_llama, chats, output, max_steps=1).status == "finished"


def test_changed_data_is_not_resumed_on(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(tiny_llama, chats, output, max_steps=1)
    interrupt(output)
    rows = chats.read_text(encoding="utf-8")
    chats.write_text(rows.replace("red", "rad"), encoding="utf-8")
    with pytest.raises(ConfigError, match="content of train_file has changed"):
        run(tiny_llama, chats, output, max_steps=2)
    chats.write_text(rows, encoding="utf-8")
    assert run(tiny_llama, chats, output, max_steps=2).summary.steps == 2


def test_a_checkpoint_that_is_named_must_fit(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    run(tiny_llama, chats, first, max_steps=1)
    checkpoint = str(first / "checkpoint-1")
    with pytest.raises(ConfigError, match="holds an adapter"):
        run(tiny_llama, chats, tmp_path / "full", train_mode="full", resume_from_checkpoint=checkpoint)
    with pytest.raises(ConfigError, match="lora_rank: was 4, now 8"):
        run(tiny_llama, chats, tmp_path / "rank", lora_rank=8, resume_from_checkpoint=checkpoint)
    on = run(tiny_llama, chats, tmp_path / "on", max_steps=2, resume_from_checkpoint=checkpoint)
    assert on.summary.steps == 2


def test_a_damaged_checkpoint_of_another_program(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    """Without checksums it is found when it is read."""
    output = tmp_path / "out"
    run(tiny_llama, chats, output, max_steps=2, save_steps=1)
    interrupt(output)
    (output / "checkpoint-2" / CHECKSUMS_NAME).unlink()
    (output / "checkpoint-2" / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(ConfigError, match="checkpoint-2 cannot be resumed from: its optimizer state is damaged"):
        run(tiny_llama, chats, output, max_steps=3, save_steps=1)
    (output / "checkpoint-2" / "trainer_state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"trainer_state\.json is damaged"):
        run(tiny_llama, chats, output, max_steps=3, save_steps=1)
    shutil.rmtree(output / "checkpoint-2")
    assert run(tiny_llama, chats, output, max_steps=3, save_steps=1).summary.steps == 3
    (output / RUN_NAME).write_text("{")
    assert run(tiny_llama, chats, output, max_steps=1, overwrite_output_dir=True).summary.steps == 1


def test_an_output_dir_that_cannot_be_one(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        run(tiny_llama, chats, chats, cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be made"):
        run(tiny_llama, chats, chats / "below", cache_dir=str(tmp_path))
