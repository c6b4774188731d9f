"""Output folders: what lies in one, whether a run may start, resume or must be refused, and atomic writes."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyralis.errors import ConfigError
from pyralis.models.staging import write_text
from pyralis.train.checkpoints.checksums import damage

CONFIG_NAME = "pyralis_config.json"
RUN_NAME = "pyralis_run.json"
STAGING_PREFIX = ".saving-"
STATE_NAME = "trainer_state.json"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")

# What may differ between an unfinished run and the config that resumes it: none of these changes a gradient already
# taken. Longer training is allowed; it changes the schedule from the resumed step on.
FREE_TO_CHANGE = frozenset(
    {
        "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "cache_dir", "run_name", "report_to", "project",
        "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "save_total_limit", "save_steps",
        "save_strategy", "save_only_model", "logging_steps", "logging_strategy", "logging_first_step", "eval_steps",
        "eval_strategy", "eval_delay", "eval_on_start", "eval_file", "per_device_eval_batch_size", "num_train_epochs",
        "early_stopping_patience", "early_stopping_threshold", "load_best_model_at_end", "sample_at_eval",
        "max_steps", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "tokenize_num_workers", "sample_prompts", "sample_max_new_tokens",
        "gradient_checkpointing", "acceleration", "use_unsloth", "on_nan", "push_to_hub", "hub_token", "hub_model_id",
        "local_rank", "ddp_timeout",
    }
)  # fmt: skip


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file of a run. Raises ConfigError where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): delete it, or set overwrite_output_dir: true.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is damaged (no JSON object): delete it, or set overwrite_output_dir: true.")
    return value


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints, oldest first. Staging folders of a killed save are not among them."""
    if not output_dir.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in output_dir.iterdir() if p.is_dir() and (m := _CHECKPOINT.match(p.name))]
    return sorted((step, path) for step, path in found if (path / STATE_NAME).is_file())


