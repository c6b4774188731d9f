"""The description of the machine, and what works on it."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import torch

from pyralis.train.report import environment
from pyralis.train.report.environment import code_commits, describe_environment, git_commit, probe_capabilities


def test_it_describes_this_machine() -> None:
    found = describe_environment()
    packages = dict(found.packages)
    assert found.python == platform.python_version()
    assert packages["torch"] == torch.__version__
    assert {"pyralis", "transformers", "peft", "bitsandbytes"} <= set(packages)
    assert len(found.gpus) == torch.cuda.device_count()
    assert found.cpu
    assert found.cores >= 1
    assert found.memory_gib > 0.1


def test_a_package_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert [name for name, _ in describe_environment().packages] == ["torch"]


def test_it_tries_bf16_fp16_and_nf4() -> None:
    found = probe_capabilities()
    assert [capability.name for capability in found] == ["bf16", "fp16", "NF4"]
    assert all(capability.works for capability in found)


def test_a_slow_dtype_is_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(a: torch.Tensor, b: torch.Tensor) -> float:
        return 0.001 if a.dtype is torch.float32 else 0.02

    monkeypatch.setattr(environment, "_matmul_seconds", seconds)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bf16 = probe_capabilities()[0]
    assert (bf16.works, bf16.note) == (True, "20 times slower than float32 on this CPU: use float32")


def test_what_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError("no kernel for this device\nand more")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", fail)
    nf4 = probe_capabilities()[2]
    assert (nf4.works, nf4.note) == (False, "no kernel for this device")


def test_the_commit_of_a_folder(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = git_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 12
    (tmp_path / "untracked").write_text("1")
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_code_is_named_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "git_commit", lambda folder: "abc" if folder == Path.cwd() else None)
    assert code_commits()["working directory"] == "abc"
