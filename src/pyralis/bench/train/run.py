"""`pyralis bench train`: prepare, then each peer in a process of its own; whatever is known is written at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from pydantic import TypeAdapter

from pyralis.bench.train.architectures import model_folder
from pyralis.bench.train.peers import PEERS
from pyralis.bench.train.prepare import PREPARED
from pyralis.bench.train.results import RUN_OR_LOADED, Record, Run
from pyralis.bench.train.settings import Job, MadeModel, PeerChoice, TrainBench, cases
from pyralis.compat import installed_versions
from pyralis.errors import ConfigError, PyralisError

POLL_SECONDS = 0.2
LAST_SECONDS = 5.0  # kept back from the time limit for the tables
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "unsloth", "bitsandbytes", "pyralis")
Report = Callable[[str], None]


def measure(
    bench: TrainBench, work_dir: Path, written: Callable[[Record], None], time_limit: float | None, report: Report
) -> Record:
    """Every case of every peer. `written` is called with the record whenever something is added.

    Args:
        work_dir: for the model, jobs and logs; the model stays there and serves again.
        time_limit: seconds for all. Cases that find no time are recorded as not run.

    Raises:
        ConfigError: a model that cannot be made.
        PyralisError: making it failed; the message names the log.
    """
    model_folder(bench.model)
    deadline = None if time_limit is None else time.time() + time_limit - LAST_SECONDS
    for folder in (work_dir, work_dir / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    record, made = _prepared(bench, work_dir, deadline, report)
    written(record)
    for choice in bench.peers:
        if find_spec(PEERS[choice.name].package) is None:
            error = f"{PEERS[choice.name].package} is not installed"
        elif deadline is not None and time.time() > deadline:
            error = "not run: the time was up"
        else:
            report(f"{choice.name}: {', '.join(choice.variants)}")
            error = _run_peer(bench, made, choice, work_dir, deadline, record, written, report)
        done = {run.case for run in record.runs}
        record.runs += [Run(case, error=error) for case in cases(bench, choice) if case not in done]
        written(record)
    return record


def _prepared(bench: TrainBench, work_dir: Path, deadline: float | None, report: Report) -> tuple[Record, MadeModel]:
    report(f"model: {bench.model} ({bench.mode})")
    job, out = work_dir / "prepare.json", work_dir / "prepared.json"
    job.write_bytes(TypeAdapter(TrainBench).dump_json(bench))
    out.unlink(missing_ok=True)
    log = work_dir / "logs" / "prepare.log"
    with _process("prepare", [str(job), str(out)], work_dir, log) as process:
        try:
            process.wait(None if deadline is None else max(deadline - time.time(), 1))
        except subprocess.TimeoutExpired:
            raise PyralisError(
                "--time-limit was over before the model was made: give more, or a smaller model"
            ) from None
    if not out.is_file():
        raise PyralisError(f"the model could not be made: {_last_line(log)} (see {log})")
    prepared = PREPARED.validate_json(out.read_bytes())
    if prepared.made is None:
        raise ConfigError(prepared.error or "the model could not be made")
    return Record(bench, prepared.made.facts, prepared.rates, installed_versions(PACKAGES)), prepared.made


def _run_peer(
    bench: TrainBench, made: MadeModel, choice: PeerChoice, work_dir: Path, deadline: float | None, record: Record,
    written: Callable[[Record], None], report: Report,
) -> str:  # fmt: skip
    """Add what the peer's process tells to the record, as it tells it; why cases may be missing from it."""
    job_file, results, log = (
        work_dir / f"{choice.name}.json", work_dir / f"{choice.name}.jsonl", work_dir / "logs" / f"{choice.name}.log",
    )  # fmt: skip
    results.unlink(missing_ok=True)
    job_file.write_bytes(TypeAdapter(Job).dump_json(Job(bench, made, choice, results, time.time(), deadline)))
    seen = 0
    with _process("worker", [str(job_file)], work_dir, log) as process:
        running = True
        while running:
            running = process.poll() is None
            lines = _whole_lines(results)
            for line in lines[seen:]:
                told = RUN_OR_LOADED.validate_json(line)
                if isinstance(told, Run):
                    record.runs.append(told)
                    report(_progress(told))
                else:
                    record.loaded.append(told)
                written(record)
            seen = len(lines)
            if running and deadline is not None and time.time() > deadline:
                return "not run: the time was up"
            if running:
                time.sleep(POLL_SECONDS)
    if process.returncode == 0:  # it looks at the time itself
        return "not run: the time was up"
    return f"ended with status {process.returncode}: {_last_line(log)}"


@contextmanager
def _process(module: str, arguments: list[str], work_dir: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process of this package in `work_dir`, where libraries leave what they compile; ended with the block."""
    source = str(Path(__file__).parents[3])
    environment = {
        "CUDA_VISIBLE_DEVICES": "0",  # one GPU, unless the caller has chosen
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", f"pyralis.bench.train.{module}", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=work_dir, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _whole_lines(path: Path) -> list[bytes]:
    if not path.is_file():
        return []
    return path.read_bytes().rpartition(b"\n")[0].splitlines()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"


def _progress(run: Run) -> str:
    case = run.case
    took = run.error if run.measured is None else f"{run.seconds * 1e3:.1f} ms"
    return f"  {case.variant} {case.loop} {case.shape}: {took}"
