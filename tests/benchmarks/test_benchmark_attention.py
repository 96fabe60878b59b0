"""The attention benchmark: it compares equal things, its floors count what patterns show, and its sums are right."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
import types
from typing import Any

import generate as cards
import pytest
import torch
from torch import Tensor

from hf_efficient.benchmarks import attention as benchmark_attention
from hf_efficient.benchmarks import baselines, suites
from hf_efficient.benchmarks import gpu as benchmark_gpu
from hf_efficient.benchmarks import models as benchmark
from hf_efficient.benchmarks.attention import Stage, attention_suite, crossovers
from hf_efficient.benchmarks.baselines import (
    BASELINES,
    BIASED,
    DENSE,
    MASKED,
    SAME,
    MechanismAttention,
    Point,
    build,
    mechanism_names,
)
from hf_efficient.benchmarks.work import count_pairs, pattern_of, work_of
from hf_efficient.ops.block_sparse.attention import block_sparse_attention, reference_attention
from hf_efficient.ops.context import AttentionCall
from hf_efficient.patterns.random_blocks import BigBirdBlocks
from hf_efficient.profiling import timing
from hf_efficient.profiling.timing import Times
from hf_efficient.testing import assert_close

HEADS, WIDTH = 2, 8
CALL = AttentionCall(is_causal=False, scaling=WIDTH**-0.5)


def point(length: int, **sizes: Any) -> Point:
    return Point(length, **{"heads": HEADS, "width": WIDTH, **sizes})


def outputs_and_gradients(attention: Any, at: Point) -> dict[str, Tensor]:
    *heads, gradient = at.tensors()
    leaves = [x.detach().requires_grad_() for x in heads]
    out = attention(*leaves)
    return {
        "out": out,
        **dict(zip(("query", "key", "value"), torch.autograd.grad(out, leaves, gradient), strict=True)),
    }


def assert_same(theirs: Any, ours: Any, at: Point) -> None:
    mine = outputs_and_gradients(ours, at)
    for name, x in outputs_and_gradients(theirs, at).items():
        assert_close(mine[name], x, 2e-5, name)


# ---- equal things ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, other", [("local", "transformers Longformer"), ("local", "transformers LongT5 local")])
def test_the_same_window(name: str, other: str):
    at = point(1536, batch=2)
    assert_same(build(other, at), build(name, at), at)
    assert_same(build(MASKED, at), build(name, at), at)


def test_the_same_global_token():
    at = point(1024)
    theirs, ours = build("transformers Longformer, first token global", at), build("longformer", at)
    for name, parameter in ours.module.named_parameters():
        parameter.data = theirs.module.get_parameter(name).data  # query_global, key_global, value_global
    for name in ("query_global", "key_global", "value_global"):
        # theirs have a bias, like BERT; ours follow the host
        torch.nn.init.zeros_(getattr(theirs.module, name).bias)
    assert_same(theirs, ours, at)


def test_the_same_slots():
    at = point(1024, batch=2)
    assert_same(build("transformers LongT5 transient-global", at), build("longt5", at), at)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnByTransformers(BigBirdBlocks):
    """BigBird's blocks with the random ones of `plan`: [head][block row - 1] → blocks."""

    plan: tuple[tuple[tuple[int, ...], ...], ...]

    def random_blocks(self, rows: Tensor, last: Tensor | None, num_blocks: int) -> Tensor:
        inner = torch.tensor(self.plan)
        edge = torch.full_like(inner[:, :1], -1)
        drawn = torch.cat([edge, inner, edge], dim=1)[:, rows[0]]
        return (drawn if self.single is None else drawn[self.single : self.single + 1])[None]


