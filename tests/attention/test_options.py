"""Options that can't matter beside the others: refused when given, dropped from stored configs."""

from __future__ import annotations

from typing import Any

import pytest

import hf_efficient as he
from hf_efficient.attention.base.registry import stored_attention

# mechanism, an option and a value, options beside which it is dead, others beside which it matters
DEAD: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("synthesizer", dict(mixture_of="dense"), dict(variant="random"), dict()),
    ("synthesizer", dict(rank=5), dict(variant="dense"), dict(variant="factorized_random")),
    ("synthesizer", dict(rank=5), dict(mixture_of="random"), dict(mixture_of="factorized_random")),
    ("linformer", dict(sharing="headwise"), dict(projection="mean"), dict()),
    ("linformer", dict(sharing="kv"), dict(projection="max"), dict(projection="conv")),
    ("longformer", dict(separator_token_id=3), dict(global_tokens="first"), dict(global_tokens="question")),
    ("longformer", dict(separator_token_id=3), dict(global_tokens=(0, 4)), dict(global_tokens="question")),
    ("bigbird", dict(seed=0), dict(num_random_blocks=0), dict()),
    ("reformer", dict(seed=0), dict(num_buckets=1), dict()),
]


@pytest.mark.parametrize(("mechanism", "option", "beside", "elsewhere"), DEAD)
def test_an_option_that_cannot_matter_is_refused_and_dropped_from_stored_configs(
    mechanism: str, option: dict[str, Any], beside: dict[str, Any], elsewhere: dict[str, Any]
):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{mechanism}: {name}={value!r} is not possible; .*None"):
        he.attention_config(mechanism, **option, **beside)
    config = he.attention_config(mechanism, **beside).to_dict()
    assert stored_attention([config | option]) == [config]
    kept = he.attention_config(mechanism, **option, **elsewhere).to_dict()
    assert kept[name] == value and stored_attention([kept]) == [kept]
