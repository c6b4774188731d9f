"""What a run's memory went into: what the memory plan predicted beside what was counted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyralis.memory.explain import layer_lines, memory_rows
from pyralis.memory.plan import Plan
from pyralis.train.memory_account import MemoryAccount
from pyralis.train.report.summary import RunSummary

GIB = 2**30
CHINESE = {
    "weights": "权重",
    "adapters and their compute copies": "适配器及其计算副本",
    "gradients": "梯度",
    "optimizer": "优化器状态",
    "dequantised matrices": "反量化的矩阵",
    "kept for the backward": "为反向传播保留的激活",
    "working memory of a layer or the head": "单层或输出头的工作内存",
    "libraries' workspaces": "库的工作区",
    "holes between blocks": "内存块之间的空洞",
    "CUDA context": "CUDA 上下文",
}
"""Of the categories of `memory_rows`."""
BESIDE = ("holes between blocks", "CUDA context")
"""What the allocator's own figure, which is measured, leaves out."""

_IN_THE_PROCESS = ("everything else: Python, libraries, data, activations", "其余：Python、库、数据、激活")


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """One category, in bytes; None where it is not known. of_all: share of the whole, for a bar."""

    english: str
    chinese: str
    predicted: int | None = None
    counted: int | None = None
    of_all: float = 0.0


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """rows add up to the peak: predicted to `predicted`, counted to `measured`. beside: predicted, outside of both.

    plan: what layers keep, in words.
    """

    rows: Sequence[MemoryRow]
    predicted: int | None
    measured: int | None
    on_gpu: bool
    beside: Sequence[MemoryRow] = ()
    plan: Sequence[str] = ()


def memory_table(plan: Plan | None, account: MemoryAccount | None, summary: RunSummary) -> MemoryTable | None:
    """None where nothing was counted or predicted."""
    on_gpu = summary.peak_memory_gib is not None
    peak = summary.peak_memory_gib if on_gpu else summary.peak_host_memory_gib
    measured = None if peak is None else round(peak * GIB)
    if plan is None and (account is None or measured is None):
        return None
    sizes = {} if plan is None else dict(memory_rows(plan))
    counted = _counted(account)
    names = [name for name in CHINESE if (name in counted or sizes.get(name)) and name not in BESIDE]
    predicted = sum(size for name, size in sizes.items() if name not in BESIDE) if sizes else None
    whole = max(predicted or 0, measured or 0, 1)
    rows = [_row(name, sizes.get(name), counted.get(name), whole) for name in names]
    rest = None if measured is None or account is None else measured - account.total
    if rest is not None and rest >= 0:
        what = ("everything else", "其余") if on_gpu else _IN_THE_PROCESS
        rows.append(MemoryRow(*what, None, rest, 0.0 if predicted is not None else rest / whole))
    beside = [_row(name, sizes[name], None, whole) for name in BESIDE if name in sizes]
    return MemoryTable(rows, predicted, measured, on_gpu, beside, [] if plan is None else layer_lines(plan))


def _counted(account: MemoryAccount | None) -> dict[str, int]:
    """By the names of `memory_rows`."""
    if account is None:
        return {}
    found = {
        "weights": account.weights, "adapters and their compute copies": account.adapters,
        "gradients": account.gradients, "optimizer": account.optimizer,
    }  # fmt: skip
    return {name: size for name, size in found.items() if size}


def _row(name: str, predicted: int | None, counted: int | None, whole: int) -> MemoryRow:
    size = counted if predicted is None else predicted
    english = "adapters" if predicted is None and name.startswith("adapters") else name
    chinese = "适配器" if english == "adapters" else CHINESE[name]
    return MemoryRow(english, chinese, predicted, counted, (size or 0) / whole)
