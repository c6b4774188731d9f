"""`verify_model`: a model loaded as training would, run stock and fast on the same batches, both against the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyralis.lora.attach import LoraSettings, attach_lora
from pyralis.models.dtype import DtypeName, choose_device
from pyralis.models.load import LoadedModel, ModelSettings, load_model
from pyralis.models.nf4 import is_four_bit
from pyralis.models.source import locate_model
from pyralis.models.surgery import AccelerationReport, accelerate, report, restore
from pyralis.models.tokenizer import load_tokenizer
from pyralis.ops._shortage import ran_short
from pyralis.train.report.environment import describe_environment
from pyralis.verify.batches import Batch, built_in_examples, examples_of, make_batches
from pyralis.verify.compare import Comparison, compare
from pyralis.verify.exact import check_exact
from pyralis.verify.measure import Outcome, measure_fast, measure_stock, measure_truth
from pyralis.verify.result import Subject, Verification

TOKENS = {"cpu": 64}  # a row, where not given: half a minute for 135M parameters on two cores
GPU_TOKENS = 512
RANDOM = LoraSettings(rank=16, alpha=16, dropout=0.0)  # on every linear layer
MORE_RUNS = 4  # of stock in half precision, where one says that fast is worse
B_STD = 0.02  # of the random adapter's B: its product is then a tenth of a usual weight


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """What to verify.

    Attributes:
        model: a folder, an adapter's folder, a .gguf file, a demo model's or hub name.
        adapter: a folder of LoRA. None is the one that `model` is, or else a random one.
        data: a file of training data; None is a built-in text in several languages.
        load_in_4bit: NF4, as QLoRA trains.
        rows, tokens: of each batch. tokens None: 64 on a CPU, 512 on a GPU.
    """

    model: str
    adapter: Path | None = None
    data: str | None = None
    load_in_4bit: bool = False
    dtype: DtypeName = "auto"
    rows: int = 2
    tokens: int | None = None


def verify_model(settings: VerifySettings, *, progress: Callable[[str], None] = lambda line: None) -> Verification:
    """Compare stock transformers with the fast layers, both against float64: losses and every gradient.

    Dropout is off. Three batches: padded on the right, on the left, and packed.

    Args:
        progress: is told what is being done.

    Raises:
        ModelError, DataError, TemplateError, FetchError: what is wrong with model, adapter or data.
    """
    source, tokenizer = locate_model(settings.model), load_tokenizer(settings.model)
    device = choose_device()
    rows, tokens = settings.rows, settings.tokens or TOKENS.get(device.type, GPU_TOKENS)
    if settings.data is None:
        examples = built_in_examples(tokenizer)
    else:
        examples = examples_of(settings.data, tokenizer, rows, tokens)
    batches = make_batches(examples, rows, tokens, device)
    progress("loading the model")
    loaded = load_model(
        ModelSettings(settings.model, train_mode="qlora" if settings.load_in_4bit else "lora", dtype=settings.dtype),
        device=device,
    )
    check_exact(loaded.model)
    adapter = settings.adapter or source.adapter
    model = _with_adapter(loaded, adapter)
    acceleration, comparisons, truth = _compared(model, batches, loaded.dtype, progress)
    notes = list(loaded.notes)
    if truth != torch.float64:
        notes.append(
            "the truth is in float32: one layer and its activations in float64 do not fit into this GPU's memory"
        )
    subject = Subject(
        model=source.location,
        base="NF4" if is_four_bit(loaded.model) else "plain",
        adapter=f"random, rank {RANDOM.rank} on every linear layer" if adapter is None else str(adapter),
        data="built-in text" if settings.data is None else settings.data,
        dtype=loaded.dtype,
        device=str(device),
        shape=(rows, tokens),
        truth=truth,
    )
    return Verification(subject, acceleration, tuple(comparisons), describe_environment(), tuple(notes))


def _with_adapter(loaded: LoadedModel, adapter: Path | None) -> nn.Module:
    """What is trained is rounded to the compute dtype, in which autocast multiplies it: the truth starts from there."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = attach_lora(loaded.model, RANDOM, adapter=adapter)
        for name, parameter in model.named_parameters():
            if adapter is None and "lora_B" in name:
                nn.init.normal_(parameter, std=B_STD)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(loaded.dtype).to(parameter.dtype)
    return model.eval()


def _compared(
    model: Any, batches: list[Batch], dtype: torch.dtype, progress: Callable[[str], None]
) -> tuple[AccelerationReport, list[Comparison], torch.dtype]:
    """What is fast, the comparisons of all layouts, and the dtype of the truth."""
    accelerate(model)
    acceleration, comparisons, truth_dtype = report(model), [], torch.float64
    restore(model)
    for batch in batches if acceleration.fast_layers else ():
        progress(f"{batch.layout}: the truth")
        truth, truth_dtype = _truth(model, batch, truth_dtype)
        progress(f"{batch.layout}: stock transformers")
        stock = measure_stock(model, batch, dtype)
        progress(f"{batch.layout}: Pyralis")
        accelerate(model)
        fast = measure_fast(model, batch, dtype)
        acceleration = _stock_in_either(acceleration, report(model))
        restore(model)
        found = compare(batch.layout, truth, [stock], fast, dtype)
        if not found.passed and dtype != torch.float32:
            progress(f"{batch.layout}: more runs of stock transformers")
            more = [measure_stock(model, batch, dtype, moved=seed) for seed in range(MORE_RUNS)]
            found = compare(batch.layout, truth, [stock, *more], fast, dtype)
        comparisons.append(found)
    return acceleration, comparisons, truth_dtype


def _truth(model: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[Outcome, torch.dtype]:
    """In `dtype`, or in float32 where a GPU has no room for it."""
    try:
        return measure_truth(model, batch, dtype), dtype
    except RuntimeError as error:
        if dtype == torch.float32 or not ran_short(error):
            raise
    torch.cuda.empty_cache()
    return measure_truth(model, batch, torch.float32), torch.float32


def _stock_in_either(first: AccelerationReport, second: AccelerationReport) -> AccelerationReport:
    return AccelerationReport(tuple(b if a.fast else a for a, b in zip(first.layers, second.layers)))
