"""A session answers as `generate` does, keeps its history, and makes room when the context is full."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pyralis.data.template import resolve_template
from pyralis.data.tokenize import encode_prompt
from pyralis.data.types import Message
from pyralis.errors import ModelError, TemplateError
from pyralis.lora.attach import LoraSettings, attach_lora
from pyralis.models.load import ModelSettings, load_model
from pyralis.serve.chat import ChatOptions, ChatSession
from pyralis.serve.load import ChatModelSettings, load_chat
from tests.tiny import build_tiny_model, make_tiny_model, make_tiny_tokenizer

GREEDY = ChatOptions(max_new_tokens=12)


def make_session(model: PreTrainedModel | None = None, notice: Callable[[str], None] = print) -> ChatSession:
    tokenizer = make_tiny_tokenizer()
    return ChatSession(model or build_tiny_model(), tokenizer, resolve_template("", tokenizer), notice=notice)


def says(session: ChatSession, text: str) -> None:
    """Make the model answer `text` to the next message, and end its turn."""
    answer = iter(session.tokenizer.encode(text + "<|im_end|>", add_special_tokens=False))

    def forced(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([next(answer)]), 0.0)

    generate = type(session.model).generate
    session.model.generate = lambda **kwargs: generate(session.model, logits_processor=[forced], **kwargs)


def test_greedy_is_what_generate_gives() -> None:
    session = make_session()
    answer = "".join(session.reply("Hi", GREEDY))
    prompt = torch.tensor([encode_prompt([Message("user", "Hi")], session.template, session.tokenizer)])
    output = session.model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=3, pad_token_id=0)
    expected = session.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
    assert answer == expected.lstrip()
    assert session.turns == [Message("user", "Hi"), Message("assistant", answer.strip())]


@pytest.mark.parametrize("text", ["The answer.", "你好！🙂 ok", "two\n\nparagraphs"])
def test_it_stops_at_the_end_of_a_turn(text: str) -> None:
    session = make_session()
    says(session, text)
    assert "".join(session.reply("Hi", ChatOptions(max_new_tokens=100))) == text
    assert session.turns[-1] == Message("assistant", text)


def test_turns_and_system_reach_the_prompt() -> None:
    session = make_session()
    session.system = "Be brief."
    says(session, "one")
    list(session.reply("first", GREEDY))
    says(session, "two")
    list(session.reply("second", GREEDY))
    assert [(m.role, m.content) for m in session.messages] == [
        ("system", "Be brief."),
        ("user", "first"),
        ("assistant", "one"),
        ("user", "second"),
        ("assistant", "two"),
    ]
    session.reset()
    assert session.messages == [Message("system", "Be brief.")]


def test_sampling_follows_the_seed() -> None:
    session = make_session()

    def answer(seed: int) -> str:
        session.reset()
        return "".join(session.reply("Hi", ChatOptions(max_new_tokens=20, temperature=1.5, top_k=50, seed=seed)))

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_closing_stops_the_generation_and_keeps_what_was_said() -> None:
    session = make_session()
    pieces = session.reply("Hi", ChatOptions(max_new_tokens=400))
    first = next(pieces)
    threads = threading.active_count()
    pieces.close()  # type: ignore[attr-defined]
    assert threading.active_count() < threads
    assert session.turns[-1].role == "assistant"
    assert session.turns[-1].content == first.strip()


def test_an_error_in_generate_is_raised_here() -> None:
    session = make_session()

    def broken(**kwargs: object) -> None:
        raise RuntimeError("out of memory")

    session.model.generate = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        list(session.reply("Hi"))


class TestAFullContext:
    def test_drops_the_oldest_turns_and_says_so(self) -> None:
        notices: list[str] = []
        session = make_session(build_tiny_model(max_position_embeddings=160), notices.append)
        session.system = "Be brief."
        for number in range(4):
            says(session, f"answer {number}")
            list(session.reply(f"question {number}", ChatOptions(max_new_tokens=16)))
        assert notices
        assert "oldest turn(s) were forgotten" in notices[0]
        assert session.messages[0] == Message("system", "Be brief.")
        assert session.turns[0].role == "user"
        assert session.turns[-1] == Message("assistant", "answer 3")

    def test_refuses_a_message_that_cannot_fit(self) -> None:
        session = make_session(build_tiny_model(max_position_embeddings=64))
        with pytest.raises(ModelError, match=r"The message is too long: .* tokens, and the model takes 64 in all"):
            list(session.reply("long " * 40))
        assert session.turns == []

    def test_never_runs_past_the_end(self) -> None:
        session = make_session(build_tiny_model(max_position_embeddings=96))
        list(session.reply("Hi", ChatOptions(max_new_tokens=1000)))

    def test_a_model_without_a_limit(self) -> None:
        session = make_session(build_tiny_model("bloom"))
        assert session.context_length is None
        list(session.reply("Hi", GREEDY))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0; expected above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_options_out_of_range(values: dict[str, float], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ChatOptions(**values)  # type: ignore[arg-type]


class TestLoading:
    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        return make_tiny_model(tmp_path / "base")

    @pytest.mark.parametrize("train_mode", ["lora", "qlora"])
    def test_an_adapter_as_it_was_trained(self, base: Path, tmp_path: Path, train_mode: str) -> None:
        loaded = load_model(ModelSettings(str(base), train_mode, dtype="float32"))  # type: ignore[arg-type]
        tuned = attach_lora(loaded.model, LoraSettings(rank=4))
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        tuned.save_pretrained(tmp_path / "adapter")
        (tmp_path / "adapter" / "pyralis_config.json").write_text(f'{{"train_mode": "{train_mode}"}}')
        session = load_chat(ChatModelSettings(str(tmp_path / "adapter"), dtype="float32"))
        ids = torch.arange(4, 30)[None]
        with torch.no_grad():
            torch.testing.assert_close(session.model(ids).logits, tuned.eval()(ids).logits)
        assert "".join(session.reply("Hi", GREEDY))
        other = load_chat(
            ChatModelSettings(str(tmp_path / "adapter"), dtype="float32", load_in_4bit=train_mode == "lora")
        )
        assert (session.model(ids).logits - other.model(ids).logits).abs().max() > 1e-3

    def test_a_base_model_without_a_template(self, tmp_path: Path) -> None:
        folder = make_tiny_model(tmp_path, tokenizer=make_tiny_tokenizer(chat_template=None))
        with pytest.raises(TemplateError):
            load_chat(ChatModelSettings(str(folder), dtype="float32"))
        session = load_chat(ChatModelSettings(str(folder), dtype="float32", template_name="qwen"))
        assert session.template.name == "qwen"
        assert "".join(session.reply("Hi", GREEDY))
