"""Softmax attention of one dense tile, with its log-sum-exp where asked for, and the exact merge of partial results."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.kernels import cpu_attention
from hf_efficient.ops.graph import is_captured, is_tracing
from hf_efficient.ops.grouped_heads import expand_heads

Partial = tuple[Tensor, Tensor]
Result = tuple[Tensor, Tensor | None]

# elements of the scores that are held at once, where no gradient needs them later: bounds working memory, not results
SCORE_BUDGET = 2**25


def additive_mask(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where kept, -inf elsewhere: attention kernels take this form without another pass over it."""
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, float("-inf"))


def bool_all(mask: Tensor) -> bool:
    """Everything visible; not asked where a graph is made, for which values are unknown."""
    return not is_captured() and mask.device.type == "cpu" and bool(mask.all())


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """`F.scaled_dot_product_attention`, in which a query without any visible key gives 0, in every graph too.

    PyTorch promises that for its own operator alone: other runtimes compute what the formula says, which is 0 / 0. Keys and
    values may have fewer heads, each for as many heads of queries; on the CPU they are not repeated.
    """
    is_grouped = query.dim() == 4 and key.shape[1] != query.shape[1]
    # fast kernels of other devices take either a mask or grouped heads, and other runtimes know no grouped heads
    if is_grouped and (is_tracing() or (attn_mask is not None and query.device.type != "cpu")):
        key, value = expand_heads(query, key, value)
        is_grouped = False
    if attn_mask is not None and is_tracing():
        visible = attn_mask if attn_mask.dtype == torch.bool else attn_mask > float("-inf")
        lowest = torch.finfo(query.dtype).min / 2
        shown = query.new_zeros(()) if attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
        logits = torch.where(visible, shown, lowest)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=logits, **options)
        return torch.where(visible.any(-1, keepdim=True), out, 0.0)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, enable_gqa=is_grouped, **options)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    return_lse: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`out_i = Σ_j softmax_j(s · q_i·k_j + logits_ij) v_j`, and `lse_i = log Σ_j exp(s · q_i·k_j + logits_ij)`.

    Args:
        query: (…, H, N, D); key, value: (…, HK, K, D), H a multiple of HK (grouped heads, which are not repeated). logits:
            additive, broadcastable to (…, H, N, K), -inf = not visible.
        return_lse: also return the log-sum-exp (…, N), in fp32 at least, with its gradient.
        softcap: c, where `s · q_i·k_j` becomes `c · tanh(s · q_i·k_j / c)`.

    Returns:
        (out, lse or `None`); a row that sees nothing gives out 0, lse -inf and gradient 0.
    """
    if not return_lse and softcap is None:
        return masked_attention(query, key, value, attn_mask=logits, dropout_p=dropout, scale=scaling), None
    takes_gradient = logits is not None and logits.requires_grad and torch.is_grad_enabled()
    if (
        query.device.type == "cpu"
        and softcap is None
        and query.dim() == 4
        and not dropout
        and not takes_gradient
        and not is_tracing()
    ):
        return _fused(query, key, value, logits, scaling)
    options: dict[str, Any] = dict(scaling=scaling, dropout=dropout, return_lse=True, softcap=softcap)
    if query[..., 0].numel() * key.shape[-2] > SCORE_BUDGET and max(query.shape[0], query.shape[-2]) > 1:
        return _in_halves(query, key, value, logits, **options)
    wide = torch.promote_types(query.dtype, torch.float32)
    # half precision would round the logits before the softmax, which attention kernels never do; so would autocast
    with torch.autocast(query.device.type, enabled=False):
        scores = _grouped_product(query.to(wide), key.to(wide).transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if logits is not None:
        scores = scores + logits.to(scores.dtype)
    # a row without any visible key must give 0 and gradient 0, not NaN
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top == float("-inf"), 0.0, top)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    visible = total > 0
    total = torch.where(visible, total, 1.0)
    # shares before the product: sums of many values would leave the range of float16
    shares = weights / total
    out = _grouped_product((F.dropout(shares, dropout) if dropout else shares).to(value.dtype), value)
    lse = torch.where(visible, total.log() + top, float("-inf"))
    return out, lse.squeeze(-1)


def _grouped_product(x: Tensor, y: Tensor) -> Tensor:
    """(…, H, N, A) times (…, HK, A, K) as (…, H, N, K): the heads that share one of `y` are further rows for it."""
    if x.dim() < 4 or y.shape[-3] == x.shape[-3]:
        return x @ y
    rows = x.unflatten(-3, (y.shape[-3], -1)).flatten(-3, -2) @ y
    return rows.unflatten(-2, (-1, x.shape[-2])).flatten(-4, -3)


def _in_halves(query: Tensor, key: Tensor, value: Tensor, logits: Tensor | None, **options: Any) -> Partial:
    """`attend` with its log-sum-exp for one half of the batch, or of the queries of a single row, after the other."""
    by_batch = query.shape[0] > 1
    axis = 0 if by_batch else query.dim() - 2
    cut = (query.shape[axis] // 2, query.shape[axis] - query.shape[axis] // 2)
    masks = [logits, logits]
    if logits is not None and logits.dim() >= query.dim() - axis and logits.shape[axis - query.dim()] > 1:
        masks = list(logits.split(cut, axis - query.dim()))
    keys, values = (x.split(cut) if by_batch else (x, x) for x in (key, value))
    done = [
        attend(q, k, v, m, **options) for q, k, v, m in zip(query.split(cut, axis), keys, values, masks, strict=True)
    ]
    return torch.cat([out for out, _ in done], axis), torch.cat([lse for _, lse in done if lse is not None], axis)


def _fused(query: Tensor, key: Tensor, value: Tensor, logits: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """`attend` with its log-sum-exp by PyTorch's attention kernel for the CPU, for logits without a gradient."""
    # the kernel checks nothing, and would read beyond its inputs
    fit = key.shape == value.shape and key.shape[::3] == query.shape[::3] and query.shape[1] % key.shape[1] == 0
    scores = (*query.shape[:3], key.shape[2])
    if not fit or (logits is not None and torch.broadcast_shapes(logits.shape, scores) != scores):
        shapes = [None if x is None else tuple(x.shape) for x in (query, key, value, logits)]
        raise ValueError(f"query, key, value and logits of shapes {shapes} do not fit together.")
    # half precision would round the log-sum-exp's gradient
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (query, key, value))
    logits = None if logits is None else logits.to(wide)
    out, lse = _FlashWithSum.apply(q, k, v, logits, scaling)
    if logits is not None:
        # the kernel gives 0 for a row without any visible key
        lse = torch.where(logits.amax(-1) == float("-inf"), float("-inf"), lse)
    return out.to(value.dtype), lse


