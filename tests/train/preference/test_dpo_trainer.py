"""Equal to TRL's DPO on the same batch: losses, every gradient, what is logged; then over steps."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainingArguments

from pyralis.data.pairs import LAYOUTS, PairLayout
from pyralis.errors import ConfigError
from pyralis.models.load import ModelSettings, load_model
from pyralis.train.old_trainer_names import say_once
from pyralis.train.preference import dpo_reference, dpo_step
from pyralis.train.preference.dpo_loss import LOSSES
from pyralis.train.preference.dpo_trainer import DPOTrainer
from tests.tiny import build_tiny_model, make_tiny_model, make_tiny_tokenizer
from tests.train.dpo_pairs import LORA, PREFERENCES, lora, off_by, settle_adapter, step, trainer

UNTIMED = ("runtime", "per_second")
REF_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.ref.weight"

SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in LOSSES if name not in ("cdpo", "robust", "exo_pair")},
    "robust": {"loss_type": "robust", "label_smoothing": 0.2},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.01},
    "aot": {"loss_type": "aot", "label_smoothing": 0.1},
    "mixed": {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [0.8, 1.0, 0.2], "beta": 0.3},
    "ld_alpha": {"ld_alpha": 0.4},
    "cut": {"max_length": 24},
    "cut at the start": {"max_length": 24, "truncation_mode": "keep_end"},
}


def fresh(ours: bool, folder: Path, **settings: Any) -> Any:
    """Trainers that attach the adapter themselves: the reference is the model without it."""
    made = trainer(ours, folder, given={"peft_config": copy.deepcopy(LORA)}, **settings)
    settle_adapter(made.model)
    if ours:
        assert made.data_collator.layout == "shared"
    return made


def same(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert off_by(mine[1], theirs[1]) < 1e-5
    assert mine[2] == pytest.approx(theirs[2], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_loss(name: str, tmp_path: Path) -> None:
    same(step(fresh(True, tmp_path, **SETTINGS[name])), step(fresh(False, tmp_path, **SETTINGS[name])))


def test_conservative_dpo_is_the_old_sigmoid_with_label_smoothing(tmp_path: Path) -> None:
    loss = step(fresh(True, tmp_path, loss_type="cdpo", label_smoothing=0.2))[0]
    plain, robust = (step(fresh(True, tmp_path, loss_type=n, label_smoothing=0.2))[0] for n in ("sigmoid", "robust"))
    # robust (1 - 2e) = (1 - e) f - e g and cdpo = (1 - e) f + e g, with f the sigmoid loss
    torch.testing.assert_close(loss + robust * 0.6, 1.6 * plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: PairLayout, tmp_path: Path) -> None:
    made = fresh(True, tmp_path)
    made.data_collator = replace(made.data_collator, layout=layout)
    same(step(made), step(fresh(False, tmp_path)))


def test_ref_adapter(tmp_path: Path) -> None:
    """An adapter that was trained before: its copy "ref" is the reference, not the base model."""
    made = [trainer(ours, tmp_path, lora()) for ours in (True, False)]
    assert made[0]._step.reference.kind == 'the adapter "ref"'
    for one in made:
        assert one.model.get_parameter(REF_A).eq(one.model.get_parameter(REF_A.replace("ref", "default"))).all()
        settle_adapter(one.model, seed=9)
    same(step(made[0]), step(made[1]))
    assert made[0].model.active_adapters == ["default"]
    assert not made[0].model.get_parameter(REF_A).requires_grad
    assert made[0].model.get_parameter(REF_A.replace("ref", "default")).requires_grad


def test_reference_model_given(tmp_path: Path) -> None:
    made = [trainer(ours, tmp_path, given={"ref_model": build_tiny_model(seed=5)}) for ours in (True, False)]
    assert made[0]._step.reference.kind == "a model of its own"
    same(step(made[0]), step(made[1]))


def test_a_fully_trained_model_is_held_to_what_it_was(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    made = [trainer(ours, tmp_path, AutoModelForCausalLM.from_pretrained(folder)) for ours in (True, False)]
    assert not any(p.requires_grad for p in made[0].ref_model.parameters())
    for one in made:
        with torch.no_grad():
            one.model.lm_head.weight.mul_(1.1)
    same(step(made[0]), step(made[1]))


@pytest.mark.parametrize("full", [False, True])
def test_precomputed(full: bool, tmp_path: Path) -> None:
    given = {} if full else {"peft_config": LORA}
    made = [
        trainer(ours, tmp_path, given=copy.deepcopy(given), precompute_ref_log_probs=True, precompute_ref_batch_size=3)
        for ours in (True, False)
    ]
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        mine, theirs = (torch.tensor(one.train_dataset[name]) for one in made)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for one in made:
        with torch.no_grad():
            one.model.get_output_embeddings().weight.mul_(1.1)
        settle_adapter(one.model)
    same(step(made[0]), step(made[1]))


def test_four_bits(tmp_path: Path) -> None:
    """QLoRA: TRL's adapters in bfloat16 are made float32 again here; so are TRL's for the comparison."""
    folder = make_tiny_model(tmp_path / "model")
    made = []
    for ours in (True, False):
        loaded = load_model(ModelSettings(str(folder), train_mode="qlora", dtype="float32")).model
        one = trainer(ours, tmp_path, loaded, given={"peft_config": copy.deepcopy(LORA)})
        trained = [p for p in one.model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32 if ours else torch.bfloat16}
        for parameter in trained:
            parameter.data = parameter.data.float()
        settle_adapter(one.model)
        made.append(one)
    assert made[0].data_collator.layout == "shared"
    same(step(made[0]), step(made[1]))


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_three_steps_and_evaluation(settings: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for ours in (True, False):
        given = {"peft_config": copy.deepcopy(LORA), "eval_dataset": Dataset.from_list(PREFERENCES[:5])}
        made = trainer(ours, tmp_path, given=given, eval_strategy="steps", eval_steps=3, **settings)
        settle_adapter(made.model)
        made.train()
        logs = [{k: v for k, v in e.items() if not k.endswith(UNTIMED)} for e in made.state.log_history[:-1]]
        results.append((logs, {n: p.detach() for n, p in made.model.named_parameters() if p.requires_grad}))
    (mine, weights), (theirs, their_weights) = results
    assert [set(entry) for entry in mine] == [set(entry) for entry in theirs]
    assert "eval_rewards/margins" in mine[-1]
    for a, b in zip(mine, theirs):
        assert a == pytest.approx(b, rel=2e-4, abs=1e-4)
    assert off_by(weights, their_weights) < 1e-3


@pytest.mark.parametrize("which", ["logprobs", "reference", "beta"])
def test_one_percent_of_error_is_noticed(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, made = step(fresh(False, tmp_path)), fresh(True, tmp_path)
    if which == "beta":
        made._step = replace(made._step, loss=replace(made._step.loss, beta=0.101))
    else:
        module = dpo_step if which == "logprobs" else dpo_reference
        right = module.batch_logprobs

        def wrong(*args: Any, **kwargs: Any) -> Any:
            found = right(*args, **kwargs)
            found.logprobs = found.logprobs * 1.01
            return found

        monkeypatch.setattr(module, "batch_logprobs", wrong)
    with pytest.raises(AssertionError):
        same(step(made), theirs)


def test_what_is_not_served_is_trls_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    same(step(fresh(True, tmp_path)), step(fresh(False, tmp_path)))
    for settings, reason in (
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type js_divergence"),
        ({"use_weighting": True}, "use_weighting"),
    ):
        made = trainer(True, tmp_path, given={"peft_config": copy.deepcopy(LORA)}, **settings)
        settle_adapter(made.model)
        assert made._step is None
        theirs = trainer(False, tmp_path, given={"peft_config": copy.deepcopy(LORA)}, **settings)
        settle_adapter(theirs.model)
        same(step(made), step(theirs))
        assert f"TRL's own loss is used: {reason}" in caplog.text
    gpt2 = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    made, theirs = (
        trainer(ours, tmp_path, build_tiny_model("gpt2"), given={"peft_config": copy.deepcopy(gpt2)})
        for ours in (True, False)
    )
    for one in (made, theirs):
        settle_adapter(one.model)
    same(step(made), step(theirs))
    assert "TRL's own loss is used: the model is not accelerated" in caplog.text


def test_older_arguments(tmp_path: Path) -> None:
    """As scripts for TRL before 1.0 have them."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=1, report_to="none", use_cpu=True
    )
    made = DPOTrainer(
        lora(), None, arguments, tokenizer=make_tiny_tokenizer(), train_dataset=Dataset.from_list(PREFERENCES),
        beta=0.3, max_length=40, max_prompt_length=6, rpo_alpha=0.5, loss_type="ipo",
    )  # fmt: skip
    assert (made.beta, made.loss_types, made.loss_weights) == (0.3, ["ipo", "sft"], [1.0, 0.5])
    assert made._step.loss.types == ("ipo", "sft")
    assert max(map(len, made.train_dataset["prompt_ids"])) == 6
    text = made.processing_class.decode(made.train_dataset[1]["prompt_ids"])
    assert text == "ello 1"
    made.train()
    with pytest.raises(ConfigError, match="DPOTrainer takes no argument 'betta'"):
        DPOTrainer(lora(), betta=1)


