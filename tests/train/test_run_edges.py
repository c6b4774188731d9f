"""What a run refuses or says when model, data and fields do not go together."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from pyralis.errors import ConfigError, ModelError, NotFiniteError
from pyralis.export.merge import merge_adapter
from pyralis.lora.record import read_record
from pyralis.train.config.train_config import config_from_dict
from pyralis.train.report.metrics import RunEvent, read_metrics
from pyralis.train.run import train
from pyralis.train.setup import training_arguments
from tests.tiny import make_tiny_model
from tests.train.runs import run


def test_rows_longer_than_a_table_of_positions(chats: Path, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "gpt2", "gpt2", n_positions=32)
    with pytest.raises(ConfigError, match="only 32 positions"):
        run(model, chats, tmp_path / "out")


@pytest.mark.parametrize("rope_scaling", ["auto", "off"])
def test_rope_reaches_the_longest_row_or_it_is_noted(chats: Path, tmp_path: Path, rope_scaling: str) -> None:
    model = make_tiny_model(tmp_path / "llama", max_position_embeddings=32)
    run(model, chats, tmp_path / "out", rope_scaling=rope_scaling, max_steps=1)
    record = read_record(tmp_path / "out")
    merged = merge_adapter(tmp_path / "out", tmp_path / "merged")
    parameters = json.loads((merged / "config.json").read_text())["rope_parameters"]
    if rope_scaling == "off":
        assert (record.rope_scaled_to, parameters["rope_type"]) == (None, "default")
        return
    assert record.rope_scaled_to is not None
    assert parameters["factor"] == record.rope_scaled_to / 32 > 1
    # an adapter that is trained further keeps the angles it knows
    run(model, chats, tmp_path / "more", load_adapter=str(tmp_path / "out"), max_seq_length=48, max_steps=1)
    assert read_record(tmp_path / "more").rope_scaled_to == record.rope_scaled_to


def test_rope_of_packed_rows_reaches_their_longest_part(chats: Path, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "llama", max_position_embeddings=200)
    run(model, chats, tmp_path / "out", packing=True, max_seq_length=400, max_steps=1)
    assert read_record(tmp_path / "out").rope_scaled_to is None


def test_rows_longer_than_a_rotary_model_was_made_for_are_noted(chats: Path, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "llama", max_position_embeddings=32)
    text = StringIO()
    config = {
        "model_name_or_path": str(model), "train_file": str(chats), "output_dir": str(tmp_path / "out"),
        "max_seq_length": 96, "train_mode": "lora", "max_steps": 1, "dtype": "float32", "template_name": "llama3",
        "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    train(config | {"max_seq_length": 400}, console=Console(file=text, width=300))
    assert "the model was made for 32" in text.getvalue()
    assert "'<|eot_id|>', which ends an answer in this template, is 10 tokens" in text.getvalue()


def test_a_tokenizer_of_another_model(chats: Path, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "llama", vocab_size=100)
    with pytest.raises(ModelError, match="only 100 embeddings"):
        run(model, chats, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_batch_can_be_filled(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="12 rows do not fill one batch of 64"):
        run(tiny_llama, chats, tmp_path / "out", dataloader_drop_last=True, per_device_train_batch_size=64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": "galore_adamw"}, "galore-torch, which is not installed"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type: cosine_with_min_lr cannot be used: .*min_lr"),
        ({"torch_compile_backend": "nope"}, "transformers refuses this config: .*NOPE"),
        ({"push_to_hub": True}, "the hub cannot be reached"),
        ({"save_strategy": "best"}, "save_strategy: best goes by the evaluation loss"),
        ({"eval_split": 0.2, "metric_for_best_model": "accuracy"}, "'accuracy' is not measured"),
    ],
)
def test_fields_that_cannot_be_followed(
    values: dict, message: str, tiny_llama: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyralis.train.config.check_files.hub_is_reachable", lambda: False)
    with pytest.raises(ConfigError, match=message):
        run(tiny_llama, chats, tmp_path / "out", **values)


def test_evaluation_drops_no_row(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    """12 rows in batches of 5, and of 16, whatever training drops."""
    evaluated = {"eval_file": str(chats), "eval_on_start": True, "eval_strategy": "steps", "learning_rate": 0.0}
    losses = []
    for name, rows in {"kept": {}, "dropped": {"dataloader_drop_last": True}}.items():
        for size in (5, 16):
            result = run(
                tiny_llama, chats, tmp_path / f"{name}-{size}", max_steps=1, per_device_eval_batch_size=size,
                **evaluated | rows,
            )  # fmt: skip
            losses.append(result.summary.last_eval_loss)
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)


def test_attention_that_has_no_backward_on_a_cpu(
    tiny_llama: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyralis.train.setup.choose_device", lambda: torch.device("cpu"))
    with pytest.raises(ConfigError, match="flex_attention cannot learn on a CPU; set it to sdpa or eager"):
        run(tiny_llama, chats, tmp_path / "out", attn_implementation="flex_attention")


def test_saving_the_best_needs_no_metric(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    evaluated = {"eval_split": 0.2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    result = run(tiny_llama, chats, tmp_path / "out", max_steps=3, load_best_model_at_end=True, **evaluated)
    assert result.summary.best_eval_loss is not None
    assert list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("asked", ["auto", "full", False])
def test_checkpointing_is_what_the_panel_says(
    asked: str | bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where auto means yes; by whatever name the installed transformers has for it."""
    monkeypatch.setattr("pyralis.train.setup.checkpoints_layers", lambda config, device: asked in ("auto", "full"))
    values = {"model_name_or_path": str(tiny_llama), "train_file": "x", "max_seq_length": 8}
    kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    config = config_from_dict(values | kwargs | {"gradient_checkpointing": asked}).config
    arguments, _ = training_arguments(config)
    assert arguments.gradient_checkpointing is (asked is not False)
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": True}


