"""Attention transfer: mechanisms learn what full attention does in the same model."""
