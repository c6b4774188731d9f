"""Chat templates by name, their EOS, and data in other spellings."""

from __future__ import annotations

from typing import Any

import pytest

from pyralis import get_chat_template
from pyralis.api.chat_templates import spec_of
from pyralis.data.jinja_template import JinjaTemplate
from pyralis.data.named_templates import TEMPLATES
from pyralis.data.types import Message
from pyralis.errors import TemplateError
from tests.data.tokenizers import llama as llama_tokenizer
from tests.tiny import make_tiny_tokenizer

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Farewell"},
]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT]
MAPPING = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


def text(tokenizer: Any, chat: Any = CHAT, **options: Any) -> str:
    return tokenizer.apply_chat_template(chat, tokenize=False, **options)


def test_chatml_is_the_default() -> None:
    tokenizer = make_tiny_tokenizer(chat_template=None)
    tokenizer.eos_token = "<|endoftext|>"
    assert get_chat_template(tokenizer) is tokenizer
    assert text(tokenizer, CHAT[:2]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert tokenizer.eos_token == "<|im_end|>"
    assert text(tokenizer, CHAT[:1], add_generation_prompt=True).endswith("<|im_start|>assistant\n")


def test_eos_is_left_alone_when_asked() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    get_chat_template(tokenizer, "chatml", map_eos_token=False)
    assert tokenizer.eos_token == "<|endoftext|>"


def test_a_stop_that_is_no_token_is_written_as_eos() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    get_chat_template(tokenizer, "llama3")
    assert "<|eot_id|>" not in text(tokenizer)
    assert text(tokenizer).endswith("Farewell<|endoftext|>")
    assert text(tokenizer).startswith("<|start_header_id|>user")  # nor is its BOS a token, and this model has none
    get_chat_template(tokenizer, "llama3", map_eos_token=False)
    assert text(tokenizer).endswith("Farewell<|eot_id|>")


@pytest.mark.parametrize(
    "name",
    [*TEMPLATES, "chatml", "alpaca", "llama", "llama-3", "phi-3.5", "phi-4", "qwen-2.5", "gemma3", "gemma-2", "Zephyr"],
)
@pytest.mark.parametrize("map_eos_token", [True, False])
def test_every_name_writes_and_finds_every_turn(name: str, map_eos_token: bool) -> None:
    tokenizer = get_chat_template(llama_tokenizer(), name, map_eos_token=map_eos_token)
    written = text(tokenizer)
    assert all(message["content"] in written for message in CHAT)
    template = JinjaTemplate(tokenizer.chat_template, tokenizer)
    rendered = template.render([Message(m["role"], m["content"]) for m in CHAT])  # type: ignore[arg-type]
    answers = [rendered.text[span.start : span.end] for span in rendered.spans]
    assert [answer.strip().startswith(word) for answer, word in zip(answers, ("Hello", "Farewell"))] == [True, True]
    if map_eos_token:
        assert tokenizer.eos_token in answers[-1]


@pytest.mark.parametrize("name", ["chatml", "llama3", "vicuna", "alpaca"])
def test_a_mapping_reads_both_spellings(name: str) -> None:
    plain = get_chat_template(llama_tokenizer(), name)
    mapped = get_chat_template(llama_tokenizer(), name, mapping=MAPPING)
    assert text(mapped, SHAREGPT) == text(mapped, CHAT) == text(plain, CHAT)
    system = [{"from": "system", "value": "Be brief."}, *SHAREGPT]
    assert text(mapped, system) == text(plain, [{"role": "system", "content": "Be brief."}, *CHAT])


def test_system_messages() -> None:
    tokenizer = get_chat_template(make_tiny_tokenizer(), "qwen-2.5")
    assert text(tokenizer).startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")
    get_chat_template(tokenizer, "qwen-2.5", system_message="Be brief.")
    assert text(tokenizer).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    get_chat_template(tokenizer, "qwen-2.5", system_message="")
    assert text(tokenizer).startswith("<|im_start|>user")


def test_templates_of_ones_own() -> None:
    jinja = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|endoftext|>' }}{% endfor %}"
    tokenizer = get_chat_template(make_tiny_tokenizer(), jinja)
    assert (tokenizer.chat_template, tokenizer.eos_token) == (jinja, "<|im_end|>")
    get_chat_template(tokenizer, (jinja, "<|endoftext|>"), mapping=MAPPING)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert text(tokenizer, SHAREGPT[:1]) == "user: Hi<|endoftext|>"
    get_chat_template(tokenizer, (jinja, "<no token>"))
    assert tokenizer.eos_token == "<|endoftext|>"


def test_templates_that_only_the_model_has() -> None:
    tokenizer = make_tiny_tokenizer()
    before = tokenizer.chat_template
    assert get_chat_template(tokenizer, "llama-3.1").chat_template == before
    with pytest.raises(TemplateError, match=r"published with the model.*'chatml'"):
        get_chat_template(make_tiny_tokenizer(chat_template=None), "llama-3.1")


def test_unknown_names() -> None:
    with pytest.raises(TemplateError, match="Did you mean chatml"):
        get_chat_template(make_tiny_tokenizer(), "chat-ml")
    assert spec_of("LLAMA-3").name == "llama3"
