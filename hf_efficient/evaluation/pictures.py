"""Pictures to compare models on: drawn shapes, in the form that a model takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from hf_efficient.corpus import drawn_pictures
from hf_efficient.families.grid import GridPositions
from hf_efficient.families.probe import probe_inputs
from hf_efficient.families.registry import family_of


def picture_batches(model: Any, count: int = 8, batch_size: int = 4) -> list[dict[str, Tensor]]:
    """Drawn shapes as batches of `pixel_values`, of the size of the model's config, with values in -1 … 1.

    Models that take patches in a grid for each picture get noise. What a model would draw at random in each call
    (`noise` of masked pre-training) is part of the batch.
    """
    config, positions = model.config, family_of(model).positions
    size = positions.size(config) if isinstance(positions, GridPositions) else None
    if size is None:
        return [probe_inputs(model, seed=seed) for seed in range(-(-count // batch_size))]
    pictures, _ = drawn_pictures(count, size, getattr(config, "num_channels", 3))
    batches = [{"pixel_values": (part - 0.5) / 0.5} for part in pictures.to(model.dtype).split(batch_size)]
    if "noise" in inspect.signature(model.forward).parameters:
        rows, columns = positions.patches(config, size)  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(0)
        for batch in batches:
            batch["noise"] = torch.rand(len(batch["pixel_values"]), rows * columns, generator=generator)
    return batches
