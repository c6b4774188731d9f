"""What is fuzzed: one function a parser of untrusted input, each taking a `Draw` and an empty folder of its own."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import fuzz_seeds as seeds
from fuzz_draw import Draw
from pyralis.data import jinja_limits
from pyralis.data.dataset import DataSettings, build_dataset
from pyralis.data.template import TEMPLATE_FILE, control_strings_in, load_template, resolve_template, stop_token_ids
from pyralis.data.template_check import template_notes
from pyralis.data.types import Message
from pyralis.errors import PyralisError
from pyralis.lora.record import read_record
from pyralis.models.load import ModelSettings, load_model, load_tokenizer
from pyralis.serve.load import ChatModelSettings, load_chat
from pyralis.train.checkpoints.checkpoint import check_same_data, find_start_point, prepare_output_dir, run_status
from pyralis.train.config.check_report import format_check, json_check
from pyralis.train.config.train_config import known_names, load_config
from pyralis.train.report.compare import differences, read_runs
from pyralis.train.report.metric_rows import METRICS_NAME, MetricsWriter
from pyralis.train.stream_trainer import read_position
from pyralis.train.trainer import TokenCounts, restore_counts
from pyralis.train.watch.replay import replay as replay_step

Target: TypeAlias = Callable[[Draw, Path], None]


def config(draw: Draw, folder: Path) -> None:
    """Config files and overrides, and what `pyralis train --check` prints of them."""
    values = draw.changed(draw.one_of(seeds.CONFIGS), known_names())
    text = json.dumps(values, indent=draw.one_of((None, 1)))
    if draw.number(0, 2) == 2:
        text = draw.one_of((*seeds.CONFIG_TEXTS, text))
        content = draw.damaged(text.encode(), seeds.CONFIG_WORDS)
    else:
        content = text.encode()
    file = folder / draw.one_of(("config.json", "config.yaml", "config"))
    file.write_bytes(content)
    names = known_names()
    overrides = [f"{draw.key(names)}={draw.text()}" for _ in range(draw.one_of((0, 0, 1, 3)))]
    loaded = load_config(file, overrides)
    format_check(loaded)
    json_check(loaded)


def rows(draw: Draw, folder: Path) -> None:
    """Rows of every format, tokenised, packed and read as a stream."""
    fmt = draw.one_of(sorted(seeds.ROWS))
    good = seeds.ROWS[fmt]
    found = [draw.changed(good, seeds.ROW_KEYS) if draw.number(0, 7) else draw.json(seeds.ROW_KEYS) for _ in range(3)]
    content = "".join(json.dumps(row) + "\n" for row in (good, *found)).encode()
    file = folder / draw.one_of(("rows.jsonl", "rows.json"))
    file.write_bytes(draw.damaged(content) if draw.number(0, 9) == 9 else content)
    _build(draw, file, fmt.partition(" ")[0])


def files(draw: Draw, folder: Path) -> None:
    """Data files of every kind with bytes of them changed."""
    name = draw.one_of(sorted(seeds.data_files()))
    file = folder / name
    file.write_bytes(draw.damaged(seeds.data_files()[name]))
    _build(draw, file, "auto")


def _build(draw: Draw, file: Path, fmt: str) -> None:
    task = draw.one_of(("sft", "dpo", "pretrain")) if draw.number(0, 4) == 0 else seeds.TASKS.get(fmt, "sft")
    streaming = task == "pretrain" and draw.flag()
    settings = DataSettings(
        (str(file),),
        max_seq_length=draw.one_of((40, 4, 8, 200)),
        data_format=draw.one_of((fmt, "auto")),
        task_type=task,  # type: ignore[arg-type]
        loss_on=draw.one_of(("all_turns", "last_turn", "everything")),
        packing=None if task == "dpo" else draw.one_of((None, True, False)),
        on_bad_row=draw.one_of(("error", "skip")),
        on_overlong=draw.one_of(("truncate", "drop", "split", "error")),
        max_data_lost=draw.one_of((1.0, 0.5)),
        max_prompt_length=2,
        eval_split=0.0 if streaming else draw.one_of((0.0, 0.3)),
        streaming=streaming,
        buffer_size=2,
        cache_dir=str(file.parent / "cache"),
    )
    tokenizer = _tokenizer()
    name = draw.one_of(("", "yi", "mistral", "llama3", "chatglm3"))
    built = build_dataset(settings, tokenizer, resolve_template(name, tokenizer))
    for row in islice(built.train, 4):
        longest = 10**9 if task == "dpo" else settings.max_seq_length  # a pair is a row of three parts
        assert len(row["input_ids"]) == len(row["labels"]) <= longest, "a row longer than it may be"


def template(draw: Draw, folder: Path) -> None:
    """Jinja from a tokenizer's folder, rendered; and the template that is saved beside a result."""
    jinja = draw.one_of(seeds.JINJA)
    if draw.flag():  # something put between two of its parts
        place = draw.one_of([i for i in range(len(jinja)) if jinja.startswith("{", i) and jinja[i + 1 : i + 2] in "{%"])
        jinja = jinja[:place] + draw.one_of(seeds.JINJA_WORDS).decode() + jinja[place:]
    else:
        jinja = draw.damaged(jinja.encode(), seeds.JINJA_WORDS).decode("utf-8", "replace")
    jinja_limits.RENDER_SECONDS = 0.3  # in place of 3, for the sake of many cases
    tokenizer = _tokenizer()
    whole = tokenizer.chat_template
    try:
        if draw.number(0, 5) == 5:
            saved = {"name": draw.one_of(("", "yi", "nope")), "stop": "</s>", "system": None, "jinja": jinja}
            (folder / TEMPLATE_FILE).write_text(json.dumps(draw.changed(saved)))
            chosen = load_template(folder, tokenizer)
        else:
            tokenizer.chat_template = jinja
            chosen = resolve_template("", tokenizer, system=draw.one_of((None, "be brief")))
        texts = (draw.text(), draw.text())
        messages = [Message("user", texts[0]), Message("assistant", texts[1])]
        if draw.flag():
            messages = [Message("system", "sys"), *messages, Message("user", "again"), Message("assistant", "last")]
        stop_token_ids(chosen, tokenizer)
        control_strings_in(messages, chosen)
        template_notes(chosen, tokenizer)
        for spans in ("all", "last"):
            for span in chosen.render(messages, spans=spans).spans:
                assert 0 <= span.start <= span.end, "a span that is none"
    finally:
        tokenizer.chat_template = whole


