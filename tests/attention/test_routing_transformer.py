"""Routing attention against its definition, pair by pair; and centroids that follow training, once per optimiser step."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from formulas import geometry, heads
from pairs import Bench, Pair
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import hf_efficient as he
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.attention.routing_transformer import RoutingTransformerAttention
from hf_efficient.ops import cluster_attention as clusters
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.testing import VOCABULARY, assert_close, tiny_model
from hf_efficient.training.callbacks import MechanismCallback

PLACES: list[tuple[str, str | None]] = [("bert", None), ("t5", "encoder"), ("gpt2", None), ("t5", "decoder")]
SETTINGS: list[dict[str, Any]] = [
    dict(num_clusters=4, cluster_size=10, attention_window=8),
    dict(num_clusters=7, cluster_size=16, attention_window=0),
    dict(num_clusters=1, cluster_size=20, attention_window=4),
    dict(num_clusters=3, cluster_size=62, attention_window=2),
]


def bench_of(place: tuple[str, str | None], options: dict[str, Any]) -> Bench:
    return Bench(Pair("routing_transformer", *place, options, "a"))


def padding(batch: int, n: int) -> Tensor:
    """(B, N): all real, padded right, left, and in the middle."""
    keep = torch.ones(batch, n, dtype=torch.bool)
    keep[1, n - n // 3 :] = keep[2, : n // 4] = keep[3, 1:-1:4] = False
    return keep


# ---- against the definition --------------------------------------------------------------------------------------


def best_first(cosine: Tensor) -> Tensor:
    """Indices by falling cosine, of close ones the earlier first."""
    return torch.sort(cosine, descending=True, stable=True).indices


def shown_by_clusters(mechanism: Any, query: Tensor, key: Tensor, keep: Tensor) -> Tensor:
    """(B, H, N, N) how many clusters show query i key j, one row and head at a time."""
    k, w = mechanism.config.num_clusters, mechanism.config.cluster_size
    times = torch.zeros(*query.shape[:3], query.shape[2], dtype=torch.long)
    for b, h in ((b, h) for b in range(query.shape[0]) for h in range(query.shape[1])):
        real = keep[b].nonzero().flatten()
        if len(real) == 0:
            continue
        q, x = (F.normalize(y[b, h, real], dim=-1) for y in (query, key))
        mu = mechanism.centroids[h]
        if mechanism.geometry.is_causal:
            label = ((q + x) @ mu.T).argmax(-1)
            for place, i in enumerate(real.tolist()):
                members = [j for j in range(place + 1) if label[j] == label[place]]
                times[b, h, i, real[members[-w:]]] = 1
            continue
        for c in range(k):
            best = [best_first(y @ mu[c])[:w] for y in (q, x)]
            times[b, h, real[best[0]][:, None], real[best[1]]] += 1
    return times


def defined(bench: Bench, query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    n, config = query.shape[2], bench.mechanism.config
    offset = torch.arange(n) - torch.arange(n)[:, None]
    near = config.attention_window
    window = (offset <= 0) & (offset > -near) if bench.is_causal else (offset.abs() <= near // 2) & bool(near)
    with torch.no_grad():
        visible = (shown_by_clusters(bench.mechanism, query, key, keep) > 0) | window
    visible = visible & keep[:, None, None]
    bias = bench.relative_bias()
    logits = bench.WIDTH**-0.5 * query @ key.mT + (0.0 if bias is None else bias.at(offset))
    sees = visible.any(-1, keepdim=True)
    return logits.masked_fill(~visible & sees, -torch.inf).softmax(-1).where(sees, 0.0) @ value


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 63, 97])
def test_output_and_gradients_equal_the_definition(place: tuple[str, str | None], options: dict[str, Any], n: int):
    """Every pair once, in one softmax; gradients of queries, keys, values and the bias."""
    bench = bench_of(place, options)
    query, key, value = (x.requires_grad_() for x in bench.tokens(4, n)[:3])
    keep = padding(4, n)
    expected = defined(bench, query, key, value, keep)
    actual = bench(bench.tokens(4, n)._replace(query=query, key=key, value=value), keep)
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-9, where=keep)
    leaves = [query, key, value] + ([] if bench.table is None else [bench.table])
    direction = bench.normal(*actual.shape)
    real = keep[:, None, :, None]
    ours, theirs = (
        torch.autograd.grad((out.where(real, 0.0) * direction).sum(), leaves) for out in (actual, expected)
    )
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if n > 1 or number > 1:  # of a single token the logits do not matter
            assert_close(one, other, 1e-9, f"gradient {number}")


def test_settings_of_the_definition_show_what_they_should():
    """Pairs of several clusters, pairs of clusters and the window, and queries that nothing takes: else nothing is shown."""
    bench = bench_of(PLACES[0], SETTINGS[0])
    query, key = bench.tokens(4, 97)[:2]
    times = shown_by_clusters(bench.mechanism, query, key, padding(4, 97))
    offset = (torch.arange(97) - torch.arange(97)[:, None]).abs()
    assert (times > 1).any() and (times[..., offset <= 4] > 0).any()
    assert (times.sum(-1) == 0).any()
    causal = bench_of(PLACES[2], SETTINGS[0])
    times = shown_by_clusters(causal.mechanism, query, key, padding(4, 97))
    assert times.sum(-1).max() == 10 and (times.sum(-1) == 0).any()


def test_a_token_of_no_cluster_gets_0_without_a_window():
    bench = bench_of(PLACES[0], dict(num_clusters=2, cluster_size=5, attention_window=0))
    tokens = bench.tokens(2, 40)
    query = tokens.query.requires_grad_()
    out = bench(tokens._replace(query=query))
    keep = torch.ones(2, 40, dtype=torch.bool)
    unseen = shown_by_clusters(bench.mechanism, query.detach(), tokens.key, keep).sum(-1) == 0
    assert unseen.any() and (out[unseen] == 0).all() and (out[~unseen] != 0).all()
    (gradient,) = torch.autograd.grad(out.square().sum(), query)
    assert (gradient[unseen] == 0).all()


# ---- choices -----------------------------------------------------------------------------------------------------


def test_clusters_take_the_best_and_of_equal_ones_the_earlier():
    x, centroids = heads(2, 3, 31, 4)[0], F.normalize(heads(3, 5, 4)[0], dim=-1)
    x[:, :, 20] = x[:, :, 3]
    keep = torch.ones(2, 31, dtype=torch.bool)
    keep[1, :6] = False
    found = clusters.best_members(x, centroids, 7, keep)
    score = (F.normalize(x, dim=-1) @ centroids.mT).mT
    score = score.masked_fill(~keep[:, None, None], -torch.inf)
    assert torch.equal(found.tokens, found.tokens.sort().values), "not in the order of positions"
    taken = torch.zeros_like(score, dtype=torch.bool).scatter(-1, found.tokens, True)
    least = score.masked_fill(~taken, torch.inf).amin(-1)
    assert (least >= score.masked_fill(taken, -torch.inf).amax(-1) - 1e-12).all()
    assert torch.equal(found.entry < 7, taken)
    assert not (taken[0, :, :, 20] & ~taken[0, :, :, 3]).any() and (taken[0, :, :, 3] & ~taken[0, :, :, 20]).any()


def test_clusters_of_equal_tokens_or_few_take_the_earlier():
    keep = torch.ones(2, 50, dtype=torch.bool)
    keep[1, 9:] = keep[1, 3] = False
    found = clusters.best_members(torch.ones(2, 1, 50, 4), F.normalize(torch.ones(1, 3, 4), dim=-1), 12, keep)
    assert torch.equal(found.tokens[0], torch.arange(12).expand(1, 3, 12)) and found.real[0].all()
    few = [0, 1, 2, 4, 5, 6, 7, 8]
    for cluster in range(3):
        assert found.tokens[1, 0, cluster][found.real[1, 0, cluster]].tolist() == few
    assert torch.equal((found.entry < 12)[1], keep[1].expand(1, 3, 50) & (torch.arange(50) < 9))


def test_rounding_does_not_choose_among_repeats_of_a_token():
    """Repeats that differ in the last digits, as other batches and processors leave them: the earliest ones are taken."""
    tokens, centroids = heads(1, 2, 5, 8)[0], F.normalize(heads(2, 6, 8)[0], dim=-1)
    x = tokens[:, :, torch.arange(60) % 5]
    generator = torch.Generator().manual_seed(0)
    noise = [1 + 1e-14 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(20)]
    found = [clusters.best_members(x * near, centroids, 16, None).tokens for near in noise]
    assert all(torch.equal(other, found[0]) for other in found)
    for chosen in found[0].flatten(0, 2):
        for kind in range(5):
            own = chosen[chosen % 5 == kind]
            assert torch.equal(own, torch.arange(len(own)) * 5 + kind)


def test_choices_do_not_depend_on_padding_autocast_or_batch():
    x, centroids = heads(3, 2, 29, 8)[0].float(), F.normalize(heads(2, 6, 8)[0].float(), dim=-1)
    whole = clusters.best_members(x, centroids, 8, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = clusters.best_members(x, centroids, 8, None)
        labels = clusters.nearest(x, centroids)
    assert torch.equal(whole.tokens, again.tokens)
    assert torch.equal(labels, clusters.nearest(x, centroids))
    x, centroids = x.double(), centroids.double()
    padded = F.pad(x[1:2], (0, 0, 5, 4), value=3.0)
    keep = F.pad(torch.ones(1, 29, dtype=torch.bool), (5, 4))
    alone = clusters.best_members(padded, centroids, 8, keep)
    assert torch.equal(alone.tokens - 5, clusters.best_members(x, centroids, 8, None).tokens[1:2])


def test_two_runs_are_equal_bit_for_bit():
    """Also the gradients, which several clusters add to."""
    bench = bench_of(PLACES[0], SETTINGS[1])
    bench.mechanism.float()
    tokens = type(bench.tokens(1, 1))(*(x.float() for x in bench.tokens(3, 97)))
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in tokens[:3]]
        out = bench(tokens._replace(query=leaves[0], key=leaves[1], value=leaves[2]))
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("place", [PLACES[0], PLACES[2]], ids=str)
def test_bf16_chooses_as_fp32_does_and_is_as_close_as_full_attention(place: tuple[str, str | None]):
    """On the same numbers: only then is it the same function, since the least change can move a token between clusters."""
    bench = bench_of(place, SETTINGS[0])
    bench.mechanism.bfloat16()
    tokens = type(bench.tokens(1, 1))(*(x.bfloat16() for x in bench.tokens(4, 97)))
    lower = bench(tokens).float()
    bench.mechanism.float()
    wide = bench(type(tokens)(*(x.float() for x in tokens)))
    full = [
        F.scaled_dot_product_attention(*(x.to(dtype) for x in tokens[:3]), is_causal=bench.is_causal).float()
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert (lower - wide).abs().max() <= 3 * (full[0] - full[1]).abs().max()


def test_nothing_quadratic_is_made():
    bench = bench_of(("t5", "encoder"), SETTINGS[0])
    tokens = bench.tokens(1, 1500)
    query = tokens.query.requires_grad_()
    with LargestTensor() as recorder:
        bench(tokens._replace(query=query)).square().sum().backward()
    assert recorder.numel < 1500 * 1500 / 4, recorder.shape


def test_members_are_added_up_without_a_pass_over_all_tokens_per_cluster(monkeypatch: pytest.MonkeyPatch):
    """Many small clusters take each token about once: no more rows of heads may be read than they have members."""
    rows = []
    gather = Tensor.gather

    def counted(x: Tensor, dim: int, index: Tensor) -> Tensor:
        rows.append(index.numel() // x.shape[-1] if dim == 2 else 0)
        return gather(x, dim, index)

    n, heads_ = 512, 4
    bench = bench_of(("bert", None), dict(num_clusters=32, cluster_size=16, attention_window=0))
    tokens = bench.tokens(1, n)
    leaves = [x.requires_grad_() for x in tokens[:3]]
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "gather", counted)
        bench(tokens._replace(query=leaves[0], key=leaves[1], value=leaves[2])).square().sum().backward()
    assert 0 < sum(rows) <= 8 * heads_ * n


@pytest.mark.parametrize(
    "options",
    [
        dict(num_clusters=0),
        dict(cluster_size=0),
        dict(attention_window=3),
        dict(attention_window=-2),
        dict(seed=-1),
        dict(ema_decay=1.0),
        dict(ema_decay=-0.1),
        dict(ema_decay="a"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any]):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        attention_config("routing_transformer", **options)


def test_control_is_the_window_alone():
    config: Any = attention_config("routing_transformer", attention_window=6, layers=(1,), side="encoder")
    control: Any = config.attention_class.control_config(config)
    assert control == attention_config("local", attention_window=6, layers=(1,), side="encoder")
    none: Any = attention_config("routing_transformer", attention_window=0)
    assert none.attention_class.control_config(none) is None


# ---- k-means -----------------------------------------------------------------------------------------------------


def planted(count: int, per: int, width: int = 8, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """(H, count · per, width) points of any lengths around (H, count, width) orthogonal directions."""
    basis = torch.linalg.qr(heads(2, width, width)[0])[0][:, :count]
    noise, length = heads(2, count, per, width, seed=1)[0], heads(2, count, per, 1, seed=2)[0].exp()
    points = (basis[:, :, None] + spread * noise) * length
    return points.flatten(1, 2), basis


def test_kmeans_finds_planted_directions():
    """All but a few: one start can leave two directions to one centroid, which points drawn at random often do."""
    points, basis = planted(6, 50)
    shares = []
    for seed in range(10):
        found = clusters.spherical_kmeans(points, 6, seed=seed)
        assert_close(found.norm(dim=-1), torch.ones(2, 6, dtype=torch.float64), 1e-9)
        assert torch.equal(found, clusters.spherical_kmeans(points, 6, seed=seed))
        shares.append(((found @ basis.mT).amax(1) > 0.99).double().mean().item())
    assert sum(shares) / 10 > 0.9 and shares.count(1.0) >= 5, shares
    one_head = clusters.spherical_kmeans(2.5 * points[:, :200], 4)
    assert_close(clusters.spherical_kmeans(points[:, :200], 4), one_head, 1e-9, "lengths matter")


def test_each_step_of_kmeans_comes_closer():
    points = heads(2, 400, 6)[0]
    unit = F.normalize(points, dim=-1)
    gain = [
        (unit @ clusters.spherical_kmeans(points, 12, steps=steps).mT).amax(-1).mean().item()
        for steps in (0, 1, 4, 16)
    ]
    assert gain == sorted(gain) and gain[-1] > gain[0] + 0.02, gain


def test_kmeans_leaves_no_cluster_empty(monkeypatch: pytest.MonkeyPatch):
    """All start at one and the same point, so that all but one serve nobody in the first step."""
    points, _ = planted(5, 30)
    monkeypatch.setattr(clusters, "_spread_points", lambda points, count, _: points[:, :1].repeat(1, count, 1))
    found = clusters.spherical_kmeans(points, 5, steps=1)
    counts = clusters.cluster_sums(points[None], found, None)[..., -1]
    assert (counts > 0).all() and counts.sum() == 2 * 150


def test_empty_centroids_move_to_what_is_served_worst():
    points = F.normalize(heads(1, 60, 4)[0], dim=-1)
    centroids = torch.cat([points[:, :1], -points[:, :1], torch.zeros(1, 2, 4).double()], dim=1)
    near, own = (points @ centroids[:, :2].mT).max(-1)
    largest = own[0].bincount().argmax()
    worst = near[0].where(own[0] == largest, torch.inf).argsort()[:2]
    clusters._fill_empty(centroids, points, near.clone(), own)
    assert torch.equal(centroids[0, 2:], points[0, worst])


def test_kmeans_of_too_few_tokens_is_refused():
    with pytest.raises(ValueError, match="4 tokens can't be put into 5 clusters"):
        clusters.spherical_kmeans(torch.randn(2, 4, 3), 5)


# ---- centroids that follow training ------------------------------------------------------------------------------

DECAY, LABELS = 0.6, 5


def learner(family: str = "bert", decay: float = DECAY, **options: Any) -> Any:
    options = dict(num_clusters=3, cluster_size=8, attention_window=4, ema_decay=decay) | options
    return he.convert(tiny_model(family), "routing_transformer", tokenizer=object(), **options).model.train()


def routers(model: Any) -> list[RoutingTransformerAttention]:
    return [module for module in model.modules() if isinstance(module, RoutingTransformerAttention)]


def centroids(model: Any) -> Tensor:
    return torch.stack([module.centroids for module in routers(model)]).clone()


def batch_of(count: int = 8, seed: int = 5) -> dict[str, Tensor]:
    """As many labels in each row, so that the mean over parts is that over the whole; rows are padded differently."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (count, 37), generator=generator)
    mask = (torch.arange(37) < 12 + 5 * (torch.arange(count) % 5)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(torch.arange(37) >= LABELS, -100)}


