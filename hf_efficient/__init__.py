"""hf_efficient: convert pretrained checkpoints to efficient attention, prove how close they stayed, and undo it.

    import hf_efficient as he

    result = he.convert("google-bert/bert-base-uncased", "longformer", attention_window=512, max_positions=4096)
    result.save("longformer-bert-base-4096")

Importing registers one attention implementation and the Efficient model classes with transformers; nothing else.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import models, patching  # noqa: F401  (importing them registers with transformers)
from ._version import __version__

_PUBLIC = {
    "base": (
        "AttentionContext", "AttentionGeometry", "EfficientAttention", "EfficientAttentionConfig", "MechanismFacts",
        "attention_config", "describe", "get_mechanism", "list_mechanisms", "register_mechanism",
    ),
    "calibration": ("calibrate",),
    "conversion": ("ConversionReport", "convert", "revert"),
    "families": ("ModelFamily",),
    "ops.implementation": ("set_implementation",),
    "patching": ("patch_attention",),
    "picture": ("show",),
    "reversible": ("ReversibleSequence",),
    "upcycling": ("UpcyclingReport", "upcycle"),
    "verification": ("FidelityReport", "verify"),
}  # fmt: skip
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_HOME, *models.__all__]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in models.__all__:
        return getattr(models, name)
    if name.endswith(("Attention", "AttentionConfig")):  # he.LongformerAttentionConfig
        from .base import get_mechanism, list_mechanisms

        for mechanism in map(get_mechanism, list_mechanisms()):
            for cls in (mechanism, mechanism.Config):
                if cls.__name__ == name:
                    return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
