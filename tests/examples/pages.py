"""Runs the code blocks of a page in the order in which they stand, in a folder that looks like a fresh clone.

- `bash`: each line that begins with `pyralis` or `python FILE.py` runs in this process, others by bash.
- `python`: runs; names live to the end of the page.
- `yaml` that begins with a comment `# NAME.yaml`: is written to that file.

Models are exchanged for `model`, and training is cut to two steps: what a page shows must run, not finish. Lines that
install something, or that need another machine or a run gone wrong, are left out (LEFT_OUT).
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyralis.cli.main import main

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT_OUT = re.compile(
    r"^(make|pip|python3? -m venv|\.|source|nvidia-smi|accelerate|torchrun|deepspeed|pyralis replay) "
)
MODELS = re.compile(r"(?<![\w/-])((unsloth|Qwen|meta-llama|NousResearch|HuggingFaceTB)/[\w.-]+|smollm2-135m-instruct)")
SHORT = {"max_steps": 2, "gradient_accumulation_steps": 1, "tokenize_num_workers": 1, "sample_max_new_tokens": 4}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of each fenced block."""
    return [(language, code) for language, code in FENCE.findall(page.read_text(encoding="utf-8"))]


def commands(code: str) -> list[str]:
    """The lines of a shell block, continued ones joined, comments and empty ones left out."""
    lines = (line.strip() for line in code.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#") and not LEFT_OUT.match(line)]


class PageRun:
    """One page, or one notebook, being run in `folder` with `model` (a model's folder) for every model."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self.monkeypatch = folder, model, monkeypatch
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.output = ""
        for name in ("data", "examples", "src", "train_args", "train.py"):
            (folder / name).symlink_to(ROOT / name)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PYRALIS_CACHE", str(folder / "cache"))
        monkeypatch.setattr(sys, "path", list(sys.path))

    def page(self, page: Path) -> None:
        for language, code in blocks(page):
            if language == "bash":
                for line in commands(code):
                    self.command(line)
            elif language == "python":
                self.python(code)
            elif language == "yaml" and (name := re.match(r"# ([\w.-]+\.yaml)\n", code)):
                (self.folder / name[1]).write_text(self.own_model(code), encoding="utf-8")

    def notebook(self, path: Path, *, shortened: bool = True) -> None:
        """The code cells in one namespace, started where Jupyter would: in a folder of the clone."""
        (self.folder / "notebooks").mkdir()
        self.monkeypatch.chdir(self.folder / "notebooks")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                self.python("".join(cell["source"]), shortened=shortened)

    def python(self, code: str, *, shortened: bool = True) -> None:
        code = self.own_model(code)
        if shortened:
            code = re.sub(r"(\bmax_steps\b\W{1,3})\d+", r"\g<1>2", code)
        with self.heard():
            exec(compile(code, "a block of the page", "exec"), self.names)

    def command(self, line: str) -> str:
        """Run one line; returns what it wrote to stdout and stderr."""
        before = len(self.output)
        words = shlex.split(line, comments=True)
        if words[0] == "pyralis":
            self.pyralis(words[1:])
        elif words[0] == "python" and words[1].endswith(".py"):
            self.script(words[1:])
        else:
            done = subprocess.run(["bash", "-euc", line], capture_output=True, text=True, check=False)
            self.output += done.stdout + done.stderr
            assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return self.output[before:]

    def pyralis(self, words: list[str]) -> None:
        words = [self.own_model(word) for word in words]
        if words[0] in ("train", "data") and "--check" not in words:
            words += self.shortened(words)
        with self.heard(), pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code in (0, None), f"pyralis {' '.join(words)}:\n{self.output[-3000:]}"

    def script(self, words: list[str]) -> None:
        more = self.shortened(words) if words[0] == "train.py" and "--check" not in words else []
        given, sys.argv = sys.argv, [self.own_model(word) for word in words] + more
        try:
            with self.heard(), contextlib.suppress(SystemExit):
                runpy.run_path(words[0], run_name="__main__")
        finally:
            sys.argv = given

    def shortened(self, words: list[str]) -> list[str]:
        """Overrides behind a training command: this model, two steps; what the page itself overrides stays."""
        config = next(word for word in words if word.endswith((".json", ".yaml")))
        said = {word.partition("=")[0] for word in words}
        named = str(yaml.safe_load(Path(config).read_text(encoding="utf-8")).get("model_name_or_path"))
        short = {} if words[0] == "data" else SHORT
        return [
            *([f"model_name_or_path={self.own_model(named)}"] if "model_name_or_path" not in said else []),
            *(f"{name}={value}" for name, value in short.items() if name not in said),
        ]

    def own_model(self, text: str) -> str:
        return MODELS.sub(str(self.model), text)

    @contextlib.contextmanager
    def heard(self) -> Any:
        """Collect what is written to stdout and stderr."""
        heard = io.StringIO()
        try:
            with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
                yield
        finally:
            self.output += heard.getvalue()
