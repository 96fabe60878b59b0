"""The names by which transformers knows what is registered with it."""

from __future__ import annotations

IMPLEMENTATION = "hf_efficient"
"""Of the attention function and the mask function."""
PREFIX = "efficient_"


def efficient_type(model_type: str) -> str:
    """`model_type` of converted checkpoints of a stock architecture."""
    return PREFIX + model_type
