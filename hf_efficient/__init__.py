"""hf_efficient: convert pretrained checkpoints to efficient attention, prove how close they stayed, and undo it.

    import hf_efficient as he

    result = he.convert("google-bert/bert-base-uncased", "longformer", attention_window=512, max_positions=4096)
    result.save("longformer-bert-base-4096")

Importing registers one attention implementation and the types of Efficient configs with transformers; what they need is
imported when one is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from hf_efficient import models  # registers with transformers
from hf_efficient._version import __version__  # noqa: F401

_PUBLIC = {
    "advice.advice": ("Advice",),
    "advice.advise": ("advise",),
    "attention.base.geometry": ("AttentionGeometry",),
    "attention.base.mechanism": ("EfficientAttention", "EfficientAttentionConfig", "MechanismFacts"),
    "attention.base.registry": (
        "attention_config", "describe", "get_mechanism", "list_mechanisms", "register_mechanism",
    ),
    "conversion.calibrate": ("calibrate",),
    "conversion.convert": ("ConversionReport", "convert"),
    "conversion.upcycle": ("UpcyclingReport", "upcycle"),
    "evaluation.positions": ("perplexity_by_position",),
    "evaluation.verify": ("FidelityReport", "verify"),
    "exporting.export": ("export",),
    "exporting.import_checkpoint": ("import_checkpoint",),
    "exporting.report": ("ExportReport",),
    "families": ("ModelFamily", "register_family"),
    "models.in_place": ("revert",),
    "ops.backend": ("set_implementation",),
    "ops.context": ("AttentionContext",),
    "patching.temporary": ("patch_attention",),
    "training.reversible": ("ReversibleSequence",),
    "visualize.show": ("show",),
}  # fmt: skip
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
_MODELS = ("CONFIGS", "MODELS", "EfficientModelMixin")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name == "__all__":
        return ["__version__", *_HOME, *models.__all__]
    if name in _MODELS or (name.startswith("Efficient") and hasattr(models, name)):
        return getattr(models, name)
    if name.endswith(("Attention", "AttentionConfig")):  # he.LongformerAttentionConfig
        from hf_efficient.attention.base.registry import get_mechanism, list_mechanisms

        for mechanism in map(get_mechanism, list_mechanisms()):
            for cls in (mechanism, mechanism.Config):
                if cls.__name__ == name:
                    return cls
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):  # he.patching
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__getattr__("__all__"))
