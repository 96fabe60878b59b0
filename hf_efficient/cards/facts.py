"""What a checkpoint's card is made of: its config, its reports and the results of its runs, all checked."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, try_to_load_from_cache

from hf_efficient.attention.base.registry import stored_attention
from hf_efficient.conversion import card
from hf_efficient.conversion.card import README
from hf_efficient.conversion.inspect import EXACT, inspect_checkpoint
from hf_efficient.conversion.saving import REPORT_NAME, UPCYCLING_NAME
from hf_efficient.experts.layer import ExpertsConfig
from hf_efficient.training.data.texts import BUILDERS
from hf_efficient.training.results import RESULT_NAME, RunRecord

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
        records: results of its runs, the last one that of its weights.
        adapter: adapter_config.json, if the folder holds adapters only. inherited: front matter of the source.
    """

    name: str
    folder: Path
    inspected: dict[str, Any]
    config: dict[str, Any]
    report: dict[str, Any] | None
    upcycling: dict[str, Any] | None
    records: list[dict[str, Any]]
    adapter: dict[str, Any] | None
    inherited: dict[str, Any]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The reports in the order in which things were done."""
        return _in_order(self.report, self.upcycling)

    @property
    def source(self) -> str | None:
        return self.steps[0]["source"] if self.steps else None

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
    outer = folder.resolve().parent if folder.resolve().name == "model" else folder
    found = [path for path in (folder / RESULT_NAME, outer / RESULT_NAME) if path.is_file()]
    records = [_record(path) for path in {path.resolve(): path for path in [*results, *found]}.values()]
    report = _conversion([folder, holder], records, config) if config.get("efficient_attention") else None
    upcycling = _upcycling([folder, holder], config) if config.get("efficient_experts") else None
    inspected = inspect_checkpoint(str(holder))
    name = outer.name if (outer / RESULT_NAME).is_file() else folder.resolve().name
    origin = next(iter(_in_order(report, upcycling)), None)
    inherited = {} if origin is None else _inherited(origin["source"], origin["revision"])
    return CardFacts(name, folder, inspected, config, report, upcycling, records, adapter, inherited)


def _in_order(report: dict[str, Any] | None, upcycling: dict[str, Any] | None) -> list[dict[str, Any]]:
    if report is None or upcycling is None:
        return [step for step in (report, upcycling) if step is not None]
    had_experts = f"{upcycling['layers'][0]}.router.weight" in report["tensors"]
    return [upcycling, report] if had_experts else [report, upcycling]


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
