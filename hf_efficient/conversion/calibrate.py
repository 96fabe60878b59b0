"""Constants that mechanisms take from data: the pretrained model's own queries and keys on a few texts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efficient.attention.base.mechanism import EfficientAttention
from hf_efficient.conversion.loading import takes_pictures
from hf_efficient.corpus import TextUse, text_batches, text_use
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.dense import dense_attention
from hf_efficient.patching.exact import converted_layers, eval_mode, mechanism_of, substituted
from hf_efficient.patching.names import MODULE_NAME

logger = logging.getLogger(f"transformers.{__name__}")
# enough for dozens of clusters per head; bounds memory to 2 · TOKENS · H · D numbers per layer
TOKENS = 8192
LENGTH = 512
# share of the queries that some cluster should take
COVERAGE = 0.8
Batches = Iterable[Mapping[str, Tensor]]


class _Collector(EfficientAttention):
    """Full attention that keeps the (T, H, D) queries and keys of the first real tokens it meets."""

    def __init__(self, mechanism: Any):
        super().__init__(mechanism.config, mechanism.geometry)
        self.heads: list[tuple[Tensor, Tensor]] = []
        self.room = TOKENS

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        token_mask = context.key_padding_mask
        if token_mask is None:
            token_mask = query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool)
        q, k = (x.transpose(1, 2)[token_mask][: self.room] for x in (query, key))
        self.heads.append((q, k))
        self.room -= len(q)
        return dense_attention(query, key, value, context)

    def collected(self) -> tuple[Tensor, Tensor]:
        query, key = (torch.cat(part).transpose(0, 1) for part in zip(*self.heads, strict=True))
        return query, key


@torch.no_grad()
def _heads(model: Any, batches: Batches) -> dict[str, tuple[Any, Tensor, Tensor]]:
    """{layer: (mechanism, queries, keys (H, T, D))} of the layers whose mechanism can be calibrated."""
    wanted = {
        name: mechanism
        for name, layer in converted_layers(model).items()
        if hasattr(mechanism := mechanism_of(layer), "calibrate")
    }
    if not wanted:
        raise ValueError(
            f"no layer of {type(model).__name__} has a mechanism that starts from data: leave the calibration out."
        )
    found: dict[int, _Collector] = {}

    def collector(mechanism: Any) -> _Collector | None:
        if not hasattr(mechanism, "calibrate"):
            return None
        return found.setdefault(id(mechanism), _Collector(mechanism))

    device = next(model.parameters()).device
    with substituted(model, collector), eval_mode(model):
        for batch in batches:
            # without a head, so that any class will do
            model.base_model(**{name: x.to(device) for name, x in batch.items()}, use_cache=False)
            if all(one.room == 0 for one in found.values()):
                break
    if not all(one.heads for one in found.values()):
        raise ValueError("calibration without a single batch: give texts, or batches of input_ids.")
    return {name: (mechanism, *found[id(mechanism)].collected()) for name, mechanism in wanted.items()}


def calibrate(model: Any, batches: Batches, length: int | None = None) -> dict[str, str]:
    """Let every mechanism that starts from data set its constants, from the model as it is before conversion.

    The unconverted model (`exact_attention`) runs once over the batches, in eval mode; mechanisms with a
    `calibrate(query, key)` method get the (H, T, D) heads of the first T ≤ 8192 real tokens of their layer. Nothing else of
    the model changes. For a converted model, or one under `patch_attention`; `convert(…, calibration=…)` calls this.

    Args:
        batches: keyword arguments of forward passes, e.g. `{"input_ids": …, "attention_mask": …}`; 2 to 16 of them.
        length: longest input, in tokens; `None` = that of the position table. Where clusters take fewer than 0.8 of the
            queries of such an input, a warning says so.

    Returns:
        {name of a tensor: where its values came from}, for the conversion report.

    Raises:
        ValueError: no such mechanism, no batch, or too little text for the mechanism.
    """
    origins: dict[str, str] = {}
    shares: dict[str, tuple[float, int]] = {}
    for name, (mechanism, query, key) in _heads(model, batches).items():
        origins |= {
            f"{name}.{MODULE_NAME}.{tensor}": origin for tensor, origin in mechanism.calibrate(query, key).items()
        }
        longest = length or mechanism.geometry.max_positions
        if longest and hasattr(mechanism, "coverage") and (found := mechanism.coverage(query, longest)):
            shares[name] = found
    _warn_of_coverage(shares, "clusters take")
    return origins


def bound_coverage(model: Any, length: int | None) -> None:
    """Warn where clusters can't take 0.8 of the queries of an input of `length` tokens, whatever their centroids."""
    shares: dict[str, tuple[float, int]] = {}
    for name, layer in converted_layers(model).items():
        mechanism = mechanism_of(layer)
        if length and hasattr(mechanism, "coverage") and not mechanism.geometry.is_causal:
            count, size = mechanism.centroids.shape[1], mechanism.size
            shares[name] = min(1.0, count * size / length), -(-4 * length // (5 * count))
    _warn_of_coverage(shares, "clusters can take at most")


def _warn_of_coverage(shares: dict[str, tuple[float, int]], what: str) -> None:
    share, name = min(((share, name) for name, (share, _) in shares.items()), default=(1.0, ""))
    if share < COVERAGE:
        logger.warning(
            f"{what} {share:.2f} of the queries of the longest input in {name}, and the others see their window alone: "
            f"cluster_size={max(size for _, size in shares.values())} reaches {COVERAGE} in every layer."
        )


def occupancy(model: Any, batches: Batches) -> dict[str, Tensor]:
    """{layer: (H, k) share of real tokens nearest to each centroid}, on what full attention makes of the batches.

    1 / k everywhere is even; many zeros show clusters that collapsed: calibrate again. Raises as `calibrate` does.
    """
    heads = _heads(model, batches).items()
    return {name: mechanism.occupancy(query, key) for name, (mechanism, query, key) in heads}


def calibration_use(
    calibration: Sequence[str] | Sequence[Mapping[str, Tensor]],
    batches: Batches,
    tokenizer: Any,
    max_length: int | None,
) -> TextUse:
    """How much of `calibration` its batches hold, up to what `calibrate` reads; of given batches with special tokens."""
    given: list[Any] = [calibration] if isinstance(calibration, (str, Mapping)) else list(calibration)
    if isinstance(given[0], str):
        return text_use(tokenizer, given, min(LENGTH, max_length or LENGTH), most=TOKENS)
    rows = [int(row.sum()) for batch in batches for row in _mask_of(batch, max_length)]
    before = [sum(rows[:index]) for index in range(len(rows))]
    return TextUse(len(rows), sum(count < TOKENS for count in before), sum(rows), min(sum(rows), TOKENS))


def _mask_of(batch: Mapping[str, Tensor], max_length: int | None) -> Tensor:
    """(B, N) which tokens are real; pictures have as many tokens as the model has positions."""
    if "attention_mask" in batch:
        return batch["attention_mask"]
    if "input_ids" in batch:
        return torch.ones_like(batch["input_ids"])
    return torch.ones(len(next(iter(batch.values()))), max_length or 1)


def calibration_batches(
    calibration: Sequence[str] | Sequence[Mapping[str, Tensor]], tokenizer: Any, model: Any, max_length: int | None
) -> list[Mapping[str, Tensor]]:
    """Batches for `calibrate` from texts, or as they are.

    Args:
        max_length: positions that the model was trained with; `None` = any number. Texts are cut at 512 tokens, or there.

    Raises:
        ValueError: nothing given, texts without a tokenizer, or neither texts nor batches.
    """
    given: list[Any] = [calibration] if isinstance(calibration, (str, Mapping)) else list(calibration)
    if given and all(isinstance(one, Mapping) for one in given):
        return given
    if not given or not all(isinstance(one, str) for one in given):
        raise ValueError(
            "calibration is a list of texts, or of batches such as {'input_ids': …, 'attention_mask': …}."
        )
    if takes_pictures(model):
        raise ValueError(
            f"{type(model).__name__} reads pictures, not texts: give calibration as batches of pixel_values."
        )
    if tokenizer is None:
        raise ValueError("calibration texts need a tokenizer: give tokenizer=…, or batches of input_ids.")
    return text_batches(tokenizer, given, min(LENGTH, max_length or LENGTH), 4, model)  # type: ignore[return-value]
