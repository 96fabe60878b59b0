"""Bucket attention by its definition, as masks of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def defined(labels: Tensor, keep: Tensor, size: int, near: int, is_causal: bool) -> Tensor:
    """(B, H, N, N) bool, each pair by the rule: a list of the real tokens of a label, in order, and ranks within it."""
    batch, count, rounds, n = labels.shape
    seen = torch.zeros(batch, count, n, n, dtype=torch.bool)
    for b in range(batch):
        real = [j for j in range(n) if keep[b, j]]
        for j in real:
            for i in range(n):
                seen[b, :, i, j] = 0 <= i - j < near if is_causal else bool(near) and abs(i - j) <= near // 2
        for h in range(count):
            for r in range(rounds):
                members: dict[int, list[int]] = {}
                for j in real:
                    members.setdefault(int(labels[b, h, r, j]), []).append(j)
                for tokens in members.values():
                    for mine, i in enumerate(tokens):
                        for other, j in enumerate(tokens):
                            fits = 0 <= mine - other < size if is_causal else abs(mine - other) <= size // 2
                            seen[b, h, i, j] |= fits
    return seen


def defined_pairs(queries: Tensor, keys: Tensor, keep: Tensor, size: int, near: int, before: int = 0) -> Tensor:
    """(B, H, N, N) bool: queries and keys listed by (label, position), and cut into a circle of chunks."""
    batch, count, rounds, n = queries.shape
    seen = torch.zeros(batch, count, n, n, dtype=torch.bool)
    for b in range(batch):
        real = [j for j in range(n) if keep[b, j]]
        for j in real:
            for i in range(n):
                seen[b, :, i, j] = bool(near) and abs(i - j) <= near // 2
        for h in range(count):
            for r in range(rounds):
                lists = [sorted(real, key=lambda t, x=x: (int(x[b, h, r, t]), t)) for x in (queries, keys)]
                rows, columns = (
                    [torch.tensor(tokens[i : i + size]) for i in range(0, len(real), size)] for tokens in lists
                )
                for i in range(len(rows)):
                    for back in range(before + 1):
                        seen[b, h, rows[i][:, None], columns[(i - back) % len(rows)]] = True
    return seen
