"""Slots in place of old keys: what memories of segments and of slots keep while decoding, and the relative bias of slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .ops.alignment import real_length
from .ops.relative_bias import RelativeBias
from .recurrent import RecurrentLayer


class CompressedMemory(NamedTuple):
    """Slots, in order of their tokens.

    Attributes:
        keys, values: (B, H, G, D).
        there: (B, G, c) bool, which of a slot's tokens are real.
        first: (B, G) index of a slot's first token, counted from its row's first real one.
    """

    keys: Tensor
    values: Tensor
    there: Tensor
    first: Tensor


class CompressedLayer(RecurrentLayer):
    """Cache layer that keeps the keys of the last blocks, and of all before them their slots."""

    state: CompressedMemory | None  # type: ignore[assignment]

    def append(self, slots: CompressedMemory, dropped: Tensor) -> None:
        """Keep those `slots` whose tokens the last `update` forgot: (B, G, c) bool `dropped`."""
        there = slots.there & dropped
        count = int(real_length(there.any(-1)).max())
        keys, values = (x.detach()[:, :, :count] for x in slots[:2])
        new = CompressedMemory(keys, values, there[:, :count], slots.first[:, :count])
        self.state = compacted(new if self.state is None else joined(self.state, new))


class MemorySlots(NamedTuple):
    """Slots of a compressed memory, in order.

    Attributes:
        keys, values: (B, H, G, D).
        there: (B, 1 or H, G, c) bool, which of a slot's tokens are real.
        tokens: (B, 1 or H, G, c) index of its tokens, counted from their row's first real one.
        number: (B, G) of the slot in its row.
    """

    keys: Tensor
    values: Tensor
    there: Tensor
    tokens: Tensor
    number: Tensor

    def expanded(self, batch: int) -> MemorySlots:
        """For each of `batch` rows, also where they are the same."""
        return MemorySlots(*(x.expand(batch, *x.shape[1:]) for x in self))

    def last(self, wanted: Tensor, count: int) -> MemorySlots:
        """`count` slots of each row: the last that are (B, G) `wanted`, in order, behind others where these are fewer."""
        order = wanted.int().argsort(dim=1, stable=True)[:, wanted.shape[1] - count :]
        return MemorySlots(*(_chosen(x, order, dim) for x, dim in zip(self, (2, 2, 2, 2, 1), strict=True)))


class SegmentLayer(RecurrentLayer):
    """Cache layer of attention in segments: the keys of the last segments, and where a mechanism has them slots before.

    It can also be the memory of a training run: `restart` begins new texts in some rows, `rebase` keeps counts small.

    Attributes:
        queries: (B, H, R, D) of the keys that are kept, where a mechanism asked for them; `None` = it did not.
    """

    state: MemorySlots | None  # type: ignore[assignment]

    def _forget(self) -> None:
        super()._forget()
        self.queries: Tensor | None = None

    def append(self, slots: MemorySlots, gone: Tensor, most: int) -> None:
        """Keep those `slots` whose tokens the last `update` forgot, and of all in each row the newest `most`.

        Args:
            gone: (B, G) bool.
        """
        kept = slots._replace(there=slots.there & gone[:, None, :, None])
        kept = MemorySlots(*(x.detach() for x in kept))
        if self.state is not None:
            kept = joined_slots(self.state, kept)
        exists = kept.there.any(-1).any(1)
        self.state = kept.last(exists, min(most, int(exists.sum(-1).max())))

    def keep_queries(self, query: Tensor) -> Tensor:
        """Append (B, H, N, D) queries of the last `update`; returns those of all keys that it returned."""
        queries = query.detach() if self.queries is None else torch.cat([self.queries, query.detach()], dim=2)
        assert self.keys is not None
        self.queries = queries[:, :, queries.shape[2] - self.keys.shape[2] :]
        return queries

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.queries is not None and self.keys is not None:
            self.queries = self.queries[:, :, : self.keys.shape[2]]

    def _change_state(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._change_state(change)
        if self.queries is not None:
            self.queries = change(self.queries)

    def restart(self, rows: Tensor) -> None:
        """Forget what is held of (B,) bool `rows`: their next token begins a new text."""
        if not self.seen:
            return
        assert self.keys is not None and self.row_start is not None
        if self.positions is None:
            self.positions = torch.arange(self.seen, device=self.keys.device).expand(self.keys.shape[0], -1)
        self.positions = self.positions.masked_fill(rows[:, None], -1)
        self.row_start = self.row_start.masked_fill(rows, self.seen)
        if self.state is not None:
            self.state = self.state._replace(there=self.state.there & ~rows[:, None, None, None])

    def rebase(self, count: int) -> None:
        """Count from token `count` on, before which no row has any that is held."""
        if self.positions is not None:
            self.positions = torch.where(self.positions < 0, -1, self.positions - count)
        assert self.row_start is not None
        self.row_start = self.row_start - count
        self.seen, self.pruned_at = self.seen - count, max(0, self.pruned_at - count)

    def detach(self) -> None:
        """Cut what is held off from the graph of the call that made it."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.detach(), self.values.detach()

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, to be saved; see `load`."""
        assert self.row_start is not None
        held = {"keys": self.keys, "values": self.values, "positions": self.positions, "queries": self.queries}
        held |= {} if self.state is None else {f"slots.{name}": x for name, x in self.state._asdict().items()}
        counts = torch.tensor([self.seen, self.pruned_at, self._kept])
        return {name: x for name, x in held.items() if x is not None} | {"row_start": self.row_start, "counts": counts}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Hold what `tensors` gave."""
        self.lazy_initialization(tensors["keys"], tensors["values"])
        self.keys, self.values, self.row_start = (tensors[name] for name in ("keys", "values", "row_start"))
        self.positions, self.queries = tensors.get("positions"), tensors.get("queries")
        self.seen, self.pruned_at, self._kept = tensors["counts"].tolist()
        if "slots.keys" in tensors:
            self.state = MemorySlots(*(tensors[f"slots.{name}"] for name in MemorySlots._fields))