class _FlashWithSum(torch.autograd.Function):
    """PyTorch's attention kernel, whose own gradient formula leaves out that of the log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, logits: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out, lse = cpu_attention.forward(query, key, value, logits, scaling)
        ctx.save_for_backward(query, key, value, logits, out, lse)
        ctx.scaling = scaling
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, logits, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads = cpu_attention.backward(grad_out, grad_lse, query, key, value, out, lse, logits, ctx.scaling)
        return *grads, None, None


def merge_attention(*parts: Partial) -> Partial:
    """Exact attention over disjoint sets of keys from the partial results over each.

    With `(o_r, L_r)` the output and the log-sum-exp over the r-th set: `L = log Σ_r exp L_r`, `o = Σ_r exp(L_r - L) o_r`.

    Args:
        parts: (out (…, N, D), lse (…, N)) of each set; sets that show a query nothing have out 0 and lse -inf.

    Returns:
        (out, lse) over the union. Gradients reach the log-sum-exps, without which those of queries and keys are wrong.
    """
    return reduce(_merged, parts)


def _merged(first: Partial, second: Partial) -> Partial:
    (one, a), (other, b) = first, second
    empty = (a == float("-inf")) & (b == float("-inf"))
    a, b = (torch.where(empty, 0.0, x) for x in (a, b))
    out = torch.lerp(one, other, (b - a).sigmoid()[..., None].to(one.dtype))
    return out, torch.where(empty, float("-inf"), torch.logaddexp(a, b))


def with_sinks(out: Tensor, lse: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Softmax attention with one more logit per head in the denominator, which has no value.

    With L the log-sum-exp of a row's logits: `y σ(L - sink)`; a row that sees nothing stays 0.

    Args:
        out: (B, H, N, D). lse: (B, H, N). sinks: (H,); `None` = none, `out` stays.
    """
    if sinks is None:
        return out
    assert lse is not None
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return out * share[..., None].to(out.dtype)
