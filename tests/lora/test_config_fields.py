"""Every field of PEFT's `LoraConfig` is accounted for: a case of `test_lora_options.py`, or why it needs none.

A version of PEFT with a field that is not here fails: whether a fast layer still computes what PEFT does has to be
looked at then.
"""

from __future__ import annotations

import dataclasses

import peft
import pytest
from peft import LoraConfig

from tests.models.test_lora_options import FAST, STOCK

BOOKKEEPING = "says where the adapter comes from or goes, and nothing of what is computed"
FIELDS: dict[str, tuple[str, ...] | str] = {
    "task_type": BOOKKEEPING,
    "peft_type": BOOKKEEPING,
    "auto_mapping": BOOKKEEPING,
    "peft_version": BOOKKEEPING,
    "base_model_name_or_path": BOOKKEEPING,
    "revision": BOOKKEEPING,
    "inference_mode": "freezes the adapter: what is trained is read from each parameter (tests/models/test_block.py)",
    "r": ("rank 1", "rank 3", "rank 16", "rank 64", "rank 256", "odd ranks"),
    "target_modules": ("attention only", "MLP only", "a regular expression", "LoRA on embeddings and head"),
    "exclude_modules": ("excluded modules",),
    "lora_alpha": ("alpha 0", "DoRA, alpha 0"),
    "lora_dropout": ("dropout in eval mode",),  # masks: test_block.py::test_dropout_is_peft_s_with_these_masks
    "fan_in_fan_out": "of GPT-2's transposed layers, which no family that is served has; PEFT resets it on nn.Linear",
    "bias": ("all biases trained", "biases of adapted layers trained", "DoRA, odd ranks, all biases"),
    "use_rslora": ("rsLoRA", "DoRA, rsLoRA, some modules"),
    "modules_to_save": ("embeddings and head trained", "norms trained as modules to save"),
    "init_lora_weights": ("gaussian", "orthogonal", "PiSSA", "PiSSA, approximate", "OLoRA", "LoftQ", "MiCA"),
    "layers_to_transform": ("one layer", "one layer of a pattern"),
    "layers_pattern": ("one layer of a pattern",),
    "rank_pattern": ("odd ranks",),
    "alpha_pattern": ("odd ranks",),
    "megatron_config": "of Megatron's parallel layers; a layer that is not nn.Linear runs stock, by its class",
    "megatron_core": "as megatron_config",
    "trainable_token_indices": ("some tokens trained",),
    "loftq_config": ("LoftQ",),
    "eva_config": ("a start from data before there is any",),  # from data: tests/models/test_lora_starts.py
    "corda_config": "a start, from data: tests/models/test_lora_starts.py",
    "lora_ga_config": "a start, from data: tests/models/test_lora_starts.py",
    "use_dora": (
        "DoRA",
        "DoRA, rsLoRA, some modules",
        "DoRA, odd ranks, all biases",
        "DoRA, alpha 0",
        "DoRA from PiSSA",
    ),
    "velora_config": ("VeLoRA",),
    "alora_invocation_tokens": ("activated LoRA",),
    "use_qalora": ("QALoRA, which is GPTQ's",),
    "qalora_group_size": ("QALoRA, which is GPTQ's",),
    "monteclora_config": ("MonteCLoRA",),
    "layer_replication": ("layers that stand twice",),
    "runtime_config": ("starts on the GPU",),
    "lora_bias": ("biases of LoRA",),
    "target_parameters": ("LoRA on parameters",),
    "use_bdlora": ("BD-LoRA",),
    "arrow_config": "a router over several adapters, made by `create_arrow_model`; a variant by its class, so stock",
    "kasa_config": ("KaSA",),
    "ensure_weight_tying": ("tied embeddings and head trained",),
}
CASES = {**FAST, **{name: options for name, (options, _) in STOCK.items()}}


def test_no_field_is_unknown() -> None:
    new = sorted({field.name for field in dataclasses.fields(LoraConfig)} - FIELDS.keys())
    assert not new, (
        f"LoraConfig of PEFT {peft.__version__} has fields that nobody has looked at: {', '.join(new)}. Find out what "
        "layers with them compute (models/adapters.py has to refuse what the fused block does not), add a case to FAST "
        "or STOCK of tests/models/test_lora_options.py, and name it here."
    )


@pytest.mark.parametrize("name", [name for name, cases in FIELDS.items() if isinstance(cases, tuple)])
def test_its_cases_are_of_this_field(name: str) -> None:
    default = getattr(LoraConfig(), name)
    for case in FIELDS[name]:
        assert name in CASES[case], f"{case} does not set {name}"
        assert CASES[case][name] != default or name == "r", f"{case} leaves {name} as it is"


def test_every_case_is_of_some_field() -> None:
    named = {case for cases in FIELDS.values() if isinstance(cases, tuple) for case in cases}
    plain = {"a start from data before there is any"}
    assert named <= CASES.keys()
    assert CASES.keys() - named <= plain
