"""Attention by positive feature maps in O(N): both directions at once, or causal in chunks after a state of past keys."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.backend import require_torch, resolve
from hf_efficient.ops.graph import is_captured
from hf_efficient.ops.softmax import Partial, merge_attention

CHUNK = 64
# chunks that are computed at once; without gradients this bounds what is held
GROUP = 16
# of rows without any entry above -inf it gives 0
_SOFTMAX = torch.ops.aten._safe_softmax.default
BOTH_DIRECTIONS = "linear attention in both directions at once is computed by PyTorch alone"


class FeatureState(NamedTuple):
    """All that later queries need of keys: the softmax attention of every feature to them.

    Attributes:
        means: (B, H, M, D), `Σ_j φ_r(k_j) v_j / Σ_j φ_r(k_j)`, fp32 at least.
        levels: (B, H, M), `log Σ_j φ_r(k_j)`; -inf = no key had feature r.
    """

    means: Tensor
    levels: Tensor


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

    It is two softmax attentions, `S_r = Σ_j φ_r(k_j) v_j / Σ_j φ_r(k_j)` with `L_r = log Σ_j φ_r(k_j)`, and then
    `y_i = Σ_r softmax_r(log φ_r(q_i) + L_r) S_r`, each stabilised exactly, without an ε: that would turn trained models,
    whose features are tiny, into uniform attention. Causal queries see the keys before their chunk so, and those of their
    chunk one by one: features of one query and one key may be as small as e^-100 where they meet, so PyTorch computes these
    pairs in fp64, the kernels those of neighbours one by one. Compiled, PyTorch's causal form is specialised to the number
    of chunks.

    Args:
        log_query: (B, H, N, M) fp32 or fp64.
        log_key: (B, H, S, M); -inf in every feature = the key does not exist.
        value: (B, H, S, D).
        is_causal: query n sees keys j ≤ n + S - N; there may be fewer keys than queries.
        state: of keys before all of these, which every query sees.
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
        require_torch(implementation, BOTH_DIRECTIONS)
        out, lse = read(log_query, absorb(state, log_key, value))
    else:
        log_key, value, state = _one_key_each(log_query.shape[-2], log_key, value, state)
        backend = resolve(implementation, log_query, log_key, value, is_linear=True)
        causal = _causal if backend == "torch" else _by_kernels(backend)
        out, lse = causal(log_query, log_key, value, state)
    return (out, lse) if return_lse else out


def absorb(state: FeatureState | None, log_key: Tensor, value: Tensor) -> FeatureState:
    """The state after keys with log-features (B, H, S, M) and values (B, H, S, D) have joined it."""
    if log_key.shape[-2] == 1 and state is not None and not torch.is_grad_enabled():
        return _joined(state, log_key[..., 0, :], value)
    if log_key.shape[-2] == 1:  # all features have the mean of that key
        means = value.to(log_key.dtype).expand(*log_key.shape[:-2], log_key.shape[-1], -1)
        # features that it lacks have none, whatever its value
        levels = log_key[..., 0, :]
        new: Partial = torch.where(levels[..., None] > float("-inf"), means, 0.0) if state is None else means, levels
    else:
        new = _softmax_mean(log_key.transpose(-1, -2), value)
    return FeatureState(*(new if state is None else merge_attention(state, new)))


def _joined(state: FeatureState, levels: Tensor, value: Tensor) -> FeatureState:
    """The state after one key with log-features (B, H, M) and value (B, H, 1, D), without gradients: `merge_attention`."""
    total = torch.logaddexp(state.levels, levels)
    share = (levels - total.clamp_min(torch.finfo(total.dtype).min)).exp()  # 0 where no key has the feature
    return FeatureState(state.means.lerp(value.to(total.dtype), share[..., None]), total)


def read(log_query: Tensor, state: FeatureState) -> Partial:
    """Output and log-sum-exp of queries with log-features (B, H, N, M) that see the keys in the state."""
    scores = log_query + state.levels.unsqueeze(-2)
    if scores.shape[-2] == 1 and not (torch.is_grad_enabled() or is_captured()):  # fewest operations
        return _SOFTMAX(scores, -1) @ state.means.to(scores.dtype), scores.logsumexp(-1)
    return _softmax_mean(scores, state.means)


def read_mean(log_query: Tensor, state: FeatureState) -> Tensor:
    """The output of `read` alone."""
    if torch.is_grad_enabled() or is_captured():
        return read(log_query, state)[0]
    out: Tensor = _SOFTMAX(log_query + state.levels.unsqueeze(-2), -1) @ state.means.to(log_query.dtype)
    return out


def log_kernel(log_query: Tensor, log_key: Tensor) -> Tensor:
    """(…, N, S) dense `log φ(q_n)·φ(k_s)`, -inf for keys that do not exist; O(N · S)."""
    products, levels = _kernel(log_query, log_key)
    return products.clamp_min(torch.finfo(products.dtype).tiny).log() + levels


def _kernel(log_query: Tensor, log_key: Tensor) -> tuple[Tensor, Tensor]:
    """(…, N, S) products p and constants c with `p e^c = φ(q_n)·φ(k_s)`: each pair is scaled by its own two maxima.

    p falls as far below 1 as the large features of query and key lie apart, and must not reach 0.
    """
    top_query = log_query.detach().amax(dim=-1, keepdim=True)
    top_key = log_key.detach().amax(dim=-1, keepdim=True)
    products = (log_query - top_query).exp() @ (log_key - _finite(top_key)).exp().transpose(-1, -2)
    return products, top_query + top_key.transpose(-1, -2)


def _softmax_mean(scores: Tensor, value: Tensor) -> Partial:
    """Means (…, N, D) of (…, S, D) values by the softmax of (…, N, S) scores, and the log-sum-exp (…, N) of these."""
    top = _finite(scores.detach().amax(dim=-1, keepdim=True))
    return _mean((scores - top).exp(), top, value)


def _mean(weights: Tensor, top: Tensor, value: Tensor) -> Partial:
    """Means of values by weights that were divided by e^top, and the logarithm of their sum; 0 and -inf without weights."""
    total = weights.sum(-1, keepdim=True)
    exists = total > 0
    total = torch.where(exists, total, 1.0)
    lse = torch.where(exists, total.log() + top, float("-inf"))
    return weights @ value.to(weights.dtype) / total, lse.squeeze(-1)


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


def _by_kernels(backend: str) -> Any:
    """Output and log-sum-exp of as many queries as keys, by the Triton kernels."""
    if backend != "triton":
        raise ValueError(
            f"implementation={backend!r} can't take this call: FlexAttention computes softmax attention, not linear "
            "attention; use 'auto', 'torch' or 'triton'."
        )
    from hf_efficient.kernels.linear_attention_op import linear_attention as fused

    def call(log_query: Tensor, log_key: Tensor, value: Tensor, state: FeatureState | None) -> Partial:
        if state is None:
            return fused(log_query, log_key, value)
        # the kernels' form: sums of values and of ones, divided by e^maximum, which takes no gradient
        maximum = state.levels.detach()
        ones = (state.levels - _finite(maximum)).exp()[..., None]
        return fused(log_query, log_key, value, torch.cat([state.means * ones, ones], dim=-1), maximum.unsqueeze(-2))

    return call


def _causal(log_query: Tensor, log_key: Tensor, value: Tensor, state: FeatureState | None) -> Partial:
    """Output and log-sum-exp of as many queries as keys."""
    parts = list(zip(*(x.split(GROUP * CHUNK, dim=-2) for x in (log_query, log_key, value)), strict=True))
    results = []
    for number, (q, k, v) in enumerate(parts, 1):
        out, lse, state = _causal_group(q, k, v, state, is_last=number == len(parts))
        results.append((out, lse))
    outs, sums = zip(*results, strict=True)
    return torch.cat(outs, dim=-2), torch.cat(sums, dim=-1)


def _causal_group(
    log_query: Tensor, log_key: Tensor, value: Tensor, state: FeatureState | None, is_last: bool
) -> tuple[Tensor, Tensor, FeatureState | None]:
    """`_causal`, all chunks at once, and the state after them unless they are the last."""
    n = log_query.shape[-2]
    size = min(CHUNK, n)
    q, k = _in_chunks(log_query, size, 0.0), _in_chunks(log_key, size, float("-inf"))
    v = _in_chunks(value.to(q.dtype), size, 0.0)
    products, levels = _kernel(*(x.to(_widest(x)) for x in (q, k)))
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    # the largest pair that each query sees, never a later key: that could push all it really sees below the smallest number
    top = _finite((products.detach().log() + levels).masked_fill(later, float("-inf")).amax(dim=-1, keepdim=True))
    # where a pair is visible, level - top ≤ -log(product); elsewhere it may be anything
    limit = -math.log(torch.finfo(products.dtype).tiny)
    weights = (products * (levels - top).clamp(max=limit).exp()).tril()
    result = _mean(weights.to(q.dtype), top.to(q.dtype), v)
    before, after = _states(k, v, state, is_last)
    if before is not None:
        result = merge_attention(result, read(q, before))
    out, lse = result
    return out.flatten(-3, -2)[..., :n, :], lse.flatten(-2)[..., :n], after


def _states(
    log_key: Tensor, value: Tensor, state: FeatureState | None, is_last: bool
) -> tuple[FeatureState | None, FeatureState | None]:
    """The state before each chunk of (…, T, C, M) keys, (…, T, M, D) and (…, T, M), `None` = nothing before any; and the
    state after all of them, `None` if they are the last."""
    count = log_key.shape[-3] - int(is_last)
    if count == 0:
        return (None if state is None else FeatureState(*(x.unsqueeze(2) for x in state))), None
    own = absorb(None, log_key[..., :count, :, :], value[..., :count, :, :])
    # taken apart once: the gradient of one slice is as large as the whole
    chunks = [FeatureState(*new) for new in zip(own.means.unbind(-3), own.levels.unbind(-2), strict=True)]
    if state is None:
        state = FeatureState(torch.zeros_like(chunks[0].means), torch.full_like(chunks[0].levels, float("-inf")))
    states = [state]
    for new in chunks:
        states.append(FeatureState(*merge_attention(states[-1], new)))
    last = None if is_last else states.pop()
    return FeatureState(*(torch.stack(parts, dim=2) for parts in zip(*states, strict=True))), last


def _widest(x: Tensor) -> torch.dtype:
    return x.dtype if x.device.type == "mps" else torch.float64  # which has no fp64


def _finite(maximum: Tensor) -> Tensor:
    """Where there is no key the maximum is -inf; any finite shift serves, since all is exp(-inf) = 0 there."""
    return torch.where(maximum == float("-inf"), 0.0, maximum)


def _in_front(x: Tensor, rows: int, fill: float) -> Tensor:
    return torch.cat([x.new_full((*x.shape[:-2], rows, x.shape[-1]), fill), x], dim=-2)


def _in_chunks(x: Tensor, size: int, fill: float) -> Tensor:
    """(…, T, size, D) of (…, N, D), the last chunk filled up."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size), value=fill).unflatten(-2, (-1, size))
