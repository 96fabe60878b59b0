"""Attention by positive feature maps in O(N): both directions at once, or causal in chunks with a running maximum."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.backend import require_torch, resolve

CHUNK = 64
# chunks that are computed at once; without gradients this bounds what is held
GROUP = 16


class FeatureState(NamedTuple):
    """Sums over keys that are no longer there, from which later queries see them.

    Attributes:
        sums: (B, H, M, D + 1), `Σ_j exp(log φ(k_j) - maximum) [v_j, 1]`, fp32 at least.
        maximum: (B, H, 1, M) per feature; -inf = no key had it.
    """

    sums: Tensor
    maximum: Tensor


def linear_attention(
    log_query: Tensor,
    log_key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    state: FeatureState | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Any:
    """Kernel attention from log-features: `y_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)` with `φ = exp(log-features)`.

    Features enter as logarithms so that they can be stabilised exactly: keys are divided by a maximum per feature
    (causal: over past chunks), queries by a maximum per query; all cancel in the ratio, so none needs a gradient and
    no ε is added. An ε would turn trained models, whose features are tiny, into uniform attention. Features of one query
    and one key may be as small as e^-100 where they meet: PyTorch computes causal pairs of one chunk in fp64, the kernels
    those of neighbours one by one. Compiled, PyTorch's causal form is specialised to the number of chunks.

    Args:
        log_query: (B, H, N, M) fp32 or fp64.
        log_key: (B, H, S, M); -inf in every feature = the key does not exist.
        value: (B, H, S, D).
        is_causal: query n sees keys j ≤ n + S - N; there may be fewer keys than queries.
        state: of keys before all of these, which every query sees; only causal.
        return_lse: also return `log Σ_j φ(q_i)·φ(k_j)`, with its gradient, see `merge_attention`.
        implementation: `"auto"`, `"torch"` or `"triton"`; an explicit one never falls back. Both directions at once are two
            matrix products, which PyTorch computes on every device.

    Returns:
        (B, H, N, D) in the features' dtype, and with `return_lse` (B, H, N); 0 and -inf for a query without keys.
        O(S · M · D) time, O(S · M) memory, the causal form beside that one (M, D + 1) state per chunk of 64 tokens, in
        PyTorch without gradients for 1024 tokens at a time; the kernels keep no state for the backward pass, and have
        chunks of 16 to 64 tokens.

    Raises:
        ValueError: `implementation`, or what `set_implementation` chose, can't take this call; the message says why.

    Source: Katharopoulos et al. 2020 (arXiv 2006.16236) eq. 5 and 9, Choromanski et al. 2021 (arXiv 2009.14794) §2.
    """
    if not is_causal:
        require_torch(implementation, "linear attention in both directions at once is computed by PyTorch alone")
        sums, shift = _both_directions(log_query, log_key, _with_ones(value, log_key.dtype))
    else:
        log_key, value, state = _one_key_each(log_query.shape[-2], log_key, value, state)
        backend = resolve(implementation, log_query, log_key, value, is_linear=True)
        if backend != "torch":
            out, lse = _fused(backend, log_query, log_key, value, state)
            return (out, lse) if return_lse else out
        sums, shift = _causal(log_query, log_key, _with_ones(value, log_key.dtype), state)
    denominator = sums[..., -1]
    exists = denominator > 0
    safe = torch.where(exists, denominator, 1.0)
    out = torch.where(exists[..., None], sums[..., :-1] / safe[..., None], 0.0)
    return (out, torch.where(exists, safe.log() + shift[..., 0], float("-inf"))) if return_lse else out


def absorb(state: FeatureState | None, log_key: Tensor, value: Tensor) -> FeatureState:
    """The state after keys with log-features (B, H, S, M) and values (B, H, S, D) have joined it."""
    values, maximum = _with_ones(value, log_key.dtype), log_key.detach().amax(dim=-2, keepdim=True)
    if state is not None:
        maximum = torch.maximum(maximum, state.maximum)
    shift = _finite(maximum)
    sums = (log_key - shift).exp().transpose(-1, -2) @ values
    if state is not None:
        sums = sums + (state.maximum - shift).exp().transpose(-1, -2) * state.sums
    return FeatureState(sums, maximum)


def _with_ones(value: Tensor, dtype: torch.dtype) -> Tensor:
    """(…, S, D + 1): the last column carries the normaliser."""
    return torch.cat([value.to(dtype), torch.ones(*value.shape[:-1], 1, dtype=dtype, device=value.device)], dim=-1)


def _both_directions(log_query: Tensor, log_key: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    maximum = _finite(log_key.detach().amax(dim=-2, keepdim=True))
    keys = zip(*(x.split(GROUP * CHUNK, dim=-2) for x in (log_key, values)), strict=True)
    state = sum((k - maximum).exp().transpose(-1, -2) @ v for k, v in keys)
    results = []
    for q in log_query.split(GROUP * CHUNK, dim=-2):
        total = q + maximum
        top = total.detach().amax(dim=-1, keepdim=True)
        results.append(((total - top).exp() @ state, top))
    sums, top = (torch.cat(x, dim=-2) for x in zip(*results, strict=True))
    return sums, top


def _one_key_each(
    n: int, log_key: Tensor, value: Tensor, state: FeatureState | None
) -> tuple[Tensor, Tensor, FeatureState | None]:
    """Causal keys and values, one for each of n queries: keys before the first query join the state."""
    past = log_key.shape[-2] - n
    if past < 0:  # the first queries see the state at most
        return _in_front(log_key, -past, float("-inf")), _in_front(value, -past, 0.0), state
    if past:
        state = absorb(state, log_key[..., :past, :], value[..., :past, :])
    return log_key[..., past:, :], value[..., past:, :], state


def _fused(
    backend: str, log_query: Tensor, log_key: Tensor, value: Tensor, state: FeatureState | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of as many queries as keys, by the Triton kernels."""
    if backend != "triton":
        raise ValueError(
            f"implementation={backend!r} can't take this call: FlexAttention computes softmax attention, not linear "
            "attention; use 'auto', 'torch' or 'triton'."
        )
    from hf_efficient.kernels.linear_attention_op import linear_attention as fused

    return fused(log_query, log_key, value, *(state or (None, None)))


