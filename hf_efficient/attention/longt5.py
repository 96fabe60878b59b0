"""LongT5: a sliding window plus one transient global key for every block of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_efficient.attention.base import (
    AttentionGeometry,
    EfficientAttention,
    EfficientAttentionConfig,
    MechanismFacts,
    SourceAttention,
    register_mechanism,
)
from hf_efficient.attention.base.keys_shown import window_keys
from hf_efficient.ops.block_sparse.attention import block_sparse_attention
from hf_efficient.ops.context import AttentionContext, ExtraKeys
from hf_efficient.ops.graph import is_tracing
from hf_efficient.ops.grouped_heads import expand_heads
from hf_efficient.ops.padding import real_length, real_tokens
from hf_efficient.ops.relative_bias import RelativeBias, block_bias
from hf_efficient.ops.rotary import Rotation
from hf_efficient.patterns.kinds import Window

POOLING = ("mean", "rms")
RMS_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class LongT5AttentionConfig(EfficientAttentionConfig):
    """Options of LongT5's transient-global attention.

    Args:
        attention_window: w, in tokens, even: w // 2 keys (LongT5's `local_radius`) on each side plus the token itself.
        global_block_size: g, tokens per global key; longer than the input = none, which is LongT5's local attention.
        pooling: how a block becomes a global key: `"mean"` of its real tokens, the closest start from other weights, or
            `"rms"`: their sum brought to root mean square 1, as LongT5 was trained.
        log_count: add to the logit of a global key the logarithm of the number of its tokens outside the query's window, so
            that what a query sees counts every token once. LongT5's own weights were trained without.
    """

    mechanism: ClassVar[str] = "longt5"
    shares: ClassVar[Mapping[str, float]] = {"attention_window": 1}

    attention_window: int = 512
    global_block_size: int = 16
    pooling: str = "mean"
    log_count: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("attention_window", "global_block_size")
        self._require("attention_window", self.attention_window % 2 == 0, "even (half of it lies on each side)")
        self._require("pooling", self.pooling in POOLING, f"one of {', '.join(POOLING)}")
        self._require("log_count", isinstance(self.log_count, bool), "true or false")

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        return window_keys(self.attention_window, geometry, length) + length // self.global_block_size


class _Blocks(NamedTuple):
    """The blocks of each row; B is 1 where all rows are the same.

    Attributes:
        real: (B, n) bool. block: (B, n) the block that holds each token.
        seen: (B, n + 1) real tokens before each position. start, end: (B, G) positions of each block.
        is_last: (B, G) the last block of its row, which also holds what is left over. exists: (B, G).
    """

    real: Tensor
    block: Tensor
    seen: Tensor
    start: Tensor
    end: Tensor
    is_last: Tensor
    exists: Tensor


@register_mechanism
class LongT5Attention(EfficientAttention):
    """Window and all global keys in one softmax; global key t stands for block t of the layer's own input.

    With h the hidden states that enter the layer, W(i) the window of `local`, blocks of g tokens counted from a row's first
    real token (tokens left over join the last full block, a row shorter than g has none), and S_t = Σ h_j over the real
    tokens of block t, c_t their number:

        z_t = w ⊙ S_t / c_t  ("mean")   or   w ⊙ S_t / rms(S_t)  ("rms"),      k̃_t = W_k z_t,  ṽ_t = W_v z_t
        y_i = Σ softmax(s · q_i·k_j + b(j - i),  s · q_i·k̃_t + a(t - block(i)) + log u_it) · (v_j, ṽ_t)    j ∈ W(i), all t

    W_k, W_v are the host's own projections with their biases. w (hidden_size) is learned per layer. a is a table over block
    offsets for hosts with a relative bias, one for the stack and bucketed as the host's; other hosts have none. Hosts with
    rotary positions have k̃_t rotated by the mean position of the tokens of block t. u_it counts the real tokens of block t
    outside W(i); u_it = 0 hides the key from i. Thus every token counts once; what is constant on blocks is exact.

    Start: w = 1; a(o) = the host's mean bias between tokens of blocks at offset o, averaged over each bucket. Exact where
    no global key is left: attention_window ≥ 2n, and with `log_count=False` also global_block_size > n.

    O(N (w + N / g)) time and memory. Source: Guo et al. 2021 (arXiv 2112.07916), §3.1.2; with `pooling="rms",
    log_count=False` it equals transformers' `LongT5TransientGlobalAttention` given its weights. Deviations: the mean and
    the log-count above; blocks count from the first real token, so that padding on the left changes nothing.
    """

    Config = LongT5AttentionConfig
    config: LongT5AttentionConfig
    facts = MechanismFacts(
        title="LongT5 (transient global)",
        paper="arXiv 2112.07916",
        kind="memory",
        time="n·(w + n/g)",
        memory="n·(w + n/g)",
        exact_when="attention_window ≥ 2n and global_block_size > n",
        training="works without training; training improves the pooled keys",
    )
    causal_refusal = "pooled keys have later tokens in them; use local or longformer, or convert only the encoder"
    left_aligned = traceable = True
    needs_hidden_states = True
    needs_project = True

    slot_bias: nn.Parameter | None

    def __init__(self, config: LongT5AttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        self.needs_rotation = geometry.rotary is not None
        self.slot_weight = nn.Parameter(torch.ones(geometry.hidden_size))
        shape = (geometry.num_relative_buckets, geometry.num_heads)
        self.slot_bias = nn.Parameter(torch.zeros(shape)) if geometry.has_relative_bias else None

    def shared_parameters(self) -> tuple[str, ...]:
        return () if self.slot_bias is None else ("slot_bias",)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.slot_weight)
        if self.slot_bias is not None:
            nn.init.zeros_(self.slot_bias)

    @torch.no_grad()
    def initialise_from(self, source: SourceAttention) -> dict[str, str]:
        origins = {"slot_weight": "ones: a slot is the pooled block itself"}
        if self.slot_bias is not None:
            if source.relative_bias is not None:
                self.slot_bias.copy_(block_bias(source.relative_bias, self.config.global_block_size))
            origins["slot_bias"] = "means of the relative bias between tokens of blocks at each offset"
        return origins

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if geometry.rotary is not None and geometry.position_scheme == "grid":
            reasons.append("longt5 can't rotate keys of blocks that lie in a picture's rows and columns: use local")
        return reasons

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return replace(config, attention_window=2 * length, global_block_size=2 * length)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        window = Window(left=self.config.attention_window // 2, right=self.config.attention_window // 2)
        has_blocks = is_tracing() or query.shape[2] >= self.config.global_block_size
        pooled = self._global_keys(query, context) if has_blocks else None
        out = block_sparse_attention(query, key, value, window, replace(context, extra=pooled))
        return out if pooled is not None else self.with_unused_parameters(out)

    def _global_keys(self, query: Tensor, context: AttentionContext) -> ExtraKeys:
        """One key and value per block, with what is added to their logits (B or 1, H or 1, N, G)."""
        assert context.hidden_states is not None and context.project is not None
        blocks = self._blocks(query, context.key_padding_mask)
        size = _before(blocks.seen, blocks.end) - _before(blocks.seen, blocks.start)  # (B, G) real tokens
        key, value = context.project(self._pooled(context.hidden_states, blocks, size))
        if (rotary := self.geometry.rotary) is not None and context.cos_sin is not None:
            middle = blocks.start + blocks.end
            low, high = (x.div(2, rounding_mode="floor").clamp(0, query.shape[2] - 1) for x in (middle - 1, middle))
            key = Rotation(context.cos_sin, rotary.interleaved).between(low, high)(key)
        key, value = expand_heads(query, key, value)
        visible, bias = (blocks.exists & (size > 0))[:, None], None
        if self.config.log_count:
            unseen = self._unseen(blocks, size)
            visible = visible & (unseen > 0)
            bias = unseen.clamp(min=1).to(torch.promote_types(query.dtype, torch.float32)).log()[:, None]
        if self.slot_bias is not None:
            assert context.relative_bias is not None
            table = RelativeBias(self.slot_bias, context.relative_bias.bucket, context.relative_bias.saturation)
            offset = torch.arange(size.shape[1], device=query.device) - blocks.block[..., None]
            side = table.at(offset).transpose(0, 1)  # (B, H, N, G)
            bias = side if bias is None else side + bias
        return ExtraKeys(key, value, visible, bias)

    def _blocks(self, query: Tensor, key_padding_mask: Tensor | None) -> _Blocks:
        n, g = query.shape[2], self.config.global_block_size
        real = real_tokens(key_padding_mask, query)
        length = real_length(real)[:, None]
        count = length // g
        # in a graph two more than fit: where their number could be 0 or 1, it would hold for some lengths alone
        spare = 2 * int(is_tracing())
        block, token = (torch.arange(stop, device=query.device)[None] for stop in (n // g + spare, n))
        is_last = block == count - 1
        seen = F.pad(real.cumsum(-1), (1, 0))
        return _Blocks(
            real=real,
            block=torch.minimum(token // g, count - 1),
            seen=seen,
            start=(block * g).clamp(max=n).expand_as(is_last),
            end=torch.where(is_last, length, (block + 1) * g).clamp(max=n),
            is_last=is_last,
            exists=block < count,
        )

    def _pooled(self, hidden: Tensor, blocks: _Blocks, size: Tensor) -> Tensor:
        """(B, G, hidden_size) pooled blocks of (B, n, hidden_size) states."""
        g, count = self.config.global_block_size, size.shape[1]
        hidden = hidden.masked_fill(~blocks.real[..., None], 0.0)
        at = torch.arange(count + 1, device=hidden.device)[:, None] * g + torch.arange(g, device=hidden.device)
        sums = (hidden[:, at.clamp(max=hidden.shape[1] - 1)] * (at < hidden.shape[1])[..., None]).sum(2)
        # what is left over of a row is all that its next block holds
        total = sums[:, :-1] + sums[:, 1:] * blocks.is_last[..., None]
        if self.config.pooling == "mean":
            pooled = total / size.clamp(min=1)[..., None].to(total.dtype)
        else:
            wide = total.to(torch.promote_types(total.dtype, torch.float32))
            pooled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_EPSILON)
        return (self.slot_weight * pooled).to(hidden.dtype)

    def _unseen(self, blocks: _Blocks, size: Tensor) -> Tensor:
        """(B, N, G) real tokens of each block outside each query's window."""
        reach, n = self.config.attention_window // 2, blocks.real.shape[1]
        token = torch.arange(n, device=size.device)[None]
        low = _before(blocks.seen, (token - reach).clamp(min=0))
        high = _before(blocks.seen, (token + reach + 1).clamp(max=n))
        first, last = _before(blocks.seen, blocks.start), _before(blocks.seen, blocks.end)
        # counts grow with the position, so the overlap of two spans is the overlap of their counts
        overlap = torch.minimum(high[..., None], last[:, None]) - torch.maximum(low[..., None], first[:, None])
        return size[:, None] - overlap.clamp(min=0)


def _before(seen: Tensor, position: Tensor) -> Tensor:
    """Real tokens before `position` (B or 1, K), from the prefix counts (B, n + 1)."""
    return seen.gather(1, position.expand(seen.shape[0], -1))
