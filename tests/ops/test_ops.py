"""Every operation against its definition, written down a second time with loops and dense masks in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_efficient.kernels import cpu_attention, cpu_band
from hf_efficient.ops import linear_attention
from hf_efficient.ops import softmax as attend_module
from hf_efficient.ops.block_sparse import gather as blocks
from hf_efficient.ops.block_sparse import windows
from hf_efficient.ops.block_sparse.gather import BlockPlan, block_list_attention
from hf_efficient.ops.block_sparse.windows import window_attention
from hf_efficient.ops.context import AttentionCall, ExtraKeys
from hf_efficient.ops.global_tokens import up_to_separator
from hf_efficient.ops.padding import first_real_token, real_length, shift_rows
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.ops.softmax import additive_mask, attend
from hf_efficient.patterns.kinds import Window
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.testing import assert_close

TOLERANCE = 1e-9
HEADS, WIDTH, SCALING = 3, 5, 0.7
LENGTHS = (1, 2, 63, 97, 200)


# ---- definitions -------------------------------------------------------------------------------------------------


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax over the visible keys, (B, H, N, S) or broadcast to it; 0 where nothing is visible."""
    logits = SCALING * torch.einsum("bhnd,bhsd->bhns", query, key) + (0 if bias is None else bias)
    visible = visible.expand_as(logits)
    top = logits.masked_fill(~visible, -math.inf).amax(-1, keepdim=True).clamp(min=-1e300)
    weights = (logits - top).masked_fill(~visible, -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0) @ value


def window(n: int, s: int, left: int, right: int, dilation: int = 1, query_offset: int = 0) -> Tensor:
    """(N, S) bool from the sentence in the docstring."""
    reachable = [dilation * m for m in range(-left, right + 1)]
    return torch.tensor([[j - (query_offset + i) in reachable for j in range(s)] for i in range(n)]).view(n, s)


def heads(*shape: int, seed: int = 0, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).mul(1.5).requires_grad_() for _ in range(count)
    ]


def query_key_value(batch: int, n: int, s: int, seed: int = 0) -> list[Tensor]:
    return heads(batch, HEADS, n, WIDTH, seed=seed, count=1) + heads(batch, HEADS, s, WIDTH, seed=seed + 1, count=2)


