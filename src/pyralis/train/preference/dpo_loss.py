"""The losses of preference optimisation, as functions of log-probabilities: one number for each pair.

    c = log pi(chosen) - log pi_ref(chosen)        r = log pi(rejected) - log pi_ref(rejected)        d = c - r
    s(x) = log sigmoid(x)        b = beta        e = label_smoothing        |c|, |r| = answer tokens

Each is that of TRL by the same name, and equal to it; "cdpo" is TRL's "sigmoid" of before 1.0 with label smoothing,
which "sigmoid" no longer has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyralis.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class PairScores:
    """What the losses read, [P] each: log-probabilities in float32, lengths in tokens.

    nll: [] float32, the mean negative log-probability of the chosen answers' tokens.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    nll: Tensor

    @property
    def chosen_ratios(self) -> Tensor:
        """c"""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratios(self) -> Tensor:
        """r"""
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Tensor:
        """d"""
        return self.chosen_ratios - self.rejected_ratios

    @property
    def mean_delta(self) -> Tensor:
        """c / |c| - r / |r|"""
        per_token = self.chosen_ratios / self.chosen_lengths.clamp(min=1)
        return per_token - self.rejected_ratios / self.rejected_lengths.clamp(min=1)


@dataclass(frozen=True, slots=True)
class DPOLoss:
    """What is minimised: a weighted sum of losses by name.

    Attributes:
        beta: how strongly the model is held to the reference; of "ipo" the paper's tau.
        weights: of the losses; by default 1 each. rpo_alpha of older TRL is "sft" with that weight.
        label_smoothing: the chance that a preference is the wrong way round ("cdpo", "robust", "exo_pair", "aot").

    Raises:
        ConfigError: an unknown name, weights of another number, or a setting out of its range.
    """

    types: tuple[str, ...] = ("sigmoid",)
    beta: float = 0.1
    weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        for name in self.types:
            if name not in LOSSES:
                raise ConfigError(f"loss_type: {name!r} is not known; expected some of {', '.join(LOSSES)}.")
        if self.weights is not None and len(self.weights) != len(self.types):
            raise ConfigError(f"loss_weights: {len(self.weights)} weights for {len(self.types)} losses.")
        if not self.beta > 0:
            raise ConfigError(f"beta: {self.beta} is not allowed; it must be greater than 0.")
        limit = 0.5 if "robust" in self.types or "cdpo" in self.types else 1.0
        if not 0 <= self.label_smoothing < limit:
            raise ConfigError(f"label_smoothing: {self.label_smoothing} is not allowed; expected 0 to below {limit:g}.")
        if "exo_pair" in self.types and self.label_smoothing == 0:
            raise ConfigError("label_smoothing: exo_pair needs it above 0; its paper takes 1e-3.")

    def __call__(self, scores: PairScores) -> Tensor:
        """[P] float32, differentiable."""
        weights: Sequence[float] = self.weights or [1.0] * len(self.types)
        parts = [LOSSES[name](scores, self) * weight for name, weight in zip(self.types, weights)]
        return torch.stack(parts).sum(0)


def sigmoid(x: PairScores, to: DPOLoss) -> Tensor:
    """-s(b d). Rafailov et al., Direct Preference Optimization (2023), equation 7."""
    return -logsigmoid(to.beta * x.delta)


def cdpo(x: PairScores, to: DPOLoss) -> Tensor:
    """-(1 - e) s(b d) - e s(-b d). Mitchell, A note on DPO with noisy preferences (2023)."""
    return _smoothed(to.beta * x.delta, to.label_smoothing)


def robust(x: PairScores, to: DPOLoss) -> Tensor:
    """(-(1 - e) s(b d) + e s(-b d)) / (1 - 2 e). Chowdhury et al., Provably Robust DPO (2024)."""
    logits, e = to.beta * x.delta, to.label_smoothing
    return (-(1 - e) * logsigmoid(logits) + e * logsigmoid(-logits)) / (1 - 2 * e)


def hinge(x: PairScores, to: DPOLoss) -> Tensor:
    """max(0, 1 - b d). Zhao et al., SLiC-HF (2023), in the normalised form of Liu et al., RSO (2023)."""
    return torch.relu(1 - to.beta * x.delta)


def ipo(x: PairScores, to: DPOLoss) -> Tensor:
    """(c / |c| - r / |r| - 1 / (2 b))^2. Azar et al., A General Theoretical Paradigm (2023), equation 17, by token."""
    return (x.mean_delta - 1 / (2 * to.beta)).square()