def test_a_model_whose_generation_config_cannot_be_saved(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "eos_token_id": 1}))
    run(model, chats, tmp_path / "out", train_mode="full", max_steps=1)
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert saved.eos_token_id == [3]  # <|im_end|>, with which the chat template ends an answer
    assert saved.do_sample
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.use_cache


def test_embeddings_have_their_own_learning_rate(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    trained = {"modules_to_save": ["embed_tokens"], "save_strategy": "no", "max_steps": 2}
    run(tiny_llama, chats, tmp_path / "out", embedding_learning_rate=0.0, **trained)
    run(tiny_llama, chats, tmp_path / "moved", **trained)
    before = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"]
    still, moved = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "moved"))
    (name,) = [name for name in still if "embed_tokens" in name]
    assert torch.equal(still[name], before)
    assert not torch.equal(moved[name], before)
    assert any(weight.abs().sum() > 0 for name, weight in still.items() if "lora_B" in name)


def test_a_loss_that_is_lost_is_an_event(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="step 2: the loss is nan"):
        run(tiny_llama, chats, tmp_path / "out", learning_rate=1e30, logging_steps=1)
    events = [m.event for m in read_metrics(tmp_path / "out" / "metrics.jsonl") if isinstance(m, RunEvent)]
    assert events.count("nan") == 1


def test_an_adapter_goes_on_with_its_own_settings(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    run(tiny_llama, chats, tmp_path / "first", max_steps=1)
    values = {"load_adapter": str(tmp_path / "first"), "lora_rank": 32, "max_steps": 1}
    result = run(tiny_llama, chats, tmp_path / "second", **values)
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["r"] == 4
    assert "rank 4" in result.files.report.read_text(encoding="utf-8")


def test_a_checkpoint_knows_how_it_was_trained(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    run(tiny_llama, chats, tmp_path / "out", train_mode="qlora", max_steps=1, template_name="yi")
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert read_record(checkpoint).quantized
    assert json.loads((checkpoint / "pyralis_template.json").read_text())["name"] == "yi"


def test_an_adapter_names_its_base_as_the_config_did(
    tiny_llama: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """The folder of a fetched model is this machine's; and no save asks the hub about the name."""
    monkeypatch.setattr("pyralis.models.source.fetch_model", lambda name: tiny_llama)
    run(Path("smollm2-135m-instruct"), chats, tmp_path / "out", max_steps=1)
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        saved = json.loads((folder / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == "smollm2-135m-instruct"
        assert str(tiny_llama) not in (folder / "README.md").read_text(encoding="utf-8")
        assert not (folder / "training_args.bin").exists()
    assert not [w for w in recwarn if "remote file" in str(w.message) or "config file" in str(w.message)]
