"""The two names by which installed attention is known: the registered implementation and the child module."""

from __future__ import annotations

IMPLEMENTATION = "hf_efficient"
MODULE_NAME = "efficient"
