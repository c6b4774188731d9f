"""Checkpoints that a disk damaged: found by name, passed over, refused where they are asked for."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyralis.errors import ConfigError
from pyralis.train.checkpoints.checkpoint import RUN_NAME, find_start_point, list_checkpoints, write_json
from pyralis.train.checkpoints.checksums import CHECKSUMS_NAME, damage, write_checksums
from tests.train.runs import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint-3"
    (made / "sub").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    (made / "sub" / "state.json").write_text("{}")
    write_checksums(made)
    return made


def test_whole(folder: Path) -> None:
    assert damage(folder) is None
    (folder / "later.txt").write_text("not of the checkpoint")
    assert damage(folder) is None
    (folder / CHECKSUMS_NAME).unlink()
    assert damage(folder) is None  # another program's


def test_one_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[1_200_000] ^= 4
    path.write_bytes(content)
    assert damage(folder) == "model.safetensors is not what was written"


def test_cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert damage(folder) == "model.safetensors has 1,279,999 bytes, 1,280,000 were written"


def test_missing(folder: Path) -> None:
    (folder / "sub" / "state.json").unlink()
    assert damage(folder) == "sub/state.json is missing"


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 3}', '{"a": {"bytes": "many"}}', "\x00\xff"])
def test_checksums_that_are_damaged_themselves(folder: Path, content: str) -> None:
    (folder / CHECKSUMS_NAME).write_text(content, encoding="latin-1")
    assert damage(folder) == f"{CHECKSUMS_NAME} is damaged"


def test_no_file_outside_is_read(folder: Path) -> None:
    write_json(folder / CHECKSUMS_NAME, {"../../etc/passwd": {"bytes": 1, "xxh3_128": ""}})
    assert "outside the folder" in str(damage(folder))


def interrupted(output: Path) -> None:
    record = json.loads((output / RUN_NAME).read_text())
    write_json(output / RUN_NAME, record | {"status": "interrupted"})


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(tiny_llama, chats, output, max_steps=3, save_steps=1)
    interrupted(output)
    whole, damaged = output / "checkpoint-1", output / "checkpoint-2"
    shutil.rmtree(output / "checkpoint-3")
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(b"\x00" + weights.read_bytes()[1:])
    effective = json.loads((output / "pyralis_config.json").read_text())
    start = find_start_point(output, effective)
    assert start.checkpoint == whole
    assert start.notes[0].startswith("DAMAGED: checkpoint-2 (adapter_model.safetensors is not what was written)")
    with pytest.raises(ConfigError, match="checkpoint-2 is damaged: adapter_model"):
        run(tiny_llama, chats, output, max_steps=3, save_steps=1, resume_from_checkpoint=str(damaged))
    assert run(tiny_llama, chats, output, max_steps=3, save_steps=1).summary.steps == 3
    assert [damage(path) for _, path in list_checkpoints(output)] == [None] * 3

    interrupted(output)
    for _, path in list_checkpoints(output):
        (path / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(
        ConfigError, match=r"every checkpoint in .* is damaged: checkpoint-3 \(optimizer\.pt has 4 bytes"
    ):
        run(tiny_llama, chats, output, max_steps=4, save_steps=1)


def test_a_full_disk(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    """Files may not grow past a limit, as on a full disk: a clear error, the last checkpoint whole, nothing half."""
    output = tmp_path / "out"
    run(tiny_llama, chats, output, max_steps=1, save_steps=1)
    interrupted(output)
    before = list_checkpoints(output)
    script = (
        "import sys; from pathlib import Path; from tests.train.runs import run\n"
        "run(*map(Path, sys.argv[1:]), max_steps=2, save_steps=1)"
    )

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))

    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_llama), str(chats), str(output)],
        capture_output=True, text=True, preexec_fn=limited, check=False, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert "SaveError" in done.stderr, done.stderr[-2000:]
    assert "checkpoint-1 is whole: the same command goes on from it" in done.stderr
    assert "GiB are free there" in done.stderr
    assert list_checkpoints(output) == before
    assert damage(before[0][1]) is None
    assert not list(output.glob(".saving-*"))
    assert run(tiny_llama, chats, output, max_steps=2, save_steps=1).summary.steps == 2


@pytest.mark.parametrize(
    "content",
    ['{"a": {"bytes": Infinity, "xxh3_128": "0"}}', '{"a\\u0000": {"bytes": 1, "xxh3_128": "0"}}', "[" * 50_000],
)
def test_checksums_that_are_none(folder: Path, content: str) -> None:
    (folder / CHECKSUMS_NAME).write_text(content)
    assert damage(folder) == f"{CHECKSUMS_NAME} is damaged"
