"""Synthesizer: attention logits made from positions, or from the query and the key's position, without any key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_efficient.attention.base import (
    AttentionGeometry,
    EfficientAttention,
    EfficientAttentionConfig,
    MechanismFacts,
    register_mechanism,
)
from hf_efficient.attention.base.kernel import normalised
from hf_efficient.attention.base.keys_shown import all_keys
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.synthetic_logits import (
    SLIGHT,
    DenseLogits,
    FactorizedDenseLogits,
    FactorizedRandomLogits,
    RandomLogits,
)

RANK = 8
LOGITS = ("dense", "random", "factorized_dense", "factorized_random")


@dataclass(frozen=True, kw_only=True)
class SynthesizerAttentionConfig(EfficientAttentionConfig):
    """Options of Synthesizer attention.

    Args:
        variant: where the logits come from: `"dense"`, `"random"`, `"factorized_dense"` or `"factorized_random"` alone, or
            `"mixture"`: the host's own logits plus those of one of these.
        mixture_of: which of the four `"mixture"` adds; `None` = `"factorized_random"` there. `None` for all others.
        max_length: L, longest input in tokens; `None` = the model's position table (required where there is none: T5).
        rank: R of the factorised random logits; `None` = 8, or L where that is less. `None` for all others.
        factors: (a, b) of the factorised dense logits, a · b ≥ L; `None` = both about √L. `None` for all others.
    """

    mechanism: ClassVar[str] = "synthesizer"

    variant: str = "mixture"
    mixture_of: str | None = None
    max_length: int | None = None
    rank: int | None = None
    factors: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("variant", self.variant in ("mixture", *LOGITS), f"one of mixture, {', '.join(LOGITS)}")
        if self.mixture_of is not None:
            self._require(
                "mixture_of", self.variant == "mixture", f"None with variant={self.variant!r}, which mixes nothing"
            )
            self._require("mixture_of", self.mixture_of in LOGITS, f"one of {', '.join(LOGITS)}, or None")
        self._require_positive(*(name for name in ("rank", "max_length") if getattr(self, name) is not None))
        fits = self.rank is None or self.logits == "factorized_random"
        self._require("rank", fits, f"None, as {self.logits} logits have none")
        if self.factors is not None:
            pair = tuple(self.factors) if isinstance(self.factors, (list, tuple)) else ()
            positive = all(type(size) is int and size > 0 for size in pair)
            self._require("factors", len(pair) == 2 and positive, "two integers ≥ 1, or None")
            self._require("factors", self.logits == "factorized_dense", f"None, as {self.logits} logits have none")
            object.__setattr__(self, "factors", pair)

    @property
    def logits(self) -> str:
        """Which of the four kinds of logits is learned."""
        return self.variant if self.variant != "mixture" else self.mixture_of or "factorized_random"

    @classmethod
    def without_effect(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        pure = options.get("variant", cls.variant) != "mixture"
        logits = options.get("variant") if pure else options.get("mixture_of") or "factorized_random"
        return ("mixture_of",) * pure + ("rank",) * (logits != "factorized_random")

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        return all_keys(geometry, length)


@register_mechanism
class SynthesizerAttention(EfficientAttention):
    """Softmax attention with learned logits in place of q·k, or beside it.

    With i and j counted from each row's first real token, and all parameters per head:

        dense                f_L(q_i)_j,   f_L(q) = W₂ max(W₁ q + b₁, 0) + b₂,   W₁ (2D, D), W₂ (L, 2D)
        random               R_ij,   R (L, L)
        factorized_dense     f_a(q_i)_(j mod a) · f_b(q_i)_⌊j / a⌋
        factorized_random    Σ_r A_ir B_jr,   A and B (L, R)
        mixture              s · q_i·k_j + γ · one of these
        y_i = Σ_j softmax_j(logit_ij + b(j - i)) v_j     over all real keys, causally those with j ≤ i

    b is the host's relative bias. Start: γ = 0, so that a mixture is the original model; R_ij and (A Bᵀ)_ij fall with the
    distance, hardly so with a relative bias, which knows it already; dense logits are slight, with W₁ = [I, -I], for which
    W₂ = s [k̄_j, -k̄_j] would give s · q_i·k̄_j. Logits and softmax are computed in fp32 at least. A pure form has no use for
    the host's keys, nor the random ones for its queries: those projections get a gradient of 0.

    O(N²) time and memory, as full attention. Source: Tay et al. 2020 (arXiv
    2005.00743), §3. Departures: dense logits read the head's own query, as in tensorflow/mesh, not the layer's input; a
    mixture adds its parts in place of a convex combination, which would change the host's logits from the start.

    Raises:
        ValueError: in a call of more than L tokens, those in the cache included.
    """

    Config = SynthesizerAttentionConfig
    config: SynthesizerAttentionConfig
    facts = MechanismFacts(
        title="Synthesizer",
        paper="arXiv 2005.00743",
        kind="low rank",
        time="n²",
        memory="n²",
        exact_when="variant = mixture, at its start",
        training="none for a mixture, which may learn more; pure forms lose most of the model without it",
    )
    left_aligned = True
    transfer_learning_rate = 1e-2

    def __init__(self, config: SynthesizerAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        max_length = config.max_length or geometry.max_positions
        assert max_length is not None  # unsupported() refuses
        self.max_length = max_length
        self.synthetic = _logits(config, geometry, max_length)
        if config.variant == "mixture":
            self.gamma = nn.Parameter(torch.empty(geometry.num_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.synthetic.reset()
        if self.config.variant == "mixture":
            self.gamma.zero_()

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        origins = {f"synthetic.{name}": self.synthetic.origin for name, _ in self.synthetic.named_parameters()}
        return origins | ({"gamma": "zero"} if self.config.variant == "mixture" else {})

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        length = config.max_length or geometry.max_positions
        if length is None:
            return [*reasons, "this model has no position table to take a length from: give max_length, e.g. 4096"]
        if length < (geometry.max_positions or 0):
            reasons.append(
                f"max_length={length} is below the {geometry.max_positions} positions of the model: give at least that, or "
                "leave it out"
            )
        if config.rank is not None and config.rank > length:
            reasons.append(f"rank={config.rank} exceeds max_length={length}: give a rank of at most {length}")
        if config.logits == "factorized_dense" and config.factors and math.prod(config.factors) < length:
            a, b = config.factors
            reasons.append(
                f"factors={a}, {b} make {a * b} logits, but max_length={length}: give a · b ≥ {length}, or leave them out"
            )
        return reasons

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        longest = max(config.max_length or geometry.max_positions or 0, length)
        return dataclasses.replace(
            config, variant="mixture", mixture_of=config.logits, max_length=longest, factors=None
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        weights = self.attention_weights(query, key, context)
        if context.dropout:
            weights = F.dropout(weights, context.dropout)
        # nothing of what has no part, but a gradient: data-parallel training waits for that of every parameter
        return weights.to(value.dtype) @ value + query[..., :0].sum() + key[..., :0].sum()

    def attention_weights(self, query: Tensor, key: Tensor, context: AttentionContext) -> Tensor:
        n, size = query.shape[2], key.shape[2]
        if size > self.max_length:
            raise ValueError(
                f"synthesizer: input of {size} tokens, but its logits were made for max_length={self.max_length}: shorten "
                "the input, convert with a larger max_length, or with local, longformer or bigbird, which have no limit of "
                "their own."
            )
        # half precision would round the logits before the softmax; so would autocast
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            logits = self._synthetic_logits(query.to(wide), size, context)
            if self.config.variant == "mixture":
                product = context.scaling * (query.to(wide) @ key.to(wide).transpose(-1, -2))
                logits = product + self.gamma.to(wide)[:, None, None] * logits
            if context.relative_bias is not None:
                logits = logits + context.relative_bias.dense(n, size, context.query_offset, query.device).to(wide)
            return normalised(logits, context).expand(len(query), -1, -1, -1)

    def _synthetic_logits(self, query: Tensor, size: int, context: AttentionContext) -> Tensor:
        """(B or 1, H, N, S) logits of queries and keys at their positions in each row."""
        first, n, start = context.query_offset, query.shape[2], context.row_start
        if start is None:
            return self.synthetic(query, slice(first, first + n), size)
        # what lies before a row's start is padding: it may have any position
        rows = (torch.arange(first, first + n, device=query.device) - start[:, None]).clamp(min=0)
        columns = (torch.arange(size, device=query.device) - start[:, None]).clamp(min=0)
        logits = self.synthetic(query, rows, size)
        return logits.gather(-1, columns[:, None, None].expand(*logits.shape[:3], -1))


def _logits(config: SynthesizerAttentionConfig, geometry: AttentionGeometry, length: int) -> Any:
    """A module of `ops.synthetic_logits` for L = `length` positions."""
    heads, width = geometry.num_heads, geometry.head_dim
    if config.logits == "dense":
        return DenseLogits(heads, width, length)
    if config.logits == "factorized_dense":
        block = math.isqrt(length - 1) + 1
        return FactorizedDenseLogits(heads, width, config.factors or (block, -(-length // block)))
    # with no slope at all the factors would get no gradient
    steepest = SLIGHT if geometry.has_relative_bias else 1.0
    slopes = [steepest * 2 ** (-8 * (head + 1) / heads) for head in range(heads)]
    if config.logits == "random":
        return RandomLogits(slopes, length)
    return FactorizedRandomLogits(slopes, length, config.rank or min(RANK, length), geometry.is_causal)
