"""`hf-efficient bench suite`: which tasks, mechanisms and seeds a run has, and its record, which grows row by row."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_efficient.attention.base.registry import attention_configs, list_mechanisms
from hf_efficient.benchmarks.suite import listops
from hf_efficient.benchmarks.suite.circuits import constructed
from hf_efficient.benchmarks.suite.protocol import (
    Budget,
    batches_of,
    converted,
    dense_model,
    geometry_of,
    measure,
    score,
)
from hf_efficient.benchmarks.suite.tasks import Task, rules
from hf_efficient.evaluation.controls import MeanOfValuesConfig
from hf_efficient.evaluation.cost import setting_near
from hf_efficient.profiling.environment import hardware, one_thread, versions
from hf_efficient.profiling.json_files import read_json, write_json

PROTOCOL = 1
SOLVED, CONTROL_SHARE = 0.98, 0.25
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
CONTROL = {"control": "mean of values"}


@dataclass(frozen=True)
class Plan:
    """What a run consists of: tasks, mechanisms (`None` = all), costs as shares of n in keys per query, seeds, budget."""

    tasks: tuple[Task, ...]
    mechanisms: tuple[str, ...] | None
    shares: tuple[int, ...]
    seeds: tuple[int, ...]
    budget: Budget
    by_depth: bool = False
    listops: int = 0


QUICK = ("local", "bigbird", "reformer", "routing_transformer", "performer", "hedgehog", "linformer", "transformer_xl")
MQAR = tuple(Task("mqar", family, 256, 32) for family in ("gpt2", "bert"))
NEEDLES = tuple(Task("needle", family, n, 8) for family in ("gpt2", "bert") for n in (256, 1024, 2048, 4096))
T5 = Task("t5-recall", "t5", 256, 16)
PLANS = {
    "smoke": Plan(
        (Task("mqar", "gpt2", 64, 8),), ("local", "reformer", "hedgehog"), (8,), (0,), Budget(0, dense_steps=30)
    ),
    "quick": Plan(
        (*MQAR, T5, Task("needle", "gpt2", 256, 8), Task("copy", "gpt2", 256, 64)),
        QUICK,
        (8,),
        (0,),
        Budget(20),
        by_depth=True,
        listops=200,
    ),
    "full": Plan(
        (*MQAR, Task("mqar", "gpt2", 512, 64), Task("mqar", "gpt2", 1024, 64), T5, *NEEDLES),
        None,
        (16, 8, 4, 2),
        (0, 1, 2),
        Budget(200, tests=64),
        by_depth=True,
        listops=200,
    ),
}


def suite_run(run: str = "quick", record: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Measure; what stands in `record` is read, not measured again, and every new row is written there at once.

    Raises:
        ValueError: `record` was made by another run, with other versions, or on other hardware.
    """
    plan = PLANS[run]
    with one_thread():
        document = _opened(run, plan, record)
        rows = list(_missing(plan, document))
        start, before = time.process_time(), document["seconds"]
        dense: tuple[Any, Any] = (None, None)
        for task, seed, attention in tqdm(rows, desc="rows", disable=not progress, file=sys.stderr):
            if dense[0] != (task, seed):
                dense = ((task, seed), dense_model(task, seed, plan.budget))
            _add(document, plan, task, seed, attention, dense[1])
            document["seconds"] = round(before + time.process_time() - start, 1)
            if record is not None:
                write_json(record, document)
    return document


def _opened(run: str, plan: Plan, record: Path | None) -> dict[str, Any]:
    """The record so far, or a new one."""
    document: dict[str, Any] = {
        "suite": "tasks",
        "protocol": PROTOCOL,
        "run": run,
        "settings": asdict(plan.budget)
        | {"optimizer": "adamw", "test_rows": 16 * plan.budget.tests, "seed": ", ".join(map(str, plan.seeds))},
        "tasks": [],
        "listops": {},
        "sources": [],  # all models are constructed
        "hardware": hardware(),
        "versions": versions(),
        "seconds": 0.0,
    }
    if record is None or not Path(record).is_file():
        return document | ({"listops": listops_rules(plan.listops)} if plan.listops else {})
    former: dict[str, Any] = read_json(record)
    for name in ("suite", "protocol", "run", "settings", "versions", "hardware"):
        if former.get(name) != document[name]:
            raise ValueError(
                f"{record} has {name}={former.get(name)!r}, this run {document[name]!r}: give another --out, or remove it."
            )
    return former


