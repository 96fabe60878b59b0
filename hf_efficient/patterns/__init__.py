"""Which keys each query may see, as data: ranges, blocks and sets that kernels and pictures read."""
