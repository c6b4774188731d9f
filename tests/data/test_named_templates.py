"""Each named template: its exact text, its exact mask, and the Jinja template that says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError as JinjaError

from pyralis.data.named_templates import CHATGLM3_SYSTEM, INTERNLM_SYSTEM, LLAMA2_SYSTEM, TEMPLATES, VICUNA_SYSTEM
from pyralis.data.template import install_template, resolve_template
from pyralis.data.template_table import template_table
from pyralis.data.tokenize import encode_conversation, encode_prompt
from pyralis.data.types import Message
from pyralis.errors import TemplateError
from tests.data.tokenizers import byte_level, tiny_tokenizer

SYSTEM = Message("system", "S")
TURNS = (
    Message("user", " Hi 你好\n"),
    Message("assistant", "Hello \n"),
    Message("user", "Bye"),
    Message("assistant", " 再见 😀"),
)
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
HELLO, BYE = "Hello", "再见 😀"


def chatml(bos: str = "") -> tuple[str, list[str]]:
    text = (
        f"{bos}<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi 你好<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n再见 😀<|im_end|>\n"
    )
    return text, ["Hello<|im_end|>", "再见 😀<|im_end|>"]


MISTRAL = (
    "<s>[INST] S\n\nHi 你好 [/INST] Hello</s>[INST] Bye [/INST] 再见 😀</s>",
    [" Hello</s>", " 再见 😀</s>"],
)
PLAIN = [f"{HELLO}</s>", f"{BYE}</s>"]
# name: the text of SYSTEM and TURNS, and what is learnt of it
EXPECTED: dict[str, tuple[str, list[str]]] = {
    "default": (
        "System: S\n\nUser: Hi 你好\nAssistant: Hello </s>User: Bye\nAssistant: 再见 😀 </s>",
        [" Hello </s>", " 再见 😀 </s>"],
    ),
    "qwen": chatml(),
    "minicpm3": chatml(),
    "yi": chatml(),
    "internlm2": chatml("<s>"),
    "internlm": (
        "<s><|System|>:S\n<|User|>:Hi 你好\n<|Bot|>:Hello</s>\n<|User|>:Bye\n<|Bot|>:再见 😀</s>\n",
        PLAIN,
    ),
    "orion": (
        "<s>Human: S\n\nHi 你好\n\nAssistant: </s>Hello</s>Human: Bye\n\nAssistant: </s>再见 😀</s>",
        PLAIN,
    ),
    "deepseek": (
        f"{BEGIN}S\n\nUser: Hi 你好\n\nAssistant: Hello{END}User: Bye\n\nAssistant: 再见 😀{END}",
        [f" Hello{END}", f" 再见 😀{END}"],
    ),
    "chatglm2": (
        "[gMASK]sop[Round 1]\n\n问：S\n\nHi 你好\n\n答：Hello</s>\n\n[Round 2]\n\n问：Bye\n\n答：再见 😀</s>",
        PLAIN,
    ),
    "chatglm3": (
        "[gMASK]sop<|system|>\n S<|user|>\n Hi 你好<|assistant|>\n Hello</s><|user|>\n Bye<|assistant|>\n 再见 😀</s>",
        ["\n Hello</s>", "\n 再见 😀</s>"],
    ),
    "ziya2": ("<human>:S\n\nHi 你好 <bot>:Hello</s><human>:Bye <bot>:再见 😀</s>", PLAIN),
    "xverse": (
        "Human: S\n\nHi 你好\n\nAssistant: Hello<|endoftext|>Human: Bye\n\nAssistant: 再见 😀<|endoftext|>",
        [" Hello<|endoftext|>", " 再见 😀<|endoftext|>"],
    ),
    "minicpm": ("<s>S<用户>Hi 你好<AI>Hello</s><用户>Bye<AI>再见 😀</s>", PLAIN),
    "zephyr": (
        "<|system|>\nS</s>\n<|user|>\nHi 你好</s>\n<|assistant|>\nHello</s>\n"
        "<|user|>\nBye</s>\n<|assistant|>\n再见 😀</s>\n",
        PLAIN,
    ),
    "mistral": MISTRAL,
    "mixtral": MISTRAL,
    "baichuan": (
        "<reserved_102>S\n\nHi 你好<reserved_103>Hello</s><reserved_102>Bye<reserved_103>再见 😀</s>",
        PLAIN,
    ),
    "baichuan2": (
        "S<reserved_106>Hi 你好<reserved_107>Hello</s><reserved_106>Bye<reserved_107>再见 😀</s>",
        PLAIN,
    ),
    "vicuna": (
        "<s>S USER: Hi 你好 ASSISTANT: Hello</s>USER: Bye ASSISTANT: 再见 😀</s>",
        [" Hello</s>", " 再见 😀</s>"],
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nHi 你好 [/INST] Hello </s><s>[INST] Bye [/INST] 再见 😀 </s>",
        [" Hello </s>", " 再见 😀 </s>"],
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi 你好<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n再见 😀<|eot_id|>",
        ["Hello<|eot_id|>", "再见 😀<|eot_id|>"],
    ),
    "gemma": (
        "<bos><start_of_turn>user\nS\n\nHi 你好<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n再见 😀<end_of_turn>\n",
        ["Hello<end_of_turn>", "再见 😀<end_of_turn>"],
    ),
    "phi3": (
        "<|system|>\nS<|end|>\n<|user|>\nHi 你好<|end|>\n<|assistant|>\nHello<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n再见 😀<|end|>\n",
        ["Hello<|end|>", "再见 😀<|end|>"],
    ),
}
DEFAULT_SYSTEMS = {
    "qwen": "You are a helpful assistant.",
    "minicpm3": "You are a helpful assistant.",
    "internlm": INTERNLM_SYSTEM,
    "internlm2": INTERNLM_SYSTEM,
    "chatglm3": CHATGLM3_SYSTEM,
    "vicuna": VICUNA_SYSTEM,
    "llama2": LLAMA2_SYSTEM,
}
names = pytest.mark.parametrize("name", TEMPLATES)


def test_all_of_them_are_expected() -> None:
    assert sorted(EXPECTED) == sorted(TEMPLATES)
    assert len(TEMPLATES) == 23


@names
def test_exact_text_and_mask(name: str) -> None:
    tokenizer = tiny_tokenizer("byte_level")
    template = resolve_template(name, tokenizer)
    messages = (SYSTEM, *TURNS)
    rendered = template.render(messages)
    text, learnt = EXPECTED[name]
    assert rendered.text == text
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == learnt
    assert [span.turn for span in rendered.spans] == [0, 1]

    encoded = encode_conversation(messages, template, tokenizer, max_length=1000)
    assert encoded.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    supervised = [label for label in encoded.labels if label != -100]
    assert tokenizer.decode(supervised) == "".join(learnt)
    assert all(label in (-100, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))

    last = encode_conversation(messages, template, tokenizer, max_length=1000, loss_on="last_turn")
    assert tokenizer.decode([label for label in last.labels if label != -100]) == learnt[1]


@names
def test_prompt_is_what_stands_in_front_of_the_answer(name: str) -> None:
    tokenizer = tiny_tokenizer("byte_level")
    template = resolve_template(name, tokenizer)
    messages = (SYSTEM, *TURNS)
    whole = template.render(messages)
    for length, span in zip((2, 4), whole.spans, strict=True):
        prompt = template.render(messages[:length], add_generation_prompt=True).text
        assert prompt == whole.text[: span.start]
        assert not prompt.endswith(" ")
        ids = encode_prompt(messages[:length], template, tokenizer)
        encoded = encode_conversation(messages[: length + 1], template, tokenizer, max_length=1000)
        assert encoded.input_ids[: len(ids)] == ids
        assert encoded.labels[len(ids)] != -100


@names
def test_system_texts(name: str) -> None:
    tokenizer = tiny_tokenizer("byte_level")
    default = DEFAULT_SYSTEMS.get(name, "")
    named = resolve_template(name, tokenizer)
    assert named.render(TURNS) == named.render((Message("system", default), *TURNS))
    assert resolve_template(name, tokenizer, system=" S ").render(TURNS) == named.render((SYSTEM, *TURNS))
    bare = resolve_template(name, tokenizer, system="")
    assert bare.render(TURNS) == named.render((Message("system", " "), *TURNS))
    assert not default or default not in bare.render(TURNS).text


@names
@pytest.mark.parametrize("system", [None, "", "Be {content} {{ brief }}.\n'\"\\"])
def test_jinja_gives_the_same_text(name: str, system: str | None) -> None:
    tokenizer = byte_level()
    template = resolve_template(name, tokenizer, system=system)
    install_template(template, tokenizer)
    odd = (Message("user", "{round} {content} {% if %}"), Message("assistant", "</s> ' \" \\n \t{{ x }}"))
    for messages in (
        TURNS,
        (SYSTEM, *TURNS),
        (Message("system", "  "), *TURNS),
        (SYSTEM, *odd, *TURNS[2:]),
        TURNS[:1],
        (SYSTEM, *TURNS[:3]),
        (TURNS[0], TURNS[2], TURNS[1]),
    ):
        dicts = [{"role": message.role, "content": message.content} for message in messages]
        for prompt in (False, True):
            text = tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=prompt)
            assert text == template.render(messages, add_generation_prompt=prompt).text


@names
def test_messages_without_a_form_are_refused(name: str) -> None:
    tokenizer = byte_level()
    template = resolve_template(name, tokenizer)
    install_template(template, tokenizer)
    for messages, reason in (
        ((*TURNS[:3], Message("tool", "42")), "role 'tool'"),
        ((*TURNS[:2], SYSTEM, *TURNS[2:]), "a system message must be the first"),
    ):
        with pytest.raises(TemplateError, match=reason):
            template.render(messages)
        dicts = [{"role": message.role, "content": message.content} for message in messages]
        with pytest.raises(JinjaError, match=name):
            tokenizer.apply_chat_template(dicts, tokenize=False)
    with pytest.raises(TemplateError, match="without messages"):
        template.render(())


def test_a_system_text_needs_a_user_message_to_stand_in() -> None:
    template = resolve_template("gemma", tiny_tokenizer("byte_level"))
    with pytest.raises(TemplateError, match="first user message"):
        template.render((SYSTEM, TURNS[1]))


def test_the_page_shows_the_templates_as_they_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "templates.md").read_text(encoding="utf-8")
    begin, end = "<!-- python -m pyralis.data.template_table writes this -->\n", "<!-- end -->"
    assert begin in page
    assert page.split(begin)[1].split(end)[0].strip() == template_table().strip()
