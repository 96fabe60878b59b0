"""PyTorch's fused softmax attention for the CPU, with its log-sum-exp, and the gradient of both.

The kernel never holds its scores. It checks nothing: shapes that do not fit make it read beyond its inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.kernels.common import dense

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# columns by which heads are widened for the gradient of the log-sum-exp: one would do, vector units want whole registers
_WIDER = 16


def forward(query: Tensor, key: Tensor, value: Tensor, logits: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """`softmax(s · q·k + logits) v`, and the log-sum-exp of its logits.

    Args:
        query: (B, H, N, D). key, value: (B, HK, S, D), H a multiple of HK.
        logits: broadcastable to (B, H, N, S), -inf = not visible.

    Returns:
        (B, H, N, D), laid out as (B, N, H, D), and (B, H, N) in fp32 at least. A query that sees nothing gives 0 and 0.
    """
    query, key, value = dense(query), dense(key), dense(value)
    return _FORWARD(query, key, value, 0.0, False, attn_mask=logits, scale=scaling)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    logits: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values. Only some of the keys need be given: `out` and `lse` are the whole softmax's.

    With `P = exp(score - lse)` the scores get `P ∘ (dO·v - δ)`, `δ = dO·O - dlse`. The kernel knows no `dlse`: one more
    column of the heads, 1 in dO and -dlse in O, brings it into δ and into nothing else.

    Args:
        grad_lse: (B, H, N), or `None` = 0.
        lse: finite also where a query saw nothing.
    """
    query, key, value = dense(query), dense(key), dense(value)
    if grad_lse is None:
        return _BACKWARD(grad_out, query, key, value, out, lse, 0.0, False, attn_mask=logits, scale=scaling)
    width = query.shape[-1]
    query, key, value, grad_out, out = (F.pad(x, (0, _WIDER)) for x in (query, key, value, grad_out, out))
    grad_out[..., width], out[..., width] = 1.0, -grad_lse.to(out.dtype)
    grads = _BACKWARD(grad_out, query, key, value, out, lse, 0.0, False, attn_mask=logits, scale=scaling)
    return tuple(x[..., :width] for x in grads)
