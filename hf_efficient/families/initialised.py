"""Which parts of a model have their weights already, in transformers' way of saying so."""

from __future__ import annotations

from torch import nn


def mark_initialised(*roots: nn.Module) -> None:
    """Mark modules that were put into a model, with all inside them, as initialised.

    `post_init` of a model that takes this one as a part draws the weights of every module anew that has no such mark. Marks
    of tensors count where a class initialises parts of its parts; copies of a module keep only its own.
    """
    for root in roots:
        for module in root.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
        for tensor in (*root.parameters(), *root.buffers()):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
