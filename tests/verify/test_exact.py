"""The streamed truth against a whole model in float64 whose layers are computed by `spec_block.py`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from pyralis.errors import ModelError
from pyralis.models.surgery import accelerate
from pyralis.models.swap import is_fast
from pyralis.verify.batches import Example, make_batches
from pyralis.verify.exact import check_exact
from pyralis.verify.measure import Outcome, measure_stock, measure_truth
from tests.models.spec_block import SpecBlock, block_in_place
from tests.models.test_parity import EVERY, build, error
from tests.tiny import FAMILIES, build_tiny_model

IDS = torch.randint(4, 300, (4, 24), generator=torch.Generator().manual_seed(5)).tolist()
BATCHES = make_batches([Example(ids, [-100, *ids[1:]]) for ids in IDS], 2, 24, torch.device("cpu"))


def expected(name: str, mode: str, folder: Path, index: int) -> Outcome:
    model = build(name, mode, folder, exact=True)
    with block_in_place(SpecBlock()):
        accelerate(model, families=EVERY)
        return measure_stock(model, BATCHES[index], torch.float64)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("gpt2", "bloom")])
@pytest.mark.parametrize(("mode", "index"), [("lora", 0), ("qlora", 1), ("full", 2)])
def test_the_truth(name: str, mode: str, index: int, tmp_path: Path) -> None:
    model = build(name, mode, tmp_path)
    got, want = measure_truth(model, BATCHES[index]), expected(name, mode, tmp_path, index)
    assert error(got.token_losses, want.token_losses) < 1e-6
    assert got.gradients.keys() == want.gradients.keys()
    for key, gradient in want.gradients.items():
        assert got.gradients[key].dtype == torch.float64
        # tables of angles and Gemma's factor of embeddings are in float32 here, as in the model
        assert error(got.gradients[key], gradient) < 3e-7, key


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    model = build("llama", "lora", tmp_path)
    classes, weights = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    measure_truth(model, BATCHES[0])
    assert [type(m) for m in model.modules()] == classes
    assert not any(is_fast(m) for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_weights_that_have_no_float64() -> None:
    model = build_tiny_model()
    check_exact(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight is in int8"):
        check_exact(model)
