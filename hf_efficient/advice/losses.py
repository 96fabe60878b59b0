"""What a text loses by efficient attention: outputs of one pass beside those of full attention on the same row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.evaluation.fidelity import mean_pool, real_tokens
from hf_efficient.evaluation.heads import HeadComparison, head_outputs, is_multiple_choice, joined
from hf_efficient.profiling.timing import Mark, timed_call

LOSSES = {
    "kl": "KL divergence of the head's distributions, in nats",
    "score_error": "relative error of the scores",
    "embedding": "1 - cosine of the mean-pooled last states",
    "states": "relative error of the last states",
}
NUMBERS = 2**23
"""Logits of a vocabulary that are kept of one text: 32 MiB in single precision."""
POSITIONS = 256
NEVER = -1e4


@dataclass(frozen=True)
class Outputs:
    """Of one pass over one text: last states (1, N, D) of the encoder, or of the only stack, and logits by head."""

    states: Tensor
    heads: dict[str, Tensor]


class Passes:
    """Forward passes of a model, timed, without gradients and without a cache.

    Args:
        ignored: ids of a vocabulary that get no probability on either side (tokens that the texts were kept from).
    """

    def __init__(self, model: Any, ignored: Sequence[int] = ()):
        self.model, self.ignored = model, list(ignored)
        self.is_choice = is_multiple_choice(model)
        self.options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Outputs, float]:
        """Outputs, and seconds: CPU time of all threads, or of the GPU."""
        device, found = self.model.device, list[Any]()
        given = {k: v.to(device)[None] if self.is_choice else v.to(device) for k, v in batch.items()}

        def call(mark: Mark) -> None:
            with torch.no_grad():
                found.append(self.model(**given, **self.options, output_hidden_states=True))

        times = timed_call(call, 1, device.type)
        return self._outputs(found[0]), times.total if times.cpu is None else times.cpu

    def _outputs(self, out: Any) -> Outputs:
        hidden = getattr(out, "encoder_hidden_states", None) or out.hidden_states
        return Outputs(hidden[-1].cpu(), {name: self._kept(logits) for name, logits in head_outputs(out).items()})

    def _kept(self, logits: Tensor) -> Tensor:
        if not self.is_vocabulary(logits):
            return logits
        # a copy, so that the other positions' memory is given back
        logits = logits[:, positions(logits)].float()
        logits[..., self.ignored] = NEVER
        return logits

    def is_vocabulary(self, logits: Tensor) -> bool:
        return logits.dim() == 3 and logits.shape[-1] == getattr(self.model.config, "vocab_size", None)

    def figures(self, ours: Outputs, theirs: Outputs, batch: dict[str, Tensor]) -> dict[str, float]:
        """`LOSSES`, as far as the model has them, and `token_cosine` and the agreement of heads."""
        mask = real_tokens(batch, theirs.states)
        a, b = ours.states.float(), theirs.states.float()
        pooled = F.cosine_similarity(mean_pool(a.double(), mask), mean_pool(b.double(), mask), dim=-1)
        figures = {
            "states": float((a - b)[mask].double().norm() / b[mask].double().norm()),
            "embedding": max(0.0, 1 - float(pooled.mean())),
            "token_cosine": float(F.cosine_similarity(a[mask], b[mask], dim=-1).mean()),
        }
        heads = {}
        for name, logits in theirs.heads.items():
            heads[name] = HeadComparison(name, self.model.config, self.is_choice)
            real = batch.get("decoder_attention_mask")
            if real is None:
                real = torch.ones_like(batch["decoder_input_ids"]) if "decoder_input_ids" in batch else mask
            if self.is_vocabulary(logits):
                real = real[:, _spread(real.shape[1], logits.shape[-1])]
            heads[name].add(logits, ours.heads[name], real.bool())
        found = joined(heads)
        return figures | {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}


def positions(logits: Tensor) -> Tensor:
    """Those of (B, N, V) logits that are compared: all, or evenly spaced ones with the last."""
    return _spread(logits.shape[1], logits.shape[2])


def _spread(length: int, vocabulary: int) -> Tensor:
    count = min(length, POSITIONS, max(1, NUMBERS // vocabulary))
    return torch.linspace(length - 1, 0, count).round().long().flip(0)


def loss_of(figures: dict[str, float], embeds: bool) -> str:
    """The name of the figure that counts: of a head, if there is one; else of embeddings, if the model is for them."""
    return next((name for name in ("kl", "score_error") if name in figures), "embedding" if embeds else "states")
