"""`pyralis data preview` and `pyralis data stats` on a model folder that holds only a config and a tokenizer."""

from __future__ import annotations

import json
import re
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


def test_preview(config: str) -> None:
    output = run("preview", config, "-n", "2")
    assert "【Answer 0.<|im_end|>】" in output
    assert "row 2:" in output
    assert "row 3:" not in output
    assert "row 3:" in run("preview", config)
    assert "row 1:" in run("preview", config, "--eval", "eval_split=0.25")


def test_stats(config: str, tmp_path: Path) -> None:
    output = run("stats", config, "eval_split=0.25", "per_device_train_batch_size=4", "num_train_epochs=2")
    assert "train.jsonl: 20 rows as conversation" in output
    assert "held out of train_file: 5 rows" in output
    assert "8 steps in 2 epochs" in output
    assert re.search(r"packing: true: \d rows, \d\d\.\d% full", output)
    assert re.search(r"^40 to 44  15  █+$", output, re.MULTILINE)
    assert "padding" not in run("stats", config, "packing=true").split("batches")[0]
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('\n{"conversation": 5}\n')
    listed = re.search(r"listed in (\S+)", run("stats", config, "on_bad_row=skip"))
    assert listed is not None
    assert json.loads(Path(listed[1]).read_text())["row"] == 21


def test_errors(config: str) -> None:
    with pytest.raises(DataError, match="There is no evaluation data"):
        run("preview", config, "--eval")
    with pytest.raises(DataError, match="nothing can be learnt from any of the 20 rows"):
        run("stats", config, "max_seq_length=8")