def model(draw: Draw, folder: Path) -> None:
    """A model's folder as a hub gives it: config, index, headers, tokenizer, names, links, pickles, code."""
    home = Path(shutil.copytree(_model(), folder / "model"))
    for _ in range(draw.number(1, 2)):
        _spoil_model(draw, home)
    name = str(home)
    load_tokenizer(name)
    load_model(ModelSettings(name, train_mode=draw.one_of(("lora", "full")), max_seq_length=draw.one_of((None, 64))))


def _spoil_model(draw: Draw, home: Path) -> None:
    action = draw.number(0, 9)
    if action <= 4:
        name = draw.one_of(("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"))
        path = home / name
        whole = _model() / name
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(draw.changed(json.loads(whole.read_text()), seeds.MODEL_KEYS)))
        if draw.number(0, 5) == 5:
            path.write_bytes(draw.damaged(path.read_bytes()))
    elif action == 5:
        names = draw.one_of(("model.safetensors", "../x.safetensors", "/etc/passwd", "a/b.safetensors"))
        index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": names, "lm_head.weight": names}}
        (home / "model.safetensors.index.json").write_text(json.dumps(draw.changed(index)))
    elif action == 6:
        (home / "model.safetensors").unlink(missing_ok=True)
        _change_header(draw, Path(shutil.copy(_model() / "model.safetensors", home)))
    elif action == 7:
        path = home / draw.one_of(
            ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "x.bin")
        )
        path.unlink(missing_ok=True)
        path.symlink_to(draw.one_of(("/etc/passwd", "../nowhere", ".", "/dev/null", str(_model() / path.name))))
    elif action == 8:
        for name in draw.one_of((("model.safetensors",), ("tokenizer.json",), ())):
            (home / name).unlink(missing_ok=True)
        name = draw.one_of(
            ("pytorch_model.bin", "model.pt", "x.distcp", "vocab.json", "tokenizer.model", "adapter.bin")
        )
        (home / name).unlink(missing_ok=True)
        (home / name).write_bytes(draw.one_of((seeds.EVIL_PICKLE, b"{}", b"", b"PK\x03\x04")))
    else:
        (home / "evil.py").write_text(seeds.EVIL_CODE)
        for file in ("config.json", "tokenizer_config.json"):
            values = json.loads((_model() / file).read_text())
            kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
            values["auto_map"] = dict.fromkeys(kinds, draw.one_of(("evil.Evil", "x--evil.Evil", ["evil.Evil", None])))
            values["model_type"] = draw.one_of(("llama", "evil"))
            (home / file).unlink(missing_ok=True)
            (home / file).write_text(json.dumps(values))


