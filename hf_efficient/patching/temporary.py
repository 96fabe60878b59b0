"""Mechanisms in a loaded model for as long as they are wanted."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_efficient.attention.base.registry import ConfigLike, requested_configs
from hf_efficient.families import HostModel
from hf_efficient.patching.install import implementations, install, plan, uninstall
from hf_efficient.patching.proof import prove


class PatchHandle:
    """Undoes one `patch_attention`: as a context manager at its end, or by `undo()`."""

    def __init__(self, model: PreTrainedModel, before: list[tuple[Any, str]]):
        self.model = model
        self._before = before
        self.active = True

    def undo(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        if self.active:
            uninstall(HostModel.of(self.model), self._before, self._before[0][1])
            self.active = False

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(self, *exc: object) -> None:
        self.undo()


def patch_attention(model: PreTrainedModel, attention: ConfigLike, **options: Any) -> PatchHandle:
    """Replace self-attention in a loaded model, in place, until undone.

        with patch_attention(model, "longformer", attention_window=512):
            model(**batch)
        handle = patch_attention(model, [config_for_low_layers, config_for_high_layers]); …; handle.undo()

    Cross-attention and layers that no config names keep exact attention. New parameters are initialised from the
    model's weights.

    Raises:
        ValueError: unsupported model, setting or combination: all reasons at once; the model is unchanged then.
    """
    host, before = HostModel.of(model), implementations(model)
    chosen = plan(host, requested_configs(attention, **options))
    if host.family.needs_proof:
        prove(host)
    install(host, chosen)
    return PatchHandle(model, before)
