"""Causal means causal: no gradient from the future. That decoding equals one full forward stands in test_decoding.py."""

from __future__ import annotations

import torch
from pairs import MAIN, VARIANTS, Pair, each

from hf_efficient.testing import inputs_for

CAUSAL = [pair for pair in MAIN + VARIANTS if pair.is_causal]


@each(CAUSAL, of="attention")
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