def padding(batch: int, s: int) -> Tensor:
    """(B, S): row 0 padded on the left, row 1 on the right, row 2 with holes, row 3 without any real token."""
    keep = torch.ones(batch, s, dtype=torch.bool)
    keep[0, : s // 3] = False
    keep[1, s - s // 3 :] = False
    keep[2, torch.arange(s) % 5 == 2] = False
    keep[3] = False
    return keep


def table_bias(reach: int = 6, seed: int = 0) -> RelativeBias:
    """One learned value per offset in [-reach, reach], constant beyond."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(2 * reach + 1, HEADS, generator=generator, dtype=torch.float64).requires_grad_()
    return RelativeBias(table, lambda offsets: offsets.clamp(-reach, reach) + reach, reach)


def dense_bias(bias: RelativeBias, queries: Any, keys: Any) -> Tensor:
    """(H, N, S) bias between two lists of positions."""
    reach = bias.saturation
    ids = torch.tensor([[max(-reach, min(reach, j - i)) + reach for j in keys] for i in queries])
    return bias.table[ids].movedim(-1, 0)


def assert_same_with_gradients(actual: Tensor, expected: Tensor, leaves: dict[str, Tensor]) -> None:
    """Values, and the gradients of every leaf under one random cotangent."""
    assert_close(actual, expected, TOLERANCE, "output")
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for name, a, e in zip(
        leaves,
        torch.autograd.grad(actual, list(leaves.values()), cotangent),
        torch.autograd.grad(expected, list(leaves.values()), cotangent),
        strict=True,
    ):
        if e.abs().max() == 0:
            assert a.abs().max() <= 1e-12, f"gradient of {name} should vanish"
        else:
            assert_close(a, e, TOLERANCE, f"gradient of {name}")


# ---- windows -----------------------------------------------------------------------------------------------------

# rows of a block, and whether operations of any device stand in for the fused kernel
PATHS = {"own": (None, True), "blocks": (4, True), "plain": (4, False)}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    rows, is_fused = PATHS[request.param]
    if not is_fused:
        monkeypatch.setattr(windows, "_is_fused", lambda query, call: False)
    if rows is not None:
        monkeypatch.setattr(windows, "_block_size", lambda reach: rows)
        monkeypatch.setattr(cpu_band, "NARROW", 0)
        monkeypatch.setattr(cpu_band, "FORWARD_ROWS", rows)
        monkeypatch.setattr(cpu_band, "BACKWARD_ROWS", rows + 3)
    return request.param


def windowed(query: Tensor, key: Tensor, value: Tensor, near: Window, **facts: Any) -> Tensor:
    call = AttentionCall(**dict(is_causal=False, scaling=SCALING) | facts)
    return window_attention(query, key, value, near, call)[0]


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("left, right", [(0, 0), (3, 0), (0, 4), (2, 5), (7, 7), (60, 60)])
@pytest.mark.parametrize("n", LENGTHS)
def test_window(n: int, left: int, right: int, dilation: int, path: str) -> None:
    q, k, v = query_key_value(4, n, n)
    mask = window(n, n, left, right, dilation)
    near, keep, bias = Window(left=left, right=right, dilation=dilation), padding(4, n), table_bias()
    assert_close(windowed(q, k, v, near), attention(q, k, v, mask), TOLERANCE, "plain")
    actual = windowed(q, k, v, near, key_padding_mask=keep, relative_bias=bias)
    expected = attention(q, k, v, mask & keep[:, None, None], dense_bias(bias, range(n), range(n)))
    assert_close(actual, expected, TOLERANCE, "padded, with bias")
    assert actual[3].abs().max() == 0, "a row without real keys"
    actual = windowed(q, k, v, near, key_padding_mask=keep)
    assert_close(actual, attention(q, k, v, mask & keep[:, None, None]), TOLERANCE, "padded")


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("dilation", [1, 3])
def test_window_is_a_few_calls_whatever_the_length(
    dilation: int, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks whose keys all exist are one call, and nothing is copied for them; padding at the ends only shortens rows."""
    sizes: list[int] = []
    forward = cpu_attention.forward

    def spy(query: Tensor, key: Tensor, *rest: Any) -> Any:
        sizes.append(key.shape[2])
        return forward(query, key, *rest)

    monkeypatch.setattr(cpu_attention, "forward", spy)
    near = Window(left=9, right=5, dilation=dilation)
    for n in (600, 1200):
        q, k, v = query_key_value(1, n, n)
        keep = torch.arange(n)[None] < n - 17 * is_padded
        sizes.clear()
        with torch.no_grad(), LargestTensor() as recorder:
            actual = windowed(q, k, v, near, key_padding_mask=keep if is_padded else None)
        mask = window(n, n, 9, 5, dilation) & keep[:, None]
        assert_close(actual, attention(q, k, v, mask), TOLERANCE)
        assert recorder.numel <= (n + dilation) * HEADS * WIDTH
        assert max(sizes) <= cpu_band.FORWARD_ROWS + 9 + 5
        assert len(sizes) <= dilation * 4


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize(
    "n, s, query_offset, right",
    [(1, 1, 0, 0), (1, 50, 49, 0), (7, 60, 53, 0), (64, 97, 33, 0), (97, 130, 33, 0), (30, 97, 20, 4), (90, 97, 0, 4)],
)
def test_window_of_queries_among_more_keys(
    n: int, s: int, query_offset: int, right: int, dilation: int, path: str
) -> None:
    q, k, v = query_key_value(4, n, s)
    keep, bias = padding(4, s), table_bias()
    actual = windowed(
        q,
        k,
        v,
        Window(left=5, right=right, dilation=dilation),
        key_padding_mask=keep,
        relative_bias=bias,
        query_offset=query_offset,
    )
    mask = window(n, s, 5, right, dilation, query_offset) & keep[:, None, None]
    positions = range(query_offset, query_offset + n)
    assert_close(actual, attention(q, k, v, mask, dense_bias(bias, positions, range(s))), TOLERANCE)


def extra_keys(batch: int, n: int, form: str, with_bias: bool) -> ExtraKeys:
    """Three further keys; `form` names the axes that their keep-mask really has."""
    key, value = heads(batch, HEADS, 3, WIDTH, seed=7, count=2)
    shape = (batch if "b" in form else 1, n if "n" in form else 1, 3)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[0, 0] = torch.tensor([True, False, True])
    bias = heads(batch if "b" in form else 1, HEADS, n, 3, seed=8, count=1)[0] if with_bias else None
    return ExtraKeys(key, value, keep, bias)


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("form", ["", "b", "n", "bn"])
@pytest.mark.parametrize("n, s", [(40, 40), (97, 97), (97, 110)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_window_with_extra_keys(n: int, s: int, form: str, with_bias: bool, dilation: int, path: str) -> None:
    q, k, v = query_key_value(4, n, s)
    extra, keep = extra_keys(4, n, form, with_bias), padding(4, s)
    bias = table_bias() if with_bias else None
    actual = windowed(
        q,
        k,
        v,
        Window(left=4, right=2, dilation=dilation),
        key_padding_mask=keep,
        relative_bias=bias,
        query_offset=s - n,
        extra=extra,
    )
    near = (window(n, s, 4, 2, dilation, s - n) & keep[:, None, None]).expand(4, 1, n, s)
    visible = torch.cat([extra.keep[:, None].expand(4, 1, n, 3), near], -1)
    added = None
    if bias is not None and extra.bias is not None:
        added = torch.cat(
            [extra.bias.expand(4, -1, -1, -1), dense_bias(bias, range(s - n, s), range(s)).expand(4, -1, -1, -1)], -1
        )
    expected = attention(q, torch.cat([extra.key, k], 2), torch.cat([extra.value, v], 2), visible, added)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_masks_of_hidden_keys_are_held_in_parts(rows: int, dilation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that are hidden one by one take masks, of so many blocks at a time; which changes nothing."""
    n, span, block = 97, 7, 8
    q, k, v = query_key_value(4, n, n)
    extra, bias, keep = extra_keys(4, n, "bn", True), table_bias(), padding(4, n)
    near = Window(left=4, right=2, dilation=dilation)
    whole: Any = dict(key_padding_mask=keep, relative_bias=bias, extra=extra)
    expected = windowed(q, k, v, near, **whole)
    monkeypatch.setattr(cpu_band, "FORWARD_ROWS", 2 * block)
    monkeypatch.setattr(cpu_band, "MASK_BUDGET", rows * HEADS * block * (span + block - 1))
    sizes = []
    forward = cpu_attention.forward

    def record(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Any:
        # the extra keys are attended to in one go
        sizes.extend(
            [len(mask)] * (k.shape[2] == span + block - 1) if mask is not None and len(mask) == len(q) else []
        )
        return forward(q, k, v, mask, *rest)

    monkeypatch.setattr(cpu_attention, "forward", record)
    assert_close(windowed(q, k, v, near, **whole), expected, TOLERANCE)
    assert max(sizes) == rows, "the budget did not cut the blocks"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
def test_window_gradients(causal: bool, dilation: int, path: str) -> None:
    n, right = 63, 0 if causal else 3
    q, k, v = query_key_value(4, n, n)
    keep, bias, extra = padding(4, n), table_bias(), extra_keys(4, n, "bn", True)
    assert extra.bias is not None
    actual = windowed(
        q,
        k,
        v,
        Window(left=3, right=right, dilation=dilation),
        key_padding_mask=keep,
        relative_bias=bias,
        extra=extra,
    )
    near = (window(n, n, 3, right, dilation) & keep[:, None, None]).expand(4, 1, n, n)
    visible = torch.cat([extra.keep[:, None], near], -1)
    added = torch.cat([extra.bias, dense_bias(bias, range(n), range(n)).expand(4, -1, -1, -1)], -1)
    expected = attention(q, torch.cat([extra.key, k], 2), torch.cat([extra.value, v], 2), visible, added)
    leaves = {"q": q, "k": k, "v": v, "table": bias.table, "extra key": extra.key, "extra value": extra.value}
    assert_same_with_gradients(actual, expected, leaves | {"extra bias": extra.bias})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_without_keys_have_finite_gradients(dtype: torch.dtype, with_bias: bool, path: str) -> None:
    """0 in, 0 out: the softmax of nothing must not become NaN backwards either."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in query_key_value(4, 63, 63))
    bias = table_bias() if with_bias else None
    out = windowed(q, k, v, Window(left=2, right=2), key_padding_mask=padding(4, 63), relative_bias=bias)
    assert out[3].abs().max() == 0
    for name, gradient in zip("qkv", torch.autograd.grad(out.square().sum(), (q, k, v)), strict=True):
        assert gradient.isfinite().all(), name
        assert gradient[3].abs().max() == 0, name
        assert gradient[0].abs().max() > 0, name


def test_window_memory_grows_with_length_not_with_its_square() -> None:
    sizes = []
    for n in (512, 2048):
        q, k, v = (torch.randn(1, 2, n, 8) for _ in range(3))
        with LargestTensor() as recorder:
            windowed(q, k, v, Window(left=8, right=8))
        sizes.append(recorder.numel)
    assert sizes[1] <= 4.5 * sizes[0]


# ---- lists of blocks ---------------------------------------------------------------------------------------------


def listed(query: Tensor, key: Tensor, value: Tensor, columns: Tensor, size: int, **facts: Any) -> Tensor:
    call = AttentionCall(scaling=SCALING, **facts)
    return block_list_attention(query, key, value, plan(columns, size), call, block_size=size)[0]


def random_columns(batch: int, num_heads: int, rows: int, count: int, seed: int = 0) -> Tensor:
    """Distinct random block numbers per row, about a quarter of them replaced by -1; one row sees nothing."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, num_heads, rows, rows, generator=generator).argsort(-1)[..., : min(count, rows)]
    columns = torch.where(torch.rand(order.shape, generator=generator) < 0.25, -1, order)
    columns[..., -1, :] = -1
    return columns


def plan(columns: Tensor, size: int) -> BlockPlan:
    """All query blocks in one group, each tile wholly visible."""
    return BlockPlan(
        [(torch.arange(columns.shape[2]), columns, None)], torch.zeros(0, size, size, dtype=torch.bool), None
    )


def block_mask(columns: Tensor, n: int, size: int, causal: bool) -> Tensor:
    """(B, H, N, N) bool by looking up every pair."""
    lists = columns.tolist()
    return torch.tensor(
        [
            [
                [[j // size in row[i // size] and (j <= i or not causal) for j in range(n)] for i in range(n)]
                for row in h
            ]
            for h in lists
        ]
    )


@pytest.mark.parametrize("budget", [None, 1, 3000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, HEADS), (4, HEADS)])
@pytest.mark.parametrize("n, size, count", [(1, 4, 1), (33, 4, 3), (48, 16, 2), (61, 5, 13)])
def test_block_lists(
    n: int, size: int, count: int, shape: tuple[int, int], causal: bool, budget: int | None, monkeypatch: Any
) -> None:
    if budget is not None:
        monkeypatch.setattr(blocks, "GATHER_BUDGET", budget)
    q, k, v = query_key_value(4, n, n)
    columns = random_columns(*shape, -(-n // size), count)
    mask, keep, bias = block_mask(columns, n, size, causal), padding(4, n), table_bias()
    expected = attention(q, k, v, mask) if n > 1 else torch.zeros_like(q)  # the last row of lists is empty
    if n == 1:
        assert listed(q, k, v, columns, size, is_causal=causal).abs().max() == 0
        return
    assert_close(listed(q, k, v, columns, size, is_causal=causal), expected, TOLERANCE, "plain")
    actual = listed(q, k, v, columns, size, is_causal=causal, key_padding_mask=keep)
    assert_close(actual, attention(q, k, v, mask & keep[:, None, None]), TOLERANCE, "padded")
    assert actual[3].abs().max() == 0
    actual = listed(q, k, v, columns, size, is_causal=causal, key_padding_mask=keep, relative_bias=bias)
    expected = attention(q, k, v, mask & keep[:, None, None], dense_bias(bias, range(n), range(n)))
    assert_close(actual, expected, TOLERANCE, "padded, with bias")


@pytest.mark.parametrize("shape", [(1, 1), (4, HEADS)])
@pytest.mark.parametrize("causal", [False, True])
def test_block_list_gradients(shape: tuple[int, int], causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "GATHER_BUDGET", 4000)
    n, size = 33, 4
    q, k, v = query_key_value(4, n, n)
    columns, keep, bias = random_columns(*shape, 9, 3), padding(4, n), table_bias()
    actual = listed(q, k, v, columns, size, is_causal=causal, key_padding_mask=keep, relative_bias=bias)
    mask = block_mask(columns, n, size, causal) & keep[:, None, None]
    expected = attention(q, k, v, mask, dense_bias(bias, range(n), range(n)))
    assert_same_with_gradients(actual, expected, {"q": q, "k": k, "v": v, "table": bias.table})


@pytest.mark.parametrize("shape", [None, (5, 1, 33, 33), (33, 33), (1, 2, 33, 33)])
def test_scores_are_held_in_parts(shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting the batch bounds the scores held at once, and changes nothing."""
    q, k, v = heads(5, 2, 33, 8)
    logits = None if shape is None else heads(*shape, count=1)[0].requires_grad_()
    leaves = {"q": q, "k": k, "v": v} | ({} if logits is None else {"logits": logits})
    whole = torch.cat([x.flatten() for x in attend(q, k, v, logits, scaling=SCALING, return_lse=True)])
    monkeypatch.setattr(attend_module, "SCORE_BUDGET", 2 * 33 * 33)
    with torch.no_grad(), LargestTensor() as recorder:
        attend(q, k, v, logits, scaling=SCALING, return_lse=True)
    assert recorder.numel < 5 * 2 * 33 * 33 / 3, "all scores at once"
    parts = torch.cat([x.flatten() for x in attend(q, k, v, logits, scaling=SCALING, return_lse=True)])
    assert_same_with_gradients(parts, whole, leaves)


# ---- linear attention --------------------------------------------------------------------------------------------


def kernel_attention(log_query: Tensor, log_key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """The quadratic form: weights `Σ_r φ(q)_r φ(k)_r`, as logarithms, through one softmax."""
    n, s = log_query.shape[2], log_key.shape[2]
    exists = (log_key > -math.inf).any(-1)[:, :, None]
    log_key = torch.where(log_key > -math.inf, log_key, 0.0)  # logsumexp of nothing has no gradient
    logits = torch.logsumexp(log_query[:, :, :, None] + log_key[:, :, None], dim=-1)
    visible = torch.tensor([[j <= i + s - n or not causal for j in range(s)] for i in range(n)]).view(n, s)
    visible = visible & exists
    top = logits.masked_fill(~visible, -math.inf).amax(-1, keepdim=True).clamp(min=-1e300)
    weights = (logits - top).masked_fill(~visible, -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0) @ value


def log_features(batch: int, n: int, s: int, features: int = 6, scale: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n + s)
    return [
        torch.randn(batch, HEADS, length, last, generator=generator, dtype=torch.float64).mul(factor).requires_grad_()
        for length, last, factor in ((n, features, scale), (s, features, scale), (s, WIDTH, 1.0))
    ]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_attention, "CHUNK", 8)
    monkeypatch.setattr(linear_attention, "GROUP", 3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n, s", [(1, 1), (2, 2), (8, 8), (9, 9), (29, 29), (1, 20), (5, 29), (20, 29)])
def test_linear_attention(n: int, s: int, causal: bool) -> None:
    q, k, v = log_features(4, n, s)
    actual = linear_attention.linear_attention(q, k, v, is_causal=causal)
    assert_same_with_gradients(actual, kernel_attention(q, k, v, causal), {"q": q, "k": k, "v": v})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n, s", [(29, 29), (20, 33)])
def test_linear_attention_without_some_keys(n: int, s: int, causal: bool) -> None:
    """Log-features -∞ = no such key: whole chunks of them at the start, holes, and a row without any key."""
    q, k, v = log_features(4, n, s)
    keep = padding(4, s)
    keep[0, :17] = False
    k = k.masked_fill(~keep[:, None, :, None], -math.inf)
    actual = linear_attention.linear_attention(q, k, v, is_causal=causal)
    assert_same_with_gradients(actual, kernel_attention(q, k, v, causal), {"q": q, "v": v})
    assert actual[3].abs().max() == 0
    if causal and n == s:
        assert actual[0, :, :17].abs().max() == 0


def test_linear_attention_at_its_own_chunk_size() -> None:
    n = 2 * linear_attention.CHUNK + 31
    q, k, v = log_features(1, n, n, features=3)
    actual = linear_attention.linear_attention(q, k, v, is_causal=True)
    assert_same_with_gradients(actual, kernel_attention(q, k, v, True), {"q": q, "k": k, "v": v})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, TOLERANCE), (torch.float32, 2e-5)])
@pytest.mark.parametrize("position", [0, 3, 12, 28])
@pytest.mark.parametrize("size", [60.0, 2000.0])
def test_linear_attention_with_one_huge_key(
    causal: bool, dtype: torch.dtype, tolerance: float, position: int, size: float
) -> None:
    """Features from e^-size to e^size on one key: neither it nor the keys beside it may overflow or vanish."""
    q, k, v = log_features(1, 29, 29)
    with torch.no_grad():
        k[:, :, position] = torch.linspace(-size, size, 6)
    expected = kernel_attention(q, k, v, causal)
    q, k, v = (x.detach().to(dtype) for x in (q, k, v))
    actual = linear_attention.linear_attention(q, k, v, is_causal=causal)
    assert_close(actual.double(), expected, tolerance)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 200.0, 2000.0])
def test_linear_attention_ignores_the_future(dtype: torch.dtype, size: float) -> None:
    """A later key, however large, changes no earlier output, also inside one chunk."""
    q, k, v = (x.detach().to(dtype) for x in log_features(2, 29, 29))
    expected = linear_attention.linear_attention(q, k, v, is_causal=True)
    for position in (2, 12, 28):
        changed, other = k.clone(), v.clone()
        changed[:, :, position:] += size
        other[:, :, position:] = 7.0
        actual = linear_attention.linear_attention(q, changed, other, is_causal=True)
        assert_close(actual[:, :, :position], expected[:, :, :position], 1e-6 if dtype == torch.float32 else 1e-12)
        assert (actual[:, :, position] - expected[:, :, position]).abs().max() > 0.1


def test_causal_linear_attention_ends_like_bidirectional() -> None:
    q, k, v = log_features(2, 29, 29)
    causal, both = (linear_attention.linear_attention(q, k, v, is_causal=c) for c in (True, False))
    assert_close(causal[:, :, -1], both[:, :, -1], TOLERANCE)


# ---- relative bias -----------------------------------------------------------------------------------------------


def test_bias_at_offsets() -> None:
    bias = table_bias(4)
    offsets = torch.tensor([[-100, -5, -4], [0, 3, 99]])
    expected = torch.stack([bias.table[[0, 0, 0]], bias.table[[4, 7, 8]]]).movedim(-1, 0)
    assert torch.equal(bias.at(offsets), expected)


@pytest.mark.parametrize("rows, columns, first, step", [(1, 1, 0, 1), (3, 7, -2, 1), (7, 3, 5, 1), (4, 9, -30, 3)])
def test_bias_toeplitz(rows: int, columns: int, first: int, step: int) -> None:
    bias = table_bias(4)
    ids = [[max(-4, min(4, step * (first + c - r))) + 4 for c in range(columns)] for r in range(rows)]
    assert torch.equal(bias.toeplitz(rows, columns, first, step), bias.table[torch.tensor(ids)].movedim(-1, 0))


@pytest.mark.parametrize("n, s, query_offset", [(5, 5, 0), (1, 9, 8), (4, 20, 16)])
def test_bias_dense(n: int, s: int, query_offset: int) -> None:
    bias = table_bias(4)
    expected = dense_bias(bias, range(query_offset, query_offset + n), range(s))[None]
    assert torch.equal(bias.dense(n, s, query_offset), expected)


@pytest.mark.parametrize("n", [1, 3, 8, 50])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, HEADS), (2, HEADS)])
def test_bias_of_pooled_keys(n: int, shape: tuple[int, int]) -> None:
    bias = table_bias(4)
    weights = heads(*shape, 5, n, count=1)[0]
    expected = torch.einsum("bhrj,hij->bhir", weights.expand(-1, HEADS, -1, -1), dense_bias(bias, range(n), range(n)))
    assert_same_with_gradients(bias.pooled(weights), expected, {"weights": weights, "table": bias.table})


