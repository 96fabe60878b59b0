"""Checkpoints to efficient attention and back: `convert`, `revert`, `upcycle`, loading and saving."""

from hf_efficient.conversion.calibrate import calibrate
from hf_efficient.conversion.convert import ConversionReport, ConversionResult, convert
from hf_efficient.conversion.loading import load_as_it_is, load_converted, load_stock, load_tokenizer
from hf_efficient.conversion.revert import revert_checkpoint
from hf_efficient.conversion.upcycle import UpcyclingReport, upcycle
from hf_efficient.models.in_place import convert_in_place, revert

__all__ = [
    "ConversionReport",
    "ConversionResult",
    "UpcyclingReport",
    "calibrate",
    "convert",
    "convert_in_place",
    "load_as_it_is",
    "load_converted",
    "load_stock",
    "load_tokenizer",
    "revert",
    "revert_checkpoint",
    "upcycle",
]
