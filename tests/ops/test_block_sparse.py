"""Block-sparse attention in plain PyTorch against its definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pattern_cases import BY_LENGTH, HEADS, PATTERNS, WIDTH, dense
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_efficient.ops.block_sparse import attention, traceable
from hf_efficient.ops.block_sparse import gather as blocks
from hf_efficient.ops.block_sparse import torch_backend as torch_attention
from hf_efficient.ops.block_sparse.attention import block_sparse_attention, reference_attention
from hf_efficient.ops.block_sparse.decompose import _heads_of
from hf_efficient.ops.context import AttentionCall, AttentionContext, ExtraKeys
from hf_efficient.ops.dense import dense_attention
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.ops.softmax import attend, merge_attention
from hf_efficient.patterns.kinds import (
    BlockWindow,
    Full,
    Strided,
    Summary,
    Window,
)
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.sets import PerHead
from hf_efficient.patterns.tile_table import tile_table
from hf_efficient.profiling.counters import LargestTensor, flops
from hf_efficient.testing import assert_close

each = pytest.mark.parametrize("name", PATTERNS)


class Problem:
    """Random heads in fp64 for three rows: all real, padded behind, and padded in front and with a hole."""

    def __init__(self, n: int, kv_heads: int = HEADS):
        generator = torch.Generator().manual_seed(n)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shapes = [(3, heads, n, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
        self.heads = [normal(*shape).requires_grad_() for shape in shapes]
        self.keep = torch.ones(3, n, dtype=torch.bool)
        self.keep[1, n - n // 3 :] = False
        self.keep[2, : n // 4] = self.keep[2, n // 2 : n // 2 + n // 8] = False
        self.table = normal(11, HEADS).requires_grad_()
        self.bias = RelativeBias(self.table, lambda offsets: offsets.clamp(-5, 5) + 5, 5)
        self.segment = torch.randint(0, 2, (3, HEADS, n), generator=generator)
        self.position = torch.randint(0, n, (3, 1, n), generator=generator)
        self.weights = normal(3, HEADS, n, WIDTH), normal(3, HEADS, n)
        self.extra = normal(2, 3, HEADS, 2, WIDTH)

    def results(self, function: Any, pattern: Pattern, **options: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Output, log-sum-exp, and the gradients of both together."""
        out, lse = function(*self.heads, pattern, call_of(**options), return_lse=True)
        finite = torch.where(lse.isfinite(), lse, 0.0)
        loss = (out * self.weights[0]).sum() + (finite * self.weights[1]).sum()
        leaves = [*self.heads, self.table]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return out, lse, [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def call_of(**facts: Any) -> AttentionCall:
    return AttentionCall(**dict(is_causal=False, scaling=WIDTH**-0.5) | facts)


def by_row(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """The definition for each row with the pattern of its own number of tokens."""
    keep, parts = call.key_padding_mask, []
    assert keep is not None and return_lse
    for row in range(len(query)):
        length = int(keep[row].nonzero().max()) + 1
        segments = None if call.segments is None else tuple(x[row : row + 1] for x in call.segments)
        own = replace(call, key_padding_mask=keep[row : row + 1], segments=segments)
        heads = (x[row : row + 1] for x in (query, key, value))
        parts.append(reference_attention(*heads, pattern.at_length(length), own, return_lse=True))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def assert_same_results(actual: Any, expected: Any, label: str) -> None:
    assert torch.equal(actual[1].isinf(), expected[1].isinf()), label
    assert_close(actual[0], expected[0], 1e-9, f"output, {label}")
    assert (actual[0][expected[1].isinf()] == 0).all(), f"an empty row is not 0, {label}"
    there = expected[1].isfinite()
    if there.any():
        assert_close(actual[1][there], expected[1][there], 1e-9, f"lse, {label}")
    for which, a, e in zip("qkvb", actual[2], expected[2], strict=True):
        if e.any():
            assert_close(a, e, 1e-9, f"gradient of {which}, {label}")
        else:
            assert a.abs().max() < 1e-9, f"gradient of {which}, {label}"


@pytest.fixture(params=["pieces", "dense", "graph"])
def route(request, monkeypatch):
    """One dense tile never, or wherever it can serve; or the form of graphs for other runtimes, where there is one."""
    if request.param == "graph":
        monkeypatch.setattr(attention, "is_tracing", lambda: True)
        monkeypatch.setattr(traceable, "_longest", lambda n: None)  # known lengths are mostly below one window
    monkeypatch.setattr(torch_attention, "DENSE_SHARE", 9.0 if request.param == "pieces" else -1.0)


@pytest.mark.parametrize("is_causal", [False, True])
@each
def test_attention_is_its_definition(name: str, is_causal: bool, route):
    pattern, _ = PATTERNS[name]
    for n in (1, 2, 63, 110):
        problem = Problem(n)
        vectors = dict(segments=(problem.segment, problem.segment), positions=(problem.position, problem.position))
        for kind, facts in (("plain", {}), ("bias", dict(relative_bias=problem.bias)), ("vectors", vectors)):
            options: dict[str, Any] = dict(is_causal=is_causal, key_padding_mask=problem.keep, **facts)
            if kind == "plain" and n == 63:
                options.pop("key_padding_mask")
            if kind == "plain" and n == 110:
                options["softcap"] = 1.5
            expected = problem.results(reference_attention, pattern, **options)
            actual = problem.results(block_sparse_attention, pattern, **options)
            assert_same_results(actual, expected, f"{n} tokens, {kind}")
            if kind == "bias":
                plain = block_sparse_attention(*problem.heads, pattern, call_of(**options))
                assert_close(plain, expected[0], 1e-9, f"{n} tokens, without log-sum-exp")


@pytest.mark.parametrize("name", BY_LENGTH)
def test_attention_by_length_is_its_definition(name: str, route):
    for n in (1, 2, 63, 110):
        problem = Problem(n)
        capped = dict(softcap=1.5) if n == 63 else {}
        for facts in (capped, dict(relative_bias=problem.bias), dict(segments=(problem.segment, problem.segment))):
            options: dict[str, Any] = dict(key_padding_mask=problem.keep, **facts)
            expected = problem.results(by_row, BY_LENGTH[name], **options)
            assert_same_results(problem.results(block_sparse_attention, BY_LENGTH[name], **options), expected, f"{n}")


@each
def test_extra_keys_join_the_softmax(name: str, route):
    """Against the definition: two more keys of their own, seen by some queries only, one with an additive logit."""
    pattern, _ = PATTERNS[name]
    n = 70
    problem = Problem(n)
    query, key, value = (x.detach() for x in problem.heads)
    shown = torch.ones(3, n, 2, dtype=torch.bool)
    shown[1, ::3, 0] = shown[2, :, 1] = False
    bias = torch.linspace(-1, 1, HEADS * n * 2, dtype=torch.float64).view(1, HEADS, n, 2)
    extra = ExtraKeys(*problem.extra, shown, bias)
    call = call_of(scaling=0.4, key_padding_mask=problem.keep, extra=extra, is_causal=True)
    out, lse = block_sparse_attention(query, key, value, pattern, call, return_lse=True)
    scores = 0.4 * query @ torch.cat([problem.extra[0], key], 2).mT
    seen = dense(pattern, n, n, is_causal=True) & problem.keep[:, None, None]
    seen = torch.cat([shown[:, None].expand(-1, HEADS, -1, -1), seen.expand(-1, HEADS, -1, -1)], -1)
    scores = (scores + torch.cat([bias, torch.zeros(1, HEADS, n, n)], -1)).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0.0) @ torch.cat([problem.extra[1], value], 2)
    assert_close(out, expected, 1e-9)
    there = seen.any(-1)
    assert_close(lse[there], scores.logsumexp(-1)[there], 1e-9)


GROUPED = [
    "window",
    "dilated",
    "axial",
    "merged fixed",
    "per head",
    "longformer",
    "columns in a window",
    "causal bigbird",
]


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", [*GROUPED, "bigbird", "cyclic and window"])
def test_grouped_queries_share_keys(name: str, kv_heads: int, route, monkeypatch):
    """The definition with repeated keys; here no head of keys is repeated, with extra keys and a cap of the logits too."""
    pattern, definition = (BY_LENGTH[name], by_row) if name in BY_LENGTH else (PATTERNS[name][0], reference_attention)
    problem = Problem(90, kv_heads)
    padded = dict(key_padding_mask=problem.keep)
    cases: list[dict[str, Any]] = [padded, padded | dict(relative_bias=problem.bias), padded | dict(softcap=1.5)]
    expected = [problem.results(definition, pattern, **facts) for facts in cases]
    query, key, value = problem.heads
    whole = [x.repeat_interleave(HEADS // kv_heads, dim=1) for x in (key, value)]
    extra = ExtraKeys(*problem.extra, torch.ones(3, 90, 2, dtype=torch.bool), None)
    joined = block_sparse_attention(query, *whole, pattern, call_of(extra=extra))

    def repeated(*_: Any) -> None:
        raise AssertionError("keys are repeated")

    monkeypatch.setattr("hf_efficient.ops.softmax.expand_heads", repeated)
    for facts, truth in zip(cases, expected, strict=True):
        assert_same_results(problem.results(block_sparse_attention, pattern, **facts), truth, f"{list(facts)}")
    assert_close(block_sparse_attention(query, key, value, pattern, call_of(extra=extra)), joined, 1e-12)
    plain = block_sparse_attention(query, key, value, pattern, call_of(**padded))
    assert_close(plain, expected[0][0], 1e-9, "without log-sum-exp")


@pytest.mark.parametrize("name", ["window", "longformer", "causal bigbird"])
def test_no_head_of_keys_is_copied_for_its_queries(name: str):
    """Steps of decoding, and full attention: nothing is as large as the keys repeated for each head of queries."""
    pattern, s = PATTERNS[name][0], 4096
    key, value = torch.randn(2, 1, 1, s, 64)
    for n, softcap in ((1, None), (3, None), (1, 2.0)):
        call = AttentionCall(scaling=0.4, is_causal=True, query_offset=s - n, softcap=softcap)
        with LargestTensor() as largest:
            block_sparse_attention(torch.randn(1, HEADS, n, 64), key, value, pattern, call)
            dense_attention(torch.randn(1, HEADS, n, 64), key, value, AttentionContext(scaling=0.4, is_causal=True))
        assert largest.numel <= key.numel(), largest.shape


@pytest.mark.parametrize(
    "heads, owners", [([0, 1], [0]), ([1, 3], [0, 1]), ([0, 1, 2], [0, 0, 1]), ([0, 1, 2, 3], [0, 1])]
)
def test_heads_with_a_pattern_of_their_own_share_keys_where_they_can(heads: list[int], owners: list[int]):
    assert _heads_of(torch.arange(2)[None], heads, HEADS).tolist() == [owners]


def test_merged_parts_are_one_softmax():
    """Three disjoint sets of keys, with queries that see nothing in some or all of them; values and gradients."""
    problem = Problem(40)
    query, key, value = problem.heads
    seen = torch.rand(3, 1, 40, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[:, :, 5] = seen[0, :, 6, :30] = seen[1, :, 7, 10:] = False
    logits = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)

    def over(part: slice) -> tuple[Tensor, Tensor]:
        out, lse = attend(query, key[:, :, part], value[:, :, part], logits[..., part], scaling=0.3, return_lse=True)
        assert lse is not None
        return out, lse

    def merged(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return merge_attention(over(slice(0, 10)), over(slice(10, 30)), over(slice(30, 40)))

    def whole(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return over(slice(0, 40))

    assert_same_results(problem.results(merged, Full()), problem.results(whole, Full()), "merged")
    by_formula = (0.3 * query @ key.mT + logits).logsumexp(-1)
    there = by_formula.isfinite()
    assert_close(whole()[1][there], by_formula[there], 1e-12)
    assert (whole()[0][:, :, 5] == 0).all()


@each
def test_new_tokens_see_what_the_definition_shows(name: str):
    """Some queries against a cache; later keys are hidden from the earlier ones among them."""
    pattern, _ = PATTERNS[name]
    problem = Problem(70)
    query, key, value = (x.detach() for x in problem.heads)
    for first in (69, 60, 5):
        call = AttentionCall(scaling=0.4, is_causal=True, relative_bias=problem.bias, query_offset=first)
        call = replace(call, softcap=1.5 if first == 60 else None)
        expected = reference_attention(query[:, :, first:], key, value, pattern, call, return_lse=True)
        actual = block_sparse_attention(query[:, :, first:], key, value, pattern, call, return_lse=True)
        assert torch.equal(actual[1].isinf(), expected[1].isinf())
        for a, e in zip(actual, expected, strict=True):
            assert_close(torch.where(e.isinf(), 0, a), torch.where(e.isinf(), 0, e), 1e-9, f"from {first}")


@pytest.mark.parametrize("name", ["blocks and memory", "causal bigbird"])
def test_tables_made_for_inference_or_elsewhere_serve_training(name: str):
    pattern, _ = PATTERNS[name]
    for cached in (tile_table, blocks._plan):
        cached.cache_clear()
    tokens = torch.randn(1, HEADS, 600, WIDTH)
    with torch.inference_mode(), torch.device("meta"):
        expected = block_sparse_attention(tokens, tokens, tokens, pattern, call_of(is_causal=True))
    tokens.requires_grad_()
    out = block_sparse_attention(tokens, tokens, tokens, pattern, call_of(is_causal=True))
    assert torch.equal(out, expected)
    out.sum().backward()
    assert tokens.grad is not None and tokens.grad.any()


@pytest.mark.parametrize("name", ["causal bigbird in a window", "bigbird in a window"])
def test_drawn_blocks_in_a_window_compile_to_one_graph(name: str):
    """Grouped heads, a cap and the log-sum-exp as well."""
    pattern = BY_LENGTH[name] if name in BY_LENGTH else PATTERNS[name][0]
    query, (key, value) = torch.randn(2, HEADS, 200, WIDTH), torch.randn(2, 2, 2, 200, WIDTH)

    def attention(*tensors: Tensor) -> Any:
        call = call_of(is_causal=name not in BY_LENGTH, softcap=2.0)
        return block_sparse_attention(*tensors, pattern, call, return_lse=True)

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    for actual, expected in zip(compiled(query, key, value), attention(query, key, value), strict=True):
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_sum_exps_of_half_precision_are_those_of_its_inputs(dtype: torch.dtype, autocast: bool):
    """Large logits and many values: only the result is rounded."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 300, 64, generator=generator).mul(4).to(dtype) for _ in range(3))
    with torch.autocast("cpu", dtype, enabled=autocast):
        out, lse = attend(query, key, value, None, scaling=0.125, return_lse=True)
    exact = attend(query.double(), key.double(), value.double(), None, scaling=0.125, return_lse=True)
    assert lse is not None and lse.dtype == torch.float32 and out.dtype == dtype
    assert_close(out.double(), exact[0], torch.finfo(dtype).eps)
    assert_close(lse.double(), exact[1], 1e-5)
    many = torch.full((1, 1, 8192, 2), 10.0, dtype=dtype)
    assert (attend(many[:, :, :1] * 0, many, many, None, scaling=1.0, return_lse=True)[0] == 10).all()


def test_lengths_with_the_same_last_block_share_a_pattern():
    pattern = BY_LENGTH["bigbird"]
    assert pattern.at_length(33) == pattern.at_length(40) != pattern.at_length(41)


@pytest.mark.parametrize("name", ["merged fixed", "merged strided", "two strides"])
def test_root_n_patterns_cost_root_n(name: str):
    """At 4 × the length and twice the stride, work and the largest tensor grow 8 ×; full attention's would grow 16 ×."""
    cost = {}
    for n in (1024, 4096):
        stride = int(n**0.5)
        near = BlockWindow(block_size=stride) if "fixed" in name else Window(left=stride - 1, right=0)
        far = Summary(stride=stride, size=1) if "fixed" in name else Strided(stride=stride)
        far = far | Strided(stride=stride + 3) if name == "two strides" else far
        q, k, v = torch.randn(3, 1, 1, n, 16, requires_grad=True)

        def step(pattern: Pattern = near | far, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            block_sparse_attention(q, k, v, pattern, call_of(is_causal=True)).sum().backward()

        with sdpa_kernel(SDPBackend.MATH):
            with LargestTensor() as recorder:
                step()
            cost[n] = recorder.numel, flops(step)
    for before, after in zip(cost[1024], cost[4096], strict=True):
        assert after <= 9 * before, cost


@pytest.mark.parametrize("name", [name for name in [*PATTERNS, *BY_LENGTH] if "in a window" in name])
def test_inside_a_window_no_tensor_has_all_pairs(name: str):
    pattern, n = BY_LENGTH[name] if name in BY_LENGTH else PATTERNS[name][0], 4096
    heads, keep = torch.randn(3, 1, HEADS, n, WIDTH), torch.arange(n)[None] < n - 9
    with LargestTensor() as largest:
        block_sparse_attention(*heads, pattern, call_of(key_padding_mask=keep))
    assert largest.numel <= n * n // 4, largest.shape


# ---- what is refused ---------------------------------------------------------------------------------------------


def _call(query: Any = None, key: Any = None, value: Any = None, pattern: Any = None, **options: Any) -> Any:
    tokens = torch.zeros(2, HEADS, 10, WIDTH)
    query = tokens if query is None else query
    key = tokens if key is None else key
    pattern = Window(left=1, right=1) if pattern is None else pattern
    own = {name: options.pop(name) for name in ("return_lse", "implementation") if name in options}
    return block_sparse_attention(query, key, key if value is None else value, pattern, call_of(**options), **own)


SOME = torch.zeros(2, HEADS, 10, WIDTH)
NUMBERS = (torch.zeros(2, 1, 10, dtype=torch.long),) * 2
BIAS = RelativeBias(torch.zeros(3, HEADS), lambda offsets: offsets.clamp(-1, 1) + 1, 1)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dtypes": (dict(key=SOME.double()), "one dtype on one device, not torch.float32 on cpu, torch.float64"),
    "devices": (dict(key=SOME.to("meta")), "one dtype on one device, not .* on meta"),
    "heads of the pattern": (dict(pattern=PerHead(parts=(Full(),) * 3)), "made for 3 heads, but there are 4"),
    "three axes": (dict(query=SOME[0]), "do not fit"),
    "values": (dict(value=SOME[:, :, :5]), r"value \(2, 4, 5, 8\) do not fit"),
    "key heads": (dict(key=torch.zeros(2, 3, 10, WIDTH)), r"key \(2, 3, 10, 8\).*do not fit"),
    "widths": (dict(key=torch.zeros(2, HEADS, 10, 4)), "do not fit"),
    "mask of numbers": (
        dict(key_padding_mask=torch.ones(2, 10)),
        r"of torch.float32 \(2, 10\) must be bool \(2, 10\)",
    ),
    "mask of another length": (
        dict(key_padding_mask=torch.ones(2, 9, dtype=torch.bool)),
        r"\(2, 9\) must be bool \(2, 10\)",
    ),
    "a cap of nothing": (dict(softcap=0.0), "softcap=0.0 must be greater than 0, or None"),
    "positions with a bias": (dict(positions=NUMBERS, relative_bias=BIAS), "does not go with `positions`"),
    "encoder while decoding": (dict(query=SOME[:, :, :2]), "2 queries and 10 keys: only a causal"),
    "segments while decoding": (dict(query=SOME[:, :, :2], is_causal=True, segments=NUMBERS), "takes no segments"),
    "more queries than keys": (dict(key=SOME[:, :, :5]), "10 queries and 5 keys: every query needs a key of its own"),
    "kernels while decoding": (
        dict(query=SOME[:, :, :2], is_causal=True, implementation="triton"),
        "implementation='triton' can't take this call: queries of new tokens .* use 'auto' or 'torch'",
    ),
    "flex while decoding": (
        dict(query=SOME[:, :, :2], is_causal=True, implementation="flex", pattern=Full()),
        "implementation='flex' can't take this call",
    ),
    "implementation": (dict(implementation="cuda"), "implementation='cuda' is not possible"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_do_not_fit_are_refused(name: str):
    options, message = REFUSED[name]
    _call()
    with pytest.raises(ValueError, match=message):
        _call(**options)