def rotate_checkpoints(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints above `limit` (None or 0: keep all); the best and the newest stay."""
    if not limit or limit <= 0:
        return
    checkpoints = [path for _, path in list_checkpoints(output_dir)]
    keep = {checkpoints[-1].resolve()} if checkpoints else set()
    if best is not None:
        keep.add(Path(best).resolve())
    excess = len(checkpoints) - max(limit, len(keep))
    for path in checkpoints:
        if excess <= 0:
            break
        if path.resolve() not in keep:
            shutil.rmtree(path, ignore_errors=True)
            excess -= 1


@dataclass(frozen=True, slots=True)
class StartPoint:
    """How a run begins: afresh (`checkpoint` None) or from a checkpoint, with what there is to say about it."""

    checkpoint: Path | None
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int | None:
        """The optimizer step of the checkpoint."""
        if self.checkpoint is None:
            return None
        path = self.checkpoint / STATE_NAME
        step = read_object(path).get("global_step")
        if not isinstance(step, int):
            raise ConfigError(f"{path} is damaged: its global_step is {step!r}, expected a number of steps.")
        return step


def _different_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = (set(old) | set(new)) - FREE_TO_CHANGE
    return sorted(k for k in keys if old.get(k) != new.get(k))


def _check_same_run(output_dir: Path, effective: Mapping[str, Any]) -> None:
    """Raise ConfigError if the run in `output_dir` had a config that `effective` does not continue."""
    saved_path = output_dir / CONFIG_NAME
    if not saved_path.is_file():
        return
    saved = read_object(saved_path)
    different = _different_keys(saved, effective)
    if different:
        lines = "\n".join(f"  {k}: was {saved.get(k)!r}, now {effective.get(k)!r}" for k in different)
        raise ConfigError(
            f"{output_dir} holds a run of another config:\n{lines}\n"
            "Set these back to resume it, choose another output_dir, or set overwrite_output_dir: true to start anew."
        )


def _check_kind(checkpoint: Path, effective: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the checkpoint holds what the run trains, a model or an adapter, as safetensors."""
    is_adapter = (checkpoint / "adapter_config.json").is_file()
    if is_adapter == (effective.get("train_mode") == "full"):
        raise ConfigError(
            f"resume_from_checkpoint: {checkpoint} holds {'an adapter' if is_adapter else 'a whole model'}, which "
            f"train_mode: {effective.get('train_mode')} cannot go on from."
        )
    if not any(checkpoint.glob("*.safetensors")):
        raise ConfigError(f"resume_from_checkpoint: {checkpoint} has no weights as safetensors.")


def check_same_data(start: StartPoint, digest: str) -> None:
    """Raise ConfigError if the run being resumed learnt from files of another content."""
    if start.checkpoint is None:
        return
    then = run_record(start.checkpoint.parent).get("data_digest")
    if then is not None and then != digest:
        raise ConfigError(
            f"the content of train_file has changed since {start.checkpoint} was saved, so that run cannot go on where "
            "it was. Put the data back, choose another output_dir, or set overwrite_output_dir: true to start anew."
        )


def find_start_point(
    output_dir: Path,
    effective: Mapping[str, Any],
    *,
    resume: str | bool | None = "auto",
    overwrite: bool = False,
) -> StartPoint:
    """Decide how a run into `output_dir` begins.

    Args:
        output_dir: the run's folder; need not exist.
        effective: the effective config, compared with that of an unfinished run found there.
        resume: "auto" (resume an unfinished run if there is one), True (there must be one), False/None (never), or a
            checkpoint folder.
        overwrite: start anew although the folder holds a run.

    Raises:
        ConfigError: the folder holds a finished run, or an unfinished one that this config does not continue.
    """
    if isinstance(resume, str) and resume.lower() not in ("auto", "true", "false", ""):
        path = Path(resume).expanduser()
        if not (path / STATE_NAME).is_file():
            near = ", ".join(p.name for _, p in list_checkpoints(path.parent)) or "none"
            raise ConfigError(
                f"resume_from_checkpoint: {resume} is no whole checkpoint (no {STATE_NAME} in it); "
                f"checkpoints beside it: {near}."
            )
        if (problem := damage(path)) is not None:
            raise ConfigError(
                f"resume_from_checkpoint: {resume} is damaged: {problem}. Name another checkpoint, or set "
                "resume_from_checkpoint: auto, which goes on from the newest whole one."
            )
        _check_kind(path, effective)
        _check_same_run(path.parent, effective)
        return StartPoint(path, (f"resuming from {path}",))
    if isinstance(resume, str):
        resume = {"true": True, "false": False, "": False}.get(resume.lower(), "auto")

    checkpoints = list_checkpoints(output_dir)
    if overwrite and resume is not True:
        there = checkpoints or (output_dir / RUN_NAME).exists()
        notes = (f"overwrite_output_dir: the earlier run in {output_dir} is replaced",) if there else ()
        return StartPoint(None, notes)
    status = run_status(output_dir)
    if status == "finished":
        raise ConfigError(
            f"output_dir {output_dir} already holds a finished run. Choose another output_dir, or set "
            "overwrite_output_dir: true to replace it (on the command line: overwrite_output_dir=true)."
        )
    if not checkpoints:
        if resume is True:
            raise ConfigError(f"resume_from_checkpoint: true, but {output_dir} holds no whole checkpoint.")
        return StartPoint(None)
    newest = checkpoints[-1][1]
    if not resume:
        raise ConfigError(
            f"{output_dir} holds an unfinished run (newest checkpoint: {newest.name}). Set "
            "resume_from_checkpoint: auto to continue it, choose another output_dir, or set "
            "overwrite_output_dir: true to start anew."
        )
    step, whole, damaged = _newest_whole(output_dir, checkpoints)
    _check_kind(whole, effective)
    _check_same_run(output_dir, effective)
    return StartPoint(whole, (*damaged, f"resuming the unfinished run in {output_dir} from step {step}"))


def _newest_whole(output_dir: Path, checkpoints: Sequence[tuple[int, Path]]) -> tuple[int, Path, list[str]]:
    """(step, folder, a note on each newer one that is damaged); ConfigError if all are."""
    damaged: list[str] = []
    for step, path in reversed(checkpoints):
        problem = damage(path)
        if problem is None:
            notes = [f"DAMAGED: {it} is passed over; the run goes on from an earlier checkpoint" for it in damaged]
            return step, path, notes
        damaged.append(f"{path.name} ({problem})")
    raise ConfigError(
        f"every checkpoint in {output_dir} is damaged: {'; '.join(damaged)}. Put a whole one there, or set "
        "overwrite_output_dir: true to start anew."
    )


def run_status(output_dir: Path) -> str | None:
    """`running`, `interrupted`, `stopped` by a NaN, `finished`, or None where no run has begun."""
    status = run_record(output_dir).get("status")
    return None if status is None else str(status)


def run_record(output_dir: Path) -> dict[str, Any]:
    """What `pyralis_run.json` holds; empty where no run has begun."""
    path = output_dir / RUN_NAME
    return read_object(path) if path.is_file() else {}


def prepare_output_dir(output_dir: Path, start: StartPoint) -> None:
    """Make the folder; clear half-written checkpoints. When starting anew clear the earlier run's checkpoints and
    result too: an adapter that stays beside a full model, or the other way round, would be loaded with it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in output_dir.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
    if start.checkpoint is not None:
        return
    for path in output_dir.glob("checkpoint-*"):
        if _CHECKPOINT.match(path.name) and path.is_dir():
            shutil.rmtree(path)
    for path in output_dir.glob("nan-step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in _results(output_dir):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _results(output_dir: Path) -> list[Path]:
    """What of the folder the record of an earlier run calls its result. Names that lead out of it name nothing."""
    try:
        names = run_record(output_dir).get("result")
    except ConfigError:  # a damaged record, which is written anew
        return []
    named = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
    return [path for path in output_dir.iterdir() if path.name in named]


def publish(staging: Path, output_dir: Path) -> None:
    """Move every entry of `staging` into `output_dir`, replacing what has the same name, then drop `staging`."""
    for item in sorted(staging.iterdir()):
        target = output_dir / item.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(item, target)
    staging.rmdir()
