"""`pyralis data` on a model folder that holds only a config and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from pyralis.cli.main import build_app
from pyralis.errors import DataError

ROWS = [{"conversation": [{"human": f"Question {i}?", "assistant": f"Answer {i}."}]} for i in range(20)]


@pytest.fixture
def config(tmp_path: Path) -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>", "</s>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 259}))
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    values: dict[str, Any] = {
        "model_name_or_path": str(tmp_path / "model"),
        "train_file": str(tmp_path / "train.jsonl"),
        "max_seq_length": 200,
        "template_name": "yi",
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "output"),
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


def run(*args: str) -> str:
    result = CliRunner().invoke(build_app(), ["data", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def test_report_and_preview(config: str) -> None:
    output = run(config, "--rows", "2", "eval_split=0.25")
    assert "train.jsonl: 20 rows as conversation" in output
    assert "5 rows are held out" in output
    assert "【Answer 0.<|im_end|>】" in output
    assert "row 2:" in output
    assert "row 3:" not in output
    assert "row 1:" in run(config, "--eval", "eval_split=0.25")
    assert "row 1:" not in run(config, "--rows", "0")


def test_errors(config: str) -> None:
    with pytest.raises(DataError, match="There is no evaluation data"):
        run(config, "--eval")
    with pytest.raises(DataError, match="nothing can be learnt from any of the 20 rows"):
        run(config, "max_seq_length=8")
