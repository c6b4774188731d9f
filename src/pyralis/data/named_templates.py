"""The chat templates that have a name, as data. docs/templates.md shows them and says where they come from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class TemplateSpec:
    """A named template. In the forms `{content}` is the message, stripped, and `{round}` the number of the user turn.

    The text is `bos`, the system form, then for each turn the user form, or `header` + answer form + `stop` + `after`.
    `header` is the generation prompt. It never ends in a space: the space belongs to the answer, because tokenizers
    put it into the answer's first token.
    """

    name: str
    user: str
    header: str
    stop: str | None  # None: the tokenizer's EOS
    answer: str = "{content}"
    after: str = ""
    bos: str = ""
    between: str = ""  # in front of each user turn but the first
    system: str = "{content}\n\n"
    system_inside_user: bool = False  # the system form stands in front of the first user message's content
    default_system: str = ""
    differs: str = ""  # from Firefly's template of this name, and why


INTERNLM_SYSTEM: Final = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
    "English and 中文."
)
CHATGLM3_SYSTEM: Final = (
    "You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions carefully. "
    "Respond using markdown."
)
VICUNA_SYSTEM: Final = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA2_SYSTEM: Final = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
KEEPS_SYSTEM: Final = "keeps a row's system text: in front of the first user message, a blank line between"

CHATML: Final = TemplateSpec(
    name="yi",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    header="<|im_start|>assistant\n",
    stop="<|im_end|>",
    after="\n",
)
MISTRAL: Final = TemplateSpec(
    name="mistral",
    bos="<s>",
    user="[INST] {content} [/INST]",
    header="",
    answer=" {content}",
    stop="</s>",
    system_inside_user=True,
    differs=f"spaces around the texts in `[INST]`, as published; `<s>` once in front; {KEEPS_SYSTEM}",
)

_SPECS: Final = (
    TemplateSpec(
        name="default",
        system="System: {content}\n\n",
        user="User: {content}\n",
        header="Assistant:",
        answer=" {content} ",
        stop=None,
    ),
    replace(CHATML, name="qwen", default_system="You are a helpful assistant."),
    replace(CHATML, name="minicpm3", default_system="You are a helpful assistant."),
    CHATML,
    replace(CHATML, name="internlm2", bos="<s>", default_system=INTERNLM_SYSTEM, differs="begins with `<s>`"),
    TemplateSpec(
        name="internlm",
        bos="<s>",
        system="<|System|>:{content}\n",
        user="<|User|>:{content}\n",
        header="<|Bot|>:",
        stop="</s>",
        after="\n",
        default_system=INTERNLM_SYSTEM,
        differs="begins with `<s>`",
    ),
    TemplateSpec(
        name="orion",
        bos="<s>",
        user="Human: {content}\n\n",
        header="Assistant: </s>",
        stop="</s>",
        system_inside_user=True,
        differs=f"`<s>` in front, with and without a system text; {KEEPS_SYSTEM}",
    ),
    TemplateSpec(
        name="deepseek",
        bos="<｜begin▁of▁sentence｜>",
        user="User: {content}\n\n",
        header="Assistant:",
        answer=" {content}",
        stop="<｜end▁of▁sentence｜>",
        differs="begins with BOS; has a system text: as it is, a blank line behind it",
    ),
    TemplateSpec(
        name="chatglm2",
        bos="[gMASK]sop",
        user="[Round {round}]\n\n问：{content}\n\n",
        header="答：",
        stop="</s>",
        between="\n\n",
        system_inside_user=True,
        differs=f"begins with `[gMASK]sop`; blank line between rounds; every answer ends with `</s>`; {KEEPS_SYSTEM}",
    ),
    TemplateSpec(
        name="chatglm3",
        bos="[gMASK]sop",
        system="<|system|>\n {content}",
        user="<|user|>\n {content}",
        header="<|assistant|>",
        answer="\n {content}",
        stop="</s>",
        default_system=CHATGLM3_SYSTEM,
        differs="role tokens and `[gMASK]sop` are part of the text (Firefly adds them in code); "
        "every answer ends with `</s>`",
    ),
    TemplateSpec(
        name="ziya2",
        user="<human>:{content} ",
        header="<bot>:",
        stop="</s>",
        system_inside_user=True,
        differs=KEEPS_SYSTEM,
    ),
    TemplateSpec(
        name="xverse",
        user="Human: {content}\n\n",
        header="Assistant:",
        answer=" {content}",
        stop="<|endoftext|>",
        system_inside_user=True,
        differs=KEEPS_SYSTEM,
    ),
    TemplateSpec(
        name="minicpm",
        bos="<s>",
        system="{content}",
        user="<用户>{content}",
        header="<AI>",
        stop="</s>",
        differs="begins with `<s>`; has a system text: as it is, in front of the first turn",
    ),
    TemplateSpec(
        name="zephyr",
        system="<|system|>\n{content}</s>\n",
        user="<|user|>\n{content}</s>\n",
        header="<|assistant|>\n",
        stop="</s>",
        after="\n",
        differs="newline behind the system turn",
    ),
    MISTRAL,
    replace(MISTRAL, name="mixtral"),
    TemplateSpec(
        name="baichuan",
        user="<reserved_102>{content}",
        header="<reserved_103>",
        stop="</s>",
        system_inside_user=True,
        differs=KEEPS_SYSTEM,
    ),
    TemplateSpec(
        name="baichuan2",
        system="{content}",
        user="<reserved_106>{content}",
        header="<reserved_107>",
        stop="</s>",
        differs="has a system text: as it is, in front of the first turn",
    ),
    TemplateSpec(
        name="vicuna",
        bos="<s>",
        system="{content} ",
        user="USER: {content} ",
        header="ASSISTANT:",
        answer=" {content}",
        stop="</s>",
        default_system=VICUNA_SYSTEM,
        differs="begins with `<s>`; a space, no newline, behind the system text; a space in front of the answer",
    ),
    TemplateSpec(
        name="llama2",
        bos="<s>",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        system_inside_user=True,
        user="[INST] {content} [/INST]",
        header="",
        answer=" {content} ",
        stop="</s>",
        between="<s>",
        default_system=LLAMA2_SYSTEM,
        differs="`<<SYS>>` stands inside the first `[INST]`; `<s>` in front of every `[INST]`; spaces inside `[INST]` "
        "and in front of the answer",
    ),
    TemplateSpec(
        name="llama3",
        bos="<|begin_of_text|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stop="<|eot_id|>",
        differs="begins with `<|begin_of_text|>`, with and without a system text",
    ),
    TemplateSpec(
        name="gemma",
        bos="<bos>",
        user="<start_of_turn>user\n{content}<end_of_turn>\n",
        header="<start_of_turn>model\n",
        stop="<end_of_turn>",
        after="\n",
        system_inside_user=True,
        differs=f"the stop is `<end_of_turn>`, not `<eos>`; {KEEPS_SYSTEM}",
    ),
    TemplateSpec(
        name="phi3",
        system="<|system|>\n{content}<|end|>\n",
        user="<|user|>\n{content}<|end|>\n",
        header="<|assistant|>\n",
        stop="<|end|>",
        after="\n",
        differs="newline behind `<|assistant|>`; has a system turn",
    ),
)
TEMPLATES: Final[dict[str, TemplateSpec]] = {spec.name: spec for spec in _SPECS}
