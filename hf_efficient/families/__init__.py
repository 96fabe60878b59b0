"""Model families: one file per architecture, discovered automatically; a relative is one more row in its file."""

from hf_efficient.families.base import ModelFamily
from hf_efficient.families.registry import PREFIX, HostModel, efficient_type, families, family_of
from hf_efficient.families.stack import AttentionLayer, Stack

__all__ = ["PREFIX", "AttentionLayer", "HostModel", "ModelFamily", "Stack", "efficient_type", "families", "family_of"]
