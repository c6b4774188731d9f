"""Greedy answers to sample questions, before and after training: what a person looks at first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from pyralis.data.template import ChatTemplate, stop_token_ids
from pyralis.data.tokenize import encode_prompt
from pyralis.data.types import Message
from pyralis.train.report.language import words
from pyralis.train.report.run_report import SampleAnswer


@torch.no_grad()
def answer_questions(
    model: Any, tokenizer: Any, template: ChatTemplate, questions: Sequence[str], *, max_new_tokens: int = 64
) -> list[str]:
    """One greedy answer a question, each a conversation of its own.

    Args:
        model: any model with `generate`; its training or eval state is left as it was.
        questions: user messages.
        max_new_tokens: longest answer, in tokens.

    Returns:
        The answers in order, without special tokens, stripped.
    """
    training = model.training
    model.eval()
    stops = stop_token_ids(template, tokenizer)
    answers = []
    try:
        for question in questions:
            ids = encode_prompt([Message("user", question)], template, tokenizer)
            input_ids = torch.tensor([ids], device=model.device)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
            )
            answers.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip())
    finally:
        model.train(training)
    return answers


def answers_table(samples: Sequence[SampleAnswer]) -> Table:
    """Question, answer before, answer after; the last stands out."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=words("The same questions, before and after", "同样的问题，训练前后"),
        title_justify="left",
        expand=True,
    )
    table.add_column(words("question", "问题"), ratio=2)
    table.add_column(words("before", "训练前"), ratio=4, style="dim")
    table.add_column(words("after", "训练后"), ratio=4, style="bold")
    for sample in samples:
        before, after = (text or words("(nothing)", "（空）") for text in (sample.before, sample.after))
        table.add_row(Text(sample.question), Text(before), Text(after))
    return table
