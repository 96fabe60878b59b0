"""Kernel attention whose log-features are affine in a vector of each token: two softmax attentions, one after the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.kernels.common import dense
from hf_efficient.ops.backend import require_torch
from hf_efficient.ops.graph import is_tracing
from hf_efficient.ops.linear_attention import BOTH_DIRECTIONS

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# vector units want heads of whole registers
REGISTER = 16


class AffineFeatures(NamedTuple):
    """Log-features `log φ_r(x) = w_r·x + a(x)`.

    Attributes:
        vectors: x, (B, H, N, D).
        directions: w, (B or 1, H or 1, M, D).
        offset: a, (B, H, N); `None` = 0. That of a query cancels wherever its features are all that it has.
    """

    vectors: Tensor
    directions: Tensor
    offset: Tensor | None = None

    def dense(self) -> Tensor:
        """(B, H, N, M) log-features."""
        scores = self.vectors @ self.directions.transpose(-1, -2)
        return scores if self.offset is None else scores + self.offset[..., None]


def has_fused_form(query: Tensor) -> bool:
    """Whether `affine_attention` can take heads of this kind: on the CPU, in PyTorch's own graphs."""
    return query.device.type == "cpu" and not is_tracing()


def affine_attention(query: AffineFeatures, key: AffineFeatures, value: Tensor, token_mask: Tensor | None) -> Tensor:
    """`y_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)` over all keys, without any tensor of tokens × features.

    With `log φ_r(q) = w_r·q + a(q)` and `log φ_r(k) = u_r·k + b(k)` the features attend to the keys, then the queries to the
    features:

        S_r = Σ_j softmax_j(u_r·k_j + b_j) v_j,    L_r = log Σ_j exp(u_r·k_j + b_j)
        y_i = Σ_r softmax_r(w_r·q_i + L_r) S_r

    a(q) cancels. Each is one call of PyTorch's fused attention, and so is the gradient of each.

    Args:
        query: of (B, H, N, D), key: of (B, H, S, D) vectors, fp32 or fp64, on the CPU.
        value: (B, H, S, E), E ≤ D.
        token_mask: (B, S) bool, True = real; `None` = all.

    Returns:
        (B, H, N, E); 0 in a row without keys. O((N + S) · M · D) time, O((N + S + M) · D) memory.

    Raises:
        ValueError: `set_implementation` chose kernels, of which there are none for both directions.

    Source: Choromanski et al. 2021 (arXiv 2009.14794), §2: the same sums in another order.
    """
    require_torch("auto", BOTH_DIRECTIONS)
    shape, width = value.shape[:2], value.shape[-1]
    offset = key.vectors.new_zeros(value.shape[:-1]) if key.offset is None else key.offset
    if token_mask is not None:
        offset = offset.masked_fill(~token_mask[:, None], float("-inf"))
    value = F.pad(value.to(key.vectors.dtype), (0, key.vectors.shape[-1] - width))
    directions = (x.directions.expand(*shape, -1, -1) for x in (query, key))
    vectors = (query.vectors, key.vectors, value)
    out: Tensor = _TwoAttentions.apply(*map(dense, (*vectors, *directions)), offset.contiguous())
    return out[..., :width]


class _TwoAttentions(torch.autograd.Function):
    """Queries to features, features to keys; the fused kernel checks nothing, so all widths must be equal.

    With P the weights of queries and R those of features, `δ_i = dy_i·y_i`:

        dscore_ir = P_ir (dy_i·S_r - δ_i),    dS_r = Σ_i P_ir dy_i,    dL_r = dS_r·S_r - g_r,    g_r = Σ_i P_ir δ_i
        dscore_rj = R_rj (dS_r·v_j - dS_r·S_r + dL_r) = R_rj (dS_r·v_j - g_r)

    One more column of all heads carries the rest: with δ in dy it gives g in dS; with 1 in dS and g in S the kernel takes g
    off; with 1 in u and 0 in k the gradient of k there is that of the offset.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, of_query: Tensor, of_key: Tensor, offset: Tensor
    ) -> Tensor:
        # a mask whose last axis is not dense would be copied for every feature
        means, levels = FLASH(of_key, key, value, attn_mask=offset[:, :, None], scale=1.0)
        levels = levels.contiguous()
        out, lse = FLASH(query, of_query, means, attn_mask=levels[:, :, None], scale=1.0)
        ctx.save_for_backward(query, key, value, of_query, of_key, offset, means, levels, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, of_query, of_key, offset, means, levels, out, lse = ctx.saved_tensors
        width = query.shape[-1]
        # features that no key has: the kernel gives a level of 0
        grads = FLASH_BACKWARD(
            _with_column(grad, (grad * out).sum(-1)), *map(_with_column, (query, of_query, means, out)), lse,
            0.0, False, attn_mask=levels[:, :, None], scale=1.0,
        )  # fmt: skip
        d_query, d_of_query, d_means = grads
        ones, taken_off = torch.ones_like(levels), _with_column(torch.zeros_like(means), d_means[..., width])
        grads = FLASH_BACKWARD(
            _with_column(d_means[..., :width], ones), _with_column(of_key, ones), *map(_with_column, (key, value)),
            taken_off, levels, 0.0, False, attn_mask=offset[:, :, None], scale=1.0,
        )  # fmt: skip
        d_of_key, d_key, d_value = grads
        heads = (x[..., :width] for x in (d_query, d_key, d_value, d_of_query, d_of_key))
        return *heads, d_key[..., width]


def _with_column(x: Tensor, column: Tensor | None = None) -> Tensor:
    """(…, D + 16): the column, or 0, behind the others, then zeros."""
    if column is None:
        return F.pad(x, (0, REGISTER))
    return torch.cat([x, column[..., None], x.new_zeros(()).expand(*x.shape[:-1], REGISTER - 1)], dim=-1)
