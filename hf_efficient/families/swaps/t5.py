"""T5's attention with a table of biases over offsets in place of dense ones."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from hf_efficient.ops.relative_bias import RelativeBias


def table(attention: Any, device: Any) -> Tensor:
    """(buckets, H) biases, from a call of the embedding that holds them."""
    return attention.relative_attention_bias(torch.arange(attention.relative_attention_num_buckets, device=device))


class _LazyBias:
    """Host attention whose relative bias is a table over offsets instead of a dense (1, H, N, S) tensor."""

    # UMT5 told its decoder layers only in later releases that they are causal
    is_causal = property(lambda self: self.is_decoder)

    def compute_bias(
        self: Any, query_length: int, key_length: int, device: Any = None, *args: Any, **kwargs: Any
    ) -> RelativeBias:
        return RelativeBias(
            partial(table, self, device), self._bucket_of_offsets, self.relative_attention_max_distance
        )

    def _bucket_of_offsets(self: Any, offsets: Any) -> Any:
        return self._relative_position_bucket(
            offsets,
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )


class _NoBias:
    """Host cross-attention without its dense zero bias."""

    # the host builds zeros exactly where it has no table, so claim one and answer with nothing
    has_relative_attention_bias = property(lambda self: True)
    # the host's weight initialisation then fills that table
    relative_attention_bias: Any = SimpleNamespace(weight=torch.empty(0))

    def compute_bias(self, *args: Any, **kwargs: Any) -> None:
        return None


class LazyBiasT5Attention(_LazyBias, T5Attention): ...


class NoBiasT5Attention(_NoBias, T5Attention): ...


class LazyBiasMT5Attention(_LazyBias, MT5Attention): ...


class NoBiasMT5Attention(_NoBias, MT5Attention): ...


class LazyBiasUMT5Attention(_LazyBias, UMT5Attention):
    def _bucket_of_offsets(self, offsets: Any) -> Any:
        return self._relative_position_bucket(offsets)


class NoBiasUMT5Attention(_NoBias, UMT5Attention): ...


SWAPS = {
    T5Attention: (LazyBiasT5Attention, NoBiasT5Attention),
    MT5Attention: (LazyBiasMT5Attention, NoBiasMT5Attention),
    UMT5Attention: (LazyBiasUMT5Attention, NoBiasUMT5Attention),
}
HOSTS = {swapped: host for host, pair in SWAPS.items() for swapped in pair}
