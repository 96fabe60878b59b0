"""A cache layer that keeps pooled keys in place of old ones."""

from __future__ import annotations

from torch import Tensor

from hf_efficient.cache.recurrent import RecurrentLayer
from hf_efficient.ops.compression import CompressedMemory


class CompressedLayer(RecurrentLayer):
    """Cache layer that keeps the keys of the last blocks, and pooled keys of all before them."""

    state: CompressedMemory | None

    def append(self, memory: CompressedMemory, dropped: Tensor, most: int | None = None) -> None:
        """Keep those pooled keys whose tokens the last `update` forgot, and of all in each row the newest `most`.

        Args:
            dropped: (B, G, 1 or c) bool.
        """
        memory = memory._replace(token_mask=memory.token_mask & dropped[:, None])
        if self.state is not None:
            memory = self.state.followed_by(memory)
        exists = memory.token_mask.any(-1).any(1)
        count = int(exists.sum(-1).max())
        self.state = memory.last(exists, count if most is None else min(most, count))
