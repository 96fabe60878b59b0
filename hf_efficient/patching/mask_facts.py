"""What a mask function of transformers says, read from its parts: causal or not, how far it lets a token see, and the rest.

Closures of one factory share their code object, so a part is recognised without names, and its numbers are in its cells.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from transformers import masking_utils

from hf_efficient.ops.graph import is_captured

HIDES = -1e4
"""At most this is added to the logits of keys that a host means to hide, if it makes its masks itself (MarkupLM)."""


class MaskFacts(NamedTuple):
    """Facts of a mask function.

    Attributes:
        is_causal: query i may only see keys j ≤ i.
        left, right: keys that it shows on each side beside the token itself; `None` = all.
        unknown: parts that were not recognised.
    """

    is_causal: bool = False
    left: int | None = None
    right: int | None = None
    unknown: tuple[str, ...] = ()

    @property
    def has_window(self) -> bool:
        return self.left is not None or self.right is not None


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


_BOTH = _code(masking_utils.and_masks(masking_utils.causal_mask_function))
_CAUSAL_WINDOW = _code(masking_utils.sliding_window_overlay(1))
_WINDOW = _code(masking_utils.sliding_window_bidirectional_overlay(1))


def mask_facts(function: Callable[..., Any]) -> MaskFacts:
    """The facts of a mask function of `create_*_mask`, before padding is added to it.

    A causal window of w shows the last w keys, the token itself among them; one to both sides shows |j - i| ≤ w.
    """
    if function is masking_utils.causal_mask_function:
        return MaskFacts(is_causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return MaskFacts()
    kind = _code(function)
    if kind not in (_BOTH, _CAUSAL_WINDOW, _WINDOW) or kind is None:
        return MaskFacts(unknown=(getattr(function, "__qualname__", type(function).__qualname__),))
    cells = inspect.getclosurevars(function).nonlocals
    if kind is _CAUSAL_WINDOW:
        return MaskFacts(left=cells["sliding_window"] - 1)
    if kind is _WINDOW:
        return MaskFacts(left=cells["sliding_window"], right=cells["sliding_window"])
    parts = [mask_facts(part) for part in cells["mask_functions"]]
    return MaskFacts(
        any(part.is_causal for part in parts),
        min((part.left for part in parts if part.left is not None), default=None),
        min((part.right for part in parts if part.right is not None), default=None),
        tuple(name for part in parts for name in part.unknown),
    )


def padding_of(mask: Tensor | None) -> Tensor | None:
    """A mask of keys alone that a host made itself, (B, 1, 1, S) numbers to be added to all logits, as (B, S) bool.

    Any other mask is returned as it is, also one whose numbers do more than hide keys. Asks the device once.
    """
    if mask is None or not mask.is_floating_point() or is_captured():
        return mask
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
        return mask
    keep = mask == 0
    return keep[:, 0, 0] if bool((keep | (mask <= HIDES)).all()) else mask
