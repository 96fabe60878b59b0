"""How close two models are on the same text, and the control that says what the figures are worth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient.evaluation.heads import SPANS, HeadComparison, head_outputs, is_multiple_choice, joined


@torch.no_grad()
def compare(model: PreTrainedModel, source: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> dict[str, Any]:
    """How close two models are on the same inputs, over real tokens.

    Returns:
        `embedding_cosine` mean and minimum over texts (mean-pooled last states), `token_cosine` mean,
        `hidden_error` ‖H' - H‖ / ‖H‖ of the last states and `hidden_error_by_layer`; and what the heads give, see
        `HeadComparison`.
    """
    cosines: list[Tensor] = []
    token_cosine = tokens = 0.0
    squares: list[list[float]] = []
    heads: dict[str, HeadComparison] = {}
    for batch in batches:
        theirs, ours = run(source, batch), run(model, batch)
        mask = real_tokens(batch, theirs["hidden"][-1])
        for layer, (a, b) in enumerate(zip(ours["hidden"], theirs["hidden"], strict=True)):
            if len(squares) <= layer:
                squares.append([0.0, 0.0])
            squares[layer][0] += float((a - b)[mask].double().square().sum())
            squares[layer][1] += float(b[mask].double().square().sum())
        a, b = ours["hidden"][-1].float(), theirs["hidden"][-1].float()
        token_cosine += float(F.cosine_similarity(a[mask], b[mask], dim=-1).sum())
        tokens += float(mask.sum())
        cosines.append(F.cosine_similarity(mean_pool(a, mask), mean_pool(b, mask), dim=-1))
        for name, logits in theirs["heads"].items():
            is_choice = is_multiple_choice(getattr(model, "model", model))
            head = heads.setdefault(name, HeadComparison(name, source.config, is_choice))
            head.add(logits, ours["heads"][name], batch.get("decoder_attention_mask", mask).bool())
    cosine = torch.cat(cosines)
    errors = [(a / b) ** 0.5 if b else math.inf if a else 0.0 for a, b in squares]
    figures: dict[str, Any] = {
        "embedding_cosine": float(cosine.mean()),
        "embedding_cosine_min": float(cosine.min()),
        "token_cosine": token_cosine / tokens,
        "hidden_error": errors[-1],
        "hidden_error_by_layer": errors,
    }
    return figures | joined(heads)


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, D) mean of the real tokens of (B, N, D)."""
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


def run(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Hidden states of the (encoder) stack layer by layer, logits of all heads, and whatever comes last as one "output".

    Texts of which one is to be chosen are all rows of the batch.
    """
    device = next(model.parameters()).device
    is_choice = is_multiple_choice(getattr(model, "model", model))
    batch = {k: v.to(device)[None] if is_choice else v.to(device) for k, v in batch.items()}
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    hidden = [state.cpu() for state in getattr(out, "encoder_hidden_states", None) or out.hidden_states]
    heads = head_outputs(out)
    spans = [heads[name] for name in SPANS if name in heads]
    output = torch.stack(spans, -1) if spans else next(iter(heads.values()), hidden[-1])
    return {"hidden": hidden, "heads": heads, "output": output}


def real_tokens(batch: dict[str, Tensor], states: Tensor) -> Tensor:
    """(B, N) which of the tokens with these states (B, N, D) are real."""
    mask = batch.get("attention_mask", batch.get("pixel_attention_mask"))
    return torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()


def output_mask(model: Any, batch: dict[str, Tensor]) -> Tensor | None:
    """(B, N) real positions of the model's output; `None` = all are."""
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask", batch.get("pixel_attention_mask")))
    return None if mask is None else mask.bool()


def unknown_share(tokenizer: Any, batches: Iterable[dict[str, Tensor]]) -> float:
    """Share of the texts' own tokens that the tokenizer does not know; 0 where it knows every text."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    special = [index for index in getattr(tokenizer, "all_special_ids", []) if index != unknown]
    ids = ids[~torch.isin(ids, torch.tensor(special, dtype=ids.dtype))]
    return 0.0 if unknown is None or not len(ids) else float((ids == unknown).double().mean())


def relative_difference(actual: Tensor, expected: Tensor, where: Tensor | None) -> float:
    """Largest difference over the largest expected value, at the real positions `where` (B, N) of (B, N, D) tensors.

    NaN if either side has a number that is none, at a padded position too: a comparison with a limit is then false.
    """
    finite = bool(actual.isfinite().all() and expected.isfinite().all())
    if where is not None and actual.dim() == 3:
        actual, expected = actual[where], expected[where]
    difference, largest = float((actual - expected).abs().max()), float(expected.abs().max())
    return (difference / largest if largest else difference) if finite else math.nan
