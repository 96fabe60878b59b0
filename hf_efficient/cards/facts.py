"""What a checkpoint's card is made of: its config, its reports and the results of its runs, all checked."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, try_to_load_from_cache

from hf_efficient.attention.base.registry import stored_attention
from hf_efficient.conversion.inspect import EXACT, inspect_checkpoint
from hf_efficient.experts.layer import ExpertsConfig
from hf_efficient.models import card
from hf_efficient.models.card import README
from hf_efficient.models.provenance import (
    CHANGES,
    REPORT_NAME,
    UPCYCLING_NAME,
    Provenance,
    Step,
    in_order,
    result_files,
    run_step,
    runs,
    without_undone,
)
from hf_efficient.training.data.texts import BUILDERS
from hf_efficient.training.results import RunRecord

logger = logging.getLogger(f"transformers.{__name__}")

# what a report must have for a card
CONVERSION = ("source", "revision", "model_class", "efficient_attention", "max_positions", "positions", "tensors")
UPCYCLING = (
    "source", "revision", "efficient_experts", "layers", "source_parameters", "parameters", "active_parameters",
    "difference", "tolerance", "tensors",
)  # fmt: skip
ADAPTER = "adapter_config.json"
# front matter of the source that holds for what was made of it as well
INHERITED = ("license", "license_name", "license_link", "language")


@dataclass
class CardFacts:
    """Everything a card says, as it was recorded.

    Attributes:
        name: what the card calls the checkpoint. folder: where it is.
        inspected: see `inspect_checkpoint`. config: its config.json.
        report: the conversion report, if there is one. upcycling: the upcycling report, likewise.
        history: every step that led to its weights, in order; see `Provenance`. measured: how many of them came before the
            fidelity was measured; `None` = nobody knows.
        source, revision: where the first of them began.
        adapter: adapter_config.json, if the folder holds adapters only. inherited: front matter of the source.
    """

    name: str
    folder: Path
    inspected: dict[str, Any]
    config: dict[str, Any]
    report: dict[str, Any] | None
    upcycling: dict[str, Any] | None
    history: list[Step]
    measured: int | None
    source: str | None
    revision: str | None
    adapter: dict[str, Any] | None
    inherited: dict[str, Any]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The reports in the order in which things were done."""
        return in_order(report for report in (self.report, self.upcycling) if report is not None)

    @property
    def runs(self) -> list[Step]:
        return runs(self.history)

    @property
    def fidelity(self) -> dict[str, Any] | None:
        return (self.report or self.upcycling or {}).get("fidelity")

    @property
    def experts(self) -> dict[str, Any] | None:
        options: dict[str, Any] | None = self.inspected["experts"]
        return None if options is None else ExpertsConfig.from_dict(options).to_dict()

    @property
    def mechanisms(self) -> list[str]:
        names = (layer["mechanism"] for layer in self.inspected["layers"])
        return [name for name in dict.fromkeys(names) if name != EXACT]


def gather(folder: Path, results: list[Path]) -> CardFacts:
    """Read and check everything; raises as `checkpoint_card`."""
    adapter, holder = _adapter(folder)
    config = _read(holder / "config.json")
    # recipes write a folder with the result and, inside, the checkpoint itself
    found = result_files(folder)
    records = [_record(path) for path in {path.resolve(): path for path in [*results, *found]}.values()]
    report = _conversion([folder, holder], records, config) if config.get("efficient_attention") else None
    upcycling = _upcycling([folder, holder], config) if config.get("efficient_experts") else None
    inspected = inspect_checkpoint(str(holder))
    name = found[-1].resolve().parent.name if found else folder.resolve().name
    recorded = _marked(Provenance.read(holder).history, (report or upcycling or {}).get("fidelity") or {})
    history = _with_results(without_undone(recorded), records)
    measured = next((i for i, step in enumerate(history, start=1) if step.get("measured")), None)
    reports = in_order(one for one in (report, upcycling) if one is not None)
    # reports that tell of every change name the source themselves
    tell_all = len([step for step in history if step["what"] in CHANGES]) <= len(reports)
    first = history[0] if history and not (tell_all and history[0]["what"] in CHANGES) else (*reports, {})[0]
    source, revision = first.get("source"), first.get("revision")
    inherited = _inherited(source, revision)
    return CardFacts(
        name, folder, inspected, config, report, upcycling, history, measured, source, revision, adapter, inherited
    )


