"""Attention by positive feature maps in O(N): both directions at once, or causal in chunks with a running maximum."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 128


def linear_attention(log_query: Tensor, log_key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """Kernel attention from log-features: `y_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)` with `φ = exp(log-features)`.

    Features enter as logarithms so that they can be stabilised exactly: keys are divided by a maximum per feature
    (causal: a running one), queries by a maximum per query; both cancel in the ratio, so neither needs a gradient and
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
        new_maximum = k.detach().amax(dim=-2, keepdim=True)
        if maximum is not None:
            new_maximum = torch.maximum(maximum, new_maximum)
        shift = _finite(new_maximum)
        features_q = _query_features(q, shift)
        features_k = (k - shift).exp()
        numerator = (features_q @ features_k.transpose(-1, -2)).tril() @ v
        if state is not None and maximum is not None:
            # exp(-inf - shift) = 0 drops features that had no key so far
            state = (maximum - shift).exp().transpose(-1, -2) * state
            numerator = numerator + features_q @ state
        outputs.append(numerator)
        if first + CHUNK < n:
            new = features_k.transpose(-1, -2) @ v
            state = new if state is None else state + new
            maximum = new_maximum
    return _normalise(torch.cat(outputs, dim=-2))


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
