"""Padding between real tokens is never taken for distance: the row gives what it gives without it, or is refused."""

from __future__ import annotations

import pytest
import torch
from pairs import MAIN, VARIANTS, Pair, each
from torch import Tensor

import hf_efficient as he
from hf_efficient.families import family_of
from hf_efficient.testing import assert_close, tiny_model

MESSAGE = "attention_mask has zeros between real tokens"
# by these alone a mechanism may know nothing of where tokens stand
BY_CONTENT = {"performer", "linear_transformer", "random_feature", "t2r", "clustered"}
LENGTH, HOLE = 34, slice(11, 18)


def row_with_a_hole(model: object, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their mask and positions that do not count the padding in between."""
    mask = torch.ones(rows, LENGTH, dtype=torch.long)
    mask[:, HOLE] = 0
    ids = torch.randint(5, 99, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    ids = torch.where(mask.bool(), ids, model.config.pad_token_id)
    offset = family_of(model).positions.offset(model.config)
    return ids, mask, (mask.cumsum(-1) - 1) + offset


@each([pair for pair in MAIN + VARIANTS if pair.family != "t5" and "bert-variant" not in pair.label])
@torch.no_grad()
def test_a_row_with_a_hole_is_the_row_without_it_or_refused(pair: Pair) -> None:
    model = pair.model(positions=64).double()
    ids, mask, positions = row_with_a_hole(model)
    real = mask[0].bool()
    with pair.patch(model):
        ways = [{"position_ids": positions}]
        if pair.family == "roberta":
            ways.append({})  # makes these positions itself
        for given in ways:
            try:
                actual = model(input_ids=ids, attention_mask=mask, **given).logits[0, real]
            except ValueError as error:
                assert MESSAGE in str(error) and (pair.mechanism not in BY_CONTENT or "variant" in pair.label), str(
                    error
                )
                continue
            expected = model(input_ids=ids[:, real], position_ids=positions[:, real]).logits[0]
            assert_close(actual, expected, 1e-9)


@torch.no_grad()
def test_positions_that_count_the_hole_are_right() -> None:
    for family in ("bert", "gpt2"):
        model = tiny_model(family)
        ids, mask, _ = row_with_a_hole(model)
        with he.patch_attention(model, "local", attention_window=4):
            given = torch.arange(LENGTH)[None]
            out = [model(input_ids=ids, attention_mask=mask, **p).logits for p in ({}, {"position_ids": given})]
        assert torch.equal(*out)


@torch.no_grad()
@pytest.mark.parametrize("name", ["local", "performer"])
def test_holes_between_the_calls_that_fill_a_cache(name: str) -> None:
    """A prefix that all rows share, then prompts that are padded on the left; and `generate`, with that cache."""
    model = tiny_model("gpt2").double()
    ids, mask, positions = row_with_a_hole(model, rows=2)
    ids[1], mask[1, HOLE], positions[1] = ids[1].flip(0), 1, torch.arange(LENGTH)
    options = dict(attention_window=4) if name == "local" else {}
    cut = HOLE.start
    with he.patch_attention(model, name, **options):
        cache = model(ids[:, :cut], use_cache=True).past_key_values
        rest = dict(input_ids=ids[:, cut:], attention_mask=mask, position_ids=positions[:, cut:].clamp(min=0))
        if name == "local":
            with pytest.raises(ValueError, match=rf"{MESSAGE} \(before token 18 of row 0\)"):
                model(**rest, past_key_values=cache)
            with pytest.raises(ValueError, match=MESSAGE):
                model.generate(ids, attention_mask=mask, max_new_tokens=2)
            return
        out = model(**rest, past_key_values=cache).logits
        real = mask[0].bool()
        alone = model(ids[:1, real]).logits
    assert_close(out[:1, HOLE.stop - cut :], alone[:, cut:], 1e-9)


def test_compiled_models_stop_at_holes() -> None:
    model = tiny_model("gpt2", layers=1)
    ids, mask, positions = row_with_a_hole(model)
    torch.compiler.reset()
    with he.patch_attention(model, "local", attention_window=4):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        compiled(ids, attention_mask=mask, position_ids=torch.arange(LENGTH)[None])
        with pytest.raises(RuntimeError, match=MESSAGE):
            compiled(ids, attention_mask=mask, position_ids=positions)
    torch.compiler.reset()
