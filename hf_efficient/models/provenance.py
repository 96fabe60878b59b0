"""What a model was made from: the reports that are saved beside its weights, and the steps that made them, in order.

A step is a dict, as JSON, with at least

    what        "convert", "import", "upcycle", "revert", a run ("distill", "mlm", …), or "training": steps that no run
                describes
    source      folder or Hub id of the checkpoint that it began with
    settings    its options; `command` what was typed, `None` = it was called from Python
    versions    of the packages

and of a run also `steps`, `finished`, `trained` ("mechanism" = nothing but what mechanisms added, or "all") and its figures.
A step that a run took on its way names that run in `within`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.utils import cached_file

from hf_efficient.profiling.environment import versions
from hf_efficient.profiling.json_files import write_json

REPORT_NAME = "conversion_report.json"
UPCYCLING_NAME = "upcycling_report.json"
ABSENT = "absent from the source checkpoint"
HISTORY_NAME = "history.json"
"""Holds the steps of a checkpoint that has neither report."""
RESULT_NAME = "result.json"
CHANGES = ("convert", "import", "upcycle", "revert")
"""Steps that train nothing."""
EQUAL, TRAINED, CHANGED = "as in the source", "trained since", "changed, and no run that did it is recorded"
"""What tensors that were copied from a source can be, as `verify` finds them."""
ATTRIBUTE = "efficient_provenance"
Step = dict[str, Any]
logger = logging.getLogger(f"transformers.{__name__}")


@dataclass
class Provenance:
    """Steps and reports of one model, which keeps them from loading to saving.

    Attributes:
        history: all steps, oldest first. reports: {file name: a report, or its JSON form}.
        is_loaded: whether steps come from a folder.
    """

    history: list[Step] = field(default_factory=list)
    reports: dict[str, Any] = field(default_factory=dict)
    is_loaded: bool = False

    @classmethod
    def of(cls, model: Any, folder: str | Path | None = None) -> Provenance:
        """That of a model; where it has none yet, what stands in the `folder` that it was loaded from."""
        found = getattr(model, ATTRIBUTE, None)
        if found is None:
            found = cls.read(folder) if folder else cls()
            setattr(model, ATTRIBUTE, found)
        return found

    @classmethod
    def read(cls, folder: str | Path) -> Provenance:
        """What a checkpoint folder says; the steps that reports of earlier versions lack are found by following folders."""
        return cls._read(Path(folder), frozenset())

    @classmethod
    def _read(cls, folder: Path, seen: frozenset[Path]) -> Provenance:
        seen |= {folder.resolve()}
        found = {name: _object(folder / name) for name in (REPORT_NAME, UPCYCLING_NAME, HISTORY_NAME)}
        chains = [one["history"] for one in found.values() if one and _is_chain(one.get("history"))]
        reports = {name: one for name, one in found.items() if one and name != HISTORY_NAME}
        history = max(chains, key=len) if chains else _followed(folder, reports, seen)
        return cls(history, reports, is_loaded=bool(history))

    def add(self, what: str, source: str | None, settings: dict[str, Any], **facts: Any) -> Step:
        """Append a step; returns it."""
        step = {"what": what, "source": source, "settings": settings, "command": None, **facts, "versions": versions()}
        self.history.append(step)
        return step

    def write(self, folder: str | Path) -> None:
        """Put the reports, each with all steps, into a checkpoint folder; without a report the steps have their own file."""
        for name, report in self.reports.items():
            values = report if isinstance(report, dict) else report.to_dict()
            write_json(Path(folder) / name, values | {"history": self.history})
        if self.history and not self.reports:
            write_json(Path(folder) / HISTORY_NAME, {"history": self.history})

    def since(self, source: str | None) -> list[Step]:
        """The steps after a checkpoint of that name; of an unknown one, those from the first conversion on."""
        begins = [i for i, step in enumerate(self.history) if _same(step["source"], source)]
        made = [i for i, step in enumerate(self.history) if step["what"] in ("convert", "import", "upcycle")]
        return self.history[(begins or made or [0])[0] :]

    def stepped(self, optimizer: str, source: str | None) -> None:
        """Note one optimiser step, unless a run is under way that will describe itself."""
        if not self.history or self.history[-1].get("finished") is False:
            return
        if self.history[-1]["what"] != "training" or self.history[-1]["settings"] != {"optimizer": optimizer}:
            self.add("training", source, {"optimizer": optimizer}, steps=0, finished=True, trained="all")
        self.history[-1]["steps"] += 1


def earlier_steps(model: Any, folder: Path | None) -> list[Step]:
    """The steps behind a model just loaded from a folder that it does not know itself, as those of stock classes do not."""
    return [] if folder is None or hasattr(model, ATTRIBUTE) else Provenance.read(folder).history


def without_undone(history: list[Step]) -> list[Step]:
    """The steps but for conversions at the end that were undone untrained, which gave the very weights of before back."""
    while history and history[-1]["what"] == "revert":
        made = [i for i, step in enumerate(history) if step["what"] == history[-1]["settings"].get("undone")]
        if not made or runs(history[made[-1] :]):
            break
        history = history[: made[-1]] + history[made[-1] + 1 : -1]
    return history


def runs(steps: Iterable[Step]) -> list[Step]:
    """Those of the steps that trained."""
    return [step for step in steps if step["what"] not in CHANGES]


def described(step: Step) -> str:
    """A run in a few words: "100 steps of distillation"."""
    name = {"distill": "distillation", "training": f"training with {step['settings'].get('optimizer')}"}
    what = name.get(step["what"], f"the recipe {step['what']}")
    count = step.get("steps")
    text = what if count is None else f"{count} step{'s' * (count != 1)} of {what}"
    return text if step.get("finished", True) else f"an unfinished run of {what}"


def run_step(record: dict[str, Any]) -> Step:
    """The step that a result.json tells of."""
    training = record.get("training") or {}
    kept = ("metrics", "layer_errors", "data", "seed", "finished", "versions", "hardware")
    return {
        "what": record["recipe"],
        "source": record["settings"].get("model"),
        "settings": record["settings"],
        "command": record.get("command"),
        "steps": training.get("steps"),
        "trained": "all",
        "training": {name: value for name, value in training.items() if name != "log"},
    } | {name: record[name] for name in kept if name in record}


# ---- checkpoints of earlier versions -----------------------------------------------------------------------------


def in_order(reports: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reports of a conversion and of an upcycling in the order in which things were done."""
    found = sorted(reports, key=lambda report: "efficient_experts" in report)
    if len(found) == 2 and any(f"{layer}.router.weight" in found[0]["tensors"] for layer in found[1]["layers"]):
        found.reverse()
    return found


