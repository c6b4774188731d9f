"""Config files that strain a parser: refused in words, at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyralis.errors import ConfigError
from pyralis.train.config.read_config import parse_overrides, read_config_file
from pyralis.train.config.train_config import config_from_dict

LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("c.yaml", LAUGHS, "more than 100,000 values"),
        ("c.yaml", "a: &a [*a]", "stand inside of what they name"),
        ("c.yaml", "a: &a {b: *a}", "stand inside of what they name"),
        ("c.yaml", "a: \x00", "unacceptable character"),
        ("c.yaml", "[" * 3000, "nested too deeply"),
        ("c.yaml", "a: !!timestamp x", "not valid YAML"),
        ("c.yaml", "a: !!int _", "not valid YAML"),
        ("c.yaml", "a: 2001-99-99", "month must be in 1..12"),
        ("c.yaml", "a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("c.yaml", "a: 1\na: 2", "^[^ ]*c.yaml: the key 'a' is given twice"),
        ("c.json", '{"a":' * 50_000, "nested too deeply"),
        ("c.json", '{"a": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit"),
        ("c.json", '{"a": 1,\n', "not valid JSON at line 2"),
        ("c.json", "", "not valid JSON at line 1"),
    ],
)
def test_what_strains_a_parser(tmp_path: Path, name: str, text: str, reason: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_config_file(file)


def test_aliases_that_are_meant(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("base: &b {lora_rank: 8}\nfirst: *b\nsecond: {<<: *b, seed: 1}\n")
    read = read_config_file(file)
    assert read == {"base": {"lora_rank": 8}, "first": {"lora_rank": 8}, "second": {"lora_rank": 8, "seed": 1}}


def test_overrides_that_are_no_yaml() -> None:
    with pytest.raises(ConfigError, match="unacceptable character"):
        parse_overrides(["output_dir=\ud800"])


@pytest.mark.parametrize("name", ["a" * 5000, "zero\0byte", "~" + "a" * 300])
def test_names_that_no_file_can_have(name: str) -> None:
    fields = {"train_file": "rows.jsonl", "max_seq_length": 64}
    named = {"model_name_or_path": name, "deepspeed": name, "load_adapter": name, "output_dir": "out"}
    config_from_dict(named | fields)  # they may yet come
    if not name.startswith("~"):
        with pytest.raises(ConfigError, match="is no name for a folder"):
            config_from_dict({"model_name_or_path": "m", "output_dir": name} | fields)
