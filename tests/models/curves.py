"""Training curves of a model run stock and fast from the same start on the same batches, and how far apart they are."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyralis.models.causal_lm import causal_lm_loss
from pyralis.models.surgery import accelerate, decoder_layers, report
from pyralis.verify.text import TEXTS
from tests.models.test_parity import EVERY, with_lora
from tests.tiny import build_tiny_model, make_tiny_tokenizer

SIZES = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.05,
}  # fmt: skip


@dataclass(frozen=True)
class Curves:
    """The loss of each step: exact is stock in float32; stock and fast compute in `dtype`."""

    name: str
    dtype: str
    learning_rate: float
    exact: list[float]
    stock: list[float]
    fast: list[float]

    def distance(self, curve: list[float]) -> float:
        """Root mean square over the steps of the relative distance to the exact curve."""
        a, b = torch.tensor(curve, dtype=torch.float64), torch.tensor(self.exact, dtype=torch.float64)
        return float(((a - b) / b).square().mean().sqrt())

    @property
    def learnt(self) -> float:
        """By how much the exact loss fell."""
        return 1 - sum(self.exact[-5:]) / sum(self.exact[:5])


def train_both(
    name: str, device: torch.device, dtype: torch.dtype, *, steps: int = 50, rows: int = 4, tokens: int = 128,
    learning_rate: float = 1e-3, full: bool = False, seed: int = 0,
) -> Curves:  # fmt: skip
    """LoRA (full: every weight) on a random model that learns to spell a text in seven scripts."""
    batches = _batches(steps, rows, tokens, device, seed)

    def curve(compute: torch.dtype, fast: bool) -> list[float]:
        model: Any = build_tiny_model(name, **SIZES)
        half = compute != torch.float32
        model = model.train() if full else with_lora(model.to(compute), some=False)
        model.to(device)
        if fast:
            accelerate(model, families=EVERY)
        losses = _trained(model, batches, learning_rate, compute if half else None)
        if fast:
            assert report(model).fast_layers == len(decoder_layers(model)), report(model).lines
        return losses

    return Curves(
        name, str(dtype).removeprefix("torch."), learning_rate,
        exact=curve(torch.float32, False), stock=curve(dtype, False), fast=curve(dtype, True),
    )  # fmt: skip


def _batches(steps: int, rows: int, tokens: int, device: torch.device, seed: int) -> list[tuple[Tensor, Tensor]]:
    """ids and padding masks; the last row of each is padded on the right."""
    stream = torch.tensor(make_tiny_tokenizer()("\n".join(TEXTS))["input_ids"])
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        starts = torch.randint(len(stream) - tokens, (rows,), generator=generator)
        mask = torch.ones((rows, tokens), dtype=torch.int64)
        mask[-1, -tokens // 4 :] = 0
        ids = torch.stack([stream[start : start + tokens] for start in starts.tolist()])
        found.append((ids.to(device), mask.to(device)))
    return found


def _trained(
    model: Any, batches: list[tuple[Tensor, Tensor]], rate: float, autocast: torch.dtype | None
) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    losses = []
    for ids, mask in batches:
        with nullcontext() if autocast is None else torch.autocast(ids.device.type, autocast):
            labels = ids.masked_fill(mask == 0, -100)
            loss = causal_lm_loss(model, {"input_ids": ids, "attention_mask": mask}, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).double().tolist()


def save(curves: list[Curves], folder: Path) -> None:
    """curves.json, and curves.png with stock and fast laid over one another."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    entries = [asdict(c) | {"stock_distance": c.distance(c.stock), "fast_distance": c.distance(c.fast)} for c in curves]
    (folder / "curves.json").write_text(json.dumps(entries, indent=1) + "\n")
    figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3), squeeze=False, layout="constrained")
    for axis, drawn in zip(axes[0], curves):
        axis.plot(drawn.exact, color="0.7", linewidth=4, label="stock, float32")
        axis.plot(drawn.stock, label=f"stock, {drawn.dtype}")
        axis.plot(drawn.fast, "--", label=f"fast, {drawn.dtype}")
        axis.set(title=drawn.name, xlabel="step", ylabel="loss")
        axis.legend()
    figure.savefig(folder / "curves.png", dpi=120)
    pyplot.close(figure)
