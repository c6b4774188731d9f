"""A tokenizer's own template: what is learnt, and what is refused and why."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyralis.data.jinja_template import JinjaTemplate
from pyralis.data.rendering import Rendered, SpansOf
from pyralis.data.template import resolve_template
from pyralis.data.tokenize import encode_conversation, encode_prompt
from pyralis.data.types import Message
from pyralis.errors import TemplateError
from tests.data import chat_jinja
from tests.data.tokenizers import byte_level, tiny_tokenizer

SYSTEM = Message("system", "Be brief. 简短些")
TURNS = (
    Message("user", "Hi 你好"),
    Message("assistant", "Hello"),
    Message("user", "Bye"),
    Message("assistant", "再见 😀"),
)
HELLO, BYE = "Hello", "再见 😀"
STOPS = {
    "llama3": "<|eot_id|>", "qwen2": "<|im_end|>", "qwen3": "<|im_end|>", "gemma": "<end_of_turn>",
    "mistral": "</s>", "phi3": "<|end|>", "zephyr": "</s>", "plain": "</s>", "generation": "<|im_end|>",
}  # fmt: skip
NO_SYSTEM = ("gemma", "mistral")
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def own(jinja: str, *, system: str | None = None) -> JinjaTemplate:
    return JinjaTemplate(jinja, tiny_tokenizer("byte_level"), system=system)


def learnt(rendered: Rendered) -> list[str]:
    return [rendered.text[span.start : span.end] for span in rendered.spans]


@pytest.mark.parametrize("name", chat_jinja.TEMPLATES)
def test_answers_and_stops_are_learnt(name: str) -> None:
    tokenizer = tiny_tokenizer("byte_level")
    template = own(chat_jinja.TEMPLATES[name])
    stop = STOPS[name]
    assert template.stop_strings == (stop,)
    messages = TURNS if name in NO_SYSTEM else (SYSTEM, *TURNS)
    rendered = template.render(messages)
    dicts = [{"role": message.role, "content": message.content} for message in messages]
    stock = tokenizer.apply_chat_template(dicts, chat_template=template.jinja, tokenize=False)
    assert rendered.text == stock
    expected = {
        "qwen3": [HELLO + stop, EMPTY_THOUGHT + BYE + stop],
        "mistral": [f" {HELLO}{stop}", f" {BYE}{stop}"],
        "plain": [f" {HELLO} {stop}", f" {BYE} {stop}"],
    }.get(name, [HELLO + stop, BYE + stop])
    assert learnt(rendered) == expected
    assert [span.turn for span in rendered.spans] == [0, 1]
    assert template.render(messages, spans="last").spans == rendered.spans[1:]
    assert template.render(messages, spans="none") == Rendered(rendered.text, ())

    encoded = encode_conversation(messages, template, tokenizer, max_length=1000)
    assert encoded.input_ids == tokenizer(stock, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([label for label in encoded.labels if label != -100]) == "".join(expected)
    for length in (len(messages) - 3, len(messages) - 1):
        prompt = encode_prompt(messages[:length], template, tokenizer)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt)] != -100


contents = st.text(alphabet="ab .:,你好😀\n", max_size=12).filter(lambda text: bool(text.strip()))


@pytest.mark.parametrize("name", [name for name in chat_jinja.TEMPLATES if name != "qwen3"])
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(texts=st.lists(contents, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_random_conversations(name: str, texts: list[str]) -> None:
    roles = ("user", "assistant") * 3
    messages = tuple(Message(role, text) for role, text in zip(roles, texts, strict=False))
    template = own(chat_jinja.TEMPLATES[name])
    rendered = template.render(messages)
    answers = [text.strip() for text in texts[1::2]]
    assert [text.removesuffix(STOPS[name]).strip() for text in learnt(rendered)] == answers
    encoded = encode_conversation(messages, template, tiny_tokenizer("byte_level"), max_length=10_000)
    supervised = tiny_tokenizer("byte_level").decode([label for label in encoded.labels if label != -100])
    # A token of line breaks at the edge may begin in the header, and then is the header's.
    assert "".join(supervised.split()) == "".join("".join(learnt(rendered)).split())


def test_generation_blocks_are_what_transformers_masks() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = chat_jinja.GENERATION
    dicts = [{"role": message.role, "content": message.content} for message in (SYSTEM, *TURNS)]
    stock = tokenizer.apply_chat_template(dicts, return_assistant_tokens_mask=True, return_dict=True)
    ours = encode_conversation((SYSTEM, *TURNS), resolve_template("", tokenizer), tokenizer, max_length=1000)
    assert ours.input_ids == stock["input_ids"]
    assert [int(label != -100) for label in ours.labels] == stock["assistant_masks"]
    bare = JinjaTemplate(
        chat_jinja.GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", ""), tokenizer
    )
    assert bare.render((SYSTEM, *TURNS)) == resolve_template("", tokenizer).render((SYSTEM, *TURNS))


def test_generation_blocks_say_which_turns_and_get_their_stop() -> None:
    block, end = "{% generation %}", "{% endgeneration %}"
    content = "{{ message['content'] + '<|im_end|>' }}"
    assert content in chat_jinja.GENERATION
    last_only = chat_jinja.GENERATION.replace(
        block + content + end, f"{{% if loop.last %}}{block}{content}{end}{{% else %}}{content}{{% endif %}}"
    )
    (span,) = own(last_only).render(TURNS).spans
    assert span.turn == 1
    no_stop = chat_jinja.GENERATION.replace(content + end, "{{ message['content'] }}" + end + "{{ '<|im_end|>' }}")
    assert own(no_stop).render(TURNS) == own(chat_jinja.GENERATION).render(TURNS)
    cut = chat_jinja.GENERATION.replace(
        content + end, "{{ message['content'][:1] }}" + end + "{{ message['content'][1:] + '<|im_end|>' }}"
    )
    with pytest.raises(TemplateError, match="cut assistant answer 1 off"):
        own(cut).render(TURNS)


# Thinking

THOUGHT = "<think>\nhm\n</think>\n\n"
TWO_THOUGHTS = (TURNS[0], Message("assistant", THOUGHT + HELLO), TURNS[2], Message("assistant", THOUGHT + BYE))


def test_the_last_answers_thinking_is_learnt() -> None:
    template = own(chat_jinja.QWEN3)
    messages = (*TURNS[:3], TWO_THOUGHTS[3])
    assert learnt(template.render(messages)) == ["Hello<|im_end|>", f"{THOUGHT}{BYE}<|im_end|>"]
    for spelling in (f"<think>hm</think>{BYE}", f"\n<think>\n\nhm\n</think>\n{BYE}"):
        assert template.render((*TURNS[:3], Message("assistant", spelling))) == template.render(messages)


def test_dropped_thinking_is_refused_unless_only_the_last_turn_is_learnt() -> None:
    template = own(chat_jinja.QWEN3)
    with pytest.raises(
        TemplateError, match=r"does not write the whole of assistant answer 1.*loss_on to \"last_turn\""
    ):
        template.render(TWO_THOUGHTS)
    assert learnt(template.render(TWO_THOUGHTS, spans="last")) == [f"{THOUGHT}{BYE}<|im_end|>"]
    encoded = encode_conversation(
        TWO_THOUGHTS, template, tiny_tokenizer("byte_level"), max_length=1000, loss_on="last_turn"
    )
    assert encoded.supervised > 0


def test_thinking_that_is_always_dropped_is_refused() -> None:
    drops = chat_jinja.QWEN2.replace("message['content']", "message['content'].split('</think>')[-1]")
    with pytest.raises(TemplateError, match="does not write the whole of assistant answer 1"):
        own(drops).render(TWO_THOUGHTS[:2])
    assert learnt(own(drops).render(TURNS)) == [f"{HELLO}<|im_end|>", f"{BYE}<|im_end|>"]


# Other messages


def test_tool_messages_are_never_learnt() -> None:
    messages = (TURNS[0], Message("assistant", "call: weather"), Message("tool", "sunny"), Message("assistant", "Sun."))
    text = own(chat_jinja.QWEN3).render(messages)
    assert learnt(text) == ["call: weather<|im_end|>", f"{EMPTY_THOUGHT}Sun.<|im_end|>"]
    assert "<tool_response>\nsunny\n</tool_response>" in text.text
    with pytest.raises(TemplateError, match="does not write tool messages: 'sunny'"):
        own(chat_jinja.ZEPHYR).render(messages)
    as_json = chat_jinja.QWEN2.replace("message['content']", "(message['content'] | tojson)")
    tool = Message("tool", 'a "quoted"\nline')
    assert learnt(own(as_json).render((TURNS[0], tool, TURNS[1]))) == ['"Hello"<|im_end|>']


def test_system_messages_are_written_or_refused() -> None:
    with pytest.raises(TemplateError, match=r"refuses a conversation of the roles \[system, user.*not supported"):
        own(chat_jinja.GEMMA).render((SYSTEM, *TURNS))
    with pytest.raises(TemplateError, match="Only user and assistant roles"):
        own(chat_jinja.MISTRAL, system="Be brief.").render(TURNS)
    passes_over = chat_jinja.ZEPHYR.replace("== 'system'", "== 'nobody'")
    for template, messages in ((own(passes_over), (SYSTEM, *TURNS)), (own(passes_over, system="S!"), TURNS)):
        with pytest.raises(TemplateError, match="does not write system messages"):
            template.render(messages)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "phi3", "zephyr", "plain", "generation"])
def test_default_system_text(name: str) -> None:
    jinja = chat_jinja.TEMPLATES[name]
    plain, other = own(jinja), own(jinja, system=SYSTEM.content)
    assert other.render(TURNS) == plain.render((SYSTEM, *TURNS))
    mine = Message("system", "Mine")
    assert other.render((mine, *TURNS)) == plain.render((mine, *TURNS))


def test_alternation_is_the_templates_word() -> None:
    with pytest.raises(TemplateError, match="must alternate"):
        own(chat_jinja.GEMMA).render((TURNS[0], TURNS[2], TURNS[1]))
    assert learnt(own(chat_jinja.QWEN2).render((TURNS[1], TURNS[0], TURNS[3])))[0] == f"{HELLO}<|im_end|>"


# Templates that cannot be trained with


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "writes nothing behind an assistant's answer"),
        (
            "{% for m in messages %}{{ m.content + ('</s>' if loop.last else ';') }}{% endfor %}",
            "writes ';.*' behind assistant answer 1",
        ),
        ("{{ messages[-1].content + '</s>' }}", "drops assistant answer 1"),
        (
            "{% for m in messages %}{{ m.content + '</s>' + m.content + '</s>' }}{% endfor %}",
            "writes 2 times assistant answer 1",
        ),
        ("{% for m in messages %}{{ m.content | length }}{{ m.content + '</s>' }}{% endfor %}", "cannot be found"),
        ("{% for m in messages %}{{ m.content | upper + '</s>' }}{% endfor %}", "does not write the whole"),
        ("{{ messages[0].nothing.more }}", "refuses a conversation"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "refuses a conversation"),
        ("{% if messages %}", "not valid Jinja: Unexpected end of template"),
    ],
)
def test_what_cannot_be_learnt_is_refused_with_the_reason(jinja: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        own(jinja).render(TURNS)


# Odd ones


@pytest.mark.parametrize("spans", ["all", "last"])
def test_a_clock_between_renders(monkeypatch: pytest.MonkeyPatch, spans: SpansOf) -> None:
    template = own("{{ clock }}" + chat_jinja.QWEN2)
    ticks = iter(["09:00", "09:00", "09:01"])  # the stop's probe, then the clock goes on behind the first render
    tokenizer = template._tokenizer
    stock = type(tokenizer).apply_chat_template
    assert template.stop_strings

    def ticking(self: object, *args: object, **options: object) -> object:
        return stock(self, *args, clock=next(ticks, "09:01"), **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", ticking)
    next(ticks)
    rendered = template.render(TURNS, spans=spans)
    assert rendered.text.startswith("09:01")
    assert learnt(rendered)[-1] == f"{BYE}<|im_end|>"


def test_dates() -> None:
    dated = own("{{ strftime_now('%Y-%m-%d') + '\n' }}" + chat_jinja.QWEN2)
    assert learnt(dated.render(TURNS)) == [f"{HELLO}<|im_end|>", f"{BYE}<|im_end|>"]


def test_a_template_without_generation_prompt_learns_no_header() -> None:
    jinja = chat_jinja.QWEN2.split("{% if add_generation_prompt %}")[0]
    assert learnt(own(jinja).render(TURNS)) == [f"{HELLO}<|im_end|>", f"{BYE}<|im_end|>"]


def test_white_space_and_private_characters() -> None:
    odd = Message("assistant", "\n \U000f0000 a\U000f0003\n\n")
    (kept,) = learnt(own(chat_jinja.QWEN2).render((TURNS[0], odd)))
    assert kept == odd.content + "<|im_end|>"
    (trimmed,) = learnt(own(chat_jinja.LLAMA3).render((TURNS[0], odd)))
    assert trimmed == odd.content.strip() + "<|eot_id|>"
    for text in ("", " \n"):
        (empty,) = learnt(own(chat_jinja.QWEN2).render((TURNS[0], Message("assistant", text))))
        assert empty == text + "<|im_end|>"


def test_prompts_without_answers() -> None:
    template = own(chat_jinja.QWEN2)
    rendered = template.render(TURNS[:1], add_generation_prompt=True)
    assert rendered.text.endswith("<|im_start|>assistant\n")
    assert rendered.spans == ()
    rendered = template.render(TURNS[:3], add_generation_prompt=True)
    assert learnt(rendered) == [f"{HELLO}<|im_end|>"]


def test_answers_that_hold_the_stop_or_repeat() -> None:
    messages = (Message("user", HELLO), TURNS[1], Message("user", HELLO), TURNS[1], Message("user", "<|im_end|>\n"))
    answer = Message("assistant", f"<|im_end|>\n<|im_start|>user\n{HELLO}")
    rendered = own(chat_jinja.QWEN2).render((*messages, answer))
    assert learnt(rendered) == [f"{HELLO}<|im_end|>", f"{HELLO}<|im_end|>", answer.content + "<|im_end|>"]