def sigmoid_norm(x: PairScores, to: DPOLoss) -> Tensor:
    """-s(b (c / |c| - r / |r|)). Lambert et al., Tulu 3 (2024), length-normalised DPO."""
    return -logsigmoid(to.beta * x.mean_delta)


def sft(x: PairScores, to: DPOLoss) -> Tensor:
    """Mean negative log-probability of the chosen tokens, the same for each pair. Pang et al., Iterative Reasoning
    Preference Optimization (2024), its second term."""
    return x.nll.expand(x.chosen.shape)


def exo_pair(x: PairScores, to: DPOLoss) -> Tensor:
    """KL of (sigmoid(b d), sigmoid(-b d)) from (1 - e, e). Ji et al., EXO (2024), equation 16."""
    logits, e = to.beta * x.delta, torch.tensor(to.label_smoothing, device=x.chosen.device)
    right = torch.sigmoid(logits) * (logsigmoid(logits) - torch.log1p(-e))
    return right + torch.sigmoid(-logits) * (logsigmoid(-logits) - torch.log(e))


def nca_pair(x: PairScores, to: DPOLoss) -> Tensor:
    """-s(b c) - (s(-b c) + s(-b r)) / 2. Chen et al., Noise Contrastive Alignment (2024)."""
    c, r = to.beta * x.chosen_ratios, to.beta * x.rejected_ratios
    return -logsigmoid(c) - 0.5 * (logsigmoid(-c) + logsigmoid(-r))


def bco_pair(x: PairScores, to: DPOLoss) -> Tensor:
    """-s(b c) - s(-b r). Jung et al., Binary Classifier Optimization (2024), without its running mean."""
    return -logsigmoid(to.beta * x.chosen_ratios) - logsigmoid(-to.beta * x.rejected_ratios)


def sppo_hard(x: PairScores, to: DPOLoss) -> Tensor:
    """(c - 1 / (2 b))^2 + (r + 1 / (2 b))^2. Wu et al., Self-Play Preference Optimization (2024), equation 4.7."""
    half = 0.5 / to.beta
    return (x.chosen_ratios - half).square() + (x.rejected_ratios + half).square()


def apo_zero(x: PairScores, to: DPOLoss) -> Tensor:
    """1 - sigmoid(b c) + sigmoid(b r). D'Oosterlinck et al., Anchored Preference Optimization (2024), equation 7."""
    return 1 - torch.sigmoid(to.beta * x.chosen_ratios) + torch.sigmoid(to.beta * x.rejected_ratios)


def apo_down(x: PairScores, to: DPOLoss) -> Tensor:
    """sigmoid(b c) + 1 - sigmoid(b d). The same, equation 8."""
    return torch.sigmoid(to.beta * x.chosen_ratios) + 1 - torch.sigmoid(to.beta * x.delta)


def aot(x: PairScores, to: DPOLoss) -> Tensor:
    """Smoothed -s of the model's sorted log-ratios of pairs against the reference's. Melnyk et al., Distributional
    Preference Alignment via Optimal Transport (2024), paired."""
    own, reference = (x.chosen - x.rejected).sort(0)[0], (x.ref_chosen - x.ref_rejected).sort(0)[0]
    return _smoothed(to.beta * (own - reference), to.label_smoothing)


def aot_unpaired(x: PairScores, to: DPOLoss) -> Tensor:
    """As `aot`, of sorted c against sorted r."""
    return _smoothed(to.beta * (x.chosen_ratios.sort(0)[0] - x.rejected_ratios.sort(0)[0]), to.label_smoothing)


def discopop(x: PairScores, to: DPOLoss) -> Tensor:
    """-s(b d) and exp(-b d), mixed by sigmoid(b d / tau). Lu et al., DiscoPOP (2024), equation 5."""
    logits = to.beta * x.delta
    share = torch.sigmoid(logits / to.discopop_tau)
    return -logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


def _smoothed(logits: Tensor, e: float) -> Tensor:
    return -(1 - e) * logsigmoid(logits) - e * logsigmoid(-logits)


Loss: TypeAlias = Callable[[PairScores, DPOLoss], Tensor]
LOSSES: dict[str, Loss] = {
    function.__name__: function
    for function in (
        sigmoid, cdpo, robust, hinge, ipo, sigmoid_norm, sft, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero,
        apo_down, aot, aot_unpaired, discopop,
    )
}  # fmt: skip
