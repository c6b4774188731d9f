"""`python train.py --train_args_file CONFIG`: Firefly's command line, and what torchrun and deepspeed add to it."""

from __future__ import annotations

import argparse
import os
import sys

USAGE = "python train.py --train_args_file CONFIG.json [--check] [key=value ...]"


def parse(argv: list[str]) -> list[str]:
    """Arguments of `pyralis train` for those of Firefly's train.py.

    `--train_args_file FILE` (or `=FILE`), `--local_rank N` of older launchers (goes to LOCAL_RANK
    where they run several processes), `--key value` pairs
    of TrainingArguments as `key=value` overrides.

    Raises:
        SystemExit: no `--train_args_file`, as argparse says it.
    """
    parser = argparse.ArgumentParser(prog="train.py", usage=USAGE, allow_abbrev=False)
    parser.add_argument("--train_args_file", required=True, help="a JSON or YAML config; see `pyralis config explain`")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="check the config and print what would run")
    known, rest = parser.parse_known_args(argv)
    # Alone it means one process; set without the rest of a launcher's environment it would start a process group.
    if known.local_rank is not None and known.local_rank >= 0 and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", str(known.local_rank))
    overrides = []
    position = 0
    while position < len(rest):
        word = rest[position]
        if not word.startswith("--"):
            overrides.append(word)  # key=value
        elif "=" in word:
            key, _, value = word[2:].partition("=")
            overrides.append(f"{key.replace('-', '_')}={value}")
        elif position + 1 < len(rest) and not rest[position + 1].startswith("--"):
            overrides.append(f"{word[2:].replace('-', '_')}={rest[position + 1]}")
            position += 1
        else:
            overrides.append(f"{word[2:].replace('-', '_')}=true")
        position += 1
    return ["train", known.train_args_file, *overrides, *(["--check"] if known.check else [])]


def main() -> None:
    from pyralis.cli.main import main as pyralis

    pyralis(parse(sys.argv[1:]))
