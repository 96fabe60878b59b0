"""The `hf-efficient` command."""

from hf_efficient.cli.app import app, main

__all__ = ["app", "main"]
