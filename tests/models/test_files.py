"""Weights that are missing, damaged or no weights at all are told from their headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyralis.errors import ModelError
from pyralis.models.files import check_weights, read_json
from tests.tiny import build_tiny_model, make_tiny_model


def test_a_whole_model_passes(tmp_path: Path) -> None:
    check_weights(make_tiny_model(tmp_path))


def test_a_truncated_file(tmp_path: Path) -> None:
    file = make_tiny_model(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="was not downloaded wholly"):
        check_weights(tmp_path)


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    file = make_tiny_model(tmp_path) / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        check_weights(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    build_tiny_model().save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of {len(shards)} weight files: {shards[1].name}"):
        check_weights(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (make_tiny_model(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "training_args.bin").write_bytes(b"")  # a pickle, but no weight
    with pytest.raises(ModelError, match="no weights"):
        check_weights(tmp_path)


def test_a_distributed_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    (make_tiny_model(tmp_path) / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ModelError, match=r"__0_0\.distcp"):
        check_weights(tmp_path)
    check_weights(tmp_path, allow_pickle_weights=True)


def test_json_that_is_none(tmp_path: Path) -> None:
    for text, reason in (("{", "cannot be read"), ("[]", "holds a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=reason):
            read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ModelError, match="which is no file of that folder"):
        check_weights(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": 1}', '{"weight_map": {"a": ["b"]}}', "[" * 50_000])
def test_an_index_that_is_none(content: str, tmp_path: Path) -> None:
    (make_tiny_model(tmp_path) / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"has no weight_map|cannot be read"):
        check_weights(tmp_path)


def test_a_link_to_nothing(tmp_path: Path) -> None:
    file = make_tiny_model(tmp_path) / "model.safetensors"
    file.unlink()
    file.symlink_to("nowhere")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read: No such file"):
        check_weights(tmp_path)
