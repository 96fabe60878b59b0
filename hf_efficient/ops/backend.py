"""Which implementation computes an op: plain PyTorch, our Triton kernels, or FlexAttention."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

import torch
from torch import Tensor

if "torch.utils.flop_counter" in sys.modules:
    importlib.import_module("hf_efficient.kernels.flops")

logger = logging.getLogger(f"transformers.{__name__}")

IMPLEMENTATIONS = ("auto", "torch", "triton", "flex")
_chosen = "auto"
_said: set[str] = set()


def set_implementation(implementation: str) -> None:
    """What `implementation="auto"` means from now on, in this process.

    Args:
        implementation: `"auto"` (kernels on CUDA where they can take a call, else PyTorch), `"torch"`, `"triton"`, `"flex"`.

    Raises:
        ValueError: no such implementation.
    """
    global _chosen
    _chosen = checked(implementation)


def checked(implementation: str) -> str:
    """`implementation`, if there is one of that name."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is not possible; it must be one of {', '.join(IMPLEMENTATIONS)}."
        )
    return implementation


def require_torch(implementation: str, reason: str) -> None:
    """Refuse an explicit implementation where there is none but PyTorch's, for `reason`.

    Raises:
        ValueError: `implementation`, or what `set_implementation` chose, is neither `"auto"` nor `"torch"`.
    """
    wanted = checked(implementation)
    wanted = _chosen if wanted == "auto" else wanted
    if wanted not in ("auto", "torch"):
        raise ValueError(f"implementation={wanted!r} can't take this call: {reason}; use 'auto' or 'torch'.")


def resolve(implementation: str, query: Tensor, key: Tensor, value: Tensor, **facts: Any) -> str:
    """The implementation of one call: an explicit one never falls back, `"auto"` does so for reasons of capability only.

    Raises:
        ValueError: an explicit implementation can't take this call; the message says why and what to change.
    """
    wanted = checked(implementation)
    wanted = _chosen if wanted == "auto" else wanted
    if wanted == "torch" or (wanted == "auto" and query.device.type != "cuda"):
        return "torch"
    from hf_efficient.kernels.block_sparse_op import unsupported

    reason = unsupported(query, key, value, **facts) if wanted != "flex" else None
    if reason is None:
        return "triton" if wanted == "auto" else wanted
    if wanted == "triton":
        raise ValueError(f"implementation='triton' can't take this call: {reason}")
    if not torch.compiler.is_compiling() and reason not in _said:
        _said.add(reason)
        logger.warning(f"fused kernels can't take this call, PyTorch computes it: {reason}")
    return "torch"
