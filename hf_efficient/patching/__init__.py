"""What happens inside a patched model."""

from hf_efficient.patching import dispatch  # noqa: F401  (registers with transformers)
from hf_efficient.patching.install import is_installed
from hf_efficient.patching.temporary import patch_attention

__all__ = ["is_installed", "patch_attention"]
