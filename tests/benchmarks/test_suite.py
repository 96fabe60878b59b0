"""The benchmark of recall tasks: what is asked was shown, rules and reach are what they say, and the record goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import error
from paths import ROOT

from hf_efficient.attention.base.registry import attention_config
from hf_efficient.benchmarks.suite import listops, run
from hf_efficient.benchmarks.suite.circuits import constructed
from hf_efficient.benchmarks.suite.protocol import _reach, batches_of, converted, inputs_of, score, seeded
from hf_efficient.benchmarks.suite.tables import block_rows, draw_suite, needle_rows, suite_rows
from hf_efficient.benchmarks.suite.tasks import FIRST_VALUE, Task, reach, rules
from hf_efficient.patching.exact import converted_layers, mechanism_of

TASKS = (
    Task("mqar", "gpt2", 64, 8),
    Task("mqar", "bert", 64, 8),
    Task("needle", "gpt2", 64, 8),
    Task("needle", "bert", 64, 8),
    Task("t5-recall", "t5", 96, 8),
    Task("copy", "gpt2", 64, 16),
)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}-{task.family}")
def test_every_question_has_evidence_and_one_answer(task: Task):
    batch = task.draw(6, seeded(3))
    evidence = task.evidence(batch)
    asked = batch.labels != -100
    assert evidence.any(-1)[asked].all() and not evidence[~asked].any()
    rows, queries, keys = evidence.nonzero().T
    assert (batch.ids[rows, keys] == batch.labels[rows, queries]).all()
    assert (batch.labels[asked] >= FIRST_VALUE).all()
    if task.form == "causal":
        assert (keys < queries).all()
    else:  # only what was shown once tells the answer
        assert (evidence.sum(-1)[asked] == 1).all()
    again = task.draw(6, seeded(3))
    assert torch.equal(batch.ids, again.ids) and torch.equal(batch.labels, again.labels)


def test_needles_stand_at_their_depth():
    task = Task("needle", "gpt2", 256, 8, depth=0.5)
    batch = task.draw(4, seeded(0))
    first = (batch.labels != -100).int().argmax(1)
    places = task.evidence(batch)[torch.arange(4), first].int().argmax(-1)
    assert places.tolist() == [121] * 4  # the value behind a key at half of the 240 tokens of filler


def test_rules_and_reach_are_shares_of_questions():
    task = TASKS[0]
    batches = batches_of(task, 0, 4)
    found = rules(task, batches)
    assert found["a value shown, at random"] == pytest.approx(1 / 8, abs=0.05)
    place = torch.arange(64)
    causal = place <= place[:, None]
    assert reach(task, batches, causal) == 1.0
    near = reach(task, batches, causal & (place > place[:, None] - 8))
    wide = reach(task, batches, causal & (place > place[:, None] - 24))
    assert 0 < near < wide < 1


def test_reach_is_of_the_head_that_looks_up():
    task = Task("t5-recall", "t5", 96, 8)
    batches, config = batches_of(task, 0, 1), attention_config("bigbird", block_size=4, num_random_blocks=3)
    place = torch.arange(96)
    with converted(constructed(task, 0), task, config, 0) as model:
        pattern = mechanism_of(list(converted_layers(model).values())[-1]).pattern.at_length(96)
        masks = pattern.visible_per_head(place[:, None], place[None])
        first, second = (round(reach(task, batches, mask), 4) for mask in masks)
        assert first != second == _reach(model, task, batches)


@pytest.mark.parametrize("task", [TASKS[0], TASKS[2], run.T5], ids=lambda task: f"{task.name}-{task.family}")
def test_constructed_models_start_far_above_chance(task: Task):
    """Chance is 1 of 64 values, of those that are shown 1 of 8 (T5: of 16); and a seed is one model."""
    model, batches = constructed(task, 0), batches_of(task, 0, 1)
    torch.randn(1)
    again = constructed(task, 0).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
    accuracy = score(model, task, batches)["accuracy"]
    assert accuracy > (0.15 if task.family == "t5" else 0.8)
    assert set(inputs_of(task, batches[0].ids)) <= {"input_ids", "attention_mask", "decoder_input_ids"}


def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A whole run: valid, windows score what they reach, and what is recorded is not measured again."""
    record = tmp_path / "suite.json"
    document = run.suite_run("smoke", record, progress=False)
    assert json.loads(record.read_text()) == document
    check_schema(document)
    (block,) = document["tasks"]
    assert block["validity"]["passed"], block["validity"]
    rows = {json.dumps(row["attention"]): row for row in block["rows"]}
    assert document["sources"] == [] and document["hardware"]["threads"] == 1
    for row in rows.values():
        assert row["time_ratio"] > 0
        accuracy = row["stages"]["dense" if row["attention"] is None else "converted"]["accuracy"]
        if row["attention"] and row["attention"].get("mechanism") == "local":
            assert accuracy == pytest.approx(row["reach"], abs=0.01), row
            assert accuracy < block["validity"]["dense"]

    headings, lines = suite_rows(document)
    assert all(len(line) == len(headings) for line in lines) and len(lines) == len(rows) + len(block["rules"])
    named = [line[1] for line in lines]
    learned = next(name for name in named if name.startswith("hedgehog"))
    assert len(set(named)) == len(named) and any(", the control of " in name and learned in name for name in named)
    draw_suite(document, tmp_path / "suite.png")
    assert (tmp_path / "suite.png").stat().st_size > 10_000

    def refuse(*args: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(run, "measure", refuse)
    monkeypatch.setattr(run, "dense_model", refuse)
    assert run.suite_run("smoke", record, progress=False) == document
    with pytest.raises(ValueError, match="smoke"):
        run.suite_run("quick", record, progress=False)
    record.write_text(json.dumps(document | {"hardware": document["hardware"] | {"cpu": "another"}}))
    with pytest.raises(ValueError, match=r"has hardware=.*another"):
        run.suite_run("smoke", record, progress=False)


def test_rows_that_beat_nothing_are_in_italics_and_differences_within_the_spread_are_equal_signs():
    def figure(attention: Any, stage: str, *values: float) -> dict[str, Any]:
        spread = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        return {"attention": attention, "stage": stage, **spread, "seeds": len(values)}

    good, bad = ({"mechanism": "local", "attention_window": w} for w in (32, 2))
    rows = [{"attention": a, "seed": 0, "keys_per_query": 9.0, "reach": None} for a in (run.CONTROL, good, bad)]
    summary = [
        figure(run.CONTROL, "converted", 0.1, 0.2),
        figure(good, "converted", 0.5, 0.6),
        figure(good, "finetuned", 0.52, 0.6),
        figure(bad, "converted", 0.1, 0.1),
    ]
    block = {"rows": rows, "summary": summary, "rules": {"last": 0.05}}
    lines = block_rows(block, italics="*")
    assert lines[1][4:6] == ["0.550 (0.500–0.600)", "="]
    assert lines[2][0] == "*local 2*" and lines[0][0] == "control: mean of values" and lines[3][0] == "rule: last"
    task = {"name": "mqar", "family": "bert", "n": 64}
    told = suite_rows({"tasks": [block | {"task": task, "validity": {"passed": False}}]})[1]
    assert {line[0] for line in told} == {"mqar bert 64, validity: failed"}


def test_only_this_suite_has_several_runs():
    assert "only `bench suite` has such runs" in error("bench", "encoder", "--quick")
    assert "only `bench suite`" in error("bench", "fidelity", "--smoke", "--full")
    assert error("bench", "suite", "--quick", "--full") == "--quick --full: give one of them."
    assert "the suite suite has its own" in error("bench", "suite", "--lengths", "512")


def test_listops_is_evaluated_as_published():
    assert [listops.apply(name, [9, 2, 5, 8]) for name in listops.OPERATORS] == [2, 9, 6, 4]
    assert listops.apply("MED", [7, 1, 3]) == 3
    found = listops.examples(60, 0, depth=4, arguments=5, shortest=16, longest=126)
    for example in found:
        assert 16 <= len(example.tokens) <= 126
        assert example.value == _by_stack(example.tokens)
    figures = listops.rules(found, found)
    assert figures["majority"] <= figures["first operator"] <= 1.0
    assert found == listops.examples(60, 0, depth=4, arguments=5, shortest=16, longest=126)


def _by_stack(tokens: tuple[str, ...]) -> int:
    stack: list[list[Any]] = [[]]
    for token in tokens:
        if token.startswith("["):
            stack.append([token[1:]])
        elif token == "]":
            operator, *digits = stack.pop()
            stack[-1].append(listops.apply(operator, digits))
        else:
            stack[-1].append(int(token))
    return int(stack[0][0])


def check_schema(document: dict[str, Any]) -> None:
    assert {"suite", "protocol", "run", "settings", "tasks", "hardware", "versions", "seconds"} <= set(document)
    for block in document["tasks"]:
        assert set(block) == {"task", "validity", "rules", "rows", "summary"}
        assert set(block["task"]) == {"name", "family", "n", "pairs", "form"}
        for row in block["rows"]:
            assert {"attention", "seed", "keys_per_query", "reach", "stages"} <= set(row)
            for stage in row["stages"].values():
                assert set(stage) == {"accuracy", "near", "middle", "far", "cpu_s", "tokens"}
        assert {tuple(sorted(figure)) for figure in block["summary"]} == {
            ("attention", "max", "mean", "min", "seeds", "stage")
        }


def test_recorded_files_keep_to_the_schema():
    for path in (ROOT / "model_cards" / "results").glob("suite*.json"):
        document = json.loads(path.read_text())
        check_schema(document)
        suite_rows(document)
        needle_rows(document)
