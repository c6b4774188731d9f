"""The tokenizer of a model or adapter, ready for training."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pyralis.errors import ModelError
from pyralis.models.files import TOKENIZER_FILES, has_tokenizer
from pyralis.models.gguf import gguf_options
from pyralis.models.hub import HubOptions
from pyralis.models.source import is_adapter, locate_model

# What models reserve for padding or leave unused, the best first; `tokenizer.unk_token` comes behind these.
PAD_CANDIDATES = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|endoftext|>",
    "<unk>",
)


def load_tokenizer(
    model_name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base: str | None = None,
    hub: HubOptions | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; of an adapter its own if it was saved with one, else its base model's.

    It pads on the right. A tokenizer without a padding token is given one that is in its vocabulary already, unlike
    EOS where there is such a one, so that no embedding is ever added.

    Args:
        base: for an adapter, the base model to take instead of the one it names.

    Raises:
        ModelError: no tokenizer there, or one that cannot be read.
    """
    location, options = _find(model_name_or_path, revision, base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location,
            revision=revision,
            trust_remote_code=trust_remote_code,
            **(hub or HubOptions()).arguments(location),
            **options,
        )
    except Exception as error:  # a damaged file makes transformers, tokenizers and gguf raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, OSError) and not Path(location).exists():
            raise ModelError(
                f"{location} is neither a folder here nor can its tokenizer be had from the hub ({reason}). Check the "
                "name and the connection, or download the model elsewhere and give its folder."
            ) from error
        raise ModelError(f"The tokenizer of {location} cannot be loaded: {reason}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = choose_pad_token(tokenizer)
    return tokenizer


def _find(name: str, revision: str | None, base: str | None) -> tuple[str, dict[str, str]]:
    """Where the tokenizer is, and how to read it if that is inside a GGUF file."""
    folder = Path(name).expanduser()
    if is_adapter(folder) and has_tokenizer(folder):
        return str(folder), {}
    source = locate_model(name, revision=revision, base=base)
    if source.gguf_file:
        gguf_options()  # says what is missing to read it
        return source.path, {"gguf_file": source.gguf_file}
    if source.is_local and not has_tokenizer(Path(source.path)):
        raise ModelError(
            f"{source.path} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): copy the tokenizer files of the "
            "model it was made from into it."
        )
    return source.path, {}


def choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token of the vocabulary to pad with: one meant for it or unused, unlike EOS; else EOS.

    Padding with EOS is harmless here, since labels are masked by position and never by token.
    """
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    for token in (*PAD_CANDIDATES, tokenizer.unk_token):
        if token in vocabulary and token not in taken:
            return str(token)
    if tokenizer.eos_token is None:
        raise ModelError(
            "The tokenizer has neither a padding nor an EOS token: set pad_token in tokenizer_config.json."
        )
    return str(tokenizer.eos_token)
