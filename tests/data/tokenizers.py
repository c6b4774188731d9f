"""Tiny tokenizers of every kind, trained on the spot from a few bilingual sentences.

All of them know the control tokens of every named template, so that each template can be tried on each of them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import regex
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

SENTENCES = (
    "Hello, who are you? I am a small assistant. What is the capital of France? It is Paris.",
    "你好，请问你是谁？我是一个小助手。法国的首都是哪里？是巴黎。",
    "User: good morning\nAssistant: good morning to you, the weather is fine today.",
    "Human: 今天天气怎么样？\n\nAssistant: 今天天气很好。[INST] sing a song [/INST] la la la",
    "The answer is 42. 答案是四十二。[Round 1]\n\n问：一加一等于几？\n\n答：二。",
    "system user assistant model USER: hi ASSISTANT: hello Human: hi",
    "The end.\n\n",
)
CONTROL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|end|>", "<|System|>", "<|User|>", "<|Bot|>", "<用户>", "<AI>", "<reserved_102>", "<reserved_103>",
    "<reserved_106>", "<reserved_107>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "[gMASK]", "sop",
)  # fmt: skip
SPECIAL = ("<unk>", "<s>", "</s>", *CONTROL_TOKENS)
NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@cache
def byte_level_core() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(SENTENCES * 3, trainer)
    return core


def _fast(core: Tokenizer) -> PreTrainedTokenizerFast:
    core.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **NAMED)


def byte_level() -> PreTrainedTokenizerFast:
    """As of GPT-2, Llama 3 and Qwen."""
    return _fast(Tokenizer.from_str(byte_level_core().to_str()))


def byte_level_trimmed() -> PreTrainedTokenizerFast:
    """The same with white space left out of its offsets, as some checkpoints have it, and Qwen's NFC."""
    core = Tokenizer.from_str(byte_level_core().to_str())
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.normalizer = normalizers.NFC()
    return _fast(core)


@cache
def _metaspace_bpe() -> str:
    core = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(vocab_size=650, special_tokens=["<unk>", *BYTES], show_progress=False)
    core.train_from_iterator(SENTENCES * 3, trainer)
    state = json.loads(core.to_str())
    state["added_tokens"] = []  # the bytes are ordinary tokens
    return json.dumps(state)


def llama() -> PreTrainedTokenizerFast:
    """As of Llama 2 in transformers 5: a "▁" in front of the text only."""
    core = Tokenizer.from_str(_metaspace_bpe())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = _METASPACE_DECODER
    return _fast(core)


def llama_legacy() -> PreTrainedTokenizerFast:
    """As of Llama 2 before: a "▁" behind every special token too."""
    state = json.loads(_metaspace_bpe())
    state["pre_tokenizer"] = None
    core = Tokenizer.from_str(json.dumps(state))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = _METASPACE_DECODER
    return _fast(core)


_METASPACE_DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def phi() -> PreTrainedTokenizerFast:
    """As of Phi-3: Llama's, with special tokens that swallow the white space behind them."""
    core = Tokenizer.from_str(llama_legacy().backend_tokenizer.to_str())
    state = json.loads(core.to_str())
    for token in state["added_tokens"]:
        token["rstrip"] = token["content"] in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    core = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **NAMED)


def unigram() -> PreTrainedTokenizerFast:
    """As of T5 and XLM-R: Unigram, NFKC, unknown characters."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.normalizer = normalizers.NFKC()
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    core.train_from_iterator(SENTENCES * 3, trainer)
    return _fast(core)


@cache
def _sentencepiece_file(kind: str) -> Path:
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in SENTENCES for line in text.split("\n")] * 3),
        model_writer=model,
        model_type=kind,
        vocab_size=460,
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    folder = Path(tempfile.mkdtemp(prefix="pyralis-test-"))
    file = folder / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return file


def _sentencepiece(kind: str, *, legacy: bool) -> SentencePieceBackend:
    tokenizer = SentencePieceBackend(vocab_file=str(_sentencepiece_file(kind)), legacy=legacy, **NAMED)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


def slow_sentencepiece_bpe() -> SentencePieceBackend:
    return _sentencepiece("bpe", legacy=True)


def slow_sentencepiece_unigram() -> SentencePieceBackend:
    return _sentencepiece("unigram", legacy=False)


class SlowBPE(PythonBackend):
    """A byte-level BPE in Python, as many checkpoints with code of their own bring along."""

    vocab_files_names: ClassVar[dict[str, str]] = {}

    def __init__(self, **kwargs: str) -> None:
        state = json.loads(byte_level_core().to_str())["model"]
        self._vocab: dict[str, int] = dict(state["vocab"])
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(state["merges"])}
        self._tokens = {index: token for token, index in self._vocab.items()}
        self._bytes = _byte_characters()
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._vocab)

    def get_vocab(self) -> dict[str, int]:
        return {**self._vocab, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return [piece for word in regex.findall(GPT2_WORDS, text) for piece in self._merge(word)]

    def _merge(self, word: str) -> list[str]:
        pieces = [self._bytes[byte] for byte in word.encode()]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            place = min(range(len(pairs)), key=lambda k: self._ranks.get(pairs[k], 1 << 30))
            if pairs[place] not in self._ranks:
                break
            pieces[place : place + 2] = ["".join(pairs[place])]
        return pieces

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._vocab.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        back = {character: byte for byte, character in self._bytes.items()}
        parts = [bytes([back[c] for c in token]) if token in self._vocab else token.encode() for token in tokens]
        return b"".join(parts).decode("utf-8", errors="replace")


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + k) for k, byte in enumerate(others)}


def slow_bpe() -> SlowBPE:
    tokenizer = SlowBPE(**NAMED)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    maker.__name__: maker
    for maker in (
        byte_level, byte_level_trimmed, llama, llama_legacy, phi, unigram,
        slow_bpe, slow_sentencepiece_bpe, slow_sentencepiece_unigram,
    )
}  # fmt: skip


@cache
def tiny_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """One of MAKERS, made once a process."""
    return MAKERS[kind]()
