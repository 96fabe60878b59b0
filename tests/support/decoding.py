"""Decoding step by step, and one full forward to compare it with."""

from __future__ import annotations

from typing import Any

import torch
from pairs import positions_of
from torch import Tensor

from hf_efficient.cache.bounded import BoundedLayer
from hf_efficient.testing import VOCABULARY, assert_close, inputs_for


def prompt(batch: int, length: int, starts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Token ids and a mask whose rows start at `starts`."""
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))
    return ids, (torch.arange(length) >= torch.tensor(starts)[:, None]).long()


def encoded(model: Any, batch: int) -> dict[str, Any]:
    """What an encoder-decoder model needs beside the decoder's inputs."""
    if not model.config.is_encoder_decoder:
        return {}
    source = inputs_for(model, batch=batch, length=23)
    with torch.no_grad():
        states = model.get_encoder()(source["input_ids"], attention_mask=source["attention_mask"])
    return {"encoder_outputs": states, "attention_mask": source["attention_mask"]}


def call(model: Any, ids: Tensor, mask: Tensor, part: slice, source: dict[str, Any], **options: Any) -> Any:
    """One forward over the tokens of `part`, those before it being in the cache."""
    seen = mask[:, : part.stop]
    inputs = {"input_ids": ids[:, part], "attention_mask": seen}
    inputs |= {name: value[:, part] for name, value in positions_of(model, seen).items()}
    if model.config.is_encoder_decoder:
        inputs = {f"decoder_{name}": value for name, value in inputs.items()} | source
    with torch.no_grad():
        return model(**inputs, **options)


def decode(model: Any, ids: Tensor, mask: Tensor, ends: tuple[int, ...], cache: Any = None, **options: Any) -> Any:
    """(logits of calls that end at `ends`, the cache); `options` go into every call."""
    source, parts, start = encoded(model, len(ids)), [], cache.get_seq_length() if cache is not None else 0
    for end in ends:
        out = call(model, ids, mask, slice(start, end), source, past_key_values=cache, use_cache=True, **options)
        parts.append(out.logits)
        cache, start = out.past_key_values, end
    return torch.cat(parts, dim=1), cache


def full(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return call(model, ids, mask, slice(0, ids.shape[1]), encoded(model, len(ids)), use_cache=False, **options).logits


def layers_of(cache: Any) -> list[Any]:
    return getattr(cache, "self_attention_cache", cache).layers


def bounded_layers(cache: Any) -> list[BoundedLayer]:
    return [layer for layer in layers_of(cache) if isinstance(layer, BoundedLayer)]


def most_needed(layers: list[BoundedLayer]) -> int:
    """The most keys that a pattern of `layers` still needs, far from the start."""
    counts = [layer.pattern.needed(torch.arange(n), n).sum() for layer in layers for n in range(300, 400)]
    return int(max(counts))


def assert_decodes(model: Any, ids: Tensor, mask: Tensor, ends: tuple[int, ...], **options: Any) -> Any:
    actual, cache = decode(model, ids, mask, ends, **options)
    assert_close(actual, full(model, ids, mask, **options), 1e-9, "decoded logits", where=mask)
    return cache
