"""How to do a run again: from the config and the record that it leaves."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyralis.train.checkpoints.checkpoint import CONFIG_NAME, run_record


@dataclass(frozen=True, slots=True)
class Reproduction:
    """commits: of code, by place. exact: whether the same bits come out on the same machine with the same versions."""

    command: str
    seed: int | None
    data_digest: str | None
    commits: Mapping[str, str]
    exact: bool


def reproduction(output_dir: Path, effective: Mapping[str, Any]) -> Reproduction:
    record = run_record(output_dir)
    on_gpu = not str(record.get("device", "")).startswith("CPU")
    return Reproduction(
        command=f"pyralis train {shlex.quote(str(output_dir / CONFIG_NAME))} output_dir=NEW_FOLDER",
        seed=record.get("seed"),
        data_digest=record.get("data_digest"),
        commits=record.get("commits", {}),
        exact=not on_gpu or bool(effective.get("deterministic")),
    )
