"""One row per mechanism: what the generic suites run it with. A mechanism without a row fails test_policy.py."""

from __future__ import annotations

import math
from collections.abc import Callable
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
        encoder_variants, causal_variants: the same, for encoders or causal models only.
        mask: the pattern as a float-4-D-mask oracle exists in test_oracles.py.
        by_content: which keys are seen depends on what they are, so that rounding in front of the choice can change it.
        parameters: the mechanism has trainable parameters of its own.
        unused: ends of the names of host parameters that `small` or a variant has no use for, whose gradient is 0.
        options_at: further options at a length, where cost is linear only if some option grows with the length.
        growth: by how much cost grows at 4 × the length.
    """

    small: dict[str, Any]
    sides: frozenset[str]
    t5_options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    error_law: str = ""
    finer: dict[str, Any] = field(default_factory=dict)
    finer_by: float = 1.0
    variants: tuple[dict[str, Any], ...] = ()
    encoder_variants: tuple[dict[str, Any], ...] = ()
    causal_variants: tuple[dict[str, Any], ...] = ()
    mask: bool = True
    by_content: bool = False
    parameters: bool = False
    unused: tuple[str, ...] = ()
    options_at: Callable[[int], dict[str, Any]] | None = None
    growth: float = 4.0


ALL = frozenset({"E", "C", "T5"})

CASES: dict[str, Case] = {
    "local": Case(
        dict(attention_window=8),
        ALL,
        variants=(dict(attention_window=6, dilation=3), dict(attention_window=6, sink_tokens=2)),
    ),
    "longformer": Case(
        dict(attention_window=8, global_tokens="first"),
        ALL,
        variants=(
            dict(attention_window=8),
            dict(attention_window=(4, 12), global_tokens=(0, 5)),
            dict(attention_window=6, dilation=2, global_tokens="first"),
            dict(attention_window=6, dilation=(1, 2, 1, 3), global_tokens="first"),
        ),
        parameters=True,
    ),
    "bigbird": Case(
        dict(block_size=4, num_random_blocks=2),
        ALL,
        variants=(dict(block_size=5, num_random_blocks=0),),
        encoder_variants=(
            dict(block_size=5, num_random_blocks=1, form="etc", num_global_tokens=3),
            dict(block_size=5, num_random_blocks=0, first_block_weight=3.0),
        ),
    ),
    "etc": Case(
        dict(attention_window=8, num_global_tokens=3),
        frozenset({"E", "T5"}),
        variants=(
            dict(attention_window=8, num_global_tokens=2, sharing="kv"),
            dict(attention_window=12, num_global_tokens=5, sharing="none", relative_labels=4),
            dict(attention_window=8, num_global_tokens=0, relative_labels=2),
        ),
        mask=False,
        parameters=True,
    ),
    "longt5": Case(
        dict(attention_window=8, global_block_size=6),
        frozenset({"E", "T5"}),
        variants=(
            dict(attention_window=8, global_block_size=6, pooling="rms", log_count=False),
            dict(attention_window=4, global_block_size=25, log_count=False),
        ),
        mask=False,
        parameters=True,
        # n · n / g: with a fixed number of slots it is linear
        options_at=lambda length: dict(global_block_size=length // 16),
    ),
    "sparse_transformer": Case(
        dict(stride=8),
        ALL,
        variants=(
            dict(stride=9, head_policy="split"),
            dict(stride=7, head_policy="interleaved"),
            dict(pattern="fixed", stride=10, summary_size=2),
            dict(pattern="fixed", stride=8, summary_size=1, head_policy="split"),
            dict(pattern="fixed", stride=20, summary_size=3, head_policy="interleaved"),
        ),
        # n √n
        options_at=lambda length: dict(stride=math.isqrt(length)),
        growth=8.0,
    ),
    "axial": Case(
        dict(row_length=10),
        ALL,
        variants=(dict(row_length=7, form="split"), dict(row_length=18, form="interleaved")),
        # n √n
        options_at=lambda length: dict(row_length=math.isqrt(length)),
        growth=8.0,
    ),
    "blockwise": Case(
        dict(block_size=8),
        ALL,
        variants=(dict(block_size=5, shifts=(0, 1, 2, 3)), dict(block_size=6, shifts=(2, 1))),
    ),
    "image_local": Case(
        dict(block_size=8, memory_size=5),
        ALL,
        variants=(
            dict(block_size=7, memory_size=0),
            dict(block_size=(2, 3), memory_size=(1, 1), grid=(8, 5)),
            dict(block_size=3, memory_size=1, grid=(20, 4)),
        ),
    ),
    "combined": Case(
        dict(
            patterns=(
                dict(mechanism="local", attention_window=4),
                dict(mechanism="image_local", block_size=7, memory_size=0),
            )
        ),
        ALL,
        variants=(
            dict(
                patterns=(dict(mechanism="local", attention_window=8), dict(mechanism="axial", row_length=12)),
                heads=(1, 1),
            ),
            dict(
                patterns=(
                    dict(mechanism="local", attention_window=4),
                    dict(mechanism="axial", row_length=9),
                    dict(mechanism="sparse_transformer", pattern="fixed", stride=20, summary_size=1),
                )
            ),
            dict(
                patterns=(
                    dict(mechanism="local", attention_window=4),
                    dict(mechanism="blockwise", block_size=6, shifts=(0, 2)),
                )
            ),
            dict(
                patterns=(
                    dict(mechanism="longformer", attention_window=4, global_tokens=(0, 7)),
                    dict(mechanism="image_local", block_size=5, memory_size=0),
                )
            ),
        ),
    ),
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
            dict(rank=16, projection="conv"),
            dict(rank=(8, 20), projection="mean"),
            dict(rank=16, sharing="none", head_ranks=(16, 3, 8, 16)),
        ),
        mask=False,
        parameters=True,
    ),
    "memory_compressed": Case(
        dict(compression_rate=3, block_size=6),
        ALL,
        variants=(dict(compression_rate=4, block_size=4),),
        mask=False,
        parameters=True,
        # n √n
        options_at=lambda length: dict(compression_rate=math.isqrt(length), block_size=math.isqrt(length)),
        growth=8.0,
    ),
    "set_transformer": Case(
        dict(num_inducing=12),
        frozenset({"E", "T5"}),
        variants=(dict(num_inducing=5, segment_bias=0.5),),
        mask=False,
        parameters=True,
    ),
    "nystromformer": Case(
        dict(num_landmarks=12, conv_kernel_size=5),
        frozenset({"E"}),
        variants=(dict(num_landmarks=9, conv_kernel_size=None, pinv_iterations=3),),
        mask=False,
        parameters=True,
    ),
    "synthesizer": Case(
        dict(variant="dense"),
        ALL,
        t5_options=dict(max_length=128),
        variants=(
            dict(variant="random"),
            dict(variant="factorized_dense", factors=(11, 12)),
            dict(variant="factorized_random", rank=5),
        ),
        mask=False,
        parameters=True,
        # logits without keys, and those of positions alone
        unused=("self.key.weight", "self.query.weight", "self.query.bias", "Attention.k.weight", "Attention.q.weight"),
        growth=16.0,
    ),
    "sinkhorn": Case(
        dict(block_size=6, num_sorted_blocks=2),
        ALL,
        variants=(dict(block_size=5, num_sorted_blocks=1), dict(block_size=8, num_sorted_blocks=0)),
        encoder_variants=(
            dict(block_size=5, num_sorted_blocks=3, iterations=4, temperature=0.5),
            dict(block_size=7, num_sorted_blocks=2, sortcut=True),
        ),
        mask=False,
        by_content=True,
        # n √n, and (n / b)²
        options_at=lambda length: dict(block_size=math.isqrt(length)),
        growth=8.0,
    ),
    "clustered": Case(
        dict(num_clusters=6, top_k=5),
        frozenset({"E", "T5"}),
        variants=(dict(num_clusters=9, top_k=0, iterations=1),),
        mask=False,
        by_content=True,
    ),
    "routing_transformer": Case(
        dict(num_clusters=4, cluster_size=10, attention_window=8),
        ALL,
        variants=(
            dict(num_clusters=7, cluster_size=16, attention_window=0),
            dict(num_clusters=1, cluster_size=20, attention_window=4),
        ),
        mask=False,
        by_content=True,
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
    "linear_transformer": Case(
        dict(),
        frozenset({"E", "C"}),
        exact=False,
        error_law="another kernel than the softmax",
        mask=False,
        parameters=True,
    ),
    "cosformer": Case(
        dict(),
        frozenset({"E", "C"}),
        exact=False,
        error_law="another kernel than the softmax",
        mask=False,
    ),
    "random_feature": Case(
        dict(num_features=16),
        frozenset({"E", "C"}),
        exact=False,
        error_law="the error to softmax attention of unit vectors falls with num_features",
        causal_variants=(dict(num_features=16, gate=True),),
        mask=False,
        parameters=True,
    ),
    "hedgehog": Case(
        dict(attention_window=8),
        ALL,
        t5_options=dict(attention_window=44),
        variants=(
            dict(attention_window=0),
            dict(attention_window=2, feature_dim=11),
            dict(feature_dim=3, attention_window=6, sink_tokens=2),
        ),
        mask=False,
        parameters=True,
    ),
    "t2r": Case(
        dict(),
        ALL,
        t5_options=dict(attention_window=44),
        variants=(dict(attention_window=8, feature_dim=13),),
        mask=False,
        parameters=True,
    ),
    "transformer_xl": Case(
        # a stopped gradient is not that of the function: test_transformer_xl.py
        dict(segment_length=7, memory_length=5, stop_gradient=False),
        frozenset({"C", "T5"}),
        variants=(
            dict(segment_length=6, memory_length=20, stop_gradient=False),
            dict(segment_length=9, memory_length=4, stop_gradient=False, relative=True),
        ),
        mask=False,
        # of the variant: multiplied by a projection that starts at 0
        unused=("efficient.position_bias",),
    ),
    "compressive": Case(
        dict(segment_length=6, memory_length=7, compressed_memory_length=5, compression_rate=3, stop_gradient=False),
        frozenset({"C", "T5"}),
        variants=tuple(
            dict(
                segment_length=8,
                memory_length=memory,
                compressed_memory_length=9,
                compression_rate=2,
                compression=compression,
                stop_gradient=False,
            )
            for compression, memory in (("mean", 4), ("max", 3), ("dilated", 5), ("most_used", 10))
        ),
        mask=False,
        parameters=True,
    ),
    "reformer": Case(
        dict(num_buckets=4, bucket_size=8, num_hashes=2, attention_window=4),
        ALL,
        variants=(
            dict(num_buckets=6, bucket_size=5, num_hashes=1, num_chunks_before=0, attention_window=0),
            dict(num_buckets=2, bucket_size=7, num_hashes=3, attention_window=0, shared_qk=True),
        ),
        mask=False,
        by_content=True,
        # shared queries and keys: those of the keys
        unused=("self.query.weight", "self.query.bias", "Attention.q.weight"),
    ),
    "funnel": Case(
        # models of one layer pool, too
        dict(blocks=(0, 1)),
        frozenset({"E", "T5"}),
        variants=(
            dict(),
            dict(blocks=(0, 1, 1)),
            dict(pool_size=3, blocks=(0, 2), separate_cls=False),
        ),
        mask=False,
        # (n / p)²
        growth=16.0,
    ),
}
