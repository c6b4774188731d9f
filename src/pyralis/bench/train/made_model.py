"""A model with random weights and a made-up tokenizer, in a folder that every peer can load without a hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedTokenizerFast

from pyralis.bench.train.architectures import MODELS, model_folder
from pyralis.bench.train.settings import MadeModel, Mode, ModelFacts
from pyralis.errors import ConfigError
from pyralis.lora.attach import find_linear_targets
from pyralis.models.staging import staged_folder

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
# Outputs of a linear layer on normed inputs then have this standard deviation, at any width: logits near zero, so that
# the loss starts near ln V, and a residual stream that stays below 10 over 32 layers.
OUTPUT_STD = 0.6


def made_model(name: str, mode: Mode, rank: int, work_dir: Path) -> MadeModel:
    """The model called `name`, made in `work_dir` unless it is there, or the folder `name`.

    Raises:
        ConfigError: neither a name in `MODELS` nor a folder with a config.json; `full` with a quantised one.
    """
    device, dtype = compute_in()
    folder = model_folder(name)
    if folder is None:
        folder = work_dir / f"{name}-{'nf4' if mode == 'qlora' else 'plain'}-{str(dtype).removeprefix('torch.')}"
        if not (folder / "config.json").is_file():
            make_model(name, folder, quantize=mode == "qlora", device=device, dtype=dtype)
    config = AutoConfig.from_pretrained(folder)
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized and mode == "full":
        raise ConfigError(f"--model {folder} is quantised: only adapters can be trained on it; take --mode qlora")
    return _counted(folder, config, quantized, rank, device, dtype)


def compute_in() -> tuple[torch.device, torch.dtype]:
    """A GPU and bfloat16 (float16 where that is emulated), else the CPU and float32."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device("cuda", torch.cuda.current_device()), torch.bfloat16 if bf16 else torch.float16


def make_model(name: str, folder: Path, *, quantize: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Make `MODELS[name]` on `device` and save it, with its linear layers but the head in NF4 if `quantize`.

    The same weights for either, from one seed. Quantised in place of a load and a second save: 8B take 20 s less.
    """
    fields = dict(MODELS[name])
    ids = {f"{kind}_token_id": SPECIAL_TOKENS.index(token) for kind, token in _TOKEN_NAMES.items() if kind != "unk"}
    fields |= ids | {"initializer_range": OUTPUT_STD / fields["hidden_size"] ** 0.5}
    config = AutoConfig.for_model(**fields)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantize:
        model.config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ).to_dict()
    with staged_folder(folder) as staging:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(staging)
        save_torch_state_dict(_stored(model, quantize), str(staging), max_shard_size="5GB")
        make_tokenizer().save_pretrained(staging)


def _stored(model: Any, quantize: bool) -> dict[str, Tensor]:
    """The state dict as a checkpoint holds it: tied weights once, 4-bit layers as bitsandbytes saves them."""
    state = model.state_dict()
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if module is head:
            if tied:
                del state[f"{name}.weight"]
        elif quantize:
            from bitsandbytes.functional import quantize_4bit

            key = f"{name}.weight"
            packed, constants = quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            state[key] = packed
            # Copies: a table that several layers share would be saved for the first of them alone.
            state |= {f"{key}.{part}": value.clone() for part, value in constants.as_dict(packed=True).items()}
            module.weight = None  # type: ignore[assignment]  # both sizes of the whole model may not fit
    return state


_TOKEN_NAMES = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte level without merges: every byte of a text is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    names: dict[str, Any] = {f"{kind}_token": token for kind, token in _TOKEN_NAMES.items()}
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)


def _counted(
    folder: Path, config: PreTrainedConfig, quantized: bool, rank: int, device: torch.device, dtype: torch.dtype
) -> MadeModel:
    text: Any = config.get_text_config(decoder=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = find_linear_targets(model)
    adapted = [module for name, module in linear.items() if name.rpartition(".")[2] in targets or name in targets]
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    facts = ModelFacts(
        linear_parameters=sum(module.weight.numel() for module in linear.values()),
        lora_parameters=rank * sum(module.in_features + module.out_features for module in adapted),
        attention_features=text.num_attention_heads * size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        dtype=str(dtype).removeprefix("torch."),
    )
    attention = "eager" if getattr(text, "attn_logit_softcapping", None) else "sdpa"  # SDPA has no softcap
    return MadeModel(folder, quantized, tuple(targets), attention, str(device), facts)
