"""Which rows a task can learn from."""

from __future__ import annotations

from pyralis.data.formats import FORMATS
from pyralis.data.settings import TaskType
from pyralis.data.types import Conversation, PlainText, Preference, Record
from pyralis.errors import DataError


def check_task(record: Record, task: TaskType, *, has_template: bool) -> None:
    """Raise DataError, naming the row, if it is none for the task, or a conversation without a template."""
    if isinstance(record, Preference) != (task == "dpo"):
        raise DataError(
            f"{record.source}: preference rows (chosen, rejected) are for task_type dpo, not {task}."
            if task != "dpo"
            else f"{record.source}: task_type dpo needs preference rows, {FORMATS['preference'].example}."
        )
    if task == "pretrain" and not isinstance(record, PlainText):
        raise DataError(
            f'{record.source}: task_type pretrain needs documents, {{"text": ...}}; this row is a '
            f"{'conversation' if isinstance(record, Conversation) else 'prompt with its completion'}. "
            "Set task_type: sft."
        )
    if isinstance(record, Conversation | Preference) and not has_template:
        raise DataError(
            f"{record.source}: a conversation needs a chat template; the tokenizer has none. Set template_name."
        )
