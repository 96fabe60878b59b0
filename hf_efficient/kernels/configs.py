"""Tile sizes, warps and pipeline stages of every kernel, by architecture, element type, head width and cap of the logits.

With Triton 3.9 every row compiles without register spills and within the architecture's shared memory, with a bias and in
half precision with capped logits, which the tests check without a GPU; with Triton 3.6 seven of the sixty kernels spill 8 to
40 bytes, which costs a little time.
The choice depends on nothing else, so that equal calls give equal bits.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One kernel's query rows and keys per tile, warps, and stages of its load pipeline."""

    block_q: int
    block_k: int
    warps: int
    stages: int


class LinearTile(NamedTuple):
    """One kernel's tokens per chunk, features per slice, and warps. Its states are summed over chunks of the same size."""

    chunk: int
    slice: int
    warps: int


class LinearConfig(NamedTuple):
    """The tiles of the kernels of linear attention, and how many features one program adds up over all chunks."""

    forward: LinearTile
    query_gradient: LinearTile
    key_gradient: LinearTile
    scanned: int = 16


class Config(NamedTuple):
    """The tiles of the kernels that read tile tables, and the most tiles of one of their work items."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile
    bias_gradient: Tile
    cap: int = 64


_IEEE_64 = Config(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 16, 4, 1))
_IEEE_128 = Config(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 1))
_TF32_64 = Config(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))
_TF32_128 = Config(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(32, 16, 4, 1))

# (architecture, "half" | "tf32" | "ieee", padded head width up to) -> config; half = bfloat16 and float16
CONFIGS: dict[tuple[str, str, int], Config] = {
    ("sm_90", "half", 64): Config(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    ("sm_90", "half", 128): Config(Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2), Tile(64, 64, 8, 1)),
    ("sm_80", "half", 64): Config(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 1)),
    ("sm_80", "half", 128): Config(Tile(64, 64, 8, 3), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2), Tile(32, 16, 4, 1)),
    ("sm_90", "tf32", 64): _TF32_64,
    ("sm_90", "tf32", 128): _TF32_128,
    ("sm_80", "tf32", 64): _TF32_64,
    ("sm_80", "tf32", 128): _TF32_128,
    ("sm_90", "ieee", 64): _IEEE_64,
    ("sm_90", "ieee", 128): _IEEE_128,
    ("sm_80", "ieee", 64): _IEEE_64,
    ("sm_80", "ieee", 128): _IEEE_128._replace(key_gradient=Tile(16, 32, 4, 2)),
}

# a cap holds one more tile of numbers in registers
_CAPPED = {("sm_80", "half", 64): CONFIGS["sm_80", "half", 64]._replace(key_gradient=Tile(64, 32, 4, 2))}

_FORWARD, _GRADIENT = LinearTile(64, 64, 4), LinearTile(64, 64, 8)
_LINEAR_IEEE = LinearConfig(LinearTile(32, 16, 4), LinearTile(32, 32, 4), LinearTile(16, 32, 4))
_LINEAR_IEEE_128 = LinearConfig(LinearTile(16, 16, 4), LinearTile(16, 16, 4), LinearTile(16, 16, 4))

# (architecture, "tf32" | "ieee", padded width of values up to) -> config of linear attention
LINEAR_CONFIGS: dict[tuple[str, str, int], LinearConfig] = {
    ("sm_90", "tf32", 64): LinearConfig(_FORWARD, _GRADIENT, _GRADIENT),
    ("sm_90", "tf32", 128): LinearConfig(_GRADIENT, LinearTile(64, 32, 8), LinearTile(64, 32, 8)),
    ("sm_80", "tf32", 64): LinearConfig(_FORWARD, _GRADIENT, LinearTile(32, 32, 4)),
    ("sm_80", "tf32", 128): LinearConfig(_GRADIENT, _GRADIENT, LinearTile(32, 16, 8)),
    ("sm_90", "ieee", 64): _LINEAR_IEEE,
    ("sm_90", "ieee", 128): _LINEAR_IEEE_128,
    ("sm_80", "ieee", 64): _LINEAR_IEEE,
    ("sm_80", "ieee", 128): _LINEAR_IEEE_128,
}

# small and unequal tiles and short work items, so that a few hundred tokens pass through every branch
INTERPRETER = Config(Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), Tile(32, 64, 4, 1), Tile(32, 32, 4, 1), cap=2)
LINEAR_INTERPRETER = LinearConfig(LinearTile(64, 64, 4), LinearTile(128, 64, 4), LinearTile(64, 64, 4), scanned=64)


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors: set `TRITON_INTERPRET=1` before Python starts."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def dot_precision(dtype: torch.dtype) -> str:
    """ "half", or for float32 what `torch.backends.cuda.matmul.fp32_precision` allows: "ieee" or "tf32".

    `torch.set_float32_matmul_precision` sets it as well, but its getter raises once somebody has set this one.
    """
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and not interpreting() else "ieee"


def padded_width(width: int) -> int:
    """The power of two, at least 16, that a head's width is padded to inside the kernels."""
    return max(16, 1 << (width - 1).bit_length())


def architecture(device: torch.device) -> str:
    """The named architecture whose configs serve a device; between and after the named ones, that of the older one."""
    # of the newer architectures only 9.0 and 10.x have room for the larger tiles
    return "sm_90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"


def config_for(name: str, precision: str, width: int, is_capped: bool) -> Config:
    """The config of a key of `CONFIGS`, with or without capped logits."""
    key = name, precision, width
    return _CAPPED.get(key, CONFIGS[key]) if is_capped else CONFIGS[key]


def select(device: torch.device, dtype: torch.dtype, width: int, is_capped: bool) -> Config:
    """The config of a call."""
    if device.type == "cpu":
        return INTERPRETER
    return config_for(architecture(device), dot_precision(dtype), 64 if padded_width(width) <= 64 else 128, is_capped)


def linear_precision(dtype: torch.dtype) -> str:
    """How linear attention multiplies values of this type: TensorFloat-32 holds half precision exactly."""
    if interpreting():
        return "ieee"
    return "tf32" if dtype != torch.float32 else dot_precision(dtype)


def select_linear(device: torch.device, dtype: torch.dtype, width: int) -> LinearConfig:
    """The config of a call of linear attention with values of this type and width."""
    if device.type == "cpu":
        return LINEAR_INTERPRETER
    return LINEAR_CONFIGS[architecture(device), linear_precision(dtype), 64 if padded_width(width) <= 64 else 128]
