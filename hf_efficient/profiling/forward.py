"""One forward call of a model on random inputs, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_efficient.profiling.timing import Mark


def random_inputs(config: Any, length: int) -> dict[str, torch.Tensor]:
    """One row of random tokens; encoder-decoder models get 16 decoder tokens."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(5, config.vocab_size, (1, length), generator=generator)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :16]
    return inputs


def forward_call(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[Mark], None]:
    """A forward pass without gradients and without a cache, to be timed."""
    inputs = {k: v.to(model.device) for k, v in inputs.items()}
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def call(mark: Mark) -> None:
        with torch.no_grad():
            model(**inputs, **options)

    return call
