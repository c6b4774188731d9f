"""A model's generation config, so that the saved model stops where its chat template does, and can be saved at all."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel


def settle_generation(model: PreTrainedModel, stop_ids: Sequence[int], pad_token_id: int | None) -> None:
    """Put the stop tokens (none: the model's own stay) and a padding token where `generate` looks for them.

    Many published configs hold sampling values without `do_sample`, which transformers reads but refuses to save: they
    mean to sample.
    """
    generation = model.generation_config
    if generation is None:
        return
    if stop_ids:
        generation.eos_token_id = list(stop_ids)
    if generation.pad_token_id is None:
        generation.pad_token_id = pad_token_id
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