def _change_header(draw: Draw, path: Path) -> None:
    """The JSON in front of the tensors, changed, its length fitted to it most of the time; or any bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = draw.changed(json.loads(content[8 : 8 + length]), seeds.MODEL_KEYS)
    text = json.dumps(header).encode()
    told = draw.one_of((len(text), len(text), 0, 2**40, 2**63))
    found = told.to_bytes(8, "little") + text + content[8 + length :]
    path.write_bytes(draw.damaged(content[:4096]) if draw.number(0, 5) == 5 else found)


def adapter(draw: Draw, folder: Path) -> None:
    """An adapter's folder, loaded for a chat."""
    home = Path(shutil.copytree(_adapter(), folder / "adapter"))
    for name in draw.one_of((("adapter_config.json",), ("pyralis_adapter.json",), ("pyralis_template.json",), ())):
        path = home / name
        path.write_text(
            json.dumps(draw.changed(seeds.RECORDS.get(name) or json.loads(path.read_text()), seeds.MODEL_KEYS))
        )
    if draw.flag():
        _change_header(draw, home / "adapter_model.safetensors")
    read_record(home)
    load_chat(ChatModelSettings(str(home)))


def gguf(draw: Draw, folder: Path) -> None:
    """A GGUF file with bytes of it changed, most of them in its header."""
    content = seeds.gguf_file()
    head = draw.one_of((64, 1024, len(content)))
    file = folder / "model.gguf"
    file.write_bytes(draw.damaged(content[:head]) + content[head:])
    load_tokenizer(str(file))
    load_model(ModelSettings(str(file)))


def checkpoint(draw: Draw, folder: Path) -> None:
    """A run's folder: its records, metrics and checkpoints, as a run that resumes and a comparison read them."""
    output = Path(shutil.copytree(_run(), folder / "run"))
    places = sorted(path for path in output.rglob("*.json*") if "report" not in path.name)
    for _ in range(draw.number(1, 3)):
        path = draw.one_of(places)
        whole = _run() / path.relative_to(output)
        if draw.number(0, 4) == 4:
            path.write_bytes(draw.damaged(whole.read_bytes()))
        elif path.name == METRICS_NAME:
            lines = whole.read_text().splitlines()
            place = draw.number(0, len(lines) - 1)
            lines[place] = json.dumps(draw.changed(json.loads(lines[place]), seeds.RECORD_KEYS))
            path.write_text("\n".join(lines) + "\n")
        else:
            path.write_text(json.dumps(draw.changed(json.loads(whole.read_text()), seeds.RECORD_KEYS)))
    if draw.flag():  # as of another program, or damaged with its checksums
        for path in output.glob("*/pyralis_checksums.json"):
            path.unlink()
    effective = json.loads((_run() / "pyralis_config.json").read_text())
    _one_of_these(
        lambda: run_status(output),
        lambda: [difference.values for difference in differences(read_runs([output, _run()]))],
        lambda: read_position(output / "checkpoint-2"),
        lambda: restore_counts(SimpleNamespace(token_counts=TokenCounts()), output / "checkpoint-2"),  # type: ignore[arg-type]
    )
    resume = draw.one_of(("auto", True, str(output / "checkpoint-2")))
    start = find_start_point(output, effective, resume=resume, overwrite=draw.number(0, 3) == 3)
    step = start.step
    check_same_data(start, json.loads((_run() / "pyralis_run.json").read_text())["data_digest"])
    prepare_output_dir(output, start)
    MetricsWriter(output / METRICS_NAME, resume_step=step).close()


