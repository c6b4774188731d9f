"""Kill a training run again and again: it ends as one left alone. python tools/chaos.py CONFIG OUT [key=value ...]

The run is trained once undisturbed into OUT/whole, and once into OUT/killed, where it gets SIGKILL at a random moment,
every third time while a checkpoint is being written, and is started again, until --kills are done; then it may finish.
Losses, gradient norms and every tensor of the result must be equal, bit by bit (on a GPU: with a config whose steps are
deterministic).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPARED = ("loss", "grad_norm", "learning_rate", "supervised_tokens")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of it. `differences` is empty where the two runs ended alike."""

    kills: int
    in_saves: int  # kills while a checkpoint was being written
    resumed_steps: tuple[int, ...]  # the newest whole checkpoint after each kill, 0 for none
    differences: tuple[str, ...]


def chaos(
    config: Mapping[str, Any], folder: Path, kills: int, seed: int, say: Callable[[str], None] = print
) -> Outcome:
    """`config`: of a run that saves checkpoints; its output_dir is set here."""
    from pyralis.train.checkpoints.checkpoint import list_checkpoints

    generator = random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    _finish(dict(config, output_dir=str(whole)), folder / "whole.log")
    last = max(_steps(whole))
    say(f"undisturbed: {last} steps")
    steps: list[int] = []
    in_saves = 0
    while len(steps) < kills:
        process = _start(dict(config, output_dir=str(killed)), folder / "killed.log")
        # The next kill comes so many steps on that all kills fit, in every third case at the save after that.
        until = _last_step(killed) + generator.randint(
            0, max(1, 2 * (last - _last_step(killed)) // (kills - len(steps) + 2))
        )
        hit = _wait(process, killed, until, len(steps) % 3 == 1, generator.uniform(0, 0.05))
        if not process.is_alive():
            process.join()
            if process.exitcode:
                raise SystemExit(f"the run failed by itself, see {folder / 'killed.log'}")
            break  # it finished before it was hit
        process.kill()
        process.join()
        in_saves += hit
        found = list_checkpoints(killed)
        steps.append(found[-1][0] if found else 0)
        say(f"kill {len(steps)}: {'in a save' if hit else 'elsewhere'}, goes on from step {steps[-1]}")
    _finish(dict(config, output_dir=str(killed)), folder / "killed.log", may_be_finished=True)
    return Outcome(len(steps), in_saves, tuple(steps), tuple(differences(whole, killed)))


def differences(whole: Path, killed: Path) -> list[str]:
    """Every step's figures and every tensor that are not the same."""
    from safetensors.torch import load_file

    a, b = _steps(whole), _steps(killed)
    found = [
        f"step {step}: {a.get(step)} undisturbed, {b.get(step)} killed"
        for step in sorted(a.keys() | b.keys())
        if a.get(step) != b.get(step)
    ]
    for path in sorted(whole.glob("*.safetensors")):
        ours, theirs = load_file(path), load_file(killed / path.name)
        if ours.keys() != theirs.keys():
            found.append(f"{path.name}: other tensors")
        found += [f"{path.name}: {n} differs" for n, t in ours.items() if n in theirs and not t.equal(theirs[n])]
    return found


def _steps(folder: Path) -> dict[int, tuple[Any, ...]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: tuple(row.get(name) for name in COMPARED) for row in rows if row["kind"] == "train"}


def _train(config: dict[str, Any], log: str, may_be_finished: bool) -> None:
    from rich.console import Console

    from pyralis.train.checkpoints.checkpoint import run_status
    from pyralis.train.run import train

    if may_be_finished and run_status(Path(config["output_dir"])) == "finished":
        return
    sys.stdout = sys.stderr = file = open(log, "a", encoding="utf-8")  # noqa: SIM115  a traceback is still to come
    train(config, console=Console(file=file, width=100))


def _start(config: dict[str, Any], log: Path, may_be_finished: bool = False) -> Any:
    """A process of its own, forked from one that has imported everything: seconds saved at each of many starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyralis.train.run"])
    process = context.Process(target=_train, args=(config, str(log), may_be_finished))
    process.start()
    return process


def _finish(config: dict[str, Any], log: Path, may_be_finished: bool = False) -> None:
    process = _start(config, log, may_be_finished)
    process.join()
    if process.exitcode:
        raise SystemExit(f"the run failed, see {log}")


def _last_step(folder: Path) -> int:
    try:
        return max(_steps(folder), default=0)
    except (OSError, ValueError):  # not there yet, or a line half written
        return 0


def _wait(process: Any, folder: Path, step: int, at_save: bool, delay: float) -> bool:
    """Until the run is past `step` and a moment more, or at the next save; True if a checkpoint is being written."""

    def saving() -> bool:
        return any(folder.glob(".saving-checkpoint-*"))

    while process.is_alive() and _last_step(folder) < step:
        time.sleep(0.005)
    while process.is_alive() and at_save and not saving():
        time.sleep(0.0005)
    time.sleep(delay / 5 if at_save else delay)
    return saving()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from pyralis.train.config.train_config import load_config

    args.out.mkdir(parents=True, exist_ok=True)
    config = load_config(args.config, args.overrides).config.effective()
    outcome = chaos(config, args.out, args.kills, args.seed)
    print(f"{outcome.kills} kills, {outcome.in_saves} of them inside a save; {len(outcome.differences)} differences")
    print("\n".join(outcome.differences[:20]))
    sys.exit(bool(outcome.differences))


if __name__ == "__main__":
    main()
