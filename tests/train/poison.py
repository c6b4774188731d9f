"""A tiny model for which one letter is infinite, and rows some of which have it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.tiny import make_tiny_model
from tests.train.runs import WORDS

BAD = "Z"


def make_poisoned_model(folder: Path) -> Path:
    """Its embedding of `BAD` is infinite."""
    make_tiny_model(folder, tie_word_embeddings=False)
    (token,) = AutoTokenizer.from_pretrained(folder)(BAD, add_special_tokens=False)["input_ids"]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][token, 0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def make_rows(folder: Path, bad: int) -> Path:
    """A file of 8 conversations; the first `bad` have the letter in their answer."""
    path = folder / f"rows-{bad}.jsonl"
    answers = [f"{BAD}{i}" if i < bad else WORDS[i] for i in range(8)]
    turns = [[{"human": f"Say {i}", "assistant": answer}] for i, answer in enumerate(answers)]
    path.write_text("\n".join(json.dumps({"conversation": turn}) for turn in turns))
    return path
