"""Counters of operations: the largest tensor, and floating-point operations."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes: `with LargestTensor() as r: …; r.numel`.

    Views count as what they show, except broadcast ones (stride 0), which take no memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                held = min(leaf.numel(), leaf.untyped_storage().nbytes() // leaf.element_size())
                if held > self.numel:
                    self.numel, self.shape = held, tuple(leaf.shape)
        return out


def flops(function: Any, *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of matrix products and attention in one call."""
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()
