"""Attention by positive feature maps in O(N): both directions at once, or causal in chunks with a running maximum."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 128


def linear_attention(log_query: Tensor, log_key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """Kernel attention from log-features: `y_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)` with `φ = exp(log-features)`.

    Features enter as logarithms so that they can be stabilised exactly: keys are divided by a maximum per feature
    (causal: over past chunks), queries by a maximum per query; all cancel in the ratio, so none needs a gradient and
    no ε is added. An ε would turn trained models, whose features are tiny, into uniform attention.

    Args:
        log_query: (B, H, N, M) fp32 or fp64.
        log_key: (B, H, S, M); -inf in every feature = the key does not exist.
        value: (B, H, S, D).
        is_causal: query n sees keys j ≤ n + S - N.

    Returns:
        (B, H, N, D) in the features' dtype; 0 for a query without keys. O(S · M · D) time, O(S · M) memory; the causal
        form keeps one (M, D + 1) state.

    Source: Katharopoulos et al. 2020 (arXiv 2006.16236) eq. 5 and 9, Choromanski et al. 2021 (arXiv 2009.14794) §2.
    """
    ones = torch.ones(*value.shape[:-1], 1, dtype=log_key.dtype, device=value.device)
    values = torch.cat([value.to(log_key.dtype), ones], dim=-1)  # the last column carries the normaliser
    if not is_causal:
        maximum = _finite(log_key.detach().amax(dim=-2, keepdim=True))
        state = (log_key - maximum).exp().transpose(-1, -2) @ values
        return _normalise(_query_features(log_query, maximum) @ state)
    return _causal(log_query, log_key, values)


def _causal(log_query: Tensor, log_key: Tensor, values: Tensor) -> Tensor:
    n, s = log_query.shape[-2], log_key.shape[-2]
    past = s - n
    state = maximum = None
    if past:  # keys before the first query: one sum
        head, log_key = log_key[..., :past, :], log_key[..., past:, :]
        maximum = head.detach().amax(dim=-2, keepdim=True)
        state = (head - _finite(maximum)).exp().transpose(-1, -2) @ values[..., :past, :]
        values = values[..., past:, :]
    outputs = []
    for first in range(0, n, CHUNK):
        part = slice(first, first + CHUNK)
        q, k, v = log_query[..., part, :], log_key[..., part, :], values[..., part, :]
        running = k.detach().cummax(dim=-2).values  # per query: what it sees, never a later key
        if maximum is not None:
            running = torch.maximum(running, maximum)
        top = _finite((q.detach() + running).amax(dim=-1, keepdim=True))
        numerator = _near(q, k, top).tril() @ v
        if state is not None and maximum is not None:
            # exp(-inf - top) = 0 drops features that had no key so far
            numerator = numerator + (q + maximum - top).exp() @ state
        outputs.append(numerator)
        if first + CHUNK < n:
            new_maximum = running[..., -1:, :]
            shift = _finite(new_maximum)
            new = (k - shift).exp().transpose(-1, -2) @ v
            if state is not None and maximum is not None:
                new = new + (maximum - shift).exp().transpose(-1, -2) * state
            state, maximum = new, new_maximum
    return _normalise(torch.cat(outputs, dim=-2))


def _near(log_query: Tensor, log_key: Tensor, top: Tensor) -> Tensor:
    """(…, N, S) weights `exp(-top_n) Σ_r φ(q_n)_r φ(k_s)_r` of one chunk, each pair scaled by its own two maxima.

    A maximum per feature would be taken over keys that come later too, and a large one among them would push all that a
    query really sees below the smallest number.
    """
    top_query = log_query.detach().amax(dim=-1, keepdim=True)
    top_key = _finite(log_key.detach().amax(dim=-1, keepdim=True))
    products = (log_query - top_query).exp() @ (log_key - top_key).exp().transpose(-1, -2)
    # beyond e^80 only pairs that are not visible, or whose product is 0
    return products * (top_query + top_key.transpose(-1, -2) - top).clamp(max=80.0).exp()


def _finite(maximum: Tensor) -> Tensor:
    """A feature without any key has maximum -inf; any finite shift serves, since its keys are all exp(-inf) = 0."""
    return torch.where(maximum == float("-inf"), 0.0, maximum)


def _query_features(log_query: Tensor, shift: Tensor) -> Tensor:
    total = log_query + shift
    return (total - total.detach().amax(dim=-1, keepdim=True)).exp()


def _normalise(sums: Tensor) -> Tensor:
    denominator = sums[..., -1:]
    empty = denominator == 0
    return torch.where(empty, 0.0, sums[..., :-1] / torch.where(empty, 1.0, denominator))
