"""Causal means causal: no gradient from the future, and decoding with a cache equals one full forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import MAIN, VARIANTS, Pair, each, logits, positions_of
from torch import Tensor

from hf_efficient.testing import VOCABULARY, assert_close, inputs_for

CAUSAL = [pair for pair in MAIN + VARIANTS if pair.is_causal]


@each(CAUSAL)
def test_no_gradient_from_the_future(pair: Pair):
    """d out_i / d x_j is exactly 0 for j > i, and not all 0 for j ≤ i."""
    model = pair.model()
    length = 97
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    inputs = inputs_for(model, length=length)
    tokens = inputs.pop(f"{prefix}input_ids")
    embeds = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with pair.patch(model):
        out = model(**inputs, **{f"{prefix}inputs_embeds": embeds}).logits
        real = inputs["attention_mask"].bool()
        # a random direction, so that contributions can't cancel
        direction = torch.randn(out.shape[-1])
        for i in (0, 1, 15, 16, 17, 40, 63, 95):
            (gradient,) = torch.autograd.grad((out[:, i] @ direction).sum(), embeds, retain_graph=True)
            assert (gradient[:, i + 1 :] == 0).all(), f"output {i} sees the future"
            assert (gradient[real[:, i], : i + 1] != 0).any(), f"output {i} sees nothing"


def _prompt(model: Any, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and a mask whose rows start at different places."""
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, start in enumerate((0, 11, 30)[:batch]):
        mask[row, :start] = 0
    return ids, mask


def _call(model: Any, ids: Tensor, mask: Tensor, part: slice, encoded: Any, cache: Any = None) -> Any:
    """One forward over the tokens of `part`, those before it being in the cache."""
    seen = mask[:, : part.stop]
    positions = {name: value[:, part] for name, value in positions_of(model, seen).items()}
    inputs = {"input_ids": ids[:, part], "attention_mask": seen, **positions}
    if model.config.is_encoder_decoder:
        inputs = {f"decoder_{name}": value for name, value in inputs.items()} | encoded
    with torch.no_grad():
        return model(**inputs, past_key_values=cache, use_cache=part.stop < ids.shape[1] or cache is not None)


@pytest.mark.parametrize(
    "ends",
    [(64, *range(65, 80)), (1, 2, 3, 4, 9), (40, 41, 60, 61, 97), (8, 31, 55, 97)],
    ids=["prefill-and-steps", "from-one-token", "chunks-and-steps", "chunks"],
)
@each(CAUSAL)
def test_decoding_with_a_cache_equals_one_forward(pair: Pair, ends: tuple[int, ...]):
    """Left-padded batch; `ends` are the token counts after each call."""
    model = pair.model().double()
    ids, mask = _prompt(model, 3, ends[-1])
    if ends[0] < 32:
        mask[:] = 1  # no row may be empty when the first call ends
    with pair.patch(model):
        encoded = {}
        if model.config.is_encoder_decoder:
            source = inputs_for(model, batch=3, length=37)
            with torch.no_grad():
                states = model.get_encoder()(source["input_ids"], attention_mask=source["attention_mask"])
            encoded = {"encoder_outputs": states, "attention_mask": source["attention_mask"]}
        whole = _call(model, ids, mask, slice(0, ids.shape[1]), encoded).logits
        cache, parts, start = None, [], 0
        for end in ends:
            step = _call(model, ids, mask, slice(start, end), encoded, cache)
            parts.append(step.logits)
            cache, start = step.past_key_values, end
    assert_close(torch.cat(parts, dim=1), whole, 1e-9, "decoded logits", where=mask)


@each([pair for pair in CAUSAL if pair.family == "gpt2"])
def test_greedy_generation_equals_generation_without_cache(pair: Pair):
    model = pair.model().double()
    ids, mask = _prompt(model, 3, 41)
    options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    with pair.patch(model):
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
        assert torch.equal(cached[0, :-8], ids[0])
        # and the first new token is the best one of a plain forward
        plain = logits(model, {"input_ids": ids, "attention_mask": mask, **positions_of(model, mask)})
        assert torch.equal(cached[:, 41], plain[:, -1].argmax(-1))
