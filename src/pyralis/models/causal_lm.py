"""The training loss of a causal language model whose logits are never stored whole.

`causal_lm_loss` calls the model, as it is wrapped (PEFT, DistributedDataParallel), with one more argument. The forward
of a fast causal LM (`accelerate` swaps it with its decoder) finds it there and goes from the last hidden states to the
loss, a chunk of rows at a time (`ops/linear_cross_entropy.py`). Everywhere else, and where the head is not a plain
linear layer, logits are made by the stock model and the loss is made from them: it is the same loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from pyralis.memory.auto import chunk_of, planner_of
from pyralis.models.detect import Reason
from pyralis.models.families import FAMILIES, Family
from pyralis.models.layer_state import HOOKS
from pyralis.models.layout import HINTS, refuse_shared_keys
from pyralis.models.modules import Unlike, expect_class, expect_members_of_leaf
from pyralis.models.real_tokens import RealTokens
from pyralis.models.swap import FAST_STATE, is_fast, stock_class
from pyralis.models.unpadding import UNPADDED, Kept
from pyralis.ops._loss import IGNORE_INDEX
from pyralis.ops.cross_entropy import cross_entropy
from pyralis.ops.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "CausalState", "Head", "LossEngine", "LossRequest", "Request", "answer", "answer_of_decoder", "causal_lm_forward",
    "causal_lm_loss", "causal_lm_of", "causal_state", "family_of_model", "head_reason", "shifted",
]  # fmt: skip

REQUEST = "pyralis_loss"


@dataclass(frozen=True, eq=False)
class Head:
    """logits = softcap(logit_scale * (hidden @ weight^T + bias)); all in one dtype"""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    chunk_bytes: int | None = None  # most bytes of logits at a time; None: the op's own choice


class Request(Protocol):
    """What is wanted of a causal LM in place of its logits."""

    def of_hidden(self, hidden: Tensor, head: Head) -> Any:
        """From the last hidden states [B, S, H]."""

    def unpadded(self, tokens: RealTokens) -> Request:
        """The same of these tokens' hidden states [1, T, H]."""

    def of_logits(self, logits: Tensor) -> Any:
        """From stock logits [B, S, V]."""


@dataclass(frozen=True, eq=False)
class LossRequest:
    targets: Tensor  # [B, S] int64: what each position is to predict, -100 where nothing
    num_items: Tensor | float | None
    label_smoothing: float
    supervised_rows: int | None

    def of_hidden(self, hidden: Tensor, head: Head) -> CausalLMOutputWithPast:
        targets, rows = self.targets, self.supervised_rows
        if rows is None and targets.device.type == "cpu":
            rows = int((targets != IGNORE_INDEX).sum())
        loss = linear_cross_entropy(
            hidden, head.weight, targets, bias=head.bias, num_items=self.num_items, supervised_rows=rows,
            softcap=head.softcap, logit_scale=head.logit_scale, label_smoothing=self.label_smoothing,
            chunk_bytes=head.chunk_bytes,
        )  # fmt: skip
        return CausalLMOutputWithPast(loss=loss)

    def unpadded(self, tokens: RealTokens) -> LossRequest:
        return replace(self, targets=tokens.gathered(self.targets))

    def of_logits(self, logits: Tensor) -> CausalLMOutputWithPast:
        items: Any = self.num_items
        loss = cross_entropy(logits, self.targets, num_items=items, label_smoothing=self.label_smoothing)
        return CausalLMOutputWithPast(loss=loss)


class LossEngine(Protocol):
    """What computes the training loss in place of `answer_of_decoder`, if it can: see `engine/step_graphs.py`."""

    def __call__(self, causal: Any, head: Head, arguments: Mapping[str, Any], request: LossRequest) -> Tensor: ...

    def drop(self) -> bool:
        """Give up all that it keeps of the model, once a device is done with it; whether there was anything."""
        ...


@dataclass(eq=False)
class CausalState:
    """Kept with a fast causal LM."""

    engine: LossEngine | None = None


def causal_state(causal: nn.Module) -> CausalState:
    return vars(causal).setdefault(FAST_STATE, CausalState())


def causal_lm_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    num_items: Tensor | float | None = None,
    *,
    label_smoothing: float = 0.0,
    supervised_rows: int | None = None,
) -> Tensor:
    """The cross entropy of the next tokens, summed over the supervised ones, over `num_items`: a float32 scalar.

    Args:
        model: a causal LM as it is called, inside whatever wraps it.
        inputs: the other arguments of its forward. No cache is made.
        labels: [B, S] int64, -100 where nothing is learnt; labels[:, t] is what position t - 1 predicts.
        num_items: by default the number of supervised tokens. 0 counts as 1.
        supervised_rows: how many labels[:, 1:] are not -100, if the CPU knows: others then never reach the head.

    What padding would have to predict is not learnt where rows are computed without their padding (`unpadding.py`): a
    collator labels nothing there. The last real token of a row predicts what is labelled after it.
    """
    return answer(model, inputs, LossRequest(shifted(labels), num_items, label_smoothing, supervised_rows)).loss


