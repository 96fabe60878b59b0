"""BigBird: neighbouring, global and random blocks; global are blocks of the input (ITC) or extra tokens (ETC)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficient.attention.base import (
    AttentionGeometry,
    EfficientAttentionConfig,
    MechanismFacts,
    SourceAttention,
    register_mechanism,
)
from hf_efficient.attention.base.mechanism import GATE, prepend
from hf_efficient.attention.base.pattern import PatternAttention, PatternAttentionConfig
from hf_efficient.ops.context import AttentionContext, ExtraKeys
from hf_efficient.ops.grouped_heads import expand_heads
from hf_efficient.ops.padding import real_length, real_tokens
from hf_efficient.ops.softmax import attend, with_sinks
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.random_blocks import BigBirdBlocks

FORMS = ("itc", "etc")


@dataclass(frozen=True, kw_only=True)
class BigBirdAttentionConfig(PatternAttentionConfig):
    """Options of BigBird attention.

    Args:
        block_size: β, tokens per block.
        num_random_blocks: random key blocks per query block and head.
        form: which tokens are global: those of the first and the last block (`"itc"`), or extra learned ones (`"etc"`, which
            only encoders can have).
        num_global_tokens: extra tokens in front of the input of the whole stack; for `"etc"` only.
        seed: of the random blocks; `None` = 0. `None` without random blocks.
        first_block_weight: how often each key of the first block counts, ≥ 1, for queries between the first and the last
            block. transformers' BigBird takes its first block for every random one when it is not training: 1 + r with
            `num_random_blocks=0` is what it computes. Encoders with `"itc"` only.
    """

    mechanism: ClassVar[str] = "bigbird"
    shares: ClassVar[Mapping[str, float]] = {"block_size": 1 / 8}
    sizes: ClassVar[Mapping[str, str]] = {"num_random_blocks": "block_size"}

    block_size: int = 64
    num_random_blocks: int = 3
    form: str = "itc"
    num_global_tokens: int = 0
    seed: int | None = None
    first_block_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("block_size")
        self._require_at_least(0, "num_random_blocks", "num_global_tokens")
        if self.seed is not None:
            self._require_at_least(0, "seed")
            self._require("seed", self.num_random_blocks > 0, "None with num_random_blocks=0, where nothing is drawn")
        self._require("form", self.form in FORMS, f"one of {', '.join(FORMS)}")
        weight = self.first_block_weight
        fits = isinstance(weight, (int, float)) and not isinstance(weight, bool) and 1.0 <= weight < math.inf
        self._require("first_block_weight", fits, "a finite number ≥ 1")
        if self.form == "etc":
            self._require("first_block_weight", weight == 1.0, "1 with form='etc', which has no global blocks")
        if self.form == "itc":
            self._require(
                "num_global_tokens", self.num_global_tokens == 0, "0 with form='itc', whose blocks are global"
            )

    @classmethod
    def without_effect(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return () if options.get("num_random_blocks", cls.num_random_blocks) else ("seed",)

    def beyond_pattern(self) -> str | None:
        if self.num_global_tokens:
            return f"num_global_tokens={self.num_global_tokens}"
        return None if self.first_block_weight == 1.0 else f"first_block_weight={self.first_block_weight:g}"

    def visible_keys(self, geometry: AttentionGeometry) -> Pattern:
        return BigBirdBlocks(
            block_size=self.block_size,
            num_random_blocks=self.num_random_blocks,
            seed=self.seed or 0,
            layer=geometry.layer,
            heads=geometry.num_heads,
            is_causal=geometry.is_causal,
            has_global_blocks=self.form == "itc",
        )


@register_mechanism
class BigBirdAttention(PatternAttention):
    """Blocks of β tokens; the block of query i is u, that of key j is c, the last real block of the row is e.

        encoder: i sees j iff u ∈ {0, e} or c ∈ {0, u - 1, u, u + 1, e} ∪ R_h(u)
        causal:  i sees j iff j ≤ i and c ∈ {0, u - 1, u} ∪ R_h(u)

    with `first_block_weight` w, e to the power of each logit for c = 0 counts w times where u ∉ {0, e} (encoder)

    with form="etc" the g extra tokens see and are seen by all, and i sees block c iff c ∈ {u - 1, u, u + 1} ∪ R_h(u)

    R_h(u) are the `num_random_blocks` blocks of highest fixed pseudo-random priority (seed, layer, head, u, c) among the
    real blocks that u does not see already (causal: among 1 … u - 2). So they are the same in training and inference and
    depend neither on padding nor on the rest of the batch. Blocks count from a row's first real token.

    Extra tokens enter the softmax of the input's tokens with a learned logit per head, which starts at -5 - log g: the model
    starts close to its blocks alone. In the last layer nothing reads what they see, so it is left out. The host's own window
    binds tokens, not the extra ones.

    O(N β (5 + r)) time and memory; the two global blocks cost O(N β), extra tokens O(N g). New parameters: the extra tokens
    and their logits. Without random blocks the causal form needs 3 β keys while decoding. Source: Zaheer et al. 2020
    (arXiv 2007.14062), §2 and App. D. Deviations: a causal form; random blocks never repeat blocks that are seen anyway; the
    last *real* block is global, where transformers takes the last padded one.
    """

    Config = BigBirdAttentionConfig
    config: BigBirdAttentionConfig
    facts = MechanismFacts(
        title="BigBird",
        paper="arXiv 2007.14062",
        kind="fixed pattern",
        time="n·β·(5 + r)",
        memory="n·β·(5 + r)",
        exact_when="block_size ≥ n / 4 (causal: with num_random_blocks ≥ 1)",
        training="works without training; training restores long range",
    )

    def __init__(self, config: BigBirdAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        if config.num_global_tokens:
            self.global_logits = nn.Parameter(torch.empty(geometry.num_heads))

    @classmethod
    def num_extra_tokens(cls, config: BigBirdAttentionConfig) -> int:
        return config.num_global_tokens

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if geometry.is_causal and config.form == "etc":
            reasons.append(
                "bigbird with form='etc' can't be causal, its extra tokens see the whole input: use form='itc'"
            )
        if geometry.is_causal and config.first_block_weight != 1.0:
            reasons.append(
                f"first_block_weight={config.first_block_weight:g} is what transformers' BigBird does in encoders: leave it "
                "out in a causal model"
            )
        return reasons

    def reset_parameters(self) -> None:
        if self.config.num_global_tokens:
            nn.init.constant_(self.global_logits, GATE - math.log(self.config.num_global_tokens))

    @torch.no_grad()
    def initialise_from(self, source: SourceAttention) -> dict[str, str]:
        return {"global_logits": f"{GATE:g} - log g"} if self.config.num_global_tokens else {}

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return dataclasses.replace(
            config,
            block_size=-(-length // 4),
            num_random_blocks=1,
            form="itc",
            num_global_tokens=0,
            first_block_weight=1.0,
        )

    @classmethod
    def keeps_to_host(cls, config: Any, geometry: AttentionGeometry) -> bool:
        return bool(config.first_block_weight == 1.0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext | None) -> Tensor:
        if context is None:
            return prepend(self.global_tokens, query)
        g, token_mask = self.config.num_global_tokens, context.key_padding_mask
        if not g:
            return self.attend(query, key, value, self._with_first_block(query, key, value, context))
        q, k, v = (x[:, :, g:] for x in (query, key, value))
        bias = self.global_logits[None, :, None, None]
        if context.relative_bias is not None:
            bias = bias + context.relative_bias.at(_offsets(range(g, g + q.shape[2]), range(g), key))[None]
        visible = real_tokens(token_mask, key)[:, :g]
        extra = ExtraKeys(key[:, :, :g], value[:, :, :g], visible[:, None], bias)
        own = None if token_mask is None else token_mask[:, g:]
        out = self.attend(q, k, v, dataclasses.replace(context, key_padding_mask=own, extra=extra))
        return torch.cat([self._global_rows(query[:, :, :g], key, value, context).to(out.dtype), out], dim=2)

    def _with_first_block(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> AttentionContext:
        """Copies of the first block's keys, which count w - 1 times for queries between the first and the last block."""
        weight, size = self.config.first_block_weight, self.config.block_size
        if weight == 1.0:
            return context
        real = real_tokens(context.key_padding_mask, key)
        block = torch.arange(key.shape[2], device=key.device) // size
        is_between = (block > 0) & (block < ((real_length(real) - 1) // size)[:, None])
        first = torch.arange(size, device=key.device)
        at = first.clamp(max=key.shape[2] - 1)  # no slice, which would fix the length of a graph
        first_key, first_value = expand_heads(query, key[:, :, at], value[:, :, at])
        bias = torch.full((1, 1, 1, 1), math.log(weight - 1.0), dtype=query.dtype, device=key.device)
        if context.relative_bias is not None:
            offsets = at - torch.arange(query.shape[2], device=key.device)[:, None]
            bias = bias + context.relative_bias.at(offsets)[None]
        keep = is_between[..., None] & (real[:, at] & (first < key.shape[2]))[:, None]
        return dataclasses.replace(context, extra=ExtraKeys(first_key, first_value, keep, bias))

    def _global_rows(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        """(B, H, g, D): the extra tokens see everything."""
        if self.geometry.layer == self.geometry.num_layers - 1:
            return torch.zeros_like(query)
        logits = torch.zeros(1, 1, 1, key.shape[2], dtype=query.dtype, device=key.device)
        if context.relative_bias is not None:
            every = _offsets(range(query.shape[2]), range(key.shape[2]), key)
            logits = context.relative_bias.at(every)[None].to(query.dtype)
        if context.key_padding_mask is not None:
            logits = torch.where(context.key_padding_mask[:, None, None], logits, float("-inf"))
        return with_sinks(
            *attend(query, key, value, logits, return_lse=context.sinks is not None, **context.options), context.sinks
        )


def _offsets(queries: range, keys: range, like: Tensor) -> Tensor:
    """(N, S) key - query."""
    rows, columns = (torch.arange(x.start, x.stop, device=like.device) for x in (queries, keys))
    return columns - rows[:, None]