@pytest.mark.parametrize("buckets, distance", [(32, 128), (16, 24), (32, 64)])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_saturation_is_what_the_host_computes(model_type: str, side: str, buckets: int, distance: int) -> None:
    """`pooled` rests on it: beyond `saturation` the host's own bucket function is constant on each side."""
    from hf_efficient.patching.temporary import patch_attention
    from hf_efficient.testing import tiny_model

    model = tiny_model(
        model_type, relative_attention_num_buckets=buckets, relative_attention_max_distance=distance, layers=1
    )
    attention = getattr(model, side).block[0].layer[0].SelfAttention
    length = 3 * distance
    expected = attention.compute_bias(length, length)[0]  # the host's dense bias, before anything is replaced
    with patch_attention(model, "local", attention_window=8, side="both"):
        bias = attention.compute_bias(length, length)
        assert isinstance(bias, RelativeBias)
        far = torch.arange(bias.saturation, 20 * distance)
        for offsets in (far, -far):
            assert bias.bucket(offsets).unique().numel() == 1
        assert torch.equal(bias.dense(length, length, 0)[0], expected)


# ---- alignment ---------------------------------------------------------------------------------------------------


def test_first_and_last_real_token() -> None:
    keep = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert first_real_token(keep).tolist() == [0, 1, 0, 3, 0]
    assert real_length(keep).tolist() == [2, 4, 0, 4, 4]


