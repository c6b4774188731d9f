"""`FastLanguageModel`: load, adapt, train and save, call for call as scripts written for Unsloth do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from pyralis.api import modes
from pyralis.api.adapters import ATTENTION, MLP, attach
from pyralis.api.loading import LoadRequest, load_for_training
from pyralis.api.notice import without_effect
from pyralis.api.origin import Checkpointing
from pyralis.errors import ModelError
from pyralis.models.hub import HubOptions
from pyralis.models.rope_scaling import RopeScaling

_ONE_ROAD = "there is no vLLM in here, generate is transformers' own"
# Parameters of `from_pretrained` that other libraries have and this one has no use for.
_IGNORED = {
    "fast_inference": _ONE_ROAD,
    "gpu_memory_utilization": _ONE_ROAD,
    "float8_kv_cache": _ONE_ROAD,
    "disable_log_stats": _ONE_ROAD,
    "max_lora_rank": "adapters of any rank can be attached",
    "unsloth_vllm_standby": _ONE_ROAD,
    "use_exact_model_name": "names are never exchanged for others",
    "low_cpu_mem_usage": "weights always go straight to their device",
    "auto_model": "models are causal language models",
    "whisper_language": "models are causal language models",
    "whisper_task": "models are causal language models",
    "unsloth_force_compile": "nothing is compiled while loading",
    "fast_inference_setup": _ONE_ROAD,
    "return_logits": "logits are there whenever a forward is asked for them",
    "fullgraph": "nothing is compiled while loading",
    "temporary_location": "nothing is written while loading",
}
_ADAPTER_IGNORED = {
    "temporary_location": "nothing is written while attaching",
    "finetune_vision_layers": "the model is a language model",
}
_RANK_LIMIT = 64  # the default of max_lora_rank


class FastLanguageModel:
    """A namespace: nothing is ever made of this class. Models are transformers' and PEFT's own objects."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: Any = "sequential",
        rope_scaling: RopeScaling | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: Checkpointing = "auto",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        use_exact_model_name: bool = False,
        offload_embedding: bool = False,
        random_state: int = 3407,
        max_lora_rank: int = _RANK_LIMIT,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, PreTrainedTokenizerBase]:
        """Load a causal language model and its tokenizer, and make fast what can be.

        Args:
            model_name: a hub name, a folder, a .gguf file, a demo model's name, or an adapter (folder or hub name),
                which then is loaded with its base and trained further. Checkpoints may be in bitsandbytes' 4 bits.
            max_seq_length: RoPE is scaled where this is more than the model was made for; None leaves it as it is.
            dtype: to compute in; None is bfloat16, float16 on GPUs without it, and float32 on CPUs.
            load_in_4bit, load_in_8bit: quantise linear layers while loading. 8 bits win over 4, 16 over 4.
            load_in_16bit: quantise nothing; with full_finetuning also keep the weights in 16 bits.
            full_finetuning: train all weights, kept in float32 unless load_in_16bit or a 16-bit dtype is given.
            token, revision, cache_dir, local_files_only: how the hub is asked.
            device_map: "sequential" is this process's GPU, or the CPU; "auto" and "balanced" spread a model over
                several GPUs; a device or a dictionary is taken as it is.
            rope_scaling: a factor, or fields as in a config's `rope_parameters`, instead of what is chosen.
            trust_remote_code: True is refused.
            use_gradient_checkpointing: see `get_peft_model`.
            resize_model_vocab: give embedding and head that many rows; random_state draws the new ones.
            attn_implementation: transformers' attention for layers that run stock.
            offload_embedding: keep the embedding in pinned host memory, where the GPU reads it, once it is frozen.
            fix_tokenizer, use_exact_model_name, max_lora_rank: without effect. So are others that
                Unsloth has; they are named in the log. Unknown ones are refused.

        Returns:
            The model, in eval mode, and the tokenizer, which pads on the right and has a padding token.

        Raises:
            ModelError: a model that cannot be loaded as asked, or a parameter that cannot be followed.
        """
        if trust_remote_code:
            raise ModelError(
                "trust_remote_code=True is refused: code that comes with a checkpoint is not run, and nothing is known "
                "of what it computes. Take a model of an architecture that transformers has, which needs no such code."
            )
        changed = {
            "fix_tokenizer": not fix_tokenizer,
            "use_exact_model_name": use_exact_model_name,
            "max_lora_rank": max_lora_rank != _RANK_LIMIT,
        }
        reasons = _IGNORED | {"fix_tokenizer": "the tokenizer only gets a padding token and pads on the right"}
        without_effect({name: reasons[name] for name, given in changed.items() if given})
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        hub = HubOptions(token, kwargs.pop("cache_dir", None), bool(kwargs.pop("local_files_only", False)))
        _refuse_unknown(kwargs, _IGNORED, "from_pretrained")
        request = LoadRequest(
            model_name, max_seq_length, dtype, load_in_4bit, load_in_8bit, load_in_16bit, full_finetuning, device_map,
            rope_scaling, use_gradient_checkpointing, resize_model_vocab, revision, random_state, attn_implementation,
            hub, offload_embedding,
        )  # fmt: skip
        return load_for_training(request)

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: str | Sequence[str] | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: Literal["none", "all", "lora_only"] = "none",
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        use_gradient_checkpointing: Checkpointing = "auto",
        random_state: int = 3407,
        max_seq_length: int = 2048,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, Any] | None = None,
        use_dora: bool = False,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Put a trainable LoRA adapter on a model: a real `peft.PeftModel`, whose fast layers stay fast.

        Args:
            target_modules: names, "all-linear", or a regular expression of whole paths; None is q, k, v, o, gate, up
                and down. `embed_tokens` and `lm_head` among them are trained whole, as modules_to_save.
            use_gradient_checkpointing: "auto" keeps of each layer what makes the step the fastest that fits the GPU
                (docs/plan.md), and everything without one. True recomputes each layer in the backward and keeps its
                input; "unsloth" moves the input to host memory meanwhile; False keeps everything. Gradients are the
                same.
            random_state: seeds the adapter's start; torch's generators are left as they are.
            init_lora_weights: True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq" ... as
                PEFT has them. Those that change the base weights need a model without quantisation.
            loftq_config: `loftq_bits` and `loftq_iter` of init_lora_weights="loftq"; {} and None are 4 and 1.
            finetune_attention_modules, finetune_mlp_modules: which of the default targets are taken.
            kwargs: other fields of `peft.LoraConfig`, such as rank_pattern.

        Raises:
            ModelError: names that match nothing, a start that cannot be made, an adapter that is there already.
        """
        if not finetune_language_layers:
            raise ModelError("finetune_language_layers=False leaves nothing to train: the model is a language model.")
        if target_modules is None and not (finetune_attention_modules and finetune_mlp_modules):
            target_modules = (*(ATTENTION * finetune_attention_modules), *(MLP * finetune_mlp_modules))
        ignored = {name: _ADAPTER_IGNORED[name] for name in _ADAPTER_IGNORED if name in kwargs}
        without_effect(ignored)
        return attach(
            model,
            rank=r,
            target_modules=target_modules,
            alpha=lora_alpha,
            dropout=lora_dropout,
            bias=bias,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            checkpointing=use_gradient_checkpointing,
            random_state=random_state,
            use_rslora=use_rslora,
            use_dora=use_dora,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,
            loftq_config=loftq_config,
            more={name: value for name, value in kwargs.items() if name not in ignored},
        )

    for_training = staticmethod(modes.for_training)
    for_inference = staticmethod(modes.for_inference)


FastModel = FastLanguageModel


def PatchDPOTrainer() -> None:
    """Does nothing: trainers need no patch."""


def _refuse_unknown(given: Mapping[str, Any], ignored: Mapping[str, str], call: str) -> None:
    known = FastLanguageModel.from_pretrained.__annotations__
    for name in given:
        if name not in ignored:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ModelError(f"{call} has no parameter {name!r}{hint}")
    without_effect({name: ignored[name] for name in given})
