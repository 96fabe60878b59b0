"""Texts, tasks and collators for training."""
