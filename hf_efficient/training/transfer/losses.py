"""How far a student is from its teacher: per layer on one mechanism's call, and end to end on the model's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.evaluation.fidelity import mean_pool

LOCAL = ("attention_output", "attention_weights")
END_TO_END = ("hidden_states", "logits", "embedding")
SMALLEST = 1e-12
"""Probability below which a student's attention weight counts as this, so that its logarithm stays finite."""


def relative_parts(actual: Tensor, expected: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ‖a - b‖² and Σ‖b‖² over real positions, at least in fp32.

    Args:
        actual, expected: (B, N, D) or (B, H, N, D). real: (B, N), or `None` = all.
    """
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference, expected = actual.to(wide) - expected.to(wide), expected.to(wide)
    if real is not None:
        where = real.bool().view(real.shape[0], *([1] * (actual.dim() - 3)), real.shape[1], 1)
        # not by a product: what stands in padding may be no number
        difference, expected = (torch.where(where, x, 0.0) for x in (difference, expected))
    return difference.square().sum(), expected.square().sum()


def _relative(actual: Tensor, expected: Tensor, real: Tensor | None) -> Tensor:
    return quotient(*relative_parts(actual, expected, real))


def _mean_parts(values: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum and number of (B, …, N) values over real positions (B, N)."""
    if real is None:
        return values.sum(), values.new_tensor(values.numel())
    where = real.bool().view(real.shape[0], *([1] * (values.dim() - 2)), real.shape[1]).expand(values.shape)
    return torch.where(where, values, 0.0).sum(), where.sum().to(values.dtype)


def quotient(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole`, 0 where there is nothing."""
    return part / whole.clamp(min=torch.finfo(whole.dtype).tiny)


# ---- per layer ---------------------------------------------------------------------------------------------------


def layer_loss_parts(kind: str, call: Any) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of one of `LOCAL` for one `LayerCall`; those of several calls of a layer add up."""
    if kind == "attention_output":
        return relative_parts(call.student, call.teacher, call.real)
    weights = call.mechanism.attention_weights(call.query, call.key, call.context)
    if weights is None:
        raise ValueError(
            f"{call.mechanism.config.mechanism} can't show its attention weights: use losses='attention_output'."
        )
    teacher = exact_weights(call)
    return _mean_parts(-(teacher * weights.to(teacher.dtype).clamp(min=SMALLEST).log()).sum(-1), call.real)


@torch.no_grad()
def exact_weights(call: Any) -> Tensor:
    """(B, H, N, S) softmax weights of full attention, at least in fp32; O(N S) memory."""
    n, s, context = call.query.shape[2], call.key.shape[2], call.context
    wide = torch.promote_types(call.query.dtype, torch.float32)
    with torch.autocast(call.query.device.type, enabled=False):
        logits = context.scaling * call.query.to(wide) @ call.key.to(wide).transpose(-1, -2)
        if context.relative_bias is not None:
            logits = logits + context.relative_bias.dense(n, s, context.query_offset, logits.device).to(wide)
        keep = torch.ones(n, s, dtype=torch.bool, device=logits.device)
        if context.is_causal:
            keep = keep.tril(s - n)
        if context.key_padding_mask is not None:
            keep = keep & context.key_padding_mask[:, None, None]
        # queries in front of a row's first real token see nothing; they are no real positions
        return logits.masked_fill(~keep, torch.finfo(wide).min).softmax(-1)


# ---- end to end --------------------------------------------------------------------------------------------------


def end_to_end(
    losses: Mapping[str, float], output: Any, answer: Any, batch: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The weighted loss between a model's output and its teacher's answer, and the loss of each layer's states."""
    total: Any = 0.0
    by_layer = None
    for name, weight in losses.items():
        if name == "hidden_states":
            by_layer = _hidden_losses(output, answer, batch)
            loss = by_layer.mean()
        elif name == "logits":
            loss = _divergence(output, answer, batch)
        else:
            loss = _embedding_loss(output, answer, batch)
        total = total + weight * loss
    return total, None if by_layer is None else by_layer.detach()


def _stacks(output: Any, batch: Mapping[str, Any]) -> list[tuple[tuple[Tensor, ...], Tensor | None]]:
    """Hidden states of each stack (embeddings first), and which of its positions are real."""
    if getattr(output, "encoder_hidden_states", None) is None:
        return [(output.hidden_states, batch.get("attention_mask"))]
    encoder = output.encoder_hidden_states, batch.get("attention_mask")
    decoder = getattr(output, "decoder_hidden_states", None)
    return [encoder] if decoder is None else [encoder, (decoder, batch.get("decoder_attention_mask"))]


def _hidden_losses(output: Any, answer: Any, batch: Mapping[str, Any]) -> Tensor:
    pairs = zip(_stacks(output, batch), _stacks(answer, batch), strict=True)
    losses = [
        _relative(ours, theirs, mask)
        for (student, mask), (teacher, _) in pairs
        for ours, theirs in zip(student[1:], teacher[1:], strict=True)
    ]
    return torch.stack([loss.to(losses[0].device) for loss in losses])


def _divergence(output: Any, answer: Any, batch: Mapping[str, Any]) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(
            "this model has no logits: use the losses 'hidden_states' and 'embedding', or a class with a head."
        )
    ours, theirs = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (logits, answer.logits))
    real = batch.get("attention_mask")
    if getattr(output, "encoder_last_hidden_state", None) is not None:
        real = batch.get("decoder_attention_mask")
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    # classifiers have one row of logits per text
    return quotient(*_mean_parts(divergence, real if divergence.dim() > 1 else None))


def _embedding_loss(output: Any, answer: Any, batch: Mapping[str, Any]) -> Tensor:
    pooled = []
    for result in (output, answer):
        states, mask = _stacks(result, batch)[0]
        last = states[-1].to(torch.promote_types(states[-1].dtype, torch.float32))
        real = last.new_ones(last.shape[:2]) if mask is None else mask
        pooled.append(mean_pool(torch.where(real.bool()[..., None], last, 0.0), real))
    return 1 - F.cosine_similarity(pooled[0], pooled[1], dim=-1).mean()
