"""What a config says of bad and long rows."""

from __future__ import annotations

from typing import Any

import pytest

from pyralis.errors import ConfigError
from pyralis.train.config.train_config import config_from_dict

BASE: dict[str, Any] = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "train_file": "a.jsonl", "max_seq_length": 1024}


def test_defaults_are_strict_about_rows_and_lenient_about_length() -> None:
    config = config_from_dict(BASE).config
    assert (config.on_bad_row, config.on_overlong, config.max_data_lost) == ("error", "truncate", 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on_bad_row": "ignore"}, "on_bad_row: \"ignore\" is not allowed; expected one of 'error', 'skip'"),
        ({"on_overlong": "cut"}, "on_overlong: \"cut\" is not allowed; expected one of 'truncate', 'drop', 'split'"),
        ({"max_data_lost": 50}, "max_data_lost: 50 is not allowed; expected a number, at least 0 and at most 1"),
        ({"on_overlong": "split", "task_type": "dpo"}, "on_overlong: split does not go with task_type: dpo"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(BASE | values)
    assert message in str(caught.value)


def test_packed_documents_are_never_too_long() -> None:
    notes = config_from_dict(BASE | {"task_type": "pretrain", "on_overlong": "split"}).notes
    assert any("on_overlong: has no effect: packed documents are never too long" in note for note in notes)
    apart = config_from_dict(BASE | {"task_type": "pretrain", "on_overlong": "split", "packing": False}).notes
    assert not any("on_overlong" in note for note in apart)