def answer(model: nn.Module, inputs: Mapping[str, Any], request: Request) -> Any:
    """What `request` makes of a causal LM, called as it is wrapped. No cache is made."""
    arguments = {**inputs, "use_cache": False}
    if is_fast(causal_lm_of(model)):
        return model(**arguments, **{REQUEST: request})
    refuse_shared_keys(arguments, "the model is not accelerated")
    hints = [name for name in HINTS if name in arguments]
    return request.of_logits(model(**{k: v for k, v in arguments.items() if k not in hints}).logits)


def head_reason(model: nn.Module) -> Reason | None:
    """Why the model's logits are stored whole in training; None if they are not."""
    causal: Any = causal_lm_of(model)
    if not is_fast(causal):
        return Reason("the model is not accelerated")
    head = _head(causal)
    return head if isinstance(head, Reason) else None


def family_of_model(model: nn.Module) -> Family | None:
    """The family whose causal LM this is, by its class."""
    cls = stock_class(type(model))
    return next((f for f in FAMILIES if (cls.__module__, cls.__name__) == (f.source, f"{f.prefix}ForCausalLM")), None)


def causal_lm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of the causal LM, in place of its class's."""
    stock: Any = stock_class(type(self))
    request: Request | None = kwargs.pop(REQUEST, None)
    if (planner := planner_of(self)) is not None:
        given = dict(zip(_parameters(stock), args)) | kwargs
        planner.before_call(self, given, recorded=causal_state(self).engine is not None, logits=request is None)
    if request is None:
        return stock.forward(self, *args, **kwargs)
    head = _head(self)
    if isinstance(head, Reason):  # the decoder below is fast all the same
        return request.of_logits(stock.forward(self, *args, **kwargs).logits)
    arguments = dict(zip(_parameters(stock), args)) | kwargs
    for name in ("labels", "logits_to_keep"):  # the head's, not the decoder's
        arguments.pop(name, None)
    engine = causal_state(self).engine
    if engine is not None and isinstance(request, LossRequest):
        return CausalLMOutputWithPast(loss=engine(self, head, arguments, request))
    return answer_of_decoder(self, head, arguments, request)


def answer_of_decoder(causal: Any, head: Head, arguments: Mapping[str, Any], request: Request) -> Any:
    """What `request` makes of a causal LM whose decoder is called with `arguments`."""
    kept = Kept()
    asked = {UNPADDED: kept} if is_fast(causal.model) else {}
    hidden = causal.model(**arguments, **asked).last_hidden_state
    if kept.tokens is not None:
        request = request.unpadded(kept.tokens)
    if torch.is_autocast_enabled(hidden.device.type):  # the dtype that it would have them multiplied in
        dtype = torch.get_autocast_dtype(hidden.device.type)
        bias = None if head.bias is None else head.bias.to(dtype)
        hidden, head = hidden.to(dtype), replace(head, weight=head.weight.to(dtype), bias=bias)
    return request.of_hidden(hidden, head)


def _head(causal: Any) -> Head | Reason:
    family = family_of_model(causal)
    assert family is not None, "swapped without a family"
    module, config = causal.lm_head, causal.config
    if isinstance(module, ModulesToSaveWrapper):  # trained whole, beside the original
        saved = [name for name in module.active_adapters if name in module.modules_to_save]
        whole = not module.disable_adapters and saved
        module = module.modules_to_save[saved[0]] if whole else module.original_module
    try:
        linear: Any = expect_class(module, "torch.nn.modules.linear", "Linear", "lm_head")
        expect_members_of_leaf(linear, {"weight", "bias"}, "lm_head")
    except Unlike as error:
        return Reason(str(error))
    if any(vars(linear)[name] for name in HOOKS):
        return Reason("lm_head has hooks, which would not be called")
    if type(linear.weight.data) is not Tensor or linear.weight.shape != (linear.out_features, linear.in_features):
        return Reason("the weight of lm_head is sharded")
    softcap = config.final_logit_softcapping if family.final_softcap else None
    scale = 1 / config.logits_scaling if family.logits_scaling else 1.0
    return Head(linear.weight, linear.bias, softcap, scale, chunk_of(causal))


def shifted(labels: Tensor) -> Tensor:
    """[B, S]: what each position is to predict."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def causal_lm_of(model: Any) -> nn.Module:
    """The causal LM inside DistributedDataParallel, torch.compile and PEFT."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, PeftModel):
            if model.active_peft_config.is_prompt_learning:  # adds tokens that the labels know nothing of
                return model
            model = model.get_base_model()
        else:
            return model


@cache
def _parameters(stock: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(stock.forward).parameters)[1:]
