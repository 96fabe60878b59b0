"""One row per mechanism: what the generic suites run it with. A mechanism without a row fails test_policy.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """How the generic suites exercise one mechanism.

    Args:
        small: options at which its sparse code runs on inputs of 97 tokens, far from full attention.
        sides: "E" (encoders), "C" (causal), "T5" (relative bias) as architecture allows them; others must be refused.
        t5_options: options that only T5 needs.
        exact: whether `exact_config` exists; otherwise `error_law` says what falls instead.
        finer: without an exact limit: options whose error is `finer_by` times smaller than that of `small`.
        variants: further option sets that every property must hold for.
        mask: the pattern as a float-4-D-mask oracle exists in test_oracles.py.
        parameters: the mechanism has trainable parameters of its own.
    """

    small: dict[str, Any]
    sides: frozenset[str]
    t5_options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    error_law: str = ""
    finer: dict[str, Any] = field(default_factory=dict)
    finer_by: float = 1.0
    variants: tuple[dict[str, Any], ...] = ()
    mask: bool = True
    parameters: bool = False


ALL = frozenset({"E", "C", "T5"})

CASES: dict[str, Case] = {
    "local": Case(dict(attention_window=8), ALL, variants=(dict(attention_window=6, dilation=3),)),
    "longformer": Case(
        dict(attention_window=8, global_tokens="first"),
        ALL,
        variants=(
            dict(attention_window=8),
            dict(attention_window=(4, 12), global_tokens=(0, 5)),
            dict(attention_window=6, dilation=2, global_tokens="first"),
        ),
        parameters=True,
    ),
    "bigbird": Case(dict(block_size=4, num_random_blocks=2), ALL, variants=(dict(block_size=5, num_random_blocks=0),)),
    "linformer": Case(
        dict(rank=16),
        frozenset({"E", "T5"}),
        t5_options=dict(max_length=128),
        variants=(
            dict(rank=16, sharing="none"),
            dict(rank=16, sharing="kv"),
            dict(rank=16, sharing="layerwise"),
            dict(rank=16, projection="mean"),
            dict(rank=16, projection="max"),
        ),
        mask=False,
        parameters=True,
    ),
    "performer": Case(
        dict(num_features=32),
        frozenset({"E", "C"}),
        exact=False,
        error_law="the error falls with num_features",
        finer=dict(num_features=32 * 64),
        finer_by=8.0,
        variants=(dict(num_features=32, kernel="relu"),),
        mask=False,
    ),
}
