"""`train_on_responses_only`: which tokens are learnt, with every kind of tokenizer, and what trainers make of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import pyralis
from pyralis import get_chat_template, train_on_responses_only
from pyralis.errors import DataError, TemplateError
from tests.data.tokenizers import MAKERS
from tests.tiny import build_tiny_model, make_tiny_tokenizer

CHAT = [
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "I am a small assistant."},
    {"role": "user", "content": "法国的首都是哪里？"},
    {"role": "assistant", "content": "是巴黎。"},
]
CHATML = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
ALPACA = {"instruction_part": "### Instruction:\n", "response_part": "### Response:\n"}
# name -> (marks, what is learnt of CHAT; {eos} is the tokenizer's)
NAMED: dict[str, tuple[dict[str, str], list[str]]] = {
    "chatml": (CHATML, ["I am a small assistant.<|im_end|>", "是巴黎。<|im_end|>"]),
    "llama3": (
        {
            "instruction_part": "<|start_header_id|>user<|end_header_id|>\n\n",
            "response_part": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        },
        ["I am a small assistant.<|eot_id|>", "是巴黎。<|eot_id|>"],
    ),
    "alpaca": (ALPACA, ["I am a small assistant.{eos}", "是巴黎。{eos}"]),
    "llama2": (
        {"instruction_part": "<s>[INST]", "response_part": "[/INST]"},
        ["I am a small assistant.</s>", "是巴黎。</s>"],
    ),
}


def learnt(ids: list[int], labels: list[int], tokenizer: Any) -> list[str]:
    """The runs of learnt tokens, as text."""
    runs: list[list[int]] = []
    for at, (token, label) in enumerate(zip(ids, labels)):
        assert label in (-100, token)
        if label != -100:
            if at == 0 or labels[at - 1] == -100:
                runs.append([])
            runs[-1].append(token)
    # a newline alone is written as its byte by slow tokenizers
    return ["".join(tokenizer.decode(run).replace("<0x0A>", "\n").split()) for run in runs]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", MAKERS)
def test_answers_are_learnt_and_nothing_else(kind: str, name: str) -> None:
    tokenizer = get_chat_template(MAKERS[kind](), name, system_message="")
    marks, expected = NAMED[name]
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    mask = train_on_responses_only(None, **marks, tokenizer=tokenizer, return_function=True)
    (labels,) = mask({"input_ids": [ids]})["labels"]
    wanted = ["".join(part.replace("{eos}", tokenizer.eos_token).split()) for part in expected]
    assert learnt(ids, labels, tokenizer) == wanted


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_a_row_that_text_cannot_give_back(kind: str) -> None:
    """Cut inside a character, its marks are found among the tokens."""
    tokenizer = get_chat_template(MAKERS[kind](), "chatml", system_message="")
    text = tokenizer.apply_chat_template([*CHAT[:2], CHAT[2], {"role": "assistant", "content": "ꙮ"}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    at = next(n for n in range(len(ids), 0, -1) if "�" in tokenizer.decode(ids[:n]))
    mask = train_on_responses_only(None, **CHATML, tokenizer=tokenizer, return_function=True)
    (labels,) = mask({"input_ids": [ids[:at]]})["labels"]
    runs = learnt(ids[:at], labels, tokenizer)
    assert (runs[0], len(runs)) == ("Iamasmallassistant.<|im_end|>", 2)


def test_what_was_masked_stays_so() -> None:
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
    mask = train_on_responses_only(None, **CHATML, tokenizer=tokenizer, return_function=True)
    (alone,) = mask({"input_ids": [ids]})["labels"]
    (both,) = mask({"input_ids": [ids], "labels": [[-100] * 60 + ids[60:]]})["labels"]
    assert both == [-100] * 60 + alone[60:]


@pytest.mark.parametrize("name", ["chatml", "llama3", "alpaca", "vicuna", "zephyr", "gemma", "phi3"])
def test_marks_are_seen_in_the_template(name: str) -> None:
    tokenizer = get_chat_template(MAKERS["llama"](), name, system_message="")
    ids = tokenizer(tokenizer.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)["input_ids"]
    mask = train_on_responses_only(None, tokenizer=tokenizer, return_function=True)
    runs = learnt(ids, mask({"input_ids": [ids]})["labels"][0], tokenizer)
    assert [run.startswith(word) for run, word in zip(runs, ("Iama", "是巴黎"))] == [True, True]
    assert len(runs) == 2


def trainer_of(**data: Any) -> Any:
    collator = DataCollatorForLanguageModeling(make_tiny_tokenizer(), mlm=False)
    fields = {"train_dataset": None, "eval_dataset": None, "processing_class": make_tiny_tokenizer()}
    return SimpleNamespace(**{**fields, "data_collator": collator, **data})


def rows(*texts: str) -> Dataset:
    return Dataset.from_dict({"input_ids": [make_tiny_tokenizer()(text)["input_ids"] for text in texts]})


GOOD = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"


def test_datasets_of_a_trainer() -> None:
    evaluation = {
        "a": rows(GOOD),
        "b": IterableDataset.from_generator(lambda: iter(rows(GOOD, "<|im_start|>user\nHi"))),
    }
    trainer = trainer_of(train_dataset=rows(GOOD, "<|im_start|>user\nHi<|im_end|>", GOOD), eval_dataset=evaluation)
    assert train_on_responses_only(trainer, **CHATML) is trainer
    assert len(trainer.train_dataset) == 2  # a row without an answer is left out
    assert [len(list(one)) for one in trainer.eval_dataset.values()] == [1, 1]
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert (batch["labels"] != -100).sum() == 2 * len("Hello.\n")
    assert batch["input_ids"].shape == batch["labels"].shape


def test_nothing_to_learn_is_an_error() -> None:
    with pytest.raises(DataError, match=r"in no row of train_dataset.*'### Response:\\n' \(response_part\).*begins: "):
        train_on_responses_only(trainer_of(train_dataset=rows(GOOD)), **ALPACA)
    with pytest.raises(DataError, match="has no input_ids but text: it is not prepared"):
        train_on_responses_only(trainer_of(train_dataset=Dataset.from_dict({"text": [GOOD]})), **CHATML)
    with pytest.raises(TemplateError, match="must not be empty"):
        train_on_responses_only(trainer_of(), "<|im_start|>user", " ", force_match=False)
    with pytest.raises(TemplateError, match="are not given"):
        train_on_responses_only(None, tokenizer=make_tiny_tokenizer(chat_template=None), return_function=True)
    with pytest.raises(TemplateError, match="the trainer has no tokenizer"):
        train_on_responses_only(trainer_of(processing_class=None), **CHATML)


@pytest.mark.parametrize("kind", ["trl", "pyralis", "transformers"])
def test_the_loss_is_that_of_the_answers(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    options: dict[str, Any] = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 1, "report_to": "none",
        "use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    texts = [GOOD.rstrip(), GOOD.rstrip().replace("Hello", "Hello, and how are you?")]
    model = build_tiny_model()
    if kind == "transformers":
        trainer: Any = Trainer(
            model, TrainingArguments(**options), train_dataset=rows(*texts), processing_class=tokenizer,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )  # fmt: skip
    else:
        library = trl if kind == "trl" else pyralis
        trainer = library.SFTTrainer(
            model=model, args=library.SFTConfig(**options, dataset_text_field="text"),
            train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer,
        )  # fmt: skip
    train_on_responses_only(trainer, **CHATML)
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(2)])
    supervised = batch["labels"] != -100
    assert [tokenizer.decode(ids[on]).strip() for ids, on in zip(batch["input_ids"], supervised)] == [
        "Hello<|im_end|>",
        "Hello, and how are you?<|im_end|>",
    ]
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits[supervised[:, 1:]], batch["labels"][:, 1:][supervised[:, 1:]])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-4)
