"""`pyralis train --gpus N`: processes started, stopped and ended together, and what their exit code is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pyralis.cli import processes
from pyralis.cli.processes import check_gpus, run_processes
from pyralis.errors import ConfigError

ALONE = [sys.executable, "-c"]
RANK = "import os, sys, time; rank = int(os.environ['RANK']);"


def python(code: str) -> list[str]:
    return [*ALONE, RANK + code]


def test_each_gets_its_place(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = f"print(*(os.environ[n] for n in {names}), file=open(sys.argv[1] + str(rank), 'w'))"
    assert run_processes(3, [*python(code), str(tmp_path / "out")]) == 0
    said = [(tmp_path / f"out{rank}").read_text().split() for rank in range(3)]
    assert [words[:5] for words in said] == [[str(r), str(r), "3", "3", "127.0.0.1"] for r in range(3)]
    assert len({words[5] for words in said}) == 1


@pytest.mark.parametrize(
    ("code", "expected"),
    [("sys.exit(2)", 2), ("sys.exit(75)", 75), ("sys.exit(3 if rank else 0)", 3), ("os.kill(os.getpid(), 9)", 137)],
)
def test_the_code_of_the_first_that_failed(code: str, expected: int) -> None:
    assert run_processes(2, python(code)) == expected


def test_who_waits_for_a_failed_one_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.3)
    began = time.monotonic()
    assert run_processes(2, python("sys.exit(4) if rank else time.sleep(60)")) == 4
    assert time.monotonic() - began < 30


def test_sigterm_reaches_all(tmp_path: Path) -> None:
    code = (
        "import signal; from pathlib import Path; here = Path(sys.argv[1]);"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); (here / str(rank)).touch(); time.sleep(60)"
    )

    def stop() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    assert run_processes(2, [*python(code), str(tmp_path)]) == 75
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        check_gpus(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(2)
    with pytest.raises(ConfigError, match="3, but 2 GPU"):
        check_gpus(3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun has started"):
        check_gpus(2)


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"lora_rankk": 4}')
    done = pyralis("train", str(file), "--gpus", "2").communicate(timeout=120)[0]
    assert done.count("lora_rankk") == 1


def test_the_end_of_one_of_a_group(tmp_path: Path) -> None:
    """What waits for the end is done, what is printed arrives, and nothing is taken down behind it."""
    code = (
        "import atexit, sys, torch.distributed; from pyralis.cli.processes import end_if_grouped; end_if_grouped(1);"
        "torch.distributed.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=0, world_size=1);"
        "atexit.register(print, 'the last line'); print('before', end=' '); end_if_grouped(7); print('never')"
    )
    done = subprocess.run([*ALONE, code, str(tmp_path / "meet")], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (7, "before the last line\n")


def pyralis(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pyralis", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