@pytest.mark.parametrize("shape, dim", [((3, 7), 1), ((3, 7, 2), 1), ((3, 2, 7, 4), 2)])
def test_shift_rows(shape: tuple[int, ...], dim: int) -> None:
    tensor, shift = torch.randn(shape), torch.tensor([0, 3, -2])
    shifted = shift_rows(tensor, shift, dim)
    for row in range(3):
        for j in range(7):
            at = tensor[row].select(dim - 1, (j + int(shift[row])) % 7)
            assert torch.equal(shifted[row].select(dim - 1, j), at)
    assert torch.equal(shift_rows(shifted, -shift, dim), tensor)


@pytest.mark.parametrize("form", ["all visible", "rows without a key", "additive"])
@pytest.mark.parametrize("share", [1.0, 1e-25, 0.0])
def test_the_log_sum_exp_and_its_gradient(form: str, share: float) -> None:
    """Against the definition, also where the output itself has hardly a gradient, or none."""
    q, k, v = query_key_value(2, 13, 21)
    logits = None
    if form == "rows without a key":
        logits = additive_mask(torch.rand(2, 1, 13, 21) < 0.5, torch.float64)
        logits[:, :, 4] = float("-inf")
    elif form == "additive":
        logits = torch.randn(1, HEADS, 1, 21, dtype=torch.float64)
    empty = torch.zeros(2, HEADS, 13, dtype=torch.bool)
    empty[:, :, 4] = form == "rows without a key"
    scores = q @ k.mT * SCALING + (0.0 if logits is None else torch.where(empty[..., None], 0.0, logits))
    expected = torch.where(empty[..., None], 0.0, scores.softmax(-1) @ v), scores.logsumexp(-1)
    out, lse = attend(q, k, v, logits, scaling=SCALING, return_lse=True)
    assert lse is not None and torch.equal(lse == float("-inf"), empty) and not out[empty].any()
    weights, seen, gradients = [torch.randn_like(x) for x in expected], ~empty, []
    for y, total in (expected, (out, lse)):
        loss = (share * weights[0] * y)[seen].sum() + (weights[1] * total)[seen].sum()
        gradients.append(torch.autograd.grad(loss, (q, k, v)))
        assert_close(y, expected[0], 1e-9, "output")
        assert_close(total[seen], expected[1][seen], 1e-9, "log-sum-exp")
    if not share:
        assert all(g[2].abs().max() < 1e-28 for g in gradients), "values get no gradient from the log-sum-exp"
        gradients = [g[:2] for g in gradients]
    for name, one, other in zip("qkv", *gradients, strict=False):
        assert_close(other, one, 1e-9, f"gradient of {name}")


