"""The window that a config gives a layer, by the names that most architectures use."""

from __future__ import annotations

from typing import Any


def config_window(config: Any, module: Any, index: int, is_causal: bool) -> tuple[int, int] | None:
    """(left, right) keys beside the token itself that the host lets a query of a layer see; `None` = all.

    `config.sliding_window` counts the token itself where attention is causal. It holds in the layers that `layer_types` or
    the attention module's `sliding_window` and `is_sliding` name, without these in all.

    Raises:
        ValueError: layers have windows of different sizes.
    """
    try:
        size = getattr(config, "sliding_window", None)
    except Exception as error:  # transformers' own error for what differs from layer to layer
        raise ValueError(f"{config.model_type}: layers have sliding windows of different sizes: {error}") from error
    kinds = getattr(config, "layer_types", None)
    is_full = (
        not getattr(config, "use_sliding_window", True)
        or getattr(module, "sliding_window", size) is None
        or not getattr(module, "is_sliding", True)
        or (kinds is not None and kinds[index] != "sliding_attention")
    )
    if not size or is_full:
        return None
    return (size - 1, 0) if is_causal else (size, size)