def test_the_same_blocks(monkeypatch: pytest.MonkeyPatch):
    """With the random blocks that transformers drew, in training; our own draws are judged in test_oracles.py."""
    at = point(1216)  # 19 blocks
    theirs, drawn = build("transformers BigBird", at), []
    draw = theirs.module._bigbird_block_rand_mask_with_head
    monkeypatch.setattr(
        theirs.module, "_bigbird_block_rand_mask_with_head", lambda **k: drawn.append(draw(**k)) or drawn[-1]
    )
    expected = outputs_and_gradients(theirs, at)
    plan = tuple(tuple(tuple(int(c) for c in row) for row in head) for head in drawn[0])
    assert all(len(set(row)) == 3 for head in plan for row in head), "blocks drawn twice would count twice"
    ours = build("bigbird", at)
    fields = {f.name: getattr(ours.module.pattern, f.name) for f in dataclasses.fields(BigBirdBlocks)}
    pattern = DrawnByTransformers(**fields, plan=plan)
    mine = outputs_and_gradients(
        lambda q, k, v: block_sparse_attention(q, k, v, pattern, CALL, implementation="torch"),
        at,
    )
    for name, x in expected.items():
        assert_close(mine[name], x, 2e-5, name)
    assert count_pairs(pattern, at.length, HEADS) == count_pairs(ours.module.pattern, at.length, HEADS)


@pytest.mark.parametrize("name", [n for n in mechanism_names() if n not in ("etc", "longformer", "longt5")])
def test_ours_is_the_attention_of_its_pattern(name: str):
    """The three others are more than their pattern; their own files compare them with formulas."""
    at = point(700)
    ours, pattern = build(name, at), pattern_of(name, at).at_length(700)
    assert_same(lambda q, k, v: reference_attention(q, k, v, pattern, CALL), ours, at)
    assert_same(baselines.masked(at, pattern), ours, at)


def test_every_comparison_names_baselines():
    assert set(SAME) <= set(mechanism_names()) and set(DENSE) <= set(BASELINES)
    assert all(other in BASELINES for others in SAME.values() for other in others)
    assert {"local", "longformer", "bigbird", "axial", "sparse_transformer"} <= set(mechanism_names())
    assert not {"linformer", "performer"} & set(mechanism_names())