def _causal(log_query: Tensor, log_key: Tensor, values: Tensor, state: FeatureState | None) -> tuple[Tensor, Tensor]:
    """Of as many queries as keys: (…, N, D + 1) sums, and the logarithm (…, N, 1) of what they were divided by."""
    parts = list(zip(*(x.split(GROUP * CHUNK, dim=-2) for x in (log_query, log_key, values)), strict=True))
    results = []
    for number, (q, k, v) in enumerate(parts, 1):
        sums, top, state = _causal_group(q, k, v, state, is_last=number == len(parts))
        results.append((sums, top))
    sums, top = (torch.cat(x, dim=-2) for x in zip(*results, strict=True))
    return sums, top


def _causal_group(
    log_query: Tensor, log_key: Tensor, values: Tensor, state: FeatureState | None, is_last: bool
) -> tuple[Tensor, Tensor, FeatureState | None]:
    """`_causal` of as many queries as keys, all chunks at once, and the state after them unless they are the last."""
    n = log_query.shape[-2]
    size = min(CHUNK, n)
    q, k = _in_chunks(log_query, size, 0.0), _in_chunks(log_key, size, float("-inf"))
    v = _in_chunks(values, size, 0.0)
    products, level = kernel(*(x.to(_widest(x)) for x in (q, k)))
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    # the largest pair that each query sees, never a later key: that could push all it really sees below the smallest number
    top = (products.detach().log() + level).masked_fill(later, float("-inf")).amax(dim=-1, keepdim=True)
    before, after = _states(k, v, state, is_last)
    if before is not None:
        top = torch.maximum(top, (q.detach() + before.maximum).amax(dim=-1, keepdim=True))
    top = _finite(top).to(q.dtype)
    # where a pair is visible, level - top ≤ -log(product); elsewhere it may be anything
    limit = -math.log(torch.finfo(products.dtype).tiny)
    sums = (products * (level - top).clamp(max=limit).exp()).tril().to(v.dtype) @ v
    if before is not None:
        # exp(-inf - top) = 0 drops features that had no key so far
        sums = sums + (q + before.maximum - top).exp() @ before.sums
    return sums.flatten(-3, -2)[..., :n, :], top.flatten(-3, -2)[..., :n, :], after


def _states(
    log_key: Tensor, values: Tensor, state: FeatureState | None, is_last: bool
) -> tuple[FeatureState | None, FeatureState | None]:
    """The state before each chunk of (…, T, C, M) keys, (…, T, M, D + 1) and (…, T, 1, M), `None` = nothing before any;
    and the state after all of them, `None` if they are the last."""
    count = log_key.shape[-3] - int(is_last)
    if count == 0:
        return (None if state is None else FeatureState(*(x.unsqueeze(-3) for x in state))), None
    log_key, values = log_key[..., :count, :, :], values[..., :count, :, :]
    maxima = log_key.detach().amax(dim=-2, keepdim=True)
    own = (log_key - _finite(maxima)).exp().transpose(-1, -2) @ values
    if state is None:
        nothing = torch.full_like(maxima[..., 0, :, :], float("-inf"))
        state = FeatureState(torch.zeros_like(own[..., 0, :, :]), nothing)
    states = [state]
    # taken apart once: the gradient of one slice is as large as the whole
    for new, maximum in zip(own.unbind(-3), maxima.unbind(-3), strict=True):
        sums, before = states[-1]
        after = torch.maximum(before, maximum)
        kept, added = ((x - _finite(after)).exp().transpose(-1, -2) for x in (before, maximum))
        states.append(FeatureState(sums * kept + new * added, after))
    last = None if is_last else states.pop()
    return FeatureState(*(torch.stack(parts, dim=-3) for parts in zip(*states, strict=True))), last


def kernel(log_query: Tensor, log_key: Tensor) -> tuple[Tensor, Tensor]:
    """(…, N, S) products p and constants c with `p e^c = φ(q_n)·φ(k_s)`: each pair is scaled by its own two maxima.

    p falls as far below 1 as the large features of query and key lie apart, and must not reach 0.
    """
    top_query = log_query.detach().amax(dim=-1, keepdim=True)
    top_key = _finite(log_key.detach().amax(dim=-1, keepdim=True))
    products = (log_query - top_query).exp() @ (log_key - top_key).exp().transpose(-1, -2)
    return products, top_query + top_key.transpose(-1, -2)


def _widest(x: Tensor) -> torch.dtype:
    return x.dtype if x.device.type == "mps" else torch.float64  # which has no fp64


def _finite(maximum: Tensor) -> Tensor:
    """A feature without any key has maximum -inf; any finite shift serves, since its keys are all exp(-inf) = 0."""
    return torch.where(maximum == float("-inf"), 0.0, maximum)


def _in_front(x: Tensor, rows: int, fill: float) -> Tensor:
    return torch.cat([x.new_full((*x.shape[:-2], rows, x.shape[-1]), fill), x], dim=-2)


def _in_chunks(x: Tensor, size: int, fill: float) -> Tensor:
    """(…, T, size, D) of (…, N, D), the last chunk filled up."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size), value=fill).unflatten(-2, (-1, size))
