"""A cache layer that keeps pooled keys in place of old ones."""

from __future__ import annotations

from torch import Tensor

from hf_efficient.cache.recurrent import RecurrentLayer
from hf_efficient.ops.compression import CompressedMemory, compacted, joined
from hf_efficient.ops.padding import real_length


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
