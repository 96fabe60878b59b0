"""Softmax attention over the keys that a pattern allows, at the cost of those keys alone."""
