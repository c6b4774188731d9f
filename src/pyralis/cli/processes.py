"""`pyralis train --gpus N`: one process for each GPU of this machine, with the environment that torchrun gives.

torchrun itself hides what a process ended with, and kills it 30 seconds after a SIGTERM: a run that a scheduler stops
would lose its checkpoint and the exit code that says "start me again".
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from pyralis.cli.stopped import EXIT_CODES

# What a failing process leaves the others waiting for never comes. They end by the same error, or are ended.
GRACE_SECONDS = 15.0
LOOK_SECONDS = 0.1
# Codes of runs that end together: what the first says, the others say soon.
TOGETHER = (0, *EXIT_CODES.values())


def run_processes(count: int, command: Sequence[str]) -> int:
    """Run `command` `count` times beside each other, until all have ended.

    Each gets RANK, LOCAL_RANK, WORLD_SIZE and where to meet. SIGTERM goes on to all of them; Ctrl-C they get from the
    terminal, as we do. When one fails, the others have 15 seconds to end by themselves.

    Returns: the exit code of the first that failed, else 0; 128 + the signal's number where one killed it.
    """
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))}
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
            processes.append(subprocess.Popen(command, env=os.environ | meet | threads | own))
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def check_gpus(count: int) -> None:
    """Raise ConfigError unless there are that many GPUs, or none at all: then `count` processes share the CPU."""
    import torch

    from pyralis.errors import ConfigError

    if count < 1:
        raise ConfigError(f"--gpus is {count}; expected at least 1.")
    visible = torch.cuda.device_count()
    if torch.cuda.is_available() and count > visible:
        raise ConfigError(
            f"--gpus is {count}, but {visible} GPU(s) are visible. CUDA_VISIBLE_DEVICES says which; `pyralis env` "
            "lists them."
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("--gpus starts the processes itself; torchrun has started them already. Use one of the two.")


def end_if_grouped(code: int) -> None:
    """End a process that is one of a group here and now, as if it had come to its end; return if it is not.

    Python would take the group down with the rest of what lives, holding the lock that gloo's threads wait for to let
    go of their last tensors: one run in four did not end, or was aborted, `destroy_process_group` or not.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    atexit._run_exitfuncs()  # trackers send their last lines from there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train_command(config: str, overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pyralis", "train", config, *overrides]


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    first, deadline = 0, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        ended = [code for code in codes if code is not None]
        if first == 0:
            first = next((code for code in ended if code), 0)
        if len(ended) == len(codes):
            return 128 - first if first < 0 else first
        if first not in TOGETHER:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()  # a checkpoint exists whole or not at all
        time.sleep(LOOK_SECONDS)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
