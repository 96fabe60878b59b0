"""How close two models are on the same text, and the control that says what the figures are worth."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .base import AttentionContext, EfficientAttention, EfficientAttentionConfig, attention_configs
from .patching import patch_attention


class MeanOfValues(EfficientAttention):
    """Control: every visible value counts the same, `y_i = mean of v_j`; a mechanism must be closer than this."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        keep = torch.ones_like(value[..., :1])
        if context.key_padding_mask is not None:
            keep = keep * context.key_padding_mask[:, None, :, None]
        n = query.shape[2]
        if context.is_causal:
            total, count = (value * keep).cumsum(2)[:, :, -n:], keep.cumsum(2)[:, :, -n:]
        else:
            total, count = (value * keep).sum(2, keepdim=True), keep.sum(2, keepdim=True)
        return (total / count.clamp(min=1)).expand_as(query)


@dataclass(frozen=True, kw_only=True)
class MeanOfValuesConfig(EfficientAttentionConfig):
    """Options of the control: none of its own."""


MeanOfValues.Config = MeanOfValuesConfig
MeanOfValuesConfig.attention_class = MeanOfValues


@torch.no_grad()
def compare(model: PreTrainedModel, source: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> dict[str, Any]:
    """How close two models are on the same inputs, over real tokens.

    Returns:
        `embedding_cosine` mean and minimum over texts (mean-pooled last states), `token_cosine` mean,
        `hidden_error` ‖H' - H‖ / ‖H‖ of the last states and `hidden_error_by_layer`; with a vocabulary head also
        `kl` of the source's to the model's distribution in nats and `top1_agreement`.
    """
    cosines: list[Tensor] = []
    token_cosine = tokens = kl = agreement = predictions = 0.0
    squares: list[list[float]] = []
    for batch in batches:
        theirs, ours = run(source, batch), run(model, batch)
        mask = batch["attention_mask"].bool()
        for layer, (a, b) in enumerate(zip(ours["hidden"], theirs["hidden"], strict=True)):
            if len(squares) <= layer:
                squares.append([0.0, 0.0])
            squares[layer][0] += float((a - b)[mask].double().square().sum())
            squares[layer][1] += float(b[mask].double().square().sum())
        a, b = ours["hidden"][-1].float(), theirs["hidden"][-1].float()
        token_cosine += float(F.cosine_similarity(a[mask], b[mask], dim=-1).sum())
        tokens += float(mask.sum())
        cosines.append(F.cosine_similarity(mean_pool(a, mask), mean_pool(b, mask), dim=-1))
        if ours["logits"] is not None and ours["logits"].shape[-1] == source.config.vocab_size:
            real = output_mask(source, batch)
            p, q = (x["logits"].float().log_softmax(-1)[real] for x in (theirs, ours))
            kl += float((p.exp() * (p - q)).sum())
            agreement += float((p.argmax(-1) == q.argmax(-1)).sum())
            predictions += len(p)
    cosine = torch.cat(cosines)
    errors = [(a / b) ** 0.5 if b else 0.0 for a, b in squares]
    figures: dict[str, Any] = {
        "embedding_cosine": float(cosine.mean()),
        "embedding_cosine_min": float(cosine.min()),
        "token_cosine": token_cosine / tokens,
        "hidden_error": errors[-1],
        "hidden_error_by_layer": errors,
    }
    if predictions:
        figures |= {"kl": kl / predictions, "top1_agreement": agreement / predictions}
    return figures


def controls(model: Any) -> dict[str, list[EfficientAttentionConfig]]:
    """{name: settings} of what a converted model must be better than: `"mean of values"`, and `"window only"` where every
    mechanism of it has a `control_config`."""
    converted = attention_configs(model.config.efficient_attention)
    found: dict[str, list[EfficientAttentionConfig]] = {
        "mean of values": [MeanOfValuesConfig(layers=c.layers, side=c.side) for c in converted]
    }
    unlearned = [c.attention_class.control_config(c) for c in converted]
    if all(unlearned):
        found["window only"] = [c for c in unlearned if c is not None]
    return found


def control_figures(
    model: Any, source: PreTrainedModel, batches: Iterable[dict[str, Tensor]], control: str = "mean of values"
) -> dict[str, Any]:
    """`compare` for the source with one of the `controls` of `model` in the layers that `model` converted."""
    plain = copy.deepcopy(source)
    with patch_attention(plain, controls(model)[control]):
        return compare(plain, source, batches)


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, D) mean of the real tokens of (B, N, D)."""
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


def run(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Hidden states of the (encoder) stack layer by layer, logits if there are any, and whichever of them comes last."""
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in batch.items()}
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    hidden = [state.cpu() for state in getattr(out, "encoder_hidden_states", None) or out.hidden_states]
    logits = getattr(out, "logits", None)
    logits = None if logits is None else logits.cpu()
    return {"hidden": hidden, "logits": logits, "output": hidden[-1] if logits is None else logits}


def output_mask(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B, N) real positions of the model's output."""
    return batch.get("decoder_attention_mask", batch["attention_mask"]).bool()


def relative_difference(actual: Tensor, expected: Tensor, where: Tensor | None) -> float:
    if where is not None and actual.dim() == 3:
        actual, expected = actual[where], expected[where]
    return float((actual - expected).abs().max() / expected.abs().max())


def text_batches(tokenizer: Any, texts: Sequence[str], length: int, size: int, model: Any) -> list[dict[str, Tensor]]:
    if getattr(tokenizer, "pad_token", None) is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    batches = []
    for first in range(0, len(texts), size):
        encoded = tokenizer(
            list(texts[first : first + size]),
            truncation=True,
            max_length=length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        batch = {k: encoded[k] for k in ("input_ids", "attention_mask")}
        if model.config.is_encoder_decoder:
            # the text itself, as if it were to be copied: enough to see what the decoder makes of the encoder's states
            batch["decoder_input_ids"] = batch["input_ids"][:, :64]
            batch["decoder_attention_mask"] = batch["attention_mask"][:, :64]
        batches.append(batch)
    return batches


def ragged(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut the rows to different lengths, so that there is padding to be right about."""
    mask = batch["attention_mask"].clone()
    rows, n = mask.shape
    for row in range(1, rows):
        mask[row, n - row * n // (2 * rows) :] = 0
    ids = batch["input_ids"].masked_fill(mask == 0, 0)
    return batch | {"input_ids": ids, "attention_mask": mask}
