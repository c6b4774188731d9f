"""Pyralis: fine-tune large language models faster and in less memory, with exact maths.

Public names are imported when first used: `import pyralis` loads neither torch nor transformers, and changes
nothing in any other library.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it. No name of a package: `pyralis.train` is the package as soon as it is imported.
_PUBLIC: dict[str, str] = {
    "PyralisError": "pyralis.errors",
    "load_config": "pyralis.train.config.train_config",
    "TrainConfig": "pyralis.train.config.train_config",
    "merge_adapter": "pyralis.export.merge",
    "fetch_model": "pyralis.models.fetch",
    "PyralisTrainer": "pyralis.train.trainer",
    "PyralisTrainingArguments": "pyralis.train.arguments",
    "SFTTrainer": "pyralis.train.sft_trainer",
    "SFTConfig": "pyralis.train.sft_trainer",
    "UnslothTrainer": "pyralis.train.sft_trainer",
    "UnslothTrainingArguments": "pyralis.train.sft_trainer",
    "DPOTrainer": "pyralis.train.preference.dpo_trainer",
    "DPOConfig": "pyralis.train.preference.dpo_trainer",
    "KTOTrainer": "pyralis.train.preference.preference_trainers",
    "KTOConfig": "pyralis.train.preference.preference_trainers",
    "ORPOTrainer": "pyralis.train.preference.preference_trainers",
    "ORPOConfig": "pyralis.train.preference.preference_trainers",
    "apply_chat_template": "pyralis.api.conversations",
    "get_chat_template": "pyralis.api.chat_templates",
    "standardize_sharegpt": "pyralis.api.conversations",
    "to_sharegpt": "pyralis.api.conversations",
    "train_on_responses_only": "pyralis.api.responses",
    "FastLanguageModel": "pyralis.api.language_model",
    "FastModel": "pyralis.api.language_model",
    "PatchDPOTrainer": "pyralis.api.language_model",
    "is_bfloat16_supported": "pyralis.api.loading",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'pyralis' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
