"""Memory by category: predicted beside counted, adding up to the peaks; nothing that is not known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import LoraConfig, get_peft_model

from pyralis.memory.cost import Batch
from pyralis.memory.explain import memory_rows
from pyralis.memory.plan import fixed_plan
from pyralis.memory.shape import describe_model
from pyralis.models.surgery import accelerate, decoder_layers
from pyralis.ops._triton import Gpu
from pyralis.train.memory_account import MemoryAccount
from pyralis.train.report.memory_table import BESIDE, CHINESE, GIB, memory_table
from pyralis.train.report.metric_rows import StepMetrics
from pyralis.train.report.summary import summarise
from tests.memory.pretend import RATES
from tests.tiny import build_tiny_model

MakeStep = Callable[..., StepMetrics]
ACCOUNT = MemoryAccount(400 << 20, 8 << 20, 8 << 20, 16 << 20)


def plan() -> Any:
    model = get_peft_model(build_tiny_model(), LoraConfig(r=8, target_modules="all-linear"))
    accelerate(model)
    shape = describe_model(model.get_base_model(), decoder_layers(model), Gpu((8, 0), 2))
    return fixed_plan(shape, Batch(2, 64), "keep", RATES)


def test_predicted_and_counted_add_up(make_step: MakeStep) -> None:
    made = plan()
    summary = summarise([make_step(1, 1.0, peak_memory_gib=0.75, peak_host_memory_gib=None)])
    table = memory_table(made, ACCOUNT, summary)
    assert table is not None
    assert table.on_gpu
    assert sum(row.predicted or 0 for row in table.rows) == table.predicted == made.memory.allocated
    assert sum(row.counted or 0 for row in table.rows) == table.measured == 0.75 * GIB
    assert [row.english for row in table.rows[:4]] == [
        "weights", "adapters and their compute copies", "gradients", "optimizer",
    ]  # fmt: skip
    assert [row.english for row in table.beside] == list(BESIDE)
    assert table.plan == ["layers 0-1: everything is kept"]


def test_on_a_cpu_only_what_was_counted_is_there(make_step: MakeStep) -> None:
    table = memory_table(None, ACCOUNT, summarise([make_step(1, 1.0)]))
    assert table is not None
    assert (table.predicted, table.measured, table.on_gpu) == (None, round(1.25 * GIB), False)
    assert all(row.predicted is None for row in table.rows)
    assert sum(row.counted or 0 for row in table.rows) == table.measured
    assert table.rows[1].english == "adapters"
    assert sum(row.of_all for row in table.rows) == 1.0


def test_a_rest_below_nothing_is_left_out(make_step: MakeStep) -> None:
    mapped = MemoryAccount(2 << 30, 0)  # weights on disk, of which few were touched
    table = memory_table(None, mapped, summarise([make_step(1, 1.0)]))
    assert table is not None
    assert [row.english for row in table.rows] == ["weights"]


def test_nothing_is_shown_where_nothing_is_known(make_step: MakeStep) -> None:
    assert memory_table(None, None, summarise([make_step(1, 1.0)])) is None
    assert memory_table(None, ACCOUNT, summarise([])) is None


def test_every_category_has_its_chinese() -> None:
    assert {name for name, _ in memory_rows(plan())} == CHINESE.keys()
