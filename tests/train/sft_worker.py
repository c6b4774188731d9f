"""Trains a tiny model by TRL's SFTTrainer or ours, under `accelerate launch`: `sft_worker.py trl|pyralis OUT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trl

from pyralis.cli.processes import end_if_grouped
from pyralis.train.sft_trainer import SFTTrainer
from tests.train.sft_runs import CHATS, trained


def main() -> None:
    kind, out = sys.argv[1:]
    cls = {"trl": trl.SFTTrainer, "pyralis": SFTTrainer}[kind]
    for settings in ({"gradient_accumulation_steps": 2}, {"packing": True, "per_device_train_batch_size": 1}):
        trainer = trained(cls, Path(out).parent, CHATS * 2, settings=settings)
        assert trainer.accelerator.num_processes == 2
        if trainer.is_world_process_zero():
            names = ("loss", "grad_norm", "num_tokens")
            rows = [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]
            with Path(out).open("a") as file:
                file.write(json.dumps(rows) + "\n")
    end_if_grouped(0)  # with its trainer alive


if __name__ == "__main__":
    main()
