"""Fused forms of the operations in `ops`: Triton kernels and FlexAttention. Triton is imported with the first call."""