@pytest.mark.parametrize("which", range(5), ids=["query", "key", "value", "logits", "gradient"])
def test_memory_may_lie_in_any_order(which: int) -> None:
    """PyTorch's kernel takes the last axis of heads for dense."""
    leaves = query_key_value(2, 13, 21)
    inputs = [*leaves, *(torch.randn(*shape, dtype=torch.float64) for shape in ((1, HEADS, 13, 21), leaves[0].shape))]
    other = list(inputs)
    other[which] = inputs[which].mT.contiguous().mT
    found = []
    for q, k, v, logits, gradient in (inputs, other):
        out, lse = attend(q, k, v, logits, scaling=SCALING, return_lse=True)
        assert lse is not None
        alone = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        both = torch.autograd.grad((out, lse), leaves, (gradient, torch.ones_like(lse)))
        found.append([out, lse, *alone, *both])
    for one, transposed in zip(*found, strict=True):
        assert_close(transposed, one, 1e-12, "of another order")


def test_a_query_without_a_gradient_gives_keys_none() -> None:
    """Exactly 0: causality is proven by gradients that are 0."""
    q, k, v = query_key_value(1, 9, 12)
    out, lse = attend(q, k, v, None, scaling=SCALING, return_lse=True)
    assert lse is not None
    (gradient,) = torch.autograd.grad(out[:, :, 3].sum() + lse[:, :, 3].sum(), q)
    assert gradient[:, :, 3].all() and not gradient[:, :, [i for i in range(9) if i != 3]].any()
    out, lse = attend(q, k, v, None, scaling=SCALING, return_lse=True)
    assert lse is not None
    assert not any(g.any() for g in torch.autograd.grad(0.0 * out.sum() + 0.0 * lse.sum(), (q, k, v)))


# ---- questions ---------------------------------------------------------------------------------------------------


def test_a_question_ends_at_the_first_real_separator():
    """Padding on the left may hold the separator's id; a row without real tokens needs none."""
    ids = torch.tensor([[3, 3, 7, 8, 3, 9, 3], [7, 3, 8, 9, 3, 3, 3], [3] * 7])
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0] * 7]).bool()
    expected = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0], [0] * 7]).bool()
    assert torch.equal(up_to_separator(ids, 3, real), expected)
    real[0, 4] = real[0, 6] = False
    with pytest.raises(ValueError, match=r"no separator \(separator_token_id=3\).* question and context as a pair"):
        up_to_separator(ids, 3, real)
