"""Whether a call is being made into a graph, where the values of tensors are not those that the graph will meet."""

from __future__ import annotations

import torch


def is_captured() -> bool:
    """A graph is being made: by `torch.compile`, `torch.export`, `torch.jit.trace` or `torch.onnx.export`.

    Nothing may be decided by the values of tensors then: a tracer would keep the decision without a word.
    """
    return torch.compiler.is_compiling() or is_tracing()


def is_tracing() -> bool:
    """A graph is being made that other runtimes may run, at other lengths: by all of these but `torch.compile`.

    Nothing in it can look at values and stop, nothing may be kept that belongs to the example's length, and what PyTorch's
    operators promise beyond their formula does not hold there.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
