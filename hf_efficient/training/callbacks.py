"""Trainer callbacks of converted models."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..attention.performer import PerformerAttention


class RedrawFeatures(TrainerCallback):
    """Draw new random features every `redraw_interval` optimiser steps, where a config asks for it.

    Between optimiser steps, so that no gradient mixes two draws; the draw depends on seed, layer and count alone, so all
    processes make the same one. In a loop without a Trainer call `redraw(model, step)` after each optimiser step.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.redraw(model, state.global_step)

    @staticmethod
    def redraw(model: Any, step: int) -> int:
        """Redraw the mechanisms of `model` that are due at optimiser step `step` (from 1); returns how many were."""
        due = [
            module
            for module in model.modules()
            if isinstance(module, PerformerAttention)
            and module.config.redraw_interval
            and step % module.config.redraw_interval == 0
        ]
        for module in due:
            module.redraw()
        return len(due)