def part(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: x[rows] for name, x in batch.items()}


def train(model: Any, steps: int = 3, pieces: int = 1, shard: slice = slice(None)) -> Tensor:
    """Centroids after some steps of plain gradient descent on batches of 8 rows, or of a shard of each, cut into pieces."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(steps):
        own = part(batch_of(seed=step), shard)
        size = len(own["input_ids"]) // pieces
        for first in range(0, len(own["input_ids"]), size):
            (model(**part(own, slice(first, first + size))).loss / pieces).backward()
        optimizer.step()
        optimizer.zero_grad()
        MechanismCallback.step(model, 1)
    return centroids(model)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_centroids_move_by_the_formula(family: str):
    model = learner(family)
    before, batch, caught = centroids(model), batch_of(), []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: caught.append((args[0].detach(), args[1].detach())))
        for module in routers(model)
    ]
    model(**batch).loss.backward()
    assert torch.equal(centroids(model), before), "centroids moved before the optimiser's step"
    MechanismCallback.step(model, 1)
    for hook in hooks:
        hook.remove()
    after, real = centroids(model), batch["attention_mask"].bool()
    for layer, (q, k) in enumerate(caught):
        x = F.normalize(q, dim=-1) + (F.normalize(k, dim=-1) if family == "gpt2" else 0.0)
        x = F.normalize(x, dim=-1)
        for h in range(q.shape[1]):
            points = x[:, h][real]
            own = (points @ before[layer, h].T).argmax(-1)
            for c in range(3):
                expected = before[layer, h, c]
                if (own == c).any():
                    expected = F.normalize(DECAY * expected + (1 - DECAY) * points[own == c].mean(0), dim=0)
                assert_close(after[layer, h, c], expected, 1e-5, f"layer {layer}, head {h}, cluster {c}")
    assert (after - before).abs().max() > 0.05
    MechanismCallback.step(model, 1)
    assert_close(centroids(model), after, 1e-6, "centroids moved twice")


def test_accumulated_steps_equal_one_large_batch():
    model = learner()
    whole, pieces = train(copy.deepcopy(model)), train(copy.deepcopy(model), pieces=2)
    assert_close(pieces, whole, 1e-5)
    assert (whole - centroids(model)).abs().max() > 0.05


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_does_not_count_twice(reentrant: bool):
    model = learner()
    plain = train(copy.deepcopy(model))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**batch_of()).loss.backward()
    counted = routers(model)[0].take_pending()[..., -1].sum(-1)
    assert (counted == batch_of()["attention_mask"].sum()).all()
    routers(model)[1].take_pending()
    model.zero_grad()
    assert_close(train(model), plain, 1e-5)


def test_only_training_counts():
    model = learner()
    before, batch = centroids(model), batch_of()
    model.eval()(**batch).loss.backward()
    with torch.no_grad():
        model.train()(**batch)
    MechanismCallback.step(model, 1)
    assert torch.equal(centroids(model), before)
    frozen = learner(decay=0.0)
    start = centroids(frozen)
    assert torch.equal(train(frozen), start)


def test_moved_centroids_are_saved_and_training_goes_on(tmp_path: Path):
    model = learner()
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    assert torch.equal(centroids(loaded), centroids(model))
    assert torch.equal(loaded.eval()(**batch_of()).logits, model.eval()(**batch_of()).logits)
    assert torch.equal(train(loaded.train()), train(model.train()))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_moves_centroids_once_per_step(tmp_path: Path, accumulation: int):
    model = learner()
    expected = copy.deepcopy(model)
    data = [part(batch_of(), slice(row, row + 1)) for row in range(8)]
    rows = [{name: x[0] for name, x in row.items()} for row in data]
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-9,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model, settings, train_dataset=rows, callbacks=[MechanismCallback()]).train()  # type: ignore[arg-type]
    for _ in range(2):  # every step sees all rows, in whatever order
        expected(**batch_of()).loss.backward()
        MechanismCallback.step(expected, 1)
    assert_close(centroids(model), centroids(expected), 1e-4)


def test_centroids_in_half_precision_are_refused_where_they_should_move():
    model = learner().bfloat16()
    model(**batch_of()).loss.backward()
    with pytest.raises(ValueError, match=r"torch.bfloat16 can't follow ema_decay=0.6"):
        MechanismCallback.step(model, 1)


def test_centroids_that_move_are_refused_while_compiling():
    mechanism: Any = RoutingTransformerAttention(
        attention_config("routing_transformer", ema_decay=0.9),  # type: ignore[arg-type]
        geometry(),
    )
    mechanism.reset_parameters()
    q, k, v = (x.float().requires_grad_() for x in heads(1, 4, 9, 8))
    torch.compiler.reset()
    compiled = torch.compile(mechanism, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="ema_decay counts tokens during the backward pass"):
        compiled(q, k, v, he.AttentionContext(is_causal=False, scaling=0.5))
    torch.compiler.reset()


def test_centroids_that_move_are_refused_in_copies_of_one_call():
    """`torch.nn.DataParallel` would lose what its replicas count, and the centroids would stay without a word."""
    mechanism = routers(learner())[0]
    replica = mechanism._replicate_for_data_parallel()
    replica.centroids = mechanism.centroids
    count, _, width = mechanism.centroids.shape
    q, k, v = (x.float().requires_grad_() for x in heads(1, count, 9, width))
    with pytest.raises(ValueError, match=r"torch.nn.DataParallel .* start one process per device \(torchrun\)"):
        replica(q, k, v, he.AttentionContext(is_causal=False, scaling=0.5))


def test_two_processes_move_centroids_as_one_does(tmp_path: Path):
    """Data-parallel (gloo), half of each batch in each process: the same centroids, in both."""
    for ended in fresh.launch(2, __file__, tmp_path):
        assert ended.returncode == 0, ended.stderr[-4000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors")["centroids"] for rank in range(2))
    assert torch.equal(first, second)
    model = learner()
    start = centroids(model)
    expected = train(model)
    assert_close(first, expected, 1e-5)
    assert (expected - start).abs().max() > 0.05


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = DistributedDataParallel(learner(), find_unused_parameters=True)
    save_file(
        {"centroids": train(model, shard=slice(4 * rank, 4 * rank + 4))}, Path(sys.argv[1]) / f"{rank}.safetensors"
    )
    dist.barrier()
    # without cleaning up: the end of a data-parallel model can wait for a thread of gloo that waits for Python
    os._exit(0)


if __name__ == "__main__":
    main()
