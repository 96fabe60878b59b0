"""Peak memory of candidates, each in a fresh process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from hf_efficient.advice.candidates import Candidate
from hf_efficient.conversion.loading import load_stock
from hf_efficient.patching.temporary import patch_attention
from hf_efficient.profiling.forward import forward_call, random_inputs
from hf_efficient.profiling.memory import growth_of, peaks

SHORT = 16


def peak_memory(model: Any, candidates: Sequence[Candidate | None], length: int) -> list[float | None]:
    """Megabytes by which a pass over one row of `length` tokens raises the memory of a process; `None` = full attention.

    The unconverted `model`, which takes that length, is saved to a temporary folder for them.

    Returns:
        `None` for each where the operating system does not tell (anything but Linux).
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        name = getattr(type(model), "__name__", None)
        entries = [
            (folder, name, [] if one is None else [c.to_dict() for c in one.configs], length) for one in candidates
        ]
        return peaks(_peak, entries)


def _peak(folder: str, model_class: str, attention: list[dict[str, Any]], length: int) -> float:
    model = load_stock(folder, model_class=model_class)[0].eval()
    if attention:
        patch_attention(model, attention)
    inputs = random_inputs(model.config, length)
    # what is made once and kept is no part of a pass
    forward_call(model, {k: v[:, :SHORT] for k, v in inputs.items()})(lambda: None)
    return growth_of(lambda: forward_call(model, inputs)(lambda: None))
