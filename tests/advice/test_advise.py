"""advise: the advice follows the data, the model is as before, runs go on and end in time; what can't be is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from command_line import run
from tiny import tiny_tokenizer, words

import hf_efficient as he
from hf_efficient.advice import losses, search
from hf_efficient.advice.advice import commands
from hf_efficient.advice.bench import CHOOSE, CONFIRM, Bench
from hf_efficient.advice.candidates import Candidate
from hf_efficient.advice.rounds import Score
from hf_efficient.attention.base.registry import attention_configs
from hf_efficient.benchmarks.hybrids import hybrid_curves
from hf_efficient.evaluation.cost import mean_keys_per_query
from hf_efficient.testing import tiny_model

N = 66
WINDOW = dict(mechanism="local", attention_window=32)
CONTENT = dict(mechanism="clustered", num_clusters=33, top_k=24)
FEW = dict(force=True, memory=False, hybrid=False)


def rows(count: int = 6, length: int = N, period: int | None = None, **more: Any) -> list[dict[str, Any]]:
    found = torch.randint(5, 90, (count, period or length), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row.repeat(length // len(row))[None], **more} for row in found]


@pytest.fixture
def costs_keys(monkeypatch):
    """A pass takes one second for each key per query: times of tiny models are noise."""
    measured = losses.Passes.__call__

    def call(self, batch):
        return measured(self, batch)[0], mean_keys_per_query(self.model, batch["input_ids"].shape[1])

    monkeypatch.setattr(losses.Passes, "__call__", call)


def by_content() -> Any:
    """A model without positions whose attention is sharp."""
    model = tiny_model("bert", positions=N)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.zero_()
        for layer in model.bert.encoder.layer:
            layer.attention.self.query.weight.mul_(2)
            layer.attention.self.key.weight.mul_(2)
    return model


def test_the_advice_follows_the_data(costs_keys):
    model = by_content()
    # in repeated rows a window sees all that there is; in the others it does not
    near, far = (
        he.advise(model, N, texts, target=0.7, candidates=[WINDOW, CONTENT], **FEW)
        for texts in (rows(period=3), rows())
    )
    assert near.attention == [WINDOW] and near.reaches_target, near
    assert far.attention == [CONTENT], far
    assert near.text.startswith("Convert to local attention_window=32: it takes 0.44") and near.floor == pytest.approx(
        1 / N
    )
    assert he.convert(model, near.attention).model.config.efficient_attention[0]["attention_window"] == 32
    assert near.commands[0].startswith("hf-efficient convert SOURCE OUT --attention ")


@pytest.mark.parametrize(
    ("model_type", "loss", "more"),
    [("bert", "kl", {}), ("gpt2", "kl", {}), ("t5", "kl", {"decoder_input_ids": torch.arange(5, 13)[None]})],
)
def test_search_over_all_mechanisms(costs_keys, tmp_path, model_type, loss, more):
    model = tiny_model(model_type, positions=48).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, config, state = dict(model.named_parameters()), model.config.to_dict(), torch.random.get_rng_state()
    found = he.advise(model, 64, rows(4, 64, **more), memory=False, target=0.9, record=tmp_path / "a.json")
    assert found.loss == loss and not found.partial and not found.errors, found.errors
    assert len(found.left) == 2 and found.left[0] > 12
    shares = [row["loss_share"] for row in found.front]
    assert shares == sorted(shares, reverse=True) and found.front[0]["keys_per_query"] <= 64
    # the very model that it was
    assert before.keys() == model.state_dict().keys() and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert model.config.to_dict() == config and torch.equal(torch.random.get_rng_state(), state)
    # what is not measured is told, and what is measured is not called impossible
    tried = {row["attention"][0]["mechanism"] for row in found.rows if row.get("attention")}
    assert not tried & set(found.refused)
    told = {name for remark in found.skipped for name in remark.split(":")[0].split(", ")}
    assert set(he.list_mechanisms()) <= tried | set(found.refused) | told
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["suite"] == "advise" and document["attention"] == found.attention
    found.draw(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5_000
    limit = None if model_type == "t5" else 64
    he.convert(model, found.attention, max_positions=limit)


def test_an_exact_setting_loses_nothing():
    model = tiny_model("bert", positions=N)
    candidate = Candidate(tuple(attention_configs("local", attention_window=2 * N)))
    with torch.no_grad():
        bench = Bench(losses.Passes(model), N, {CHOOSE: rows(2)}, {})
        figures = bench.measure(candidate, CHOOSE, 2)[CHOOSE]["figures"]
    assert all(abs(one[name]) < 1e-6 for one in figures for name in ("kl", "embedding"))
    assert all(one["states"] < 1e-5 and one["top1_agreement"] == 1 for one in figures)


def test_a_run_goes_on_from_its_record(costs_keys, tmp_path, monkeypatch):
    model, path = by_content(), tmp_path / "record.json"
    given = dict(texts=rows(), candidates=[WINDOW, CONTENT], target=0.7, **FEW)
    first = he.advise(model, N, record=path, **given)
    passes = []
    monkeypatch.setattr(losses.Passes, "__call__", lambda *given: passes.append(given))
    again = he.advise(model, N, record=path, **given)
    assert not passes and again.attention == first.attention and again.front == first.front
    # what is asked of the measurements may change
    assert first.reaches_target and not he.advise(model, N, record=path, **given | {"target": 1.0}).reaches_target
    with pytest.raises(ValueError, match=r"holds another run: .*texts_sha256.*delete this one"):
        he.advise(model, N, record=path, **given | {"texts": rows(period=3)})
    there = json.loads(path.read_text())
    path.write_text(json.dumps(there | {"hardware": there["hardware"] | {"cpu": "another"}}))
    with pytest.raises(ValueError, match=r"hardware is .*another"):
        he.advise(model, N, record=path, **given)


def test_the_end_of_the_budget(costs_keys, monkeypatch):
    model = by_content()
    given = dict(texts=rows(), candidates=[WINDOW, CONTENT], target=0.7, **FEW)
    nothing = he.advise(model, N, budget=0, **given)
    assert nothing.partial and nothing.attention is None and "before anything was measured" in nothing.text
    # the clock stands still until so many passes are done
    passes = iter(range(10**6))
    monkeypatch.setattr(
        Bench,
        "deadline",
        property(lambda self: 1e9 if next(passes) < 30 else -1.0, lambda self, value: None),
        raising=False,
    )
    some = he.advise(model, N, **given)
    assert some.partial and some.front and some.settings["length"] == N


def test_the_model_is_as_before_after_an_exception(monkeypatch):
    model = tiny_model("bert", positions=48)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(search, "score", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        he.advise(model, 64, rows(4, 64), **FEW)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.max_position_embeddings == 48 and model.config._attn_implementation != "hf_efficient"


def test_keep_full_attention_where_nothing_pays():
    # one token more than a window: all the time goes elsewhere
    found = he.advise(tiny_model("bert"), 16, rows(4, 16), memory=False)
    assert found.attention is None and found.commands == [] and found.text.startswith("Keep full attention")


def test_what_is_in_all_layers_or_none_is_left_alone(costs_keys):
    """Learned tokens run through the whole stack: no hybrid of it is tried."""
    tokens = dict(mechanism="etc", attention_window=8, num_global_tokens=2)
    found = he.advise(by_content(), N, rows(2), candidates=[tokens], force=True, memory=False)
    assert not found.errors and {row["name"] for row in found.rows} == {"control", found.front[0]["name"]}


def test_why_there_is_no_choice():
    scores = {"window": Score([1.0], 0.6), "blocks": Score([0.1], 0.9)}
    assert search._why_none(scores, 64, 0.5) == "at 64 tokens no candidate takes at most 0.5 of its time."
    assert "loses about as much" in search._why_none(scores, 64, 0.7)
    assert search._why_none({"blocks": Score([0.1], 0.99)}, 64, None) == "at 64 tokens no candidate is faster."


def test_commands_say_which_checkpoint_it_is_and_train_whatever_there_is():
    candidate = Candidate(tuple(attention_configs(WINDOW)))
    convert, distill = commands(["a b", "--revision", "v1"], candidate, 80, "TEXTS", False)
    assert convert.startswith("hf-efficient convert 'a b' OUT --revision v1 --attention ")
    assert distill == "hf-efficient distill OUT TRAINED --texts TEXTS --length 80 --end-to-end-steps 100"


def test_memory_that_cannot_be_measured_costs_nothing_else(costs_keys, monkeypatch):
    def fail(*given):
        raise RuntimeError("measuring failed:\nno space left")

    monkeypatch.setattr(search, "peak_memory", fail)
    found = he.advise(by_content(), N, rows(2), candidates=[WINDOW], force=True, hybrid=False, target=0.01)
    assert found.front and found.skipped == ["peak memory: it could not be measured (no space left)"]
    assert str(found).endswith(found.skipped[0])


@pytest.mark.parametrize("rule", [True, "greedy"])
def test_hybrid_and_memory(costs_keys, monkeypatch, rule):
    monkeypatch.setattr(
        search, "peak_memory", lambda model, candidates, length: [float(i) for i in range(len(candidates))]
    )
    model = tiny_model("bert", layers=3, positions=N)
    alone = he.advise(model, N, rows(), candidates=[WINDOW], **FEW)
    share = alone.front[0]["loss_share"]
    # what one window in three layers misses, a window in fewer layers reaches
    found = he.advise(model, N, rows(), candidates=[WINDOW], target=1 - 0.9 * share, force=True, hybrid=rule)
    assert found.reaches_target and found.attention is not None, found
    layers = found.attention[0]["layers"]
    assert 0 < len(layers) < 3 and found.front[-1]["peak_mb"] is not None
    converted = he.convert(model, found.attention).model
    assert [layer.attention.self.efficient is not None for layer in converted.bert.encoder.layer] == [
        i in layers for i in range(3)
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(length=1), "length=1 is not possible"),
        (dict(budget=-1), "budget=-1"),
        (dict(target=0), "target=0"),
        (dict(hybrid="all"), "hybrid='all'"),
        (dict(max_time=0), "max_time=0"),
        (dict(texts=None), "has no tokenizer: give texts="),
        (dict(texts=["some text"]), "no tokenizer for these texts"),
        (dict(texts=rows(1)), "1 text is too little"),
        (dict(texts=[{"inputs_embeds": torch.zeros(1, 4, 32)}]), "no tensor input_ids"),
        (
            dict(texts=[{"input_ids": torch.ones(2, 8).long(), "use_cache": False}]),
            "use_cache of a batch must be tensors of 2",
        ),
        (dict(texts=rows(2, 2 * N)), "of at most length=66"),
        (dict(candidates=[]), "leaves nothing to measure"),
        (dict(candidates=["bogus"]), "unknown mechanism 'bogus'"),
        (dict(candidates=["transformer_xl"]), "remembers the past alone"),
        (dict(positions="tile", length=N), "leave it out"),
        (dict(positions="yarn", length=2 * N), "positions='yarn'"),
        (dict(bogus=3), "no option 'bogus'"),
        (dict(revision="main"), "revision: this model is loaded already"),
        (dict(untrained_only=True, candidates=["hedgehog"]), "names hedgehog .*, which need training"),
        (dict(ignored_tokens=[3, 10**6]), r"\[1000000\] are no ids of a vocabulary"),
        (dict(texts=[{"input_ids": torch.zeros(2, 0).long()}]), "has no tokens"),
    ],
)
def test_refusals(changed, message):
    given = dict(length=N, texts=rows(2), memory=False) | changed
    with pytest.raises((ValueError, TypeError), match=message):
        he.advise(tiny_model("bert", positions=N), given.pop("length"), **given)


@pytest.mark.parametrize(("model_type", "read"), [("vit", "pixel_values"), ("whisper", "input_features")])
def test_models_that_read_no_tokens_are_refused(model_type, read):
    with pytest.raises(ValueError, match=f"reads {read}, and advice is measured on texts"):
        he.advise(tiny_model(model_type), 64, rows(2, 64))


def test_a_model_whose_weights_are_elsewhere_is_refused():
    with pytest.raises(ValueError, match="some weights are not loaded"):
        he.advise(tiny_model("bert").to("meta"), 64, rows(2, 64))


def test_a_converted_model_is_refused():
    model = he.convert(tiny_model("bert"), "local").model
    with pytest.raises(ValueError, match="already has efficient attention"):
        he.advise(model, 64, rows(2, 64))


def test_a_decoder_writes_its_own_texts(costs_keys):
    model = tiny_model("gpt2", positions=48)
    found = he.advise(model, 96, candidates=[WINDOW], ignored_tokens=[0, 1, 2], **FEW)
    assert found.settings["texts"] == 8 and found.settings["tokens"] == 96
    assert "distill" not in "".join(found.commands)


def test_the_command(costs_keys, tmp_path, monkeypatch):
    folder, texts = tmp_path / "source", tmp_path / "my texts.txt"
    model, tokenizer = by_content(), tiny_tokenizer("bert")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts.write_text("\n".join(words(80, start=start) for start in (5, 30, 47, 60)))
    monkeypatch.setattr(search, "peak_memory", lambda model, candidates, length: [None] * len(candidates))
    given = (
        "--texts",
        texts,
        "--force",
        "--candidate",
        json.dumps(CONTENT),
        "--candidate",
        json.dumps(WINDOW),
        "--target",
        "0.9999",
        "--model-class",
        "BertForMaskedLM",
    )
    shown = run(
        "advise", folder, "--length", 80, *given, "--json", tmp_path / "a.json", "--out", tmp_path / "a.png"
    ).stdout
    assert f"hf-efficient convert {folder} OUT --model-class BertForMaskedLM --max-positions 80" in shown
    assert f"distill OUT TRAINED --texts '{texts}' --length 80 --end-to-end-steps 100" in shown
    assert "keys per query" in shown and "texts that nothing was chosen by" in shown
    assert json.loads((tmp_path / "a.json").read_text())["front"] and (tmp_path / "a.png").exists()


def test_curves_of_hybrids_end_at_full_attention():
    model = tiny_model("gpt2", layers=3, positions=N)
    with torch.no_grad():
        bench = Bench(losses.Passes(model), N, {CHOOSE: rows(2), CONFIRM: rows(3)[1:]}, {})
        curves = hybrid_curves(bench, attention_configs("local", attention_window=4)[0], [0, 1, 2], False)
    assert set(curves) == {"by loss alone", "greedy", "by layer error", "first layers", "last layers", "evenly spaced"}
    all_converted = {curve["loss"][0] for curve in curves.values()}
    assert len(all_converted) == 1 and all_converted.pop() > 1e-4
    assert all(len(curve["loss"]) == 4 and curve["loss"][-1] == 0 for curve in curves.values())
    assert all(sorted(curve["order"]) == [0, 1, 2] for rule, curve in curves.items() if rule != "evenly spaced")
