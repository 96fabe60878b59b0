"""Pooling by attention: a sequence read by learned seeds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_efficient.ops.softmax import masked_attention


class PoolingByMultiheadAttention(nn.Module):
    """k vectors from a sequence, in place of the mean of its tokens: learned seeds attend to all of them (PMA).

        z = softmax_j(seed · W_k x_j / √D) W_v x_j per head,   h = seed + W_o z,   out = h + W_2 relu(W_1 h)

    W_v = W_o = I, the first seed and W_2 are 0 at the start, so that the first vector starts as the mean of the real tokens,
    the embedding that sentence encoders have been trained for, and gradients reach all of it from there on. Further seeds
    are random and small (standard deviation 0.02): equal ones could stay equal for ever.

    Args:
        hidden_size: D · H. num_heads: H. num_seeds: k.

    Raises:
        ValueError: a number below 1, or heads that do not divide the width.

    O(N k) time. Source: Lee et al. 2019 (arXiv 1810.00825), §3.2. Departures: neither layer norms nor a feed-forward layer
    on the tokens, with which it could not start as a mean.
    """

    def __init__(self, hidden_size: int, num_heads: int = 1, num_seeds: int = 1):
        super().__init__()
        for name, value in (("num_heads", num_heads), ("num_seeds", num_seeds)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide hidden_size={hidden_size}.")
        self.num_heads = num_heads
        self.seeds = nn.Parameter(0.02 * torch.randn(num_seeds, hidden_size))
        nn.init.zeros_(self.seeds[:1])
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value, self.output = (nn.Linear(hidden_size, hidden_size) for _ in range(2))
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.expand = nn.Linear(hidden_size, hidden_size)
        for linear in (self.key, self.value, self.output):
            nn.init.eye_(linear.weight)
        nn.init.zeros_(self.expand.weight)
        for linear in (self.value, self.output, self.expand):
            nn.init.zeros_(linear.bias)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, k, hidden_size) of (B, N, hidden_size) tokens with a (B, N) mask, 1 = real; a row without any gives what the
        seeds alone do."""
        batch, _, width = hidden_states.shape
        key, value, seeds = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.key(hidden_states), self.value(hidden_states), self.seeds.expand(batch, -1, -1))
        )
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        read = masked_attention(seeds.to(key.dtype), key, value, attn_mask=mask)
        pooled = self.seeds + self.output(read.transpose(1, 2).reshape(batch, -1, width))
        return pooled + self.expand(F.relu(self.hidden(pooled)))
