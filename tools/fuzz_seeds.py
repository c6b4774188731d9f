"""Good input of each kind, which the fuzzer changes, and words that such input is made of."""

from __future__ import annotations

import gzip
import io
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

CONFIGS: tuple[dict[str, Any], ...] = (
    {"model_name_or_path": "m", "train_file": "rows.jsonl", "max_seq_length": 512},
    {
        "model_name_or_path": "m", "train_file": ["a.jsonl", "b"], "source_weights": [0.5, 0.5], "max_seq_length": 512,
        "output_dir": "out", "num_train_epochs": 1, "learning_rate": 1e-4, "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1, "logging_steps": 10, "save_steps": 100, "evaluation_strategy": "steps", "eval_steps": 50,
        "eval_file": "e.jsonl", "lora_rank": 8, "lora_target_modules": ["q_proj"], "template_name": "qwen",
        "report_to": ["tensorboard"], "optim": "adamw_torch", "bf16": True, "deepspeed": "ds.json", "seed": 1,
    },
    {
        "model_name_or_path": "m", "train_file": "p.jsonl", "max_seq_length": 512, "task_type": "dpo",
        "max_prompt_length": 128,
        "loss_type": "sigmoid", "accelerator_config": {"split_batches": True}, "lr_scheduler_kwargs": {"a": 1},
        "gradient_checkpointing": "auto", "use_unsloth": True, "resume_from_checkpoint": "auto", "fsdp": "full_shard",
    },
)  # fmt: skip
CONFIG_TEXTS = (
    "model_name_or_path: m\ntrain_file: [a.jsonl, b.jsonl]\nmax_seq_length: 512\nlearning_rate: 1e-4\n",
    "base: &b {lora_rank: 8}\n<<: *b\nmodel_name_or_path: m\ntrain_file: x\nmax_seq_length: 0x200\nseed: 1_0\n",
    "# c\n---\nmodel_name_or_path: 'm'\ntrain_file: |\n  x\nmax_seq_length: 512 # c\nwarmup_steps: .inf\n...\n",
)
CONFIG_WORDS = (
    *(b"{", b"}", b"[", b"]", b":", b": ", b"- ", b"\n", b"\t", b"&a ", b"*a", b"<<: ", b"!!", b"!!set", b"!!binary "),
    *(b"!!timestamp ", b"!!python/name:os.system", b"!!omap", b"? ", b"|\n", b">\n", b"%YAML 9.9\n", b"---\n", b"'"),
    *(b'"', b"\\", b"\\x", b"2001-01-01", b".inf", b".nan", b"1e9999", b"0o777", b"190:20:30", b"null", b"~", b"yes"),
    *(b"[" * 3000, b"{a: " * 2000, b'{"a":' * 3000, b"9" * 5000, b"\xef\xbb\xbf", b"\xff", b"\x00", b"\xc2\x85"),
)

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS: dict[str, dict[str, Any]] = {
    "conversation": {"conversation": [{"human": "q", "assistant": "a"}], "system": "s"},
    "messages": {"messages": [{"role": "system", "content": "s"}, *TURNS]},
    "messages with parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, TURNS[1]]},
    "messages with tools": {"messages": [*TURNS, {"role": "tool", "content": "t"}, TURNS[1]], "tools": [{"name": "f"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    "alpaca": {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]], "system": "s"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "prompt_completion of turns": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "text": {"text": "words and words"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "preference of turns": {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "b"}]},
}
TASKS = {"preference": "dpo", "text": "pretrain"}
ROW_KEYS = sorted(
    {key for row in ROWS.values() for key in row}
    | {
        "role",
        "content",
        "from",
        "value",
        "human",
        "assistant",
        "type",
        "text",
        "name",
        "tool_calls",
        "weight",
        "train",
    }
)

JINJA = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{%- if messages[0]['role'] == 'system' %}{{ messages[0].content|trim }}{% set messages = messages[1:] %}"
    "{% endif %}{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ bos_token ~ message.role ~ message.content|tojson }}"
    "{{ eos_token }}{% endfor %}",
    "{%- macro one(m) -%}{{ m.content }}{%- endmacro -%}{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ one(m) }}<|im_end|>{% endgeneration %}{% else %}{{ one(m) }}"
    "{% endif %}{% set ns.n = ns.n + 1 %}{% if ns.n > 9 %}{% break %}{% endif %}{% endfor %}",
)
JINJA_WORDS = tuple(
    word.encode()
    for word in (
        *("{{", "}}", "{%", "%}", "{#", "#}", "{%-", " + ", " ~ ", " * ", " ** ", " % ", "|", "(", ")", "[", "]", "'"),
        *("{% for i in range(99999) %}", "{% endfor %}", "{% for j in range(99999) %}{% for k in range(99999) %}"),
        *("{% if true %}", "{% endif %}", "{% generation %}", "{% endgeneration %}", "{% break %}", "{% continue %}"),
        *("{{ lipsum(n=9999999) }}", "{{ 'a' * 999999999999 }}", "{{ 9 ** 9 ** 9 }}", "{{ 'a'|center(9999999999) }}"),
        *("{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ cycler.__init__.__globals__.os.system('x') }}"),
        *("{% include 'x' %}", "{% import '/etc/passwd' as p %}", "{% extends 'x' %}", "{% macro f() %}{{ f() }}"),
        *("{% endmacro %}{{ f() }}", "{% set x = x %}", "{% set ns.x = 1 %}", "{% block b %}", "{% endblock %}"),
        *("{% call f() %}", "{% endcall %}", "{% filter upper %}", "{% endfilter %}", "{% raw %}", "{% endraw %}"),
        *("{% autoescape true %}", "{% do messages.clear() %}", "{{ '%s%s' % 1 }}", "{{ '{0.__class__}'.format(1) }}"),
        *("|attr('__class__')", "|map('upper')|list", "|groupby('role')", "|batch(0)", "|slice(0)", "|int(base=99)"),
        *(
            "|round(99999)",
            "|tojson(indent=99999999)",
            "|sort(attribute='x')",
            "|sum",
            "|random",
            "|pprint",
            "|xmlattr",
        ),
        *("strftime_now('%')", "1 / 0", "1 // 0", "9" * 5000, "(" * 500, "not " * 2000, "-" * 5000, "{{ loop }}"),
        *("messages[99]", "messages|last", "message.content.split('x')", "|default(1)", "|length", " is defined", "\\"),
    )
)

