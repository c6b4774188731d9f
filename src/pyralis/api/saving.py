"""What a loaded model can be saved as: an adapter, or one merged model in 16 or 4 bits, to a folder or the hub.

The methods are the model's own attributes: no class is changed. A copy has its own.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedTokenizerBase

from pyralis.api.notice import without_effect
from pyralis.api.origin import base_of, origin_of
from pyralis.errors import ModelError
from pyralis.export.write_model import write_model
from pyralis.lora.attach import count_parameters
from pyralis.lora.changed_base import refer_to_original_base
from pyralis.lora.record import write_record
from pyralis.models.generation import settle
from pyralis.models.staging import check_disk_space, check_not_base, staged_folder
from pyralis.train.checkpoints.checkpoint import publish

SaveMethod = Literal["merged_16bit", "merged_4bit_forced", "lora"]

_GGUF = (
    "Writing GGUF files is not here yet. Save the merged model (`model.save_pretrained_merged(folder, tokenizer)`) and "
    "convert that with llama.cpp: `python convert_hf_to_gguf.py folder --outtype q8_0`."
)


def save_pretrained_merged(
    model: Any,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    is_main_process: bool = True,
    max_shard_size: str | int = "5GB",
    maximum_memory_usage: float = 0.75,
    **others: Any,
) -> None:
    """Save as a standard folder, which appears whole or not at all; a model that is there is replaced.

    The model stays as it is and can go on learning. Host memory holds one shard at a time.

    Args:
        tokenizer: saved with it; None takes the one loaded with the model.
        save_method: "merged_16bit": W + scale B A in the dtype that the model computes in (bfloat16 where that is
            float32); a QLoRA adapter onto its dequantised 4-bit base. "merged_4bit_forced": that in NF4, which is
            rounded once more: for inference. "lora": the adapter alone.
        push_to_hub: to a repository of that name instead.
        is_main_process: False saves nothing.

    Raises:
        ModelError: a method that is none, a folder that holds something else, no disk space, weights that are not
            finite.
    """
    _say_what_is_ignored(maximum_memory_usage, others)
    if push_to_hub:
        push_to_hub_merged(
            model, str(save_directory), tokenizer, save_method, token=token, max_shard_size=max_shard_size
        )
    elif is_main_process:
        _save(model, Path(save_directory).expanduser(), tokenizer, save_method, max_shard_size)


def push_to_hub_merged(
    model: Any,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Trained with Pyralis",
    max_shard_size: str | int = "5GB",
    maximum_memory_usage: float = 0.75,
    **others: Any,
) -> str:
    """Save as `save_pretrained_merged` does and upload that in one commit; returns its address."""
    _say_what_is_ignored(maximum_memory_usage, others)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="pyralis-") as temporary:
        folder = Path(temporary) / "model"
        _save(model, folder, tokenizer, save_method, max_shard_size)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(folder_path=folder, repo_id=repository, commit_message=commit_message))


def save_adapter(model: PeftModel, save_directory: str | Path, **arguments: Any) -> None:
    """PEFT's `save_pretrained`, and beside the adapter what its base model was like.

    An adapter whose start changed the base weights (PiSSA, OLoRA) is saved so that it fits the base it names. Files are
    written beside the folder and moved in, so that none is ever half there.

    Raises:
        ModelError: no folder can be made there.
    """
    folder = Path(save_directory).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder} is a file; expected a folder to write to.")
    if not arguments.get("is_main_process", True):
        type(model).save_pretrained(model, str(folder), **arguments)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".adapter-", suffix=".partial", dir=folder))
    except OSError as error:
        raise ModelError(f"{folder} cannot be written to: {error.strerror}. Choose another folder.") from error
    try:
        if (folder / "README.md").is_file():
            shutil.copy(folder / "README.md", staging)  # PEFT adds to it
        type(model).save_pretrained(model, str(staging), **arguments)
        if (staging / "adapter_config.json").is_file():
            refer_to_original_base(model, staging)
            write_record(staging, origin_of(model).record)
        publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_pretrained_gguf(model: Any, *arguments: Any, **others: Any) -> None:
    """Raises ModelError: there is no GGUF export yet."""
    raise ModelError(_GGUF)


def generate_mixed(model: PeftModel, *arguments: Any, **others: Any) -> Any:
    """`generate` of a half-precision model with modules that are trained whole, in float32: under autocast, as a
    trainer calls it."""
    base = base_of(model)
    with torch.autocast(base.device.type, dtype=origin_of(model).record.dtype or base.dtype):
        return type(model).generate(model, *arguments, **others)


def _is_mixed(model: PeftModel) -> bool:
    if origin_of(model).record.dtype is None:
        return False
    trained = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    return any(weight.dtype == torch.float32 and "lora_" not in name for name, weight in trained)


def _save(
    model: Any,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    save_method: str,
    max_shard_size: str | int,
) -> None:
    tokenizer = origin_of(model).tokenizer if tokenizer is None else tokenizer
    if save_method == "lora":
        if not isinstance(model, PeftModel):
            raise ModelError('save_method is "lora", but the model has no adapter: use "merged_16bit".')
        model.save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return
    if save_method not in ("merged_16bit", "merged_4bit_forced"):
        hint = "4 bits are for inference: merging into them loses precision. " if save_method == "merged_4bit" else ""
        raise ModelError(f"save_method is {save_method!r}; {hint}Expected merged_16bit, merged_4bit_forced or lora.")
    if not isinstance(model, PeftModel) and hasattr(model, "peft_config"):
        raise ModelError(
            "the model has adapters but is not PEFT's model: call this method of what get_peft_model returned."
        )
    if isinstance(model, PeftModel):
        check_not_base(folder, origin_of(model).name or base_of(model).name_or_path)
    dtype = _sixteen_bits(model)
    four_bit = None
    if save_method == "merged_4bit_forced":
        record = origin_of(model).record
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=record.quant_type,
            bnb_4bit_use_double_quant=record.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    size = count_parameters(base_of(model)).total * (dtype.itemsize if four_bit is None else 1)
    check_disk_space(folder.parent, int(1.02 * size))
    with staged_folder(folder, overwrite=True) as staging:
        generation = _generation(base_of(model), tokenizer)
        write_model(model, staging, dtype, max_shard_size=max_shard_size, four_bit=four_bit, generation=generation)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)


def _sixteen_bits(model: Any) -> torch.dtype:
    dtype = origin_of(model).record.dtype or base_of(model).dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def _generation(base: Any, tokenizer: PreTrainedTokenizerBase | None) -> GenerationConfig | None:
    """The model's generation config, which stops at the tokenizer's EOS too."""
    generation = copy.deepcopy(base.generation_config)
    if generation is None or tokenizer is None:
        return generation
    known = generation.eos_token_id
    stops = list(known) if isinstance(known, list) else [] if known is None else [known]
    own = tokenizer.eos_token_id
    settle(
        generation, [own, *(stop for stop in stops if stop != own)] if own is not None else [], tokenizer.pad_token_id
    )
    return generation


def _say_what_is_ignored(maximum_memory_usage: float, others: dict[str, Any]) -> None:
    reasons = dict.fromkeys(others, "the folder is written in one way only")
    if maximum_memory_usage != 0.75:
        reasons["maximum_memory_usage"] = "one shard is in memory at a time: lower max_shard_size"
    without_effect(reasons)


class Method:
    """A function with the model as its first argument, for a model's attribute.

    Unlike a bound method it can be pickled with the model, whose copies get one of their own.
    """

    def __init__(self, function: Callable[..., Any], model: Any) -> None:
        self.function, self.model = function, model
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any, **others: Any) -> Any:
        return self.function(self.model, *arguments, **others)


_METHODS: dict[str, Callable[..., Any]] = {
    "save_pretrained_merged": save_pretrained_merged,
    "push_to_hub_merged": push_to_hub_merged,
    "save_pretrained_gguf": save_pretrained_gguf,
    "push_to_hub_gguf": save_pretrained_gguf,
}


def bind_methods(model: Any) -> None:
    """Give this model the methods above; a PeftModel's `save_pretrained` too, and a `generate` where it needs one."""
    methods = _METHODS | ({"save_pretrained": save_adapter} if isinstance(model, PeftModel) else {})
    if isinstance(model, PeftModel) and _is_mixed(model):
        methods["generate"] = generate_mixed
    for name, function in methods.items():
        vars(model)[name] = Method(function, model)
