"""A model's generation config, so that the saved model stops where its chat template does, and can be saved at all."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedModel


def settle_generation(model: PreTrainedModel, stop_ids: Sequence[int], pad_token_id: int | None) -> None:
    """Put the stop tokens (none: the model's own stay) and a padding token where `generate` looks for them."""
    if model.generation_config is not None:
        settle(model.generation_config, stop_ids, pad_token_id)


def settle(generation: GenerationConfig, stop_ids: Sequence[int], pad_token_id: int | None) -> None:
    """The same in a generation config, which can be saved afterwards.

    Many published configs hold sampling values without `do_sample`, which transformers reads but refuses to save: they
    mean to sample.
    """
    if stop_ids:
        generation.eos_token_id = list(stop_ids)
    if generation.pad_token_id is None:
        generation.pad_token_id = pad_token_id
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