def listops_rules(count: int) -> dict[str, Any]:
    """ListOps as published: what rules reach that read one level of brackets at most."""
    train, test = (listops.examples(count, seed) for seed in (0, 1))
    return {"rows": count, "rules": {name: round(value, 4) for name, value in listops.rules(train, test).items()}}


def _missing(plan: Plan, document: dict[str, Any]) -> Iterator[tuple[Task, int, dict[str, Any] | None]]:
    """(task, seed, attention) of every row that the record lacks; `None` = the dense model."""
    for task in plan.tasks:
        block = _block(document, task)
        there = [(row["attention"], row["seed"]) for row in block["rows"]]
        for seed in plan.seeds:
            for attention in (None, CONTROL, *_settings(plan, task)):
                if (attention, seed) not in there:
                    yield task, seed, attention


def _settings(plan: Plan, task: Task) -> list[dict[str, Any]]:
    """Every mechanism at the settings nearest to each cost, and what of it learns nothing."""
    geometry = geometry_of(constructed(task, 0))
    found: list[dict[str, Any]] = []
    for name in plan.mechanisms or list_mechanisms():
        for share in plan.shares:
            config = setting_near(name, geometry, task.length, task.length / share)
            if config is None:
                continue
            control = config.attention_class.control_config(config)
            found += [c.to_dict() for c in (config, control) if c is not None]
    return [one for number, one in enumerate(found) if one not in found[:number]]


def _block(document: dict[str, Any], task: Task) -> dict[str, Any]:
    """The part of the record about one task."""
    facts = {"name": task.name, "family": task.family, "n": task.length, "pairs": task.pairs, "form": task.form}
    block: dict[str, Any]
    for block in document["tasks"]:
        if block["task"] == facts:
            return block
    block = {"task": facts, "validity": None, "rules": {}, "rows": [], "summary": []}
    document["tasks"].append(block)
    return block


def _add(
    document: dict[str, Any], plan: Plan, task: Task, seed: int, attention: dict[str, Any] | None, dense: Any
) -> None:
    """Measure one row, and bring the task's validity, rules and summary up to date."""
    block = _block(document, task)
    config = None if attention is None else _config(attention)
    row = measure(dense, task, config, seed, plan.budget)
    if task.name == "needle" and plan.by_depth:
        row["depth"] = by_depth(dense, task, config, seed)
    block["rows"].append({"attention": attention, "seed": seed, **row})
    if attention is None:
        tests = batches_of(task, seed, plan.budget.tests)
        block["rules"] = {name: round(value, 4) for name, value in rules(task, tests).items()}
    block["summary"] = summary(block["rows"])
    block["validity"] = validity(block["summary"])


def _config(attention: dict[str, Any]) -> Any:
    if attention == CONTROL:
        return MeanOfValuesConfig()
    return attention_configs(attention)[0]


def by_depth(dense: Any, task: Task, config: Any, seed: int, rows: int = 64) -> dict[str, float]:
    """Accuracy of the first question, whose pair stands at each depth; untrained."""
    found: dict[str, float] = {}
    with converted(dense, task, config, seed) as model:
        for depth in DEPTHS:
            batches = batches_of(replace(task, depth=depth), seed, rows // 16)
            for batch in batches:
                first = (batch.labels != -100).int().argmax(1, keepdim=True)
                kept = batch.labels.gather(1, first)
                batch.labels.fill_(-100).scatter_(1, first, kept)
            found[str(depth)] = score(model, task, batches)["accuracy"]
    return found


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy over the seeds, of every setting and stage."""
    found: list[dict[str, Any]] = []
    settings = [row["attention"] for row in rows]
    for attention in (one for number, one in enumerate(settings) if one not in settings[:number]):
        own = [row for row in rows if row["attention"] == attention]
        for stage in own[0]["stages"]:
            values = [row["stages"][stage]["accuracy"] for row in own if stage in row["stages"]]
            spread = {"mean": round(sum(values) / len(values), 4), "min": min(values), "max": max(values)}
            found.append({"attention": attention, "stage": stage, **spread, "seeds": len(values)})
    return found


def validity(figures: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A task ranks mechanisms only if the dense model solves it, and the control, trained likewise, does not."""
    dense = next((f["mean"] for f in figures if f["attention"] is None and f["stage"] == "dense"), None)
    control = [f["mean"] for f in figures if f["attention"] == CONTROL]
    if dense is None or not control:
        return None
    passed = dense >= SOLVED and max(control) <= CONTROL_SHARE * dense
    return {"dense": dense, "control_finetuned": max(control), "passed": passed}
