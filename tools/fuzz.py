"""Untrusted input at random: it is used, or refused in words. python tools/fuzz.py TARGET [--runs 10000] [--seed 1]

Atheris (`pip install -e '.[fuzz]'`) makes the input, led by which lines of Pyralis, PyYAML and Jinja it reaches. A case
must end well or with a PyralisError. Anything else is a crash: another exception, 5 s of CPU time, and any of what
`Guard` forbids: a file written, moved or removed outside of the case's own folder, a process, a connection, a pickle
that asks for a class. Crashes are counted by where they arise; the first input of each is kept in --keep with its
traceback, and `--again FILE` runs it once more.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

SECONDS = 5  # of CPU time a case, where Python can be interrupted
WAIT = 60  # seconds after which libFuzzer ends the whole process: a hang inside of C
MEMORY = 6 << 30  # bytes of address space beyond what is there at the start
LONGEST = 2048  # bytes of input
# Audit event -> which of its arguments are paths that it changes.
WRITES = {
    "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,), "os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,),
    "os.truncate": (0,), "os.chmod": (0,), "shutil.rmtree": (0,),
}  # fmt: skip
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")


class Hang(BaseException):
    """A case took too long."""


class Forbidden(BaseException):
    """A case did what no input may lead to."""


class Guard:
    """While `folder` is set: raises Forbidden for writes outside of it and for FORBIDDEN, before they are done."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.broken: str | None = None  # remembered: whoever catches BaseException would hide it
        sys.addaudithook(self._look)

    def _look(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self._refuse(f"{event} {args[:2]!r}")
        paths = [args[place] for place in WRITES.get(event, ())]
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            paths = [args[0]]
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike) and not self._inside(os.fsdecode(path)):
                self._refuse(f"{event} {os.fsdecode(path)}")

    def _inside(self, path: str) -> bool:
        folder, _ = self.folder, setattr(self, "folder", None)
        try:
            # The last part is not followed: a link is replaced or removed, not what it points to.
            whole = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
            return whole.startswith(f"{folder}/") or whole in (folder, os.devnull)
        finally:
            self.folder = folder

    def _refuse(self, what: str) -> NoReturn:
        self.broken = what
        raise Forbidden(what)


class Fuzzer:
    """Runs cases, counts what became of them, and keeps the first input of each crash."""

    def __init__(self, target: Callable[[Any, Path], None], runs: int, keep: Path) -> None:
        from fuzz_draw import Draw
        from pyralis.errors import PyralisError

        self._target, self._runs, self._keep = target, runs, keep
        self._draw, self._refused_by = Draw, PyralisError
        self.guard = Guard()
        self.counts: Counter[str] = Counter()
        self.crashes: Counter[str] = Counter()
        self._root = Path(os.path.realpath(tempfile.mkdtemp(prefix="pyralis-fuzz-")))
        self._started = time.monotonic()

    def __call__(self, data: bytes) -> None:
        self.run(data)
        if sum(self.counts.values()) >= self._runs:
            self.report()
            shutil.rmtree(self._root, ignore_errors=True)
            sys.stdout.flush()
            os._exit(bool(self.crashes))  # libFuzzer would end the process in the same way, without a word

    def run(self, data: bytes) -> BaseException | None:
        """One case; what it crashed with."""
        folder = self._root / "case"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "tmp").mkdir(parents=True)
        tempfile.tempdir = str(folder / "tmp")
        os.chdir(folder)
        self.guard.folder, self.guard.broken = str(folder), None
        crash: BaseException | None = None
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            self._target(self._draw(data), folder)
            outcome = "used"
        except self._refused_by as error:
            outcome, crash = "refused", _unprintable(error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            outcome, crash = "", error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.guard.folder = None
        if crash is None and self.guard.broken:
            crash = Forbidden(self.guard.broken)
        self.counts["crashed" if crash else outcome] += 1
        if crash is not None:
            self._note(crash, data)
        return crash

    def _note(self, crash: BaseException, data: bytes) -> None:
        frames = traceback.extract_tb(crash.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.name}" for f in frames if "/pyralis/" in f.filename] or ["?"]
        last = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
        key = f"{type(crash).__name__} in {ours[-1]} from {last}"
        self.crashes[key] += 1
        if self.crashes[key] > 1:
            return
        name = "".join(c if c.isalnum() else "-" for c in key)[:120]
        (self._keep / f"{name}.bin").write_bytes(data)
        text = "".join(traceback.format_exception(crash)).encode("utf-8", "backslashreplace")
        (self._keep / f"{name}.txt").write_bytes(text)
        print(f"CRASH {key}: {str(crash)[:200]!r}, kept as {self._keep / name}.bin", flush=True)

    def report(self) -> None:
        seconds = time.monotonic() - self._started
        parts = ", ".join(f"{self.counts[name]:,} {name}" for name in ("used", "refused", "crashed"))
        print(f"{sum(self.counts.values()):,} cases in {seconds:,.0f} s: {parts}")
        for key, count in self.crashes.most_common():
            print(f"  {count:6,}  {key}")


def _unprintable(error: Exception) -> UnicodeError | None:
    try:
        str(error).encode()
    except UnicodeError as problem:
        return problem
    return None


def _on_time_up(number: int, frame: FrameType | None) -> NoReturn:
    raise Hang(f"{SECONDS} s of CPU time")


def main() -> None:
    import atheris

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/tiny.py makes the tiny model and tokenizer
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    # It names each module that it changes.
    with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["pyralis", "yaml", "jinja2"]):
        from fuzz_targets import TARGETS, warm_up
        from pyralis.cli.quiet import quiet_libraries
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("output/fuzz"), help="folder for inputs that crash")
    parser.add_argument("--again", type=Path, help="run this kept input once, with its traceback")
    args = parser.parse_args()
    keep = (args.keep / args.target).resolve()
    keep.mkdir(parents=True, exist_ok=True)
    again = args.again.read_bytes() if args.again else None
    target = TARGETS[args.target]
    quiet_libraries()
    signal.signal(signal.SIGPROF, _on_time_up)
    _limit_memory()
    warm_up(target)
    fuzzer = Fuzzer(target, args.runs, keep)
    if again is not None:
        crash = fuzzer.run(again)
        fuzzer.report()
        if crash is not None:
            traceback.print_exception(crash)
        sys.exit(crash is not None)
    print(f"{args.target}: {args.runs:,} cases, seed {args.seed}", flush=True)
    options = [f"-seed={args.seed}", f"-max_len={LONGEST}", "-len_control=0", f"-timeout={WAIT}", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], *options, "-verbosity=0", f"-artifact_prefix={keep}/", str(_corpus(args.seed))], fuzzer)
    atheris.Fuzz()


def _corpus(seed: int) -> Path:
    """Random inputs to start from: libFuzzer's own first ones are a few bytes long."""
    folder = Path(tempfile.mkdtemp(prefix="pyralis-fuzz-corpus-"))
    generator = random.Random(seed)
    for number in range(64):
        (folder / str(number)).write_bytes(generator.randbytes(generator.randint(16, LONGEST)))
    return folder


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


if __name__ == "__main__":
    main()
