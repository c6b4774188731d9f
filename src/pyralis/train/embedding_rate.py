"""A learning rate of their own for embeddings and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def embedding_parameters(model: Any) -> list[nn.Parameter]:
    """What is trained of the input embedding and the head, also inside PEFT's wrappers."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = {
        id(parameter): parameter
        for module in modules
        if module is not None
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    return list(found.values())


def give_learning_rate(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], rate: float) -> None:
    """Move the parameters into groups of their own, otherwise like those they were in."""
    moved = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in moved]
        if mine:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
            optimizer.add_param_group({**group, "params": mine, "lr": rate})
