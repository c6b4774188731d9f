"""What a finished run saves: it appears whole in the output folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from pyralis.models.staging import write_text
from pyralis.train.checkpoints.checkpoint import RUN_NAME, STAGING_PREFIX, publish, run_record, write_json
from pyralis.train.checkpoints.save_errors import save_errors_named
from pyralis.train.trainer import PyralisTrainer


def save_result(trainer: PyralisTrainer, output_dir: Path, card: str) -> None:
    """Adapter or model, tokenizer, template, card: written into a folder beside, then moved in. The run's record names
    them first, so that a run that starts anew finds all of them to clear away."""
    staging = output_dir / f"{STAGING_PREFIX}result"
    shutil.rmtree(staging, ignore_errors=True)
    with save_errors_named(f"the result could not be saved into {output_dir}", staging, output_dir):
        trainer.save_model(str(staging))
        write_text(staging / "README.md", card)
        names = sorted(path.name for path in staging.iterdir())
        write_json(output_dir / RUN_NAME, run_record(output_dir) | {"result": names})
        publish(staging, output_dir)
