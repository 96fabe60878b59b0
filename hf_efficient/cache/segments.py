"""A cache layer for attention in segments: their keys, and pooled keys in place of older ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_efficient.cache.pooled import CompressedLayer
from hf_efficient.ops.compression import CompressedMemory

_MEMORY_NAMES = ("slots.keys", "slots.values", "slots.there", "slots.tokens", "slots.number")
"""Names of the fields of a `CompressedMemory` in the files of training runs."""


class SegmentLayer(CompressedLayer):
    """Cache layer of attention in segments: the keys of the last segments, and for some mechanisms pooled keys before them.

    It can also be the memory of a training run: `restart` begins new texts in some rows, `rebase` keeps counts small.

    Attributes:
        queries: (B, H, R, D) of the keys that are kept, where a mechanism asked for them; `None` = it did not.
    """

    def _forget(self) -> None:
        super()._forget()
        self.queries: Tensor | None = None

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
        self.positions, self._spares = self.positions.masked_fill(rows[:, None], -1), True
        self.row_start = self.row_start.masked_fill(rows, self.seen)
        if self.state is not None:
            self.state = self.state._replace(token_mask=self.state.token_mask & ~rows[:, None, None, None])

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
        self._change_state(Tensor.detach)

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, to be saved; see `load`."""
        assert self.row_start is not None
        held = {"keys": self.keys, "values": self.values, "positions": self.positions, "queries": self.queries}
        held |= {} if self.state is None else dict(zip(_MEMORY_NAMES, self.state, strict=True))
        counts = torch.tensor([self.seen, self.pruned_at, self._kept])
        return {name: x.contiguous() for name, x in held.items() if x is not None} | {
            "row_start": self.row_start,
            "counts": counts,
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Hold what `tensors` gave."""
        self.lazy_initialization(tensors["keys"], tensors["values"])
        self.keys, self.values, self.row_start = (tensors[name] for name in ("keys", "values", "row_start"))
        self.positions, self.queries = tensors.get("positions"), tensors.get("queries")
        self._spares = self.positions is not None
        self.seen, self.pruned_at, self._kept = tensors["counts"].tolist()
        if _MEMORY_NAMES[0] in tensors:
            self.state = CompressedMemory(*(tensors[name] for name in _MEMORY_NAMES))
