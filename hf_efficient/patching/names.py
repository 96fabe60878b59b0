"""The names by which installed attention is known: the registered implementation, the child module, a layer's facts."""

from __future__ import annotations

from hf_efficient.names import IMPLEMENTATION

__all__ = ["IMPLEMENTATION", "KEPT", "LAYER", "MODULE_NAME"]

MODULE_NAME = "efficient"
LAYER = "layer"
KEPT = "kept keywords"
