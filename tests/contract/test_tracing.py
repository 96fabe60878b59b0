"""Graphs for other runtimes: no value of the example decides anything, and no operator needs more than its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import MAIN, Pair, each
from torch import Tensor

import hf_efficient as he
from hf_efficient.testing import assert_close, tiny_model

LENGTH = 33
# patterns that depend on each row's number of tokens say so, as under torch.compile
BY_LENGTH = "depends on each row's number of tokens"


class Logits(torch.nn.Module):
    def __init__(self, model: Any, **options: Any):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, **self.options).logits


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The formula, in which a query without any visible key is 0 / 0."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        hidden = ~attn_mask if attn_mask.dtype == torch.bool else None
        scores = scores + attn_mask if hidden is None else scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ value


CAUSAL = ("local", "performer", "transformer_xl", "compressive")


@each([pair for pair in MAIN if pair.family == "bert" or (pair.family == "gpt2" and pair.mechanism in CAUSAL)])
@torch.no_grad()
def test_a_graph_traced_without_padding_honours_padding(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair.model(layers=2 if pair.mechanism == "funnel" else 1, positions=64)
    ids = torch.randint(5, 99, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[1, 10:], padded[2, :20] = 0, 0
    with pair.patch(model):
        expected = model(input_ids=ids, attention_mask=padded).logits
        module = Logits(model, use_cache=False) if pair.is_causal else Logits(model)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", softmax_attention)
        try:
            traced = torch.jit.trace(module, (ids, mask), check_trace=False)
        except ValueError as error:
            assert BY_LENGTH in str(error)
            return
        assert "PythonOp" not in str(traced.inlined_graph)
        assert_close(traced(ids, padded), expected, 1e-4, where=padded)
        assert traced(ids, padded).isfinite().all()


def test_what_values_decide_is_refused_while_tracing() -> None:
    ids = torch.randint(5, 99, (2, LENGTH))
    mask = torch.ones_like(ids)
    for family in ("bert", "gpt2"):
        model = tiny_model(family, layers=1)
        with he.patch_attention(model, "longformer", attention_window=4):
            module = Logits(model, global_attention_mask=mask[:1])
            with pytest.raises(ValueError, match="global_attention_mask decides by its values"):
                torch.jit.trace(module, (ids, mask))
    model = tiny_model("bert", layers=1)
    options: dict[str, Any] = dict(attention_window=4, global_tokens="question", separator_token_id=7)
    with (
        he.patch_attention(model, "longformer", **options),
        pytest.raises(ValueError, match="traced or exported graph"),
    ):
        torch.jit.trace(Logits(model), (ids, mask))
