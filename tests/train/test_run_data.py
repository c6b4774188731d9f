"""What a run leaves and reports of its data: the rows left out, what was lost, and the numbers of the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyralis.data.left_out import LEFT_OUT_NAME
from pyralis.errors import DataError
from tests.tiny import make_tiny_model
from tests.train.runs import run


def test_rows_left_out_are_listed_beside_the_result(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    lines = chats.read_text(encoding="utf-8").splitlines()
    data = tmp_path / "bad.jsonl"
    data.write_text("\n".join([*lines, lines[0], "{}", '{"conversation": 1}']) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"bad.jsonl:{len(lines) + 2}: "):
        run(tiny_llama, data, tmp_path / "out")
    run(tiny_llama, data, tmp_path / "out", on_bad_row="skip", max_steps=2, num_train_epochs=1)
    listed = [json.loads(line) for line in (tmp_path / "out" / LEFT_OUT_NAME).read_text("utf-8").splitlines()]
    assert [row["row"] for row in listed] == [len(lines) + 2, len(lines) + 3]
    report = (tmp_path / "out" / "report.html").read_text("utf-8")
    for part in ("bad row", f"bad.jsonl:{len(lines) + 2}", "duplicates", "padding", "with packing"):
        assert part in report, part
    run(tiny_llama, chats, tmp_path / "clean", max_steps=1)
    assert not (tmp_path / "clean" / LEFT_OUT_NAME).exists()
    clean = (tmp_path / "clean" / "report.html").read_text("utf-8")
    assert "bad row" not in clean


def test_the_report_of_packed_rows_says_how_full_they_are(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    run(tiny_llama, chats, tmp_path / "out", packing=True, max_seq_length=192, max_steps=1)
    report = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "packed rows, full to" in report
    assert "with packing" not in report


def test_a_run_that_would_lose_too_much_is_refused_before_a_model_is_loaded(chats: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_tiny_model(folder, "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"more than max_data_lost 0\.05 allows"):
        run(folder, chats, tmp_path / "out", max_seq_length=30, max_data_lost=0.05)
