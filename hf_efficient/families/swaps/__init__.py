"""Subclasses of hosts' attention that a model has while it is patched: only these files import modeling files."""
