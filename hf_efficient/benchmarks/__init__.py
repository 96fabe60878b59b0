"""Benchmarks: one file per suite, and the baselines they compare with."""