def _marked(history: list[Step], fidelity: dict[str, Any]) -> list[Step]:
    """The steps, of which the one after which the fidelity was measured says so."""
    steps = list(history)
    count = (fidelity.get("weights") or {}).get("steps")
    if isinstance(count, int) and 0 < count <= len(steps):
        steps[count - 1] = steps[count - 1] | {"measured": True}
    return steps


def _with_results(history: list[Step], records: list[dict[str, Any]]) -> list[Step]:
    """The steps, each run as its result.json tells it; results of runs that are not among them stand where they belong."""
    steps, position = list(history), len(history)
    for record in reversed(records):
        run = run_step(record)
        key = ("what", "source")
        same = [
            i
            for i, step in enumerate(steps[:position])
            if all(step[name] == run[name] for name in key)
            and step["settings"].get("output_dir") == run["settings"].get("output_dir")
        ]
        if same:
            position = same[-1]
            steps[position] = steps[position] | {name: value for name, value in run.items() if value is not None}
        else:
            steps.insert(position, run)
    return steps


def _adapter(folder: Path) -> tuple[dict[str, Any] | None, Path]:
    """(adapter_config.json or `None`, the folder with the model's own config)."""
    if (folder / "config.json").is_file():
        return None, folder
    if not (folder / ADAPTER).is_file():
        raise ValueError(f"{folder} is not a checkpoint folder: it has neither config.json nor {ADAPTER}.")
    adapter = _read(folder / ADAPTER)
    base = adapter.get("base_model_name_or_path")
    if not base or not (Path(base) / "config.json").is_file():
        raise ValueError(
            f"{folder} holds adapters of {base!r}, which is not a checkpoint folder here: put it there or merge the "
            "adapters (merge_and_unload) and save the whole model."
        )
    return adapter, Path(base)


def _conversion(folders: list[Path], records: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any] | None:
    """The report beside the weights, or that of a run which converted on the way."""
    path = next((folder / REPORT_NAME for folder in folders if (folder / REPORT_NAME).is_file()), None)
    in_runs = [record["conversion"] for record in records if record["conversion"]]
    report = _report(path, CONVERSION, "conversion") if path else in_runs[-1] if in_runs else None
    if report and stored_attention(report["efficient_attention"]) != stored_attention(config["efficient_attention"]):
        raise ValueError(
            f"{path or 'a result'} describes a conversion to {report['efficient_attention']}, but the checkpoint has "
            f"{config['efficient_attention']}: it belongs to another one."
        )
    return report


def _upcycling(folders: list[Path], config: dict[str, Any]) -> dict[str, Any] | None:
    path = next((folder / UPCYCLING_NAME for folder in folders if (folder / UPCYCLING_NAME).is_file()), None)
    report = _report(path, UPCYCLING, "upcycling") if path else None
    if report is not None and report["efficient_experts"] != config["efficient_experts"]:
        raise ValueError(
            f"{path} describes experts {report['efficient_experts']}, but the checkpoint has "
            f"{config['efficient_experts']}: it belongs to another one."
        )
    return report


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}. Is it truncated?") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} can't be read: it holds no JSON object.")
    return values


def _report(path: Path, needed: tuple[str, ...], kind: str) -> dict[str, Any]:
    report = _read(path)
    missing = [name for name in needed if name not in report]
    if missing:
        raise ValueError(f"{path} is not a report of {kind}: it lacks {', '.join(missing)}.")
    return report


def _record(path: Path) -> dict[str, Any]:
    values = _read(path)
    RunRecord.read(path)  # names what is missing
    if not all(isinstance(figures, dict) for figures in values["metrics"].values()):
        raise ValueError(f"{path} is not a record of a run: its metrics are not figures by name.")
    return values


def is_hub_id(name: str) -> bool:
    """Whether the recorded name of a checkpoint or of a data set is of the Hub, and no path or data file."""
    return Path(name).suffix not in BUILDERS and card.is_hub_id(name)


def _inherited(source: str | None, revision: str | None) -> dict[str, Any]:
    """Licence and language from the front matter of the source's README, if it is at hand."""
    if source is None:
        return {}
    path: Any = Path(source) / README
    if not path.is_file():
        path = try_to_load_from_cache(source, README, revision=revision) if is_hub_id(source) else None
    if not isinstance(path, (str, Path)):
        return {}
    try:
        values = metadata_load(path) or {}
    except Exception as error:
        # somebody else's file: the card says that there is no licence, which is better than no card
        logger.warning(f"the front matter of {path} can't be read, so no licence is taken from it: {error}")
        return {}
    return {name: values[name] for name in INHERITED if values.get(name)}