def test_a_pair_whose_prompt_is_overlong(tmp_path: Path) -> None:
    rows = [*PREFERENCES[:3], {"prompt": "x" * 80, "chosen": " good", "rejected": " bad"}]
    given = {"peft_config": LORA}
    dropped = trainer(True, tmp_path, rows=rows, given=copy.deepcopy(given), max_length=64)
    assert len(dropped.train_dataset) == 3
    kept = trainer(
        True, tmp_path, rows=rows, given=copy.deepcopy(given), extra={"max_prompt_length": 30}, max_length=64
    )
    assert len(kept.train_dataset) == 4
    assert len(kept.train_dataset[3]["prompt_ids"]) == 30


def test_a_model_by_its_name(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    made = [trainer(ours, tmp_path, str(folder), given={"peft_config": copy.deepcopy(LORA)}) for ours in (True, False)]
    for one in made:
        settle_adapter(one.model)
    assert made[0].data_collator.layout == "shared"
    same(step(made[0]), step(made[1]))


def test_signatures_of_what_is_overridden() -> None:
    """Private methods of TRL, as 1.15 and 1.16 have them."""
    for name, expected in (
        ("_prepare_dataset", ["self", "dataset", "processing_class", "args", "dataset_name"]),
        ("_precompute_ref_logps", ["self", "dataset", "name", "batch_size"]),
        ("compute_ref_log_probs", ["self", "model", "inputs"]),
    ):
        assert list(inspect.signature(getattr(trl.DPOTrainer, name)).parameters) == expected
