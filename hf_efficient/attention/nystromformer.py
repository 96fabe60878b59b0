"""Nyströmformer: attention through landmarks, the means of equal segments, and an iterated pseudo-inverse."""

from __future__ import annotations

import dataclasses
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
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.graph import is_tracing
from hf_efficient.ops.padding import real_length, real_tokens
from hf_efficient.ops.pooled_keys import groups_of_rows
from hf_efficient.ops.softmax import additive_mask, masked_attention

PINV_INITS = ("matrix", "batch")


@dataclass(frozen=True, kw_only=True)
class NystromformerAttentionConfig(EfficientAttentionConfig):
    """Options of Nyströmformer attention.

    Args:
        num_landmarks: L, segments of each row; rows of at most L tokens get full attention.
        pinv_iterations: steps of the pseudo-inverse. More of them are more exact and often further from full attention.
            `None` = 6, and with one landmark, whose inverse is 1, only `None`.
        pinv_init: what the start of the pseudo-inverse is scaled by: the largest column sum of the matrix itself
            (`"matrix"`), or of all rows and heads (`"batch"`), as in transformers' class: a row then depends on the rest of
            its batch, so that only imported checkpoints have it.
        conv_kernel_size: odd width, in tokens, of the depth-wise convolution over values that is added; `None` = none.
    """

    mechanism: ClassVar[str] = "nystromformer"
    shares: ClassVar[Mapping[str, float]] = {"num_landmarks": 1}
    sizes: ClassVar[Mapping[str, str]] = {"num_landmarks": ""}

    num_landmarks: int = 64
    pinv_iterations: int | None = None
    pinv_init: str = "matrix"
    conv_kernel_size: int | None = 33

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("num_landmarks")
        if self.pinv_iterations is not None:
            self._require_positive("pinv_iterations")
            self._require("pinv_iterations", self.num_landmarks > 1, "None with num_landmarks=1, whose inverse is 1")
        self._require("pinv_init", self.pinv_init in PINV_INITS, f"one of {', '.join(PINV_INITS)}")
        if self.conv_kernel_size is not None:
            self._require_positive("conv_kernel_size")
            self._require("conv_kernel_size", self.conv_kernel_size % 2 == 1, "an odd integer ≥ 1, or None")

    def import_only(self) -> str | None:
        if self.pinv_init == "matrix":
            return None
        return (
            f"pinv_init={self.pinv_init!r} makes each row depend on the rest of its batch, as in transformers' class: "
            "hf_efficient.import_checkpoint sets it; convert with pinv_init='matrix'."
        )

    @classmethod
    def without_effect(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("pinv_iterations",) if options.get("num_landmarks") == 1 else ()

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        return min(self.num_landmarks, length)


@register_mechanism
class NystromformerAttention(EfficientAttention):
    """The Nyström approximation of the softmax matrix from L landmarks.

    With q̃, k̃ (L, D) the means over L equal segments of a row's real tokens:

        F = softmax(s q k̃ᵀ),  A = softmax(s q̃ k̃ᵀ),  B = softmax(s q̃ kᵀ)
        y = F Z (B v) + conv(v),   Z ≈ A⁺:  Z₀ = Aᵀ / max_c Σ_r A_rc,  Z ← ¼ Z (13 I - A Z (15 I - A Z (7 I - A Z)))

    conv is depth-wise along the sequence, one kernel per head, 0 at the start. Segments are those of each row's own
    tokens, so that neither padding nor other rows matter, and a row of at most L tokens gets full attention. How close the
    rest comes depends on how smooth queries and keys are along the sequence, not on L alone. Z is computed in fp32 at
    least. Attention dropout acts on B.

    O(N L D + L³) time, O(N L) memory. Source: Xiong et al. 2021 (arXiv 2102.03902), §3; transformers' Nyströmformer.
    Departures: the start of Z is scaled per matrix (there by the largest sum of all rows and heads, as here with
    `pinv_init="batch"`), padding is left out of the landmarks, conv starts at 0.
    """

    Config = NystromformerAttentionConfig
    config: NystromformerAttentionConfig
    traceable = True
    facts = MechanismFacts(
        title="Nyströmformer",
        paper="arXiv 2102.03902",
        kind="low rank",
        time="n·l·d + l³",
        memory="n·l",
        exact_when="num_landmarks ≥ n",
        training="needed where queries and keys change fast along the sequence",
    )
    causal_refusal = "landmarks mix the future into every key; use local, longformer, bigbird or performer"
    relative_bias_refusal = (
        "a landmark has no single position to read a bias at; use local, longformer, bigbird or linformer"
    )
    left_aligned = True
    transfer_learning_rate = 1e-2

    def __init__(self, config: NystromformerAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        if config.conv_kernel_size is not None:
            self.convolution = nn.Parameter(torch.empty(geometry.num_heads, config.conv_kernel_size))

    def reset_parameters(self) -> None:
        if self.config.conv_kernel_size is not None:
            nn.init.zeros_(self.convolution)

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        return {} if self.config.conv_kernel_size is None else {"convolution": "zero"}

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        steps = None if length == 1 else config.pinv_iterations
        return dataclasses.replace(config, num_landmarks=length, pinv_iterations=steps)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        n, count, token_mask = key.shape[2], self.config.num_landmarks, context.key_padding_mask
        if is_tracing():  # both forms for every length
            short = self._short(query, key, value, real_tokens(token_mask, key), context)
            is_short = (real_length(real_tokens(token_mask, key)) <= count)[:, None, None, None]
            out = torch.where(is_short, short, self._nystrom(query, key, value, context))
        elif n <= count:
            out = self._full(query, key, value, token_mask, context)
        else:
            out = self._nystrom(query, key, value, context)
            if token_mask is not None:
                q, k, v = (x[:, :, :count] for x in (query, key, value))
                short = F.pad(self._full(q, k, v, token_mask[:, :count], context), (0, 0, 0, n - count))
                out = torch.where((real_length(token_mask) <= count)[:, None, None, None], short, out)
        if self.config.conv_kernel_size is not None:
            out = out + self._convolved(value, token_mask)
        return out

    def _full(
        self, query: Tensor, key: Tensor, value: Tensor, token_mask: Tensor | None, context: AttentionContext
    ) -> Tensor:
        mask = None if token_mask is None else additive_mask(token_mask, query.dtype)[:, None, None]
        return masked_attention(query, key, value, attn_mask=mask, dropout_p=context.dropout, scale=context.scaling)

    def _short(
        self, query: Tensor, key: Tensor, value: Tensor, token_mask: Tensor, context: AttentionContext
    ) -> Tensor:
        """`_full` of rows of at most L tokens, for any number of entries; in longer rows anything."""
        n, first = key.shape[2], torch.arange(self.config.num_landmarks, device=key.device)
        at = first.clamp(max=n - 1)
        q, k, v = (x.index_select(2, at) for x in (query, key, value))
        out = self._full(q, k, v, token_mask.index_select(1, at) & (first < n), context)
        return out.index_select(2, torch.arange(n, device=key.device).clamp(max=self.config.num_landmarks - 1))

    def _nystrom(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            # rows shorter than L are computed in full; with every token its own segment their means are finite
            member = groups_of_rows(real_tokens(context.key_padding_mask, key), self.config.num_landmarks)
            means = (member.to(wide) / member.sum(-1, keepdim=True).clamp(min=1))[:, None]
            q, k = (x.to(wide) for x in (query, key))
            landmarks_q, landmarks_k = means @ q, means @ k
            scaled = context.scaling * landmarks_k.transpose(-1, -2)
            # a landmark whose segment is all holes has no part: its row and column of A are those of the unit matrix
            empty = (means == 0).all(-1)[..., None, :]
            to_landmarks, among = (
                (x @ scaled).masked_fill(empty, torch.finfo(wide).min).softmax(-1) for x in (q, landmarks_q)
            )
            unit = torch.eye(empty.shape[-1], dtype=wide, device=query.device)
            among = torch.where(empty.transpose(-1, -2), unit, among)
            pooled = self._full(landmarks_q, k, value.to(wide), context.key_padding_mask, context)
            out = to_landmarks @ (self._inverse(among) @ pooled)
        return out.to(query.dtype)

    def _inverse(self, matrix: Tensor) -> Tensor:
        return pseudo_inverse(matrix, self.config.pinv_iterations or 6, self.config.pinv_init)

    def _convolved(self, value: Tensor, token_mask: Tensor | None) -> Tensor:
        if token_mask is not None:
            value = value * token_mask[:, None, :, None]
        kernel = self.convolution.to(value.dtype)[:, None, :, None]
        return F.conv2d(value, kernel, padding=(self.convolution.shape[1] // 2, 0), groups=value.shape[1])


def pseudo_inverse(matrix: Tensor, iterations: int, init: str = "matrix") -> Tensor:
    """(…, L, L) approximate pseudo-inverse of row-stochastic matrices; O(iterations · L³).

    Third-order iteration of Razavi et al., started at the transpose over the product of the two operator norms, of which
    that of rows is 1; each matrix by its own, or with `init="batch"` all by the largest.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    norms = matrix.sum(-2, keepdim=True).amax(-1, keepdim=True)
    inverse = matrix.transpose(-1, -2) / (norms.amax() if init == "batch" else norms)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
    return inverse