def _one_of_these(*calls: Callable[[], Any]) -> None:
    for call in calls:
        try:
            call()
        except PyralisError as error:
            str(error).encode()


def replay(draw: Draw, folder: Path) -> None:
    """A step kept for `pyralis replay`, in the folder of its run."""
    output = Path(shutil.copytree(_stopped_run(), folder / "run"))
    (step,) = output.glob("nan-step-*")
    places = [step / "step.json", output / "pyralis_config.json", output / "pyralis_run.json"]
    for _ in range(draw.number(0, 2)):
        path = draw.one_of(places)
        whole = _stopped_run() / path.relative_to(output)
        path.write_text(json.dumps(draw.changed(json.loads(whole.read_text()), seeds.RECORD_KEYS)))
    if draw.flag():
        _change_header(draw, step / draw.one_of(("batch.safetensors", "weights.safetensors")))
    found = replay_step(step)
    found.advice()
    found.saved.rows()


# ---- what good input is made of, once a process ----


@cache
def _tokenizer() -> Any:
    from tests.tiny import make_tiny_tokenizer

    return make_tiny_tokenizer()


@cache
def _home() -> Path:
    return Path(os.path.realpath(tempfile.mkdtemp(prefix="pyralis-fuzz-made-")))


@cache
def _model() -> Path:
    from tests.tiny import make_tiny_model

    return make_tiny_model(_home() / "model", hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8)


@cache
def _adapter() -> Path:
    _run()
    return _home() / "finished"


def _train(name: str, **values: Any) -> Path:
    from tests.train.runs import run

    data = _home() / "rows.jsonl"
    data.write_text("".join(json.dumps(seeds.ROWS["messages"]) + "\n" for _ in range(8)))
    run(_model(), data, _home() / name, **values)
    return _home() / name


@cache
def _run() -> Path:
    """An unfinished run of two checkpoints; its first part is finished as an adapter."""
    _train("finished", max_steps=2)
    output = _train("unfinished", max_steps=4, save_steps=2, save_strategy="steps")
    shutil.rmtree(output / "checkpoint-4", ignore_errors=True)
    record = output / "pyralis_run.json"
    record.write_text(record.read_text().replace('"finished"', '"interrupted"'))
    return output


@cache
def _stopped_run() -> Path:
    from pyralis.errors import NotFiniteError

    try:
        _train("stopped", learning_rate=1e30, max_steps=8)
    except NotFiniteError:
        return _home() / "stopped"
    raise AssertionError("a learning rate of 1e30 went well")


TARGETS: dict[str, Target] = {
    target.__name__: target for target in (config, rows, files, template, model, adapter, gguf, checkpoint, replay)
}
MADE_OF: dict[str, tuple[Callable[[], Any], ...]] = {
    "model": (_model,),
    "adapter": (_adapter,),
    "gguf": (seeds.gguf_file,),
    "checkpoint": (_run,),
    "replay": (_stopped_run,),
}


def warm_up(target: Target) -> None:
    """Some cases before any is counted: what is imported and made once takes seconds."""
    for make in MADE_OF.get(target.__name__, (_tokenizer,)):
        make()
    generator = random.Random(0)
    for number in range(12):
        folder = _home() / f"warm-{number}"
        folder.mkdir()
        try:
            target(Draw(generator.randbytes(600)), folder)
        except (Exception, SystemError):  # whatever goes wrong, does so again when it is counted
            continue
        finally:
            shutil.rmtree(folder, ignore_errors=True)