MODEL_KEYS = (
    *("architectures", "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "rope_scaling", "rope_parameters", "rope_type", "factor", "rope_theta", "head_dim", "torch_dtype"),
    *("dtype", "quantization_config", "quant_method", "tie_word_embeddings", "max_position_embeddings", "auto_map"),
    *("sliding_window", "layer_types", "hidden_act", "tokenizer_class", "chat_template", "added_tokens_decoder"),
    *(
        "eos_token",
        "pad_token",
        "bos_token",
        "model_max_length",
        "pre_tokenizer",
        "model",
        "vocab",
        "type",
        "weight_map",
    ),
    *("data_offsets", "shape", "__metadata__", "peft_type", "r", "lora_alpha", "target_modules", "modules_to_save"),
    *("base_model_name_or_path", "rope_scaled_to", "rope_scaling_given", "compute_dtype", "eos_token_id"),
)
RECORD_KEYS = (
    *("status", "result", "versions", "data_digest", "compute_dtype", "global_step", "epoch", "log_history", "bytes"),
    *("best_model_checkpoint", "xxh3_128", "supervised", "total", "rows", "places", "tokens", "offset", "source"),
    *("micro_batches", "loss", "num_items", "parameters", "checkpoint", "text", "row", "seed", "rank", "step"),
    *("model_name_or_path", "trust_remote_code", "train_mode", "load_adapter", "rope_scaled_to", "kind", "event"),
)

# What is written beside an adapter that no run of ours has made.
RECORDS: dict[str, dict[str, Any]] = {
    "pyralis_adapter.json": {
        "train_mode": "lora", "quant_type": "nf4", "double_quant": True, "compute_dtype": "float32",
        "rope_scaled_to": 64, "rope_scaling_given": {"rope_type": "linear", "factor": 2.0}, "model_type": "llama",
    },
}  # fmt: skip

EVIL_CODE = """import pathlib
pathlib.Path("/tmp/pyralis-fuzz-evil").write_text("code ran")
class Evil:
    pass
"""
EVIL_PICKLE = b"cos\nsystem\n(S'touch /tmp/pyralis-fuzz-evil'\ntR."


@cache
def data_files() -> dict[str, bytes]:
    """A file of each kind that data is read from, by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["one", "two"], "more": [1, 2]})
    parquet, arrow = io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    return {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.jsonl.zst": pa.compress(lines, codec="zstd", asbytes=True),
        "a.json": b'{"data": [{"text": "one"}, {"text": "two"}]}',
        "a.csv": b'text,more\n"one, two",3\nfour,5\n',
        "a.tsv": b"text\tmore\none\t2\n",
        "a.txt": b"words and words",
        "a.parquet": parquet.getvalue(),
        "a.arrow": arrow.getvalue(),
    }


@cache
def gguf_file() -> bytes:
    """A Llama of one layer with a tokenizer of bytes, as llama.cpp writes it."""
    import gguf
    import numpy as np

    handle, name = tempfile.mkstemp(suffix=".gguf")
    os.close(handle)
    writer = gguf.GGUFWriter(name, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(260)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {
        "token_embd": (260, 32), "output_norm": (32,), "output": (260, 32), "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (32, 32), "blk.0.ffn_up": (32, 32), "blk.0.ffn_down": (32, 32),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    for tensor, shape in shapes.items():
        writer.add_tensor(f"{tensor}.weight", generator.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = Path(name).read_bytes()
    Path(name).unlink()
    return content
