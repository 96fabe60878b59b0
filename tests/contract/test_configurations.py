"""What converts also runs: hosts of one head and one layer, and hosts that take their tokens in chunks."""

from __future__ import annotations

from typing import Any

from pairs import MAIN, VARIANTS, Pair, each

from hf_efficient.testing import inputs_for

HEADS = {"gpt2": "n_head", "t5": "num_heads"}


def runs_or_is_refused(pair: Pair, **overrides: Any) -> str:
    """One forward, one backward and one `generate`; what was said of it, where it was refused."""
    model = pair.model(**{"layers": 1, "positions": 32} | overrides)
    inputs = inputs_for(model, batch=2, length=20)
    if pair.is_causal:
        inputs["attention_mask"][:] = 1
    try:
        handle = pair.patch(model)
    except ValueError as error:
        assert "these settings are not possible" in str(error)
        return str(error)
    with handle:
        logits = model(**inputs).logits
        assert logits.isfinite().all()
        logits.sum().backward()
        if model.can_generate() and pair.is_causal:
            prompt = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
            model.generate(**prompt, max_new_tokens=3, do_sample=False)
    return ""


ONE_HEAD = [pair for pair in MAIN if pair.family in ("bert", "gpt2") or pair.side == "decoder"]
PER_HEAD = [pair for pair in VARIANTS if pair.mechanism in ("longformer", "blockwise", "combined")]


@each(ONE_HEAD + PER_HEAD, of="attention")
def test_one_head_and_one_layer(pair: Pair) -> None:
    runs_or_is_refused(pair, **{HEADS.get(pair.family, "num_attention_heads"): 1})


@each([pair for pair in MAIN + VARIANTS if pair.family == "bert"], of="attention")
def test_layers_that_take_their_tokens_in_chunks(pair: Pair) -> None:
    changes = pair.mechanism == "funnel" or pair.config.attention_class.num_extra_tokens(pair.config) > 0
    refusal = runs_or_is_refused(pair, layers=3, chunk_size_feed_forward=4)
    assert ("set chunk_size_feed_forward=0" in refusal) == changes
