"""Pyralis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pyralis.bench.train.clock import Measured
from pyralis.bench.train.peers import GRAPH, RESIDENT
from pyralis.bench.train.peers.base import Peer
from pyralis.bench.train.settings import Loop, Shape
from pyralis.compat import switch_checkpointing
from pyralis.data.collate import Collator
from pyralis.engine.step_graphs import StepGraphs, use_step_graphs
from pyralis.errors import ModelError
from pyralis.lora.attach import LoraSettings, attach_lora
from pyralis.models.causal_lm import causal_lm_loss
from pyralis.models.checkpointing import choose_save_policy
from pyralis.models.load import ModelSettings, load_model
from pyralis.models.residency import keep_matrices
from pyralis.models.surgery import accelerate, decoder_layers, report
from pyralis.train.arguments import PyralisTrainingArguments
from pyralis.train.flat_optimizer import flat_adamw, flat_optimizer
from pyralis.train.trainer import PyralisTrainer


class Pyralis(Peer):
    graphs: StepGraphs | None = None

    def run(self, variant: str, loop: Loop, shape: Shape, warmup: int) -> Measured:
        """Raises ModelError if it was not what the variant's name says that ran."""
        measured = super().run(variant, loop, shape, warmup)
        ran = report(self.model)
        if ran.fast_layers < len(ran.layers):
            raise ModelError("; ".join(ran.lines))
        if self.graphs is not None and self.graphs.reason is not None:
            raise ModelError(f"steps were not replayed: {self.graphs.reason}")
        return measured

    def prepare(self, variant: str) -> nn.Module:
        model = self.model if self.model is not None else self._loaded()
        policy, *extras = variant.split("+")
        layers = decoder_layers(model)
        switch_checkpointing(model, policy != "keep")
        if policy != "keep":
            choose_save_policy(layers, policy)  # type: ignore[arg-type]  # one of POLICIES
        keep_matrices(layers, RESIDENT[1:] in extras)
        self.graphs = use_step_graphs(model, "auto" if GRAPH[1:] in extras else "off")
        return model.train()

    def _loaded(self) -> Any:
        settings = ModelSettings(str(self.folder), self.bench.mode, master_weights="compute")
        loaded = load_model(settings, device=self.device, dtype=self.dtype)
        accelerate(loaded.model)
        if self.bench.mode == "full":
            return loaded.model
        rank = self.bench.rank
        return attach_lora(loaded.model, LoraSettings(rank=rank, alpha=rank, dropout=self.bench.dropout))

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        return causal_lm_loss(self.model, inputs | {"padding_side": "right"}, batch["labels"])

    def optimizer(self) -> Optimizer:
        if self.bench.mode == "full":
            return flat_optimizer(super().optimizer(), self.model, 0.0)  # type: ignore[no-any-return]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return flat_adamw(self.model, parameters, lr=self.bench.learning_rate, weight_decay=0.0, bits=8)

    def trainer(self, variant: str, arguments: dict[str, Any], rows: Any) -> Any:
        return PyralisTrainer(
            model=self.model,
            args=PyralisTrainingArguments(**arguments, cuda_graph="off"),  # what `prepare` has chosen stays
            train_dataset=rows,
            data_collator=Collator(pad_token_id=0),
        )