def _is_chain(value: Any) -> bool:
    needed = {"what", "source", "settings"}
    return isinstance(value, list) and all(isinstance(step, dict) and needed <= step.keys() for step in value)


def _report_step(report: dict[str, Any], before: dict[str, Any], **facts: Any) -> Step:
    what = "upcycle" if "efficient_experts" in report else "convert"
    if what == "upcycle":
        settings = {"efficient_experts": report["efficient_experts"]}
    else:
        settings = {"attention": report.get("efficient_attention"), "positions": report.get("positions")}
        settings["rope"] = report.get("rope")
        given = report.get("max_positions") != before.get("max_positions") or "model_max_length" in before
        settings["max_positions"] = report.get("max_positions") if given else None
    known = {"revision": report.get("revision"), "versions": report.get("versions") or {}}
    return {"what": what, "source": report.get("source"), "settings": settings, "command": None, **known, **facts}


def _followed(folder: Path, reports: dict[str, dict[str, Any]], seen: frozenset[Path]) -> list[Step]:
    # what a converted checkpoint knows of its source
    original = (_object(folder / "config.json") or {}).get("efficient_source") or {}
    steps = [_report_step(report, original) for report in in_order(reports.values())]
    run = next(
        (run for run in map(_object, result_files(folder)) if run and isinstance(run.get("settings"), dict)), None
    )
    if run is None:
        before = _steps_of(steps[-1]["source"], seen) if steps else []
        return [*before, steps[-1]] if before else steps
    before = _steps_of(run["settings"].get("model"), seen)
    if run.get("conversion"):
        before = [*before, _report_step(run["conversion"], original, within=run.get("recipe"))]
    return [*(before or steps), run_step(run)]


def _steps_of(name: str | None, seen: frozenset[Path]) -> list[Step]:
    folder = Path(name or "")
    if not name or folder.resolve() in seen or not (folder / "config.json").is_file():
        return []
    return Provenance._read(folder, seen).history


def result_files(folder: Path) -> list[Path]:
    """Where the result of the run that wrote a checkpoint may be: in its folder, or beside a folder named `model`."""
    outer = folder.resolve().parent if folder.resolve().name == "model" else folder
    return [path for path in (folder / RESULT_NAME, outer / RESULT_NAME) if path.is_file()]


def _object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; `None` = there is none. A model whose report is damaged loads, with a warning."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(f"{path} can't be read, so it is not kept with the model: {error}")
        return None
    return value if isinstance(value, dict) else None


def _same(one: str | None, other: str | None) -> bool:
    return bool(one and other) and (one == other or Path(str(one)).resolve() == Path(str(other)).resolve())


# ---- loading and training -----------------------------------------------------------------------------------------


def reports_folder(name: Any, **location: Any) -> Path | None:
    """Where the reports of a checkpoint are: its folder, or the local copy of a Hub repository; `None` = it has none.

    Args:
        location: `revision`, `subfolder`, `token` and so on, as for `from_pretrained`.
    """
    if name is None:  # weights and config were given
        return None
    if Path(name).is_dir():
        return Path(name) / (location.get("subfolder") or "")
    lenient = {
        f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")
    }
    files = [cached_file(name, file, **lenient, **location) for file in (REPORT_NAME, UPCYCLING_NAME, HISTORY_NAME)]
    return next((Path(file).parent for file in files if file), None)


_watched: WeakSet[Any] = WeakSet()


def watch(model: Any) -> None:
    """From now on the steps that a PyTorch optimiser takes with parameters of `model` are noted in its history.

    So whoever trains it, with the Trainer or in a loop, saves a checkpoint that says so. An optimiser of copies, such as
    ZeRO's, holds others than the model's own; recipes describe such runs themselves.
    """
    _listen()
    _watched.add(model)


@cache
def _listen() -> None:
    register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in list(_watched):
        if any(id(p) in trained for p in model.parameters()):
            Provenance.of(model).stepped(type(optimizer).__name__, model.config._name_or_path or None)
