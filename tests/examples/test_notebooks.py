"""The notebooks of examples/: saved without outputs; their cells run on a tiny model, and as they are on SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.examples.pages import ROOT, PageRun
from tests.tiny import make_tiny_model

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_is_saved_without_outputs(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in content["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@every_notebook
def test_on_a_tiny_model(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    (tmp_path / "clone").mkdir()
    PageRun(tmp_path / "clone", model, monkeypatch).notebook(notebook)


@pytest.mark.full
@every_notebook
def test_on_smollm2(notebook: Path, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = PageRun(tmp_path, smollm2, monkeypatch)
    run.notebook(notebook, shortened=False)
    if notebook.stem == "chat_and_export":
        assert run.output.count("Pyralis") > 2, "the answers name it, from the adapter and from the merged model"
