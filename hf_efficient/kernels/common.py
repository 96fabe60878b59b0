"""What the torch operators over the Triton kernels have in common."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from hf_efficient.kernels.configs import interpreting

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_device(device: torch.device) -> str | None:
    """Why no kernel runs on a device, with the remedy; `None` if they do."""
    if importlib.util.find_spec("triton") is None:
        return "the fused kernels need Triton, which is not installed: pip install triton, or implementation='torch'."
    if device.type == "cpu" and not interpreting():
        return "the fused kernels run on CUDA tensors, got cpu ones; use implementation='torch', or move the model."
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.version.hip is not None):
        return f"the fused kernels run on NVIDIA GPUs, got tensors on {device}; use implementation='torch'."
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the fused kernels need compute capability 8.0 or higher; use implementation='torch'."
    return None


def strides(x: Tensor, name: str) -> dict[str, int]:
    return {f"{name}b": x.stride(0), f"{name}h": x.stride(1), name: x.stride(2)}


def token_major(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty tensor like (B, H, N, D) `x`, laid out as (B, N, H, D): merging heads then needs no copy."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width, dtype=dtype or x.dtype).transpose(1, 2)


def dense(x: Tensor) -> Tensor:
    """`x`, or a copy, whose last axis lies in one piece: kernels take its stride for 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def require_interpreter() -> None:
    if not interpreting():
        raise RuntimeError(
            "the fused kernels got CPU tensors, which they take only with TRITON_INTERPRET=1 set before Python starts; "
            "use implementation='torch', or move the model to a GPU."
        )


def refuse_second_derivatives(ctx: Any, *gradients: Tensor | None) -> None:
    # without this PyTorch warns and takes them for 0
    raise RuntimeError("the fused kernels have no second derivatives; use implementation='torch' for them.")