def _chosen(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """The entries (B, K) `order` of every row along `dim`."""
    index = order.view(order.shape[0], *(1,) * (dim - 1), -1, *(1,) * (x.dim() - dim - 1))
    return x.gather(dim, index.expand(*x.shape[:dim], -1, *x.shape[dim + 1 :]))


def joined_slots(one: MemorySlots, other: MemorySlots) -> MemorySlots:
    """The slots of both, those of `other` behind."""
    pairs = zip(one, other, (2, 2, 2, 2, 1), strict=True)
    return MemorySlots(*(torch.cat([first, second], dim=dim) for first, second, dim in pairs))


def joined(one: CompressedMemory, other: CompressedMemory) -> CompressedMemory:
    """The slots of both, those of `other` behind."""
    keys, values = (torch.cat(pair, dim=2) for pair in zip(one[:2], other[:2], strict=True))
    return CompressedMemory(keys, values, *(torch.cat(pair, dim=1) for pair in zip(one[2:], other[2:], strict=True)))


def compacted(slots: CompressedMemory) -> CompressedMemory:
    """Without what no row needs: rows that start late have fewer slots, whose places are left empty in front."""
    exists = slots.there.any(-1)
    order = exists.int().argsort(dim=1, stable=True)[:, exists.shape[1] - int(exists.sum(-1).max()) :]
    return CompressedMemory(*(_chosen(x, order, dim) for x, dim in zip(slots, (2, 2, 1, 1), strict=True)))


def slot_bias(bias: RelativeBias, there: Tensor, n: int) -> Tensor:
    """(B or 1, H, N, G) mean bias of the real tokens of slots, at n queries; rows and slots begin at the same token.

    Args:
        there: (B, G, c) bool, which of a slot's tokens are real.

    O(N · G) time and memory, and O(N · c) time for each slot that is real in part.
    """
    count, size = there.shape[1:]
    real = there.sum(-1)
    # of whole slots the mean depends on the offset of the first token alone
    offsets = torch.arange(1 - n, count * size + (1 - n) % size, device=there.device)
    means = bias.at(torch.arange(1 - n, offsets.shape[0] - n + size, device=there.device)).unfold(-1, size, 1).mean(-1)
    # offsets of one remainder by c at a time: there steps of c are steps of 1, and no tensor has N² elements
    steps = means.unflatten(-1, (-1, size)).transpose(-1, -2).unfold(-1, count, 1)
    whole = steps.transpose(1, 2).flatten(1, 2)[:, :n].flip(1)[None]
    in_part = (real > 0) & (real < size)
    most = count if torch.compiler.is_compiling() else int(in_part.sum(-1).max())
    if not most:
        return whole
    slot = in_part.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    shares = _shares(there, bias).gather(1, slot[..., None].expand(-1, -1, size))
    first = slot[:, None] * size - torch.arange(n, device=there.device)[:, None]
    parts = (bias.at(first + r) * shares[:, None, :, r] for r in range(size))
    total = next(parts)
    for part in parts:
        total = total + part
    whole = whole.to(total.dtype).expand(there.shape[0], -1, -1, -1)
    return whole.scatter(-1, slot[:, None, None].expand(-1, *whole.shape[1:3], -1), total.transpose(0, 1))


def _shares(there: Tensor, bias: RelativeBias) -> Tensor:
    """(…, c) one over the real tokens of a slot at each of them, in fp32 at least."""
    kind = torch.promote_types(bias.table.dtype, torch.float32)
    return there.to(kind) / there.sum(-1, keepdim=True).clamp(min=1)


def mean_bias(bias: RelativeBias, slots: CompressedMemory, row: Tensor) -> Tensor:
    """(B, H, N, G) mean bias of the real tokens of each slot at queries (B, N, 1)."""
    size = slots.there.shape[-1]
    token = slots.first[..., None] + torch.arange(size, device=row.device)
    share = _shares(slots.there, bias)
    return (bias.at(token[:, None] - row[..., None]) * share[:, None]).sum(-1).transpose(0, 1)


def mean_slot_bias(bias: RelativeBias, slots: MemorySlots, rows: Tensor) -> Tensor:
    """(B or 1, H, N, G) mean bias of the real tokens of each slot at queries (B or 1, N). O(N · G · c) time and memory."""
    offset = slots.tokens[:, :, None] - rows[:, None, :, None, None]
    share = _shares(slots.there, bias)
    return (bias.per_head(offset, 1) * share[:, :, None]).sum(-1)
