"""Floating-point operations of the operators, for `torch.utils.flop_counter`: two for each multiply-add of a visible pair.

Shapes and patterns alone decide: padding, segments and positions that hide keys are not known here. As PyTorch counts its
own fused attention, a forward pass has the products of scores and values, a backward pass those of the scores again and four
of gradients. PyTorch's own fused attention on the CPU, which it does not count, has a formula here as well.

Importing this module registers the formulas. It is done by itself where the counter is imported before a model is converted,
and not else: the counter brings Triton with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry, register_flop_formula

from hf_efficient.kernels import block_sparse_op, cpu_band, linear_attention_op  # noqa: F401  they define the operators
from hf_efficient.patterns.kinds import Window
from hf_efficient.patterns.parse import parse_pattern
from hf_efficient.patterns.tile_table import visible_pairs

FORWARD, BACKWARD = 2, 5


def _products(count: int, query: Any, pairs: float) -> int:
    """Of so many matrix products over `pairs` of each head; `query` is the shape (B, H, N, D)."""
    batch, heads, _, width = query
    return round(2 * count * batch * heads * width * pairs)


def _pairs(*args: Any, **options: Any) -> float:
    with _disable_current_modes():  # tensors without data have no tables
        return visible_pairs(*args, **options)


def _band(count: int, query: Any, key: Any, *rest: Any) -> int:
    extra_key, (left, right, offset) = rest[3], rest[6:9]
    pairs = _pairs(Window(left=int(left), right=int(right)), query[2], key[2], query_offset=int(offset))
    return _products(count, query, pairs + (0 if extra_key is None else query[2] * extra_key[2]))


def _band_attention(query: Any, *rest: Any, **kwargs: Any) -> int:
    return _band(FORWARD, query, *rest)


def _band_attention_backward(*args: Any, **kwargs: Any) -> int:
    return _band(BACKWARD, *args[5:])


def _block_sparse(count: int, query: Any, key: Any, *rest: Any) -> int:
    spec, _, is_causal, offset = rest[7:11]
    pairs = _pairs(parse_pattern(spec), query[2], key[2], query_offset=int(offset), is_causal=is_causal)
    return _products(count, query, pairs)


def _block_sparse_forward(*args: Any, **kwargs: Any) -> int:
    return _block_sparse(FORWARD, *args)


def _block_sparse_backward(*args: Any, **kwargs: Any) -> int:
    return _block_sparse(BACKWARD, *args[5:])


def _linear(count: int, log_query: Any, log_key: Any, value: Any) -> int:
    # values into features over the keys, and out of them over the queries
    batch, heads, n, features = log_query
    return round(count * batch * heads * features * value[3] * (n + log_key[2]))


def _linear_attention_forward(*args: Any, **kwargs: Any) -> int:
    return _linear(FORWARD, *args[:3])


def _linear_attention_backward(*args: Any, **kwargs: Any) -> int:
    return _linear(BACKWARD, *args[4:7])


def _fused(count: int, query: Any, key: Any, is_causal: bool) -> int:
    pairs = sum(min(i + 1, key[2]) for i in range(query[2])) if is_causal else query[2] * key[2]
    return _products(count, query, pairs)


def _fused_cpu(query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, **kwargs: Any) -> int:
    return _fused(FORWARD, query, key, is_causal)


def _fused_cpu_backward(grad: Any, query: Any, key: Any, *rest: Any, **kwargs: Any) -> int:
    return _fused(BACKWARD, query, key, rest[4])


_aten, _own = torch.ops.aten, torch.ops.hf_efficient
for _operator, _formula in (
    (_aten._scaled_dot_product_flash_attention_for_cpu, _fused_cpu),
    (_aten._scaled_dot_product_flash_attention_for_cpu_backward, _fused_cpu_backward),
    (_own.band_attention, _band_attention),
    (_own.band_attention_backward, _band_attention_backward),
    (_own.block_sparse_forward, _block_sparse_forward),
    (_own.block_sparse_backward, _block_sparse_backward),
    (_own.linear_attention_forward, _linear_attention_forward),
    (_own.linear_attention_backward, _linear_attention_backward),
):
    # PyTorch counts its fused attention on GPUs alone; a later version may know that of the CPU as well
    if _operator not in flop_registry:
        register_flop_formula(_operator)(_formula)
