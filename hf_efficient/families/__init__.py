"""Model families: one file per architecture, discovered automatically; a relative is one more row in its file."""

from hf_efficient.families.base import ModelFamily
from hf_efficient.families.generic import GenericFamily
from hf_efficient.families.grid import GridPositions
from hf_efficient.families.positions import (
    NoPositions,
    PositionScheme,
    PositionTable,
    RelativePositions,
    TableAfterPadding,
    TableWithOffset,
)
from hf_efficient.families.registry import (
    ORIGINS,
    HostModel,
    families,
    family_of,
    is_family,
    register_family,
)
from hf_efficient.families.rotary import RotaryPositions
from hf_efficient.families.sinusoids import EndlessSinusoids, SinusoidTable
from hf_efficient.families.sound import SOUND
from hf_efficient.families.stack import AttentionLayer, Stack
from hf_efficient.names import PREFIX, efficient_type

__all__ = [
    "ORIGINS",
    "PREFIX",
    "SOUND",
    "AttentionLayer",
    "EndlessSinusoids",
    "GenericFamily",
    "GridPositions",
    "HostModel",
    "ModelFamily",
    "NoPositions",
    "PositionScheme",
    "PositionTable",
    "RelativePositions",
    "RotaryPositions",
    "SinusoidTable",
    "Stack",
    "TableAfterPadding",
    "TableWithOffset",
    "efficient_type",
    "families",
    "family_of",
    "is_family",
    "register_family",
]