# ---- floors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [64, 130, 700])
@pytest.mark.parametrize("name", mechanism_names())
def test_pairs_are_counted_as_the_pattern_shows_them(name: str, length: int):
    at = point(length, batch=3)
    position = torch.arange(length)
    pattern = pattern_of(name, at).at_length(length)
    seen = pattern.visible_per_head(position[:, None], position).expand(HEADS, -1, -1)
    work = work_of(name, at)
    slots = HEADS * length * (length // baselines.SLOT) if name == "longt5" else 0
    assert work.pairs == 3 * (int(seen.sum()) + slots)
    blocks = -(-length // 64)
    padded = torch.zeros(HEADS, blocks * 64, blocks * 64, dtype=torch.bool)
    padded[:, :length, :length] = seen
    tiles = padded.unflatten(2, (blocks, 64)).unflatten(1, (blocks, 64)).any(4).any(2).sum()
    assert work.tile_pairs in (None, 3 * int(tiles) * 64**2)
    assert work.bytes == 4 * 3 * HEADS * length * WIDTH * 4
    assert work.flops(2) == 4 * WIDTH * work.pairs and work.flops(7) == 3.5 * work.flops(2)


def test_floors_of_the_target_are_the_published_ones():
    """Window 512, 12 heads of 64, batch 8: 204.9 GFLOP over pairs, 229.9 over tiles, 812 MB with log-sum-exps."""
    at = dataclasses.replace(benchmark_gpu.TARGET, device="cpu")
    work = work_of("local", at)
    tile_flops = work.tile_flops(2)
    assert tile_flops is not None
    assert work.flops(2) / 1e9 == pytest.approx(204.9, abs=0.1) and tile_flops / 1e9 == pytest.approx(229.9, abs=0.1)
    assert work.bytes / 1e6 == pytest.approx(805.3, abs=0.1)


# ---- sums --------------------------------------------------------------------------------------------------------


def result(length: int, ratio: float, **more: Any) -> dict[str, Any]:
    place = {"contender": "local", "pass": "forward", "dtype": "float32", "batch": 1, "width": 64, "length": length}
    return place | {"faster_than": {MASKED: {"ratio": ratio}}} | more


@pytest.mark.parametrize(
    "ratios, expected",
    [
        ({512: 0.5, 1024: 0.9, 2048: 1.4, 4096: 3.0}, 2048),
        ({512: 1.5, 1024: 0.9, 2048: 1.4}, 2048),  # an early win does not count
        ({512: 1.1, 1024: 1.2}, 512),
        ({512: 0.5, 1024: 1.0}, None),
    ],
)
def test_crossover_is_where_it_stays_faster(ratios: dict[int, float], expected: int | None):
    shuffled = [result(n, ratio) for n, ratio in reversed(ratios.items())]
    other = [result(n, 5.0, batch=8) for n in ratios]
    found = {c["batch"]: c for c in crossovers([*shuffled, *other, {"contender": MASKED, "length": 512}])}
    assert found[1]["length"] == expected and found[1]["lengths"] == sorted(ratios) and found[1]["against"] == MASKED
    assert found[8]["length"] == 512


def test_ratios_are_medians_of_ratios_of_one_round():
    theirs, ours = (
        [Times(t, t, c) for t, c in pairs] for pairs in ([(8, 9), (2, 2), (30, 30)], [(2, 3), (1, 1), (3, 5)])
    )
    assert timing.ratios(theirs, ours) == {"ratio": 4, "ratio_min": 2, "ratio_max": 10, "cpu_ratio": 3}
    assert "cpu_ratio" not in timing.ratios([Times(8, 8, None)], [Times(2, 2, None)])


def test_timing_takes_turns_splits_at_the_mark_and_keeps_failures():
    order: list[str] = []

    def slow(mark: timing.Mark) -> None:
        order.append("slow")
        time.sleep(0.004)
        mark()
        time.sleep(0.02)

    def fails(mark: timing.Mark) -> None:
        raise RuntimeError("no room")

    calls = {"slow": slow, "quick": lambda mark: order.append("quick"), "fails": fails}
    failed: dict[str, str] = {}
    times = timing.timed(calls, 3, 60, failed=failed)
    assert order == ["slow", "quick"] * 4 and failed == {"fails": "RuntimeError: no room"}
    assert all(t.total >= 0.024 and 0.004 <= t.forward < t.total - 0.019 for t in times["slow"])
    assert all(t.forward == t.total for t in times["quick"])
    assert len(timing.timed(calls, 3, 0, failed=failed)["slow"]) == 1, "out of time after the first round"
    with pytest.raises(RuntimeError, match="no room"):
        timing.timed(calls, 3)


# ---- the suites --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    names = ("local", "bigbird", *DENSE, "transformers Longformer", "transformers BigBird", "local, learned bias")
    stages = [Stage(point(n), kind, names, 2) for n in (1024, 1536) for kind in ("forward", "training")]
    stages.append(Stage(point(1000), "forward", ("local", "transformers BigBird"), 1))  # 1000 are no blocks of 64
    memory = [("local", "forward", 1024), ("local", "forward", 2048), (MASKED, "forward", 2048)]
    return attention_suite(stages, memory=memory, model_length=96, progress=False)


def test_suite_is_json_and_complete(document: dict[str, Any]):
    assert json.loads(json.dumps(document)) == document
    rows = {(row["contender"], row["pass"], row["length"]): row for row in document["results"]}
    assert len(rows) == len(document["results"]) == 7 * 4 + 1
    for (name, kind, _), row in rows.items():
        assert 0 < row["seconds"] <= row["slowest"] and row["cpu_seconds"] > 0 and row["rounds"] >= 1
        assert ("backward_seconds" in row) == (kind == "training")
        assert row["ours"] == (name not in BASELINES)
        if row["ours"]:
            assert row["tflops"] == pytest.approx(row["gflop"] / row["seconds"] / 1e3)
            assert row["tile_gflop"] >= row["gflop"] and row["gbps"] > 0 and row["floor_seconds"] > 0
    faster = rows["local", "training", 1536]["faster_than"]
    assert list(faster) == [*DENSE, "transformers Longformer"]
    assert all(f["ratio_min"] <= f["ratio"] <= f["ratio_max"] and f["cpu_ratio"] > 0 for f in faster.values())
    assert rows["bigbird", "forward", 1024]["faster_than"].keys() == {*DENSE, "transformers BigBird"}
    (failed,) = document["failed"]
    assert failed["contender"] == "transformers BigBird" and failed["length"] == 1000 and failed["reason"]
    assert document["versions"]["torch"] == torch.__version__ and document["hardware"]["cpu"]
    assert document["over_floor"]["ratio"] > 0 and document["over_floor"]["limit"] == 1.5
    local, masked = document["memory"]
    assert local["peak_mb"].keys() == {"1024", "2048"} and local["growth"].keys() == {"2048"}
    # the (2048, 2048) mask alone has 16 MB
    assert masked["peak_mb"]["2048"] > 15 > local["peak_mb"]["2048"] > 0
    assert {c["contender"] for c in document["crossover"]} == {"local", "bigbird", "local, learned bias"}


def test_suite_is_readable(document: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    headings, rows = suites.SUITES["attention"].rows(document)
    assert len(rows) == len(document["results"]) and {len(row) for row in rows} == {len(headings)}
    benchmark_attention.draw(document, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    assert cards.part("attention") in ("not measured", cards.attention_table())
    monkeypatch.setattr(cards, "record", lambda suite: document if suite == "attention" else None)
    assert "not measured" in cards.part("memory performer") and "| 1536 |" in cards.part("memory local")
    assert "`bigbird`" in cards.part("attention")


def test_bars_are_compared_with_what_was_measured():
    base = {"contender": "local", "pass": "forward", "length": 4096, "dtype": "float32", "device": "cpu"}
    rows = [base | {"faster_than": {MASKED: {"ratio": 3.9}, "transformers Longformer": {"ratio": 4.4}}}]
    rows.append(rows[0] | {"length": 512})
    bars = benchmark_attention.bars_of(rows)
    assert [(b["than"], b["ratio"], b["met"]) for b in bars] == [
        (MASKED, 3.9, True),
        ("transformers Longformer", 4.4, False),
    ]


def test_the_floor_has_no_attention_left():
    """A token hears nothing of another one; with the window it does."""
    model, inputs = benchmark.wide_model("bert", {"mechanism": "local"}, 24, "encoder", layers=1)
    changed = {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 7] = 3

    def moved() -> Tensor:
        return (model(**changed).last_hidden_state - model(**inputs).last_hidden_state).abs().amax(-1)[0] > 1e-6

    assert moved().all()
    benchmark_attention.without_attention(model)
    assert moved().nonzero().flatten().tolist() == [7]


def test_stages_of_both_devices_can_be_built():
    every = benchmark_attention.cpu_stages() + benchmark_attention.cuda_stages()
    known = {*mechanism_names(), *BASELINES, *BIASED}
    assert all(set(stage.names) <= known for stage in every)
    assert all(len(set(stage.names)) == len(stage.names) for stage in every)
    cuda = [s.point for s in benchmark_attention.cuda_stages()]
    assert cuda[0] == benchmark_gpu.TARGET
    assert {(p.dtype, p.width) for p in cuda} == {
        (d, w) for d in ("bfloat16", "float16", "float32") for w in (64, 128)
    }
    assert {(p.length, p.batch) for p in cuda} == {(n, b) for n in (4096, 16384, 65536) for b in (1, 8)}
    measured = {(name, n) for name, _, n in benchmark_attention.cpu_plan()}
    linear = set(mechanism_names()) - set(benchmark_attention.QUADRATIC)
    assert {"local", "longformer", "bigbird", "blockwise"} <= linear
    assert {name for name, n in measured if n == 65536} == linear
    assert set(mechanism_names()) <= {name for name, _ in measured}


def test_a_deadline_leaves_stages_out_and_names_them():
    stage = Stage(point(64), "forward", ("local",), 1)
    document = attention_suite([stage], model_length=0, deadline=time.monotonic() - 1, progress=False)
    assert document["results"] == [] and document["skipped"][0]["point"]["length"] == 64


# ---- the gpu suite, on the CPU -----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_suite_refuses_without_cuda():
    with pytest.raises(ValueError, match=r"needs a CUDA device.*bench attention"):
        suites.SUITES["gpu"].run()


def test_gpu_suite_says_that_it_needs_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"tests/kernels/test_gpu.py.*at the root of a checkout"):
        benchmark_gpu.gpu_suite(target=point(128))


TESTS = """
import pytest
pytestmark = pytest.mark.gpu

def test_zero():
    pass

@pytest.mark.parametrize("name", ["c", "d", "e"])
def test_one(name):
    assert name != "c", "c is wrong"

def test_skipped():
    pytest.skip("not here")

def test_other():
    pass
"""


def test_a_shard_runs_tests_and_reads_their_outcomes(tmp_path: Any):
    (tmp_path / "setup.cfg").write_text("[tool:pytest]\nmarkers =\n    gpu: on a GPU\n")
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    shard = benchmark_gpu.run_shard([path], 1, 2, lambda: 120)
    outcomes = {name.split("::")[1]: outcome for name, outcome in shard["outcomes"].items()}
    assert outcomes == {"test_one[c]": "FAILED", "test_one[e]": "PASSED", "test_other": "PASSED"}
    total = benchmark_gpu.summary([shard, {**shard, "outcomes": {"test_one[a b]": "PASSED"}, "reasons": []}])
    assert (total["passed"], total["failed"], total["skipped"], total["error"]) == (3, 1, 0, 0)
    assert total["shards_out_of_time"] == 0 and not total["trouble"]
    (failure,) = total["failures"]
    assert failure.endswith("test_some.py::test_one[c] - AssertionError: c is wrong")


def test_shards_cover_every_test_once(monkeypatch: pytest.MonkeyPatch):
    kept = []
    for index in range(3):
        monkeypatch.setenv(benchmark_gpu.SHARD, f"{index}/3")
        items = list("abcdefgh")
        benchmark_gpu.pytest_collection_modifyitems(items)
        kept += items
    assert sorted(kept) == list("abcdefgh")


def test_what_a_shard_did_before_its_time_ran_out_counts(monkeypatch: pytest.MonkeyPatch):
    def endless(*arguments: Any, timeout: float, **environment: str) -> Any:
        assert timeout == 7 and environment[benchmark_gpu.SHARD] == "1/3"
        output = (
            b"collecting ...\ntests/test_gpu.py::test_a[x y] PASSED [ 10%]\ntests/test_gpu.py::test_b FAILED\ntests/"
        )
        raise subprocess.TimeoutExpired("python", timeout, output)

    monkeypatch.setattr(benchmark_gpu, "fresh_python", endless)
    total = benchmark_gpu.summary([benchmark_gpu.run_shard([], 1, 3, lambda: 7)])
    assert (total["passed"], total["failed"], total["shards_out_of_time"]) == (1, 1, 1)


def test_a_process_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch):
    broken = subprocess.CompletedProcess([], 1, "", "No module named pytest")
    monkeypatch.setattr(benchmark_gpu, "fresh_python", lambda *a, **k: broken)
    assert benchmark_gpu.summary([benchmark_gpu.run_shard([], 0, 1, lambda: 7)])["trouble"] == [
        "No module named pytest"
    ]
    assert benchmark_gpu.compile_one(point(128), "local", lambda: 7)["reason"] == "No module named pytest"


def test_gpu_suite_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    at = point(1024)
    names = ("local", *BIASED, MASKED, "transformers Longformer")
    stages = [Stage(at, kind, names, 2) for kind in ("forward", "training")]
    compiled: list[tuple[Point, str]] = []

    def prepare(paths: Any, jobs: Any, workers: int, deadline: float) -> Any:
        compiled.extend(jobs)
        return benchmark_gpu.summary([]), []

    monkeypatch.setattr(benchmark_gpu, "prepare", prepare)
    document = benchmark_gpu.gpu_suite(600, stages=stages, target=at, progress=False)
    assert [name for _, name in compiled] == ["local", *BIASED]
    assert document["repeatable"] == {"local": True, "bigbird": True, "local, learned bias": True}
    assert {row["pass"] for row in document["bias"]} == {"forward", "backward"}
    ours, theirs = f"{benchmark_gpu.OURS}, PyTorch", benchmark_gpu.FLA
    places = {(row["contender"], row["features"], row["pass"]): row for row in document["linear"]}
    assert set(places) == {(n, m, p) for n in (ours, theirs) for m in (64, 256) for p in ("forward", "training")}
    assert all(row["seconds"] > 0 for (name, *_), row in places.items() if name == ours)
    assert all(row["seconds"] or row["reason"] for row in places.values())
    target = document["target"]
    assert set(target["forward"]["others_take"]) == {*names[1:]}
    rows = {(r["contender"], r["pass"]): r for r in document["attention"]["results"]}
    work = work_of("local", at)
    for kind, products, seconds in (
        ("forward", 2, rows["local", "forward"]["seconds"]),
        ("backward", 5, rows["local", "training"]["backward_seconds"]),
    ):
        rate = work.tile_flops(products) / seconds  # type: ignore[operator]
        assert target[kind]["share"] == pytest.approx(rate / benchmark_gpu.PEAK)
    assert json.loads(json.dumps(document))["attention"]["failed"] == []
    headings, lines = suites.SUITES["gpu"].rows(document)
    assert {len(line) for line in lines} == {len(headings)} and lines[0][0].startswith("tests: passed 0")


def test_flash_linear_attention_is_called_with_features(monkeypatch: pytest.MonkeyPatch):
    """Its own definition: (B, N, H, ·) tensors, features in the values' type, normalised."""

    def chunk_linear_attn(q: Any, k: Any, v: Any, scale: float, normalize: bool) -> Any:
        weights = torch.einsum("bnhm,bshm->bhns", q, k).tril()
        assert normalize and scale == 1.0 and q.dtype == v.dtype
        return torch.einsum("bhns,bshd->bnhd", weights / weights.sum(-1, keepdim=True), v), None

    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", types.ModuleType("fla.ops"))
    module = types.ModuleType("fla.ops.linear_attn")
    module.chunk_linear_attn = chunk_linear_attn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", module)
    tensors = [torch.randn(2, 3, 29, width) for width in (5, 5, 4)]
    found, missing = benchmark_gpu.linear_methods("cpu")
    assert not missing
    assert_close(found[benchmark_gpu.FLA](*tensors), found[f"{benchmark_gpu.OURS}, PyTorch"](*tensors), 1e-5)


def test_compiling_runs_in_a_process_of_its_own():
    done = benchmark_gpu.compile_one(point(128), "local", lambda: 120)
    assert done["reason"] == "" and done["contender"] == "local" and done["length"] == 128
    assert benchmark_gpu.compile_one(point(128), "local", lambda: 0.1)["reason"] == "not done in time"


def test_options_that_a_mechanism_refuses_are_refused():
    with pytest.raises(ValueError, match="never mix"):
        MechanismAttention("blockwise", point(64), shifts=(0,))
