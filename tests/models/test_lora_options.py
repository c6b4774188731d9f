"""Every option of LoRA runs fast or says why not, and no number differs: loss and gradients after a step as stock's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import LoftQConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import (
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from torch import Tensor, nn

from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.fused import FusedBlock
from pyralis.models.load import ModelSettings, load_model
from pyralis.models.surgery import accelerate, report
from tests.models.spec_block import block_in_place
from tests.tiny import build_tiny_model, make_tiny_model

EVERY = tuple(family.name for family in SERVED)
IDS = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(0))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAST: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1},
    "rank 3": {"r": 3},
    "rank 16": {"r": 16},
    "rank 64": {"r": 64},
    "rank 256": {"r": 256},
    "odd ranks": {"r": 5, "rank_pattern": {"k_proj": 1, "up_proj": 17}, "alpha_pattern": {"v_proj": 3}},
    "rsLoRA": {"use_rslora": True},
    "alpha 0": {"lora_alpha": 0},
    "biases of LoRA": {"lora_bias": True},
    "all biases trained": {"bias": "all"},
    "biases of adapted layers trained": {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "MLP only": {"target_modules": ["gate_proj", "down_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "one layer of a pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "layers that stand twice": {"layer_replication": [[0, 2], [0, 2]]},
    "a regular expression": {"target_modules": r".*layers\.1\.(self_attn|mlp)\.(q|up)_proj"},
    "starts on the GPU": {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
    "QALoRA, which is GPTQ's": {"use_qalora": True, "qalora_group_size": 8},
    "a start from data before there is any": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "excluded modules": {"exclude_modules": r".*layers\.0\.mlp.*|.*v_proj"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 8},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA, approximate": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "LoftQ": {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)},
    "embeddings and head trained": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tied embeddings and head trained": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA on embeddings and head": {"target_modules": [*ALL, "embed_tokens", "lm_head"]},
    "some tokens trained": {"trainable_token_indices": [1, 5]},
    "dropout in eval mode": {"lora_dropout": 0.3},
    "DoRA": {"use_dora": True},
    "DoRA, rsLoRA, some modules": {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "DoRA, odd ranks, all biases": {"use_dora": True, "r": 5, "rank_pattern": {"up_proj": 17}, "bias": "all"},
    "DoRA, alpha 0": {"use_dora": True, "lora_alpha": 0},
    "DoRA from PiSSA": {"use_dora": True, "init_lora_weights": "pissa"},
}
STOCK: dict[str, tuple[dict[str, Any], str]] = {
    "activated LoRA": ({"alora_invocation_tokens": [5, 6]}, "ALora, a variant of LoRA"),
    "MiCA": ({"init_lora_weights": "mica"}, "MiCA, a variant of LoRA"),
    "VeLoRA": ({"velora_config": VeloraConfig()}, "Velora, a variant of LoRA"),
    "MonteCLoRA": ({"monteclora_config": MontecloraConfig()}, "Monteclora, a variant of LoRA"),
    "KaSA": ({"kasa_config": KasaConfig()}, "Kasa, a variant of LoRA"),
    "BD-LoRA": (
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False)},
        "BdLora, a variant of LoRA",
    ),
    "LoRA on parameters": (
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        "peft.tuners.lora.layer.ParamWrapper",
    ),
    "norms trained as modules to save": ({"modules_to_save": ["input_layernorm"]}, "input_layernorm is peft."),
}


# Initialisations that change the base weights or quantise them; PEFT's orthogonal one fails on 4-bit weights.
PLAIN_ONLY = ("PiSSA", "PiSSA, approximate", "OLoRA", "LoftQ", "orthogonal", "DoRA from PiSSA")
# Variants that PEFT does not have for 4-bit layers; it takes them for plain LoRA, or refuses them.
PLAIN_VARIANTS = ("MiCA", "VeLoRA", "MonteCLoRA", "KaSA", "BD-LoRA", "LoRA on parameters")
BASES = ("plain", "NF4")


def tuned(options: dict[str, Any], base: str = "plain", *, seed: int = 1) -> Any:
    """A model with LoRA on it, nothing of what is trained at its starting point."""
    fields = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": "ensure_weight_tying" in options}
    if base == "plain":
        model: Any = build_tiny_model("llama", **fields)
    else:
        with TemporaryDirectory() as folder:
            make_tiny_model(Path(folder), "llama", **fields)
            model = load_model(ModelSettings(folder, train_mode="qlora", dtype="float32")).model
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": ALL, **options}))
    move(model, seed)
    return model.eval()


def move(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = logits(model).square().mean()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=0)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert (got[1][name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-9, name


def run(options: dict[str, Any], base: str) -> list[str]:
    """The reasons of a fast model's layers, after two steps whose numbers were stock's."""
    model = tuned(options, base)
    stock = copy.deepcopy(model)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (model, stock)]
    with block_in_place(FusedBlock()):
        before = accelerate(model, families=EVERY)
        for _ in range(2):
            same(step(model), step(stock))
            for optimizer in optimizers:
                optimizer.step()
        return [layer.reason for layer in (report(model) if before.fast_layers else before).layers]


@pytest.mark.parametrize(
    ("name", "base"),
    [(name, "plain") for name in FAST]
    + [pytest.param(name, "NF4", marks=pytest.mark.full) for name in FAST if name not in PLAIN_ONLY],
)
def test_runs_fast(name: str, base: str) -> None:
    if name == "LoftQ":
        pytest.importorskip("scipy", reason="PEFT's LoftQ takes it")
    assert set(run(FAST[name], base)) == {""}


@pytest.mark.parametrize(
    ("name", "base"),
    [(name, base) for name in STOCK for base in BASES if base == "plain" or name not in PLAIN_VARIANTS],
)
def test_runs_stock_and_says_why(name: str, base: str) -> None:
    options, expected = STOCK[name]
    assert all(expected in reason for reason in run(options, base))


class Pair:
    """A fast model and its stock copy, to both of which the same is done between steps."""

    def __init__(self, base: str, **options: Any) -> None:
        self.fast = tuned(options, base)
        targets = ["q_proj", "up_proj", "down_proj"]
        self.fast.add_adapter("second", LoraConfig(r=4, target_modules=targets, **options))
        self.both(lambda m: m.set_adapter("second"), models=(self.fast,))
        move(self.fast, 2)
        self.fast.set_adapter("default")
        self.stock = copy.deepcopy(self.fast)
        accelerate(self.fast, families=EVERY)

    @property
    def models(self) -> tuple[Any, Any]:
        return self.fast, self.stock

    def both(self, action: Callable[[Any], Any], *, models: tuple[Any, ...] | None = None) -> None:
        for model in models or self.models:
            torch.manual_seed(3)  # of new adapters
            action(model)

    def steps_alike(self) -> list[str]:
        same(step(self.fast), step(self.stock))
        return [layer.reason for layer in report(self.fast).layers]

    def logits_alike(self) -> list[str]:
        torch.testing.assert_close(logits(self.fast), logits(self.stock), rtol=1e-4, atol=2e-5)
        return [layer.reason for layer in report(self.fast).layers]


@pytest.mark.parametrize("base", BASES)
def test_adapters_switched_combined_and_disabled(base: str) -> None:
    pair = Pair(base)
    assert pair.steps_alike() == ["", ""]
    pair.both(lambda m: m.set_adapter("second"))
    assert pair.steps_alike() == ["", ""]
    pair.both(lambda m: m.base_model.set_adapter(["default", "second"]))
    assert all("several active adapters (default, second)" in reason for reason in pair.steps_alike())
    pair.both(lambda m: m.set_adapter("default"))
    assert pair.steps_alike() == ["", ""]
    for kind in ("cat", "linear"):
        if kind == "linear":  # of one rank only
            pair.both(lambda m: m.add_adapter("third", LoraConfig(r=8, lora_alpha=3, target_modules=ALL)))
        others = ["default", "second" if kind == "cat" else "third"]
        pair.both(lambda m: m.add_weighted_adapter(others, [0.7, 0.4], kind, combination_type=kind))  # noqa: B023
        pair.both(lambda m: m.set_adapter(kind))  # noqa: B023
        assert pair.steps_alike() == ["", ""]
    pair.both(lambda m: m.base_model.disable_adapter_layers())
    assert pair.logits_alike() == ["", ""]
    pair.both(lambda m: m.base_model.enable_adapter_layers())
    assert pair.steps_alike() == ["", ""]


@pytest.mark.parametrize("base", BASES)
def test_adapters_merged_and_unmerged(base: str) -> None:
    """Merging into 4-bit weights quantises them again, unmerging does not bring the old ones back: both do the same."""
    pair = Pair(base)
    pair.both(lambda m: m.merge_adapter())
    assert pair.logits_alike() == ["", ""]
    pair.both(lambda m: m.unmerge_adapter())
    assert pair.logits_alike() == ["", ""]
    if base == "plain":  # 4-bit weights may land on another level
        pair.both(lambda m: m.set_adapter("second"))
        assert pair.steps_alike() == ["", ""]


TRAINED: dict[str, Callable[[str], bool]] = {
    "A frozen": lambda name: "lora_B" in name,
    "B frozen": lambda name: "lora_A" in name,
    "one layer of two": lambda name: "layers.1" in name and "lora_" in name,
    "norms with the adapters": lambda name: "lora_" in name or "norm" in name,
    "biases of the base with A": lambda name: "lora_A" in name or name.endswith("base_layer.bias"),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("trained", TRAINED)
def test_what_is_trained_is_mixed(trained: str, base: str) -> None:
    pair = Pair(base)

    def choose(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(TRAINED[trained](name) and ".second." not in name)

    pair.both(choose)
    assert pair.steps_alike() == ["", ""]


def test_base_weights_with_the_adapters_on_them() -> None:
    """Some plain weights trained beside LoRA, as staged unfreezing does."""
    pair = Pair("plain")
    pair.both(lambda m: [p.requires_grad_() for n, p in m.named_parameters() if n.endswith("v_proj.base_layer.weight")])
    assert pair.steps_alike() == ["", ""]
