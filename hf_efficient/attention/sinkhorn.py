"""Sinkhorn attention: blocks of queries attend to themselves, the block before, and blocks sorted to them by content."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficient.attention.base import (
    AttentionGeometry,
    EfficientAttention,
    EfficientAttentionConfig,
    MechanismFacts,
    register_mechanism,
)
from hf_efficient.attention.base.keys_shown import all_keys, keys_shown
from hf_efficient.cache.block_queries import BlockStartLayer
from hf_efficient.ops.block_sorting import (
    best_blocks,
    block_means,
    first_tokens,
    log_shares,
    near_and_sorted_attention,
    other_blocks,
    tokens_at,
)
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.decoding import rows_attention
from hf_efficient.ops.padding import real_tokens, shift_rows
from hf_efficient.patterns.kinds import BlockWindow

SORTNETS = ("none", "bilinear")


@dataclass(frozen=True, kw_only=True)
class SinkhornAttentionConfig(EfficientAttentionConfig):
    """Options of Sinkhorn attention.

    Args:
        block_size: b, tokens per block.
        num_sorted_blocks: c, blocks of keys that each block of queries chooses; 0 = it sees its neighbourhood alone.
        sortcut: one choice for all blocks of a row, by the mean of its queries; encoders only.
        iterations: of Sinkhorn's algorithm, which keeps many blocks from choosing the same one; encoders only.
        sortnet: `"none"`, or `"bilinear"` to learn what blocks choose by.
        temperature: τ, scores are divided by it.
        gumbel: noise on the scores of a sortnet while training.
    """

    mechanism: ClassVar[str] = "sinkhorn"
    shares: ClassVar[Mapping[str, float]] = {"block_size": 1 / 4}
    sizes: ClassVar[Mapping[str, str]] = {"num_sorted_blocks": "block_size"}

    block_size: int = 64
    num_sorted_blocks: int = 2
    sortcut: bool = False
    iterations: int = 0
    sortnet: str = "none"
    temperature: float = 1.0
    gumbel: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("block_size")
        self._require_at_least(0, "num_sorted_blocks", "iterations")
        self._require("sortnet", self.sortnet in SORTNETS, f"one of {', '.join(SORTNETS)}")
        self._require("sortcut", type(self.sortcut) is bool, "true or false")
        self._require(
            "iterations", not (self.sortcut and self.iterations), "0 with sortcut, which has one choice only"
        )
        value = self.temperature
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
        is_learned = self.sortnet != "none"
        # alone it changes no order
        fits = fits and (value == 1 or is_learned or self.iterations > 0)
        self._require("temperature", fits, "a number > 0, and 1 with neither iterations nor a sortnet")
        fits = type(self.gumbel) is bool and (is_learned or not self.gumbel)
        self._require("gumbel", fits, "true or false, and false with sortnet='none'")
        fits = self.num_sorted_blocks > 0 or not (is_learned or self.sortcut or self.iterations)
        self._require(
            "num_sorted_blocks", fits, "an integer ≥ 1 with sortnet, sortcut or iterations, which choose them"
        )

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        size, count = self.block_size, -(-length // self.block_size)
        keys = keys_shown(BlockWindow(block_size=size, before=size), geometry, length)
        for block in range(count):
            others = max(0, block - 1) if geometry.is_causal else count - 1 - (block > 0)
            keys += min(size, length - block * size) * min(self.num_sorted_blocks, others) * size / length
        return min(keys, all_keys(geometry, length))


@register_mechanism
class SinkhornAttention(EfficientAttention):
    """A query in block t sees blocks t, t - 1 and the c other ones that its block chooses, in one softmax.

        R_tu = s q̄_t·W k̄_u / τ,   q̄, k̄ means of a block's real tokens; causal: q̄_t is the first query of block t
        log S = R, then `iterations` times  log S -= LSE_t log S,  log S -= LSE_u log S;  without: log softmax_u R
        block t chooses the c blocks u of largest S_tu,   u not in {t, t - 1},   causal: u < t - 1

    Every key is seen once, at its own position, with a relative bias b(j - i); b has no part in the choice. W = I per head;
    `sortnet="bilinear"` learns it: the chosen keys' weights are multiplied by S_tu / stop(S_tu) = 1, which changes no output
    but brings W the gradient of a factor on what was chosen. q̄ and k̄ are constants there: queries and keys get the
    gradients of attention to what is chosen. With `gumbel` s q̄·W k̄ + g is divided by τ while training, g = -log(-log u) of
    uniform u from the default generator, as in dropout. `sortcut`: q̄ is the mean of all queries of the row. Blocks count
    from a row's first real token. Causal rows are never balanced, as sums over t would tell the past of the future; a block
    chooses when its first query comes, so that decoding chooses likewise.

    O(N (c + 2) b D + (N / b)² D) time, O(N (c + 2) b + (N / b)²) memory; a causal cache keeps all keys and N / b queries; D²
    parameters per head if they are learned. Source: Tay et al. 2020 (arXiv 2002.11296), §3; causal choice by rows alone.
    Departures: whole blocks are chosen, where the paper mixes all of them by S into one, key by key at equal offsets, which
    pretrained weights have no use for; scores of projected queries and keys in place of a feed-forward layer on the input,
    which fixes the number of blocks; the block before is always seen; SortCut takes the blocks that suit all queries best.
    """

    Config = SinkhornAttentionConfig
    config: SinkhornAttentionConfig
    facts = MechanismFacts(
        title="Sparse Sinkhorn attention",
        paper="arXiv 2002.11296",
        kind="learnable pattern",
        time="n·b·(c + 2)·d + (n / b)²·d",
        memory="n·b·(c + 2) + (n / b)²",
        exact_when="block_size ≥ n or num_sorted_blocks ≥ n / b - 1",
        training="works without training; training restores what was not chosen",
    )
    left_aligned = True
    transfer_learning_rate = 1e-2

    def __init__(self, config: SinkhornAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        if config.sortnet == "bilinear":
            self.sort_weight = nn.Parameter(torch.empty(geometry.num_heads, geometry.head_dim, geometry.head_dim))

    def reset_parameters(self) -> None:
        if self.config.sortnet == "bilinear":
            with torch.no_grad():
                self.sort_weight.copy_(torch.eye(self.geometry.head_dim, device=self.sort_weight.device))

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        return {"sort_weight": "unit matrix: scores of mean queries and keys"} if self.config.sortnet != "none" else {}

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        for name, reads in (("sortcut", "the mean of all queries"), ("iterations", "the sum over later blocks")):
            if geometry.is_causal and getattr(config, name):
                value = getattr(config, name)
                reasons.append(f"sinkhorn: {name}={value} reads {reads}, so it can't be causal: leave {name} out")
        return reasons

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return dataclasses.replace(config, block_size=length)

    @classmethod
    def control_config(cls, config: Any) -> EfficientAttentionConfig | None:
        """The neighbourhood alone."""
        if not config.num_sorted_blocks:
            return None
        return cls.Config(block_size=config.block_size, num_sorted_blocks=0, layers=config.layers, side=config.side)

    def cache_layer(self) -> BlockStartLayer | None:
        return BlockStartLayer() if self.geometry.is_causal else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        n, token_mask = query.shape[2], real_tokens(context.key_padding_mask, key).expand(key.shape[0], -1)
        if n < key.shape[2]:
            return self._decode(query, key, value, token_mask, context)
        # a row within one block needs none of the block's empty entries
        size = min(self.config.block_size, n)
        descriptors = self._descriptors(query, token_mask, size, context)
        targets = torch.arange(descriptors.shape[2], device=key.device)
        exists = first_tokens(token_mask, size)[1]
        eligible = other_blocks(targets, len(targets), context.is_causal) & exists[:, None] & exists[..., None]
        shares = self._shares(descriptors, block_means(key.detach(), token_mask, size), eligible[:, None], context)
        chosen = best_blocks(shares, self.config.num_sorted_blocks)
        # the same in a first pass without gradients, whose recomputation draws dropout likewise
        is_learned = self.config.sortnet != "none" and (self.training or torch.is_grad_enabled())
        return near_and_sorted_attention(
            query,
            key,
            value,
            chosen,
            shares.gather(-1, chosen.clamp(min=0)) if is_learned else None,
            context,
            block_size=size,
        )

    def _descriptors(self, query: Tensor, token_mask: Tensor, size: int, context: AttentionContext) -> Tensor:
        """(B, H, U, D) what blocks choose by."""
        query = query.detach()
        if not context.is_causal:
            means = block_means(query, token_mask, size)
            return block_means(query, token_mask, query.shape[2]).expand_as(means) if self.config.sortcut else means
        first = first_tokens(token_mask, size)[0]
        if isinstance(context.recurrent, BlockStartLayer):
            return context.recurrent.append(query, first, 0)
        return tokens_at(query, first)

    def _shares(self, descriptors: Tensor, means: Tensor, eligible: Tensor, context: AttentionContext) -> Tensor:
        """(B, H, T, U) logarithms of S from (B, H, T, D) and (B, H, U, D), in fp32 at least."""
        with torch.autocast(means.device.type, enabled=False):
            descriptors = descriptors.to(means.dtype)
            if self.config.sortnet == "bilinear":
                descriptors = descriptors @ self.sort_weight.to(means.dtype)
            scores = context.scaling * descriptors @ means.transpose(-1, -2)
            if self.config.gumbel and self.training:
                scores = scores - torch.empty_like(scores).exponential_().log()
            return log_shares(scores / self.config.temperature, eligible, self.config.iterations)

    def _decode(
        self, query: Tensor, key: Tensor, value: Tensor, token_mask: Tensor, context: AttentionContext
    ) -> Tensor:
        """New queries against all keys so far, of which each sees those of its block's choice."""
        layer, size = context.recurrent, self.config.block_size
        if not isinstance(layer, BlockStartLayer) or layer.state is None:
            raise ValueError(
                "sinkhorn: the cache lacks the queries that choose blocks, as it was not filled by this mechanism or filled "
                "under torch.compile: give past_key_values=None with the first call, or use_cache=False; "
                "prefix tuning fills a cache by itself: use LoRA or prompt tuning instead."
            )
        start = key.new_zeros(key.shape[0], dtype=torch.long) if context.row_start is None else context.row_start
        shifted = shift_rows(token_mask, start, 1)
        first, exists = first_tokens(shifted, size)
        queries = layer.append(query, first + start[:, None], context.query_offset)
        means = block_means(shift_rows(key.detach(), start, 2), shifted, size)
        count = means.shape[2]

        def visible(rows: Tensor, keys: Tensor) -> Tensor:
            target = (rows[..., 0].clamp(min=0) // size).expand(key.shape[0], -1)
            eligible = other_blocks(target, count, True) & exists[:, None]
            shares = self._shares(tokens_at(queries, target), means, eligible[:, None], context)
            chosen = best_blocks(shares, self.config.num_sorted_blocks)
            near = torch.stack([target, target - 1], dim=-1)[:, None].expand(-1, chosen.shape[1], -1, -1)
            # -1 falls into a spare column
            listed = torch.cat([near, chosen], dim=-1) % (count + 1)
            seen = listed.new_zeros(*listed.shape[:3], count + 1, dtype=torch.bool).scatter(-1, listed, True)
            block = (keys.clamp(min=0) // size)[:, None]
            return seen.gather(-1, block.expand(*seen.shape[:3], -1))

        call = dataclasses.replace(context, row_start=start)
        return rows_attention(query, key, value, visible, call)[0]
