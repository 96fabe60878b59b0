"""The names by which installed attention is known: the registered implementation, the child module, a layer's facts."""

from __future__ import annotations

IMPLEMENTATION = "hf_efficient"
MODULE_NAME = "efficient"
LAYER = "layer"
KEPT = "kept keywords"
