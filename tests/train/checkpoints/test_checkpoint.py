"""How a run begins: afresh, resumed, refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyralis.errors import ConfigError
from pyralis.train.checkpoints.checkpoint import (
    CONFIG_NAME,
    RUN_NAME,
    find_start_point,
    list_checkpoints,
    prepare_output_dir,
    publish,
    rotate_checkpoints,
    write_json,
)

CONFIG = {"train_mode": "lora", "learning_rate": 1e-4, "save_steps": 10}


def make_checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if whole:
        write_json(path / "trainer_state.json", {})
        write_json(path / "adapter_config.json", {})
        (path / "adapter_model.safetensors").touch()
    return path


def unfinished(folder: Path, *steps: int, config: dict | None = None) -> Path:
    for step in steps:
        make_checkpoint(folder, step)
    write_json(folder / CONFIG_NAME, config or CONFIG)
    write_json(folder / RUN_NAME, {"status": "running"})
    return folder


def test_fresh_folder(tmp_path: Path) -> None:
    assert find_start_point(tmp_path / "new", CONFIG).checkpoint is None


def test_auto_resumes_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    unfinished(tmp_path, 2, 10, 9)
    make_checkpoint(tmp_path, 11, whole=False)
    start = find_start_point(tmp_path, CONFIG)
    assert start.checkpoint == tmp_path / "checkpoint-10"
    assert "step 10" in start.notes[0]


def test_what_changes_no_gradient_may_change_on_resume(tmp_path: Path) -> None:
    unfinished(tmp_path, 3)
    assert find_start_point(tmp_path, {**CONFIG, "save_steps": 99}).checkpoint is not None


def test_a_changed_learning_rate_is_refused_by_name(tmp_path: Path) -> None:
    unfinished(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"learning_rate: was 0.0001, now 0.5"):
        find_start_point(tmp_path, {**CONFIG, "learning_rate": 0.5})


def test_a_finished_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    write_json(tmp_path / RUN_NAME, {"status": "finished"})
    with pytest.raises(ConfigError, match="overwrite_output_dir"):
        find_start_point(tmp_path, CONFIG)
    assert find_start_point(tmp_path, CONFIG, overwrite=True).checkpoint is None


def test_resume_true_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        find_start_point(tmp_path, CONFIG, resume=True)


def test_resume_false_does_not_bury_an_unfinished_run(tmp_path: Path) -> None:
    unfinished(tmp_path, 3)
    with pytest.raises(ConfigError, match="checkpoint-3"):
        find_start_point(tmp_path, CONFIG, resume=False)


def test_resume_from_a_named_folder(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "other", 7)
    assert find_start_point(tmp_path, CONFIG, resume=str(path)).checkpoint == path
    with pytest.raises(ConfigError, match="checkpoint-7"):
        find_start_point(tmp_path, CONFIG, resume=str(tmp_path / "other" / "checkpoint-8"))


def test_weights_are_resumed_from_safetensors_only(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "other", 7)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(ConfigError, match="no weights as safetensors"):
        find_start_point(tmp_path, CONFIG, resume=str(path))


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / RUN_NAME).write_text("{")
    with pytest.raises(ConfigError, match=RUN_NAME):
        find_start_point(tmp_path, CONFIG)


def test_beginning_anew_clears_the_result_and_nothing_outside(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for path in (output / "adapter_model.safetensors", output / "mine.txt", tmp_path / "outside"):
        path.write_text("x")
    write_json(output / RUN_NAME, {"status": "finished", "result": ["adapter_model.safetensors", "../outside", ".."]})
    prepare_output_dir(output, find_start_point(output, CONFIG, overwrite=True))
    assert not (output / "adapter_model.safetensors").exists()
    assert (output / "mine.txt").exists()
    assert (tmp_path / "outside").exists()


def test_preparing_clears_half_written_and_stale_checkpoints(tmp_path: Path) -> None:
    unfinished(tmp_path, 3)
    (tmp_path / ".saving-checkpoint-4").mkdir()
    (tmp_path / "mine.txt").write_text("kept")
    prepare_output_dir(tmp_path, find_start_point(tmp_path, CONFIG))
    assert not (tmp_path / ".saving-checkpoint-4").exists()
    assert (tmp_path / "checkpoint-3").exists()
    prepare_output_dir(tmp_path, find_start_point(tmp_path, CONFIG, overwrite=True))
    assert list_checkpoints(tmp_path) == []
    assert (tmp_path / "mine.txt").exists()


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        make_checkpoint(tmp_path, step)
    rotate_checkpoints(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 10]
    rotate_checkpoints(tmp_path, None, None)
    assert len(list_checkpoints(tmp_path)) == 2


def test_publish_replaces_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    staging = tmp_path / ".staging"
    (staging / "a").mkdir(parents=True)
    (staging / "a" / "new").write_text("new")
    (staging / "b").write_text("b")
    publish(staging, tmp_path)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["new"]
    assert (tmp_path / "b").read_text() == "b"
    assert not staging.exists()


@pytest.mark.parametrize(
    "result", [["../kept", "kept.txt/..", "..", ".", "", "a\0b", "a" * 5000, 7, None], {"kept": 1}, "kept", 7]
)
def test_a_record_clears_nothing_outside_of_its_folder(tmp_path: Path, result: object) -> None:
    (tmp_path / "kept").mkdir()
    output = unfinished(tmp_path / "out", 3)
    absolute = [str(tmp_path / "kept"), "model.safetensors"] if isinstance(result, list) else []
    (output / "model.safetensors").touch()
    write_json(output / RUN_NAME, {"status": "finished", "result": [*result, *absolute] if absolute else result})
    prepare_output_dir(output, find_start_point(output, CONFIG, overwrite=True))
    assert (tmp_path / "kept").is_dir()
    assert (output / "model.safetensors").exists() != bool(absolute)


@pytest.mark.parametrize("state", [{}, {"global_step": "3"}, {"global_step": None}])
def test_a_checkpoint_without_its_step(tmp_path: Path, state: dict[str, object]) -> None:
    write_json(unfinished(tmp_path, 3) / "checkpoint-3" / "trainer_state.json", state)
    start = find_start_point(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match="its global_step is"):
        assert start.step


def test_a_damaged_record(tmp_path: Path) -> None:
    (unfinished(tmp_path, 3) / RUN_NAME).write_text("[" * 50_000)
    with pytest.raises(ConfigError, match=r"pyralis_run\.json is damaged"):
        find_start_point(tmp_path, CONFIG)
