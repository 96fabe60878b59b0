"""Tiny models of every head with trained global projections, and transformers' own long models."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import hf_efficient as he
from hf_efficient.testing import VOCABULARY, tiny_model

HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
HEADS = (*HEADS, "ForMultipleChoice")  # type: ignore[assignment]
SEPARATOR = 7
RMS = dict(pooling="rms", log_count=False, global_block_size=8)


def with_head(name: str, **config: Any) -> Any:
    """A tiny random stock model of this class."""
    family = {"XLM": "xlm-roberta", "Cam": "camembert", "MT5": "mt5"}.get(name[:3]) or {"R": "roberta", "T": "t5"}.get(
        name[0]
    )
    sizes = tiny_model(family or "bert", **config).config
    torch.manual_seed(0)
    return spread(getattr(transformers, name)(sizes))


def spread(model: Any) -> Any:
    """The model with random weights that are large enough for attention to matter."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = 0.1 if name.endswith((".q.weight", ".k.weight")) else 0.25
            nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()


def trained(model: Any) -> Any:
    """The converted model with new parameters away from their start."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "_global." in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
        elif "slot_weight" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.1, generator=generator)
    return model


def converted_head(name: str, mechanism: str, **options: Any) -> Any:
    """A converted tiny model of this stock class, its mechanism trained."""
    positions = {} if "T5" in name else {"max_positions": 256}
    return trained(he.convert(with_head(name), mechanism, attention_window=16, **positions, **options).model)


def long_model(name: str, **options: Any) -> Any:
    """A tiny random `Longformer…`, `LED…` or `LongT5…`."""
    if name.startswith("LongT5"):
        sizes = dict(d_model=40, d_kv=8, d_ff=48, num_heads=4, num_layers=2, relative_attention_max_distance=24)
        config = transformers.LongT5Config(vocab_size=VOCABULARY, local_radius=9, **sizes | options)
    elif name.startswith("LED"):
        sizes = dict(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2, decoder_layers=1)
        sizes |= dict(encoder_attention_heads=4, decoder_attention_heads=4, max_decoder_position_embeddings=20)
        sizes |= dict(attention_window=[8, 16], max_encoder_position_embeddings=130)
        config = transformers.LEDConfig(vocab_size=VOCABULARY, **sizes | options)
    else:
        sizes = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=2)
        sizes |= dict(attention_window=[8, 16], max_position_embeddings=130, sep_token_id=SEPARATOR)
        config = transformers.LongformerConfig(vocab_size=VOCABULARY, **sizes | options)
    return spread(getattr(transformers, name)(config))


def batch_for(model: Any, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Two rows (of multiple choice: one row of two choices), the second padded on the right; three separators each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, VOCABULARY, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - length // 4 :] = 0
    for row, real in zip(ids, mask.sum(-1).tolist(), strict=True):
        row[[real // 4, real // 4 + 1, real - 1]] = SEPARATOR
    ids = torch.where(mask.bool(), ids, model.config.pad_token_id)
    batch = {"input_ids": ids, "attention_mask": mask}
    if "MultipleChoice" in type(model).__name__:
        batch = {name: value[None] for name, value in batch.items()}
    if model.config.is_encoder_decoder and "EncoderModel" not in type(model).__name__:
        batch["decoder_input_ids"] = torch.randint(10, VOCABULARY, (2, 5), generator=generator)
    return batch


def error(actual: Any, expected: Any, batch: dict[str, Tensor]) -> float:
    """Largest relative difference of the first output, of last states at real tokens."""
    one, other = actual[0], expected[0]
    mask = batch["attention_mask"].bool()
    if one.shape[:2] == mask.shape:
        one, other = one[mask], other[mask]
    return ((one - other).abs().max() / other.abs().max()).item()


def same_tensors(one: Any, other: Any) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
