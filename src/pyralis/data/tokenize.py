"""Conversations and texts to token ids and labels.

A conversation is rendered whole and tokenised once, exactly as chat will, and the labels follow from character offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pyralis.data.offsets import Tokenised, tokenise, tokens_in
from pyralis.data.rendering import ChatTemplate, Span, SpansOf
from pyralis.data.types import LossOn, Message
from pyralis.errors import DataError, TemplateError

IGNORE = -100
_LETTER = "ꙮ"  # of a script that no vocabulary merges with anything


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and labels (the id where it is learnt, else -100; not shifted), cut on the right at the length asked.

    `full_length` is the length before that cut: what is longer than allowed is for the caller to keep, drop or refuse.
    """

    input_ids: list[int]
    labels: list[int]
    full_length: int

    @property
    def supervised(self) -> int:
        """How many tokens are learnt. The first never is: nothing predicts it."""
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True, slots=True)
class EncodedPreference:
    """A prompt and two answers to it; `prompt_ids + chosen_ids` is how chat tokenises the conversation.

    `full_length` is that of the prompt and the longer answer before anything was cut.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    full_length: int


def encode_conversations(
    batch: Sequence[Sequence[Message]],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: LossOn = "all_turns",
) -> list[Encoded]:
    """Each conversation with its labels: on all assistant turns, the last one, or everything.

    Raises:
        TemplateError: the template refuses a conversation, or its answers cannot be found among the tokens.
    """
    spans_of: dict[LossOn, SpansOf] = {"all_turns": "all", "last_turn": "last", "everything": "none"}
    rendered = [template.render(messages, spans=spans_of[loss_on]) for messages in batch]
    encoded = []
    for one, tokenised in zip(rendered, tokenise([one.text for one in rendered], tokenizer), strict=True):
        if loss_on == "everything":
            learnt = [True] * len(tokenised.ids)
        else:
            learnt = tokens_in(one.spans, tokenised, tokenizer)
        encoded.append(_encoded(tokenised.ids, learnt, max_length))
    return encoded


def encode_conversation(
    messages: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: LossOn = "all_turns",
) -> Encoded:
    """`encode_conversations` of one."""
    return encode_conversations([messages], template, tokenizer, max_length=max_length, loss_on=loss_on)[0]


def encode_prompt(messages: Sequence[Message], template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens to generate the next answer from: the same that stand in front of it in training.

    A space at the end of the generation prompt is left to the answer, whose first token it is part of in training.
    Line breaks there can be cut into other tokens where nothing follows them (GPT-2's words): then they are taken from
    the prompt with a letter behind it.
    """
    text = template.render(messages, add_generation_prompt=True, spans="none").text.rstrip(" ")
    alone, followed = tokenise([text, text + _LETTER], tokenizer)
    if followed.ids[: len(alone.ids)] == alone.ids:
        return alone.ids
    answer = Span(len(text), len(followed.text), turn=0)
    return followed.ids[: tokens_in([answer], followed, tokenizer).index(True)]


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, *, add_bos: bool, add_eos: bool) -> list[int]:
    """A document's tokens, between BOS (where the tokenizer has one) and EOS, each once.

    Raises:
        TemplateError: EOS is wanted, and the tokenizer has none.
    """
    ids = list(tokenise([text], tokenizer)[0].ids)
    if add_bos and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids.insert(0, tokenizer.bos_token_id)
    return _with_eos(ids, tokenizer) if add_eos else ids


def encode_prompt_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Raw strings, tokenised as one text; the completion and the EOS behind it are learnt.

    BOS stands in front where the tokenizer puts it there by itself.

    Raises:
        TemplateError: the tokenizer has no EOS.
    """
    text = prompt + completion
    (tokenised,) = tokenise([text], tokenizer)
    learnt = tokens_in([Span(len(prompt), len(text), turn=0)], tokenised, tokenizer)
    ids = _with_eos(tokenised.ids, tokenizer)
    learnt = [*learnt, True][: len(ids)]
    if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids, learnt = [tokenizer.bos_token_id, *ids], [False, *learnt]
    return _encoded(ids, learnt, max_length)


def encode_preference(
    prompt: Sequence[Message],
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
) -> EncodedPreference:
    """Both conversations, tokenised once each and split where the answers begin.

    If prompt and longer answer exceed `max_length`, the prompt keeps its last tokens, as many as fit but at least
    `max_prompt_length`; then the answers are cut on the right.

    Raises:
        DataError: a continuation is not one assistant message.
    """
    for name, continuation in (("chosen", chosen), ("rejected", rejected)):
        if [message.role for message in continuation] != ["assistant"]:
            roles = ", ".join(message.role for message in continuation) or "nothing"
            raise DataError(f"{name}: expected one assistant message behind the common history, got {roles}.")
    texts = [template.render([*prompt, *continuation], spans="last") for continuation in (chosen, rejected)]
    pair = tokenise([one.text for one in texts], tokenizer)
    bounds = [_learnt_range(one, text.spans, tokenizer) for one, text in zip(pair, texts, strict=True)]
    split = min(first for first, _ in bounds)
    while pair[0].ids[:split] != pair[1].ids[:split]:  # a token across the edge, other than its counterpart
        split -= 1
    prompt_ids = pair[0].ids[:split]
    answers = [one.ids[split:last] for one, (_, last) in zip(pair, bounds, strict=True)]
    longest = max(map(len, answers))
    full_length = len(prompt_ids) + longest
    if full_length > max_length:
        keep = min(max(max_prompt_length, max_length - longest), max_length - 1)
        prompt_ids = prompt_ids[-keep:]
        answers = [answer[: max_length - len(prompt_ids)] for answer in answers]
    return EncodedPreference(prompt_ids, answers[0], answers[1], full_length)


def _encoded(ids: list[int], learnt: Sequence[bool], max_length: int) -> Encoded:
    labels = [token if on else IGNORE for token, on in zip(ids[:max_length], learnt, strict=False)]
    labels[:1] = [IGNORE] * len(labels[:1])
    return Encoded(list(ids[:max_length]), labels, full_length=len(ids))


def _learnt_range(tokenised: Tokenised, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    learnt = [position for position, on in enumerate(tokens_in(spans, tokenised, tokenizer)) if on]
    if not learnt:
        raise TemplateError(f"the tokenizer has no token for the answer in {tokenised.text[-60:]!r}.")
    return learnt[0], learnt[-1] + 1


def _with_eos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise TemplateError(
            "a text must end with the tokenizer's EOS token, and this tokenizer has none: set tokenizer.eos_token."
        )
    return [*ids] if list(ids[-1:]) == [eos] else [*ids, eos]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS before text by itself, as its model saw it in pretraining."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
