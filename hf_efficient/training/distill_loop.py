"""What distillation with the Trainer and in a loop of one's own share: batches, parameter groups and figures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efficient.patching.exact import converted_layers, mechanism_of

DECODER_TOKENS = 64


def collate(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """(B, N) ids and mask, padded on the right; a decoder reads the same text, its first tokens if it is not converted."""
    width, pad = max(len(row) for row in rows), model.config.pad_token_id or 0
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        sides = {mechanism_of(layer).geometry.side for layer in converted_layers(model).values()}
        tokens = width if "decoder" in sides else DECODER_TOKENS
        batch |= {"decoder_input_ids": ids[:, :tokens], "decoder_attention_mask": mask[:, :tokens]}
    return batch


def optimizer_of(model: Any, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay over what requires gradients; with learning rate 0 every mechanism has its own."""
    mechanisms = [mechanism_of(layer) for layer in converted_layers(model).values()]
    rates = {id(p): mechanism.transfer_learning_rate for mechanism in mechanisms for p in mechanism.parameters()}
    groups: dict[float, list[Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(learning_rate or rates[id(parameter)], []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for rate, parameters in groups.items()], weight_decay=0.0
    )


class Clock:
    """Seconds of training in a loop; registered for checkpointing, those of a resumed run are the sum over its parts."""

    def __init__(self) -> None:
        self.earlier, self.began = 0.0, 0.0

    def start(self) -> None:
        """Called before the first step; what was held before is no part of the peak memory either."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.began

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.earlier = state["seconds"]


def training_figures(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What training cost over all stages: sums of their steps, seconds and tokens, and the highest peak memory.

    Seconds are those between the first and the last step, the guard and checkpoints included, measurements before and
    behind not; tokens are those that are no padding; epochs are passes over the rows, below 1 where some were not read.
    """
    total = {name: sum(stage.get(name, 0) for stage in stages) for name in ("steps", "epochs", "seconds", "tokens")}
    total["tokens_per_second"] = total["tokens"] / total["seconds"]
    peak = max(stages, key=lambda stage: float(stage["peak_memory_mb"]))
    return total | {name: peak[name] for name in ("peak_memory_mb", "peak_memory_of")}
