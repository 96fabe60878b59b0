"""Blockwise attention (BlockBERT): each block of queries sees one block of keys, chosen per head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_efficient.attention.base import AttentionGeometry, EfficientAttentionConfig, MechanismFacts, register_mechanism
from hf_efficient.attention.base.pattern import PatternAttention, PatternAttentionConfig
from hf_efficient.patterns.kinds import BlockList, ShiftedBlock
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.sets import PerHead


@dataclass(frozen=True, kw_only=True)
class CyclicBlocks(BlockList):
    """Query block u sees key block `(u + shift) mod nb`, nb the number of blocks that hold a row's real tokens.

    Attributes:
        shifts: one per head; a single one = for all heads.
    """

    shifts: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        return len(self.shifts)

    def head(self, index: int) -> Pattern:
        return dataclasses.replace(self, shifts=(self.shifts[index if len(self.shifts) > 1 else 0],))

    def at_length(self, length: int) -> Pattern:
        count = max(1, -(-length // self.block_size))
        blocks = [ShiftedBlock(block_size=self.block_size, shift=shift, count=count) for shift in self.shifts]
        return PerHead(parts=tuple(blocks)) if len(blocks) > 1 else blocks[0]

    def columns(self, num_blocks: int, length: Tensor, is_causal: bool) -> Tensor:
        count = (-(-length // self.block_size)).clamp(min=1)[:, None, None]
        shift = torch.tensor(self.shifts, device=length.device)[:, None]
        return ((torch.arange(num_blocks, device=length.device) + shift) % count)[..., None]


@dataclass(frozen=True, kw_only=True)
class BlockwiseAttentionConfig(PatternAttentionConfig):
    """Options of blockwise attention.

    Args:
        block_size: β, tokens per block.
        shifts: distances in blocks between queries and keys, 0 = the own block. Of G entries each serves an equal share of
            the H heads: head h has entry ⌈(h + 1) G / H⌉ - 1. The default gives 10 of 12 heads their own block, and 2 the
            next one.
    """

    mechanism: ClassVar[str] = "blockwise"
    shares: ClassVar[Mapping[str, float]] = {"block_size": 1}

    block_size: int = 256
    shifts: tuple[int, ...] = (0, 0, 0, 0, 0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("block_size")
        self._as_tuples("shifts")
        given = self.shifts if isinstance(self.shifts, tuple) else ()
        fits = bool(given) and all(type(s) is int and s >= 0 for s in given)
        self._require("shifts", fits, "integers ≥ 0, each for an equal share of the heads")

    def head_shifts(self, num_heads: int) -> tuple[int, ...]:
        """The shift of every head."""
        count = len(self.shifts)
        return tuple(self.shifts[-(-(head + 1) * count // num_heads) - 1] for head in range(num_heads))

    def visible_keys(self, geometry: AttentionGeometry) -> Pattern:
        shifts, size = self.head_shifts(geometry.num_heads), self.block_size
        if geometry.is_causal:
            return PerHead(parts=tuple(ShiftedBlock(block_size=size, shift=shift) for shift in shifts))
        return CyclicBlocks(block_size=size, shifts=shifts)


@register_mechanism
class BlockwiseAttention(PatternAttention):
    """Tokens in blocks of β; each head pairs the blocks of queries with blocks of keys.

        y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j   over the keys j of one block

    With u the block of query i and s the shift of the head, i sees j iff j lies in block

        encoder: (u + s) mod nb, nb = number of blocks that hold real tokens of the row
        causal:  u - s where u ≥ s, else u; and j ≤ i

    Blocks count from a row's first real token, so that neither padding nor the rest of the batch matters. Heads with shift 0
    alone would never mix blocks at any depth: such shifts are refused.

    O(N β) time and memory. No new parameters. While decoding, (s + 1) β past keys are needed. Source: Qiu et al. 2019
    (arXiv 1911.02972), §3. Deviations: a fixed block size in place of a fixed number of blocks, without which decoding
    would differ from one forward pass; the family of cyclic permutations; a causal form.
    """

    Config = BlockwiseAttentionConfig
    config: BlockwiseAttentionConfig
    facts = MechanismFacts(
        title="Blockwise attention (BlockBERT)",
        paper="arXiv 1911.02972",
        kind="fixed pattern",
        time="n·β",
        memory="n·β",
        exact_when="block_size ≥ n",
        training="needs training: a head loses all but one block",
    )

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if not any(config.head_shifts(geometry.num_heads)):
            reasons.append(
                f"shifts={config.shifts!r} gives each of the {geometry.num_heads} heads its own block only, so that blocks "
                "never mix: make an entry ≥ 1, the last one of which always has a head; for one block alone use image_local "
                "with memory_size=0"
            )
        return reasons

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return dataclasses.replace(config, block_size=length)
