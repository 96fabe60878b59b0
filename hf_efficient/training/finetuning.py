"""What the finetuning recipes share: labels that are checked before anything is trained, lengths, and the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_efficient.families import HostModel, family_of
from hf_efficient.models.loading import read_config
from hf_efficient.training.checkpoints import is_first_process
from hf_efficient.training.results import RESULT_NAME, RunRecord
from hf_efficient.training.settings import Settings

NO_LIMIT = 10**6
MOST_SHOWN = 12


@dataclass(kw_only=True)
class FinetuningSettings(Settings):
    """What every finetuning recipe with a baseline takes."""

    max_length: int = 0  # tokens read of each text; 0 = all that the model can read
    baseline: bool = False  # also train the unconverted model, for comparison
    warmup_steps: float = 0.1  # below 1 = share of all steps
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.include_for_metrics = list({*self.include_for_metrics, "loss"})  # of `token_loss`


def require_filled(rows: Any, *columns: str) -> None:
    """Refuse rows without a value: nothing, an empty text or an empty list.

    Args:
        rows: a `DatasetDict`. columns: names in it.

    Raises:
        ValueError: names the first such row.
    """
    for split in rows:
        for column in columns:
            for index, value in enumerate(rows[split][column]):
                text = value.strip() if isinstance(value, str) else value
                if text is None or (isinstance(text, (str, list)) and not text):
                    raise ValueError(
                        f"row {index} of {split} has nothing in {column!r}: fill it or leave the row out."
                    )


def with_label_ids(rows: Any, column: str, *, listed: bool, head: Sequence[str] = ()) -> tuple[Any, list[str]]:
    """Labels as ids, and their names in order of id.

    Where all labels of the rows are among those of the checkpoint's head, they have its ids, and the names are all of its
    names, also of classes that no row has. Else a `ClassLabel` column keeps its names and ids; of other columns the names
    are the distinct values of the training rows, in order.

    Args:
        rows: a `DatasetDict` with "train". column: where the labels stand.
        listed: whether a row has a list of labels, or one. head: see `head_labels`.

    Raises:
        ValueError: a list of labels where one is needed or the other way round; a label that is out of range, unknown in
            the training rows, or no label at all; fewer than two classes.
    """
    from datasets import ClassLabel

    feature = rows["train"].features[column]
    feature = getattr(feature, "feature", feature)
    values = {split: list(rows[split][column]) for split in rows}
    for split, labels in values.items():
        for index, value in enumerate(labels):
            if isinstance(value, list) != listed:
                needed = "a list of labels, one for each word," if listed else "one label"
                raise ValueError(f"row {index} of {split} has {value!r:.60} in {column!r}, where {needed} is needed.")
    if isinstance(feature, ClassLabel):
        names, known = list(feature.names), list(range(len(feature.names)))
    else:
        found = {label for value in values["train"] for label in _labels(value) if _is_label(label)}
        known = sorted(found, key=lambda label: (isinstance(label, str), label))
        names = [str(label) for label in known]
    ids = {label: index for index, label in enumerate(known)}
    of_head = _ids_of_head(values, feature.names if isinstance(feature, ClassLabel) else None, head)
    if of_head is not None:
        ids, names = of_head, [name if name != f"LABEL_{index}" else str(index) for index, name in enumerate(head)]
    for split, labels in values.items():
        for index, value in enumerate(labels):
            for label in _labels(value):
                if label not in ids or not _is_label(label):
                    raise ValueError(
                        f"row {index} of {split} has the label {label!r} in {column!r}, {_why(label, known)}"
                    )
        new = [[ids[label] for label in v] if isinstance(v, list) else ids[v] for v in labels]
        rows[split] = rows[split].add_column("ids", new).remove_columns(column).rename_column("ids", column)
    if len(names) < 2:
        raise ValueError(f"column {column!r} has {len(names)} classes in the training rows; at least 2 are needed.")
    return rows, names


def _ids_of_head(values: dict[str, list[Any]], names: list[str] | None, head: Sequence[str]) -> dict[Any, int] | None:
    """{label: its place in `head`} of every label that occurs, or `None` if one is not there.

    Args:
        names: of a `ClassLabel` column, in order of its ids.
    """
    labels = {label for column in values.values() for value in column for label in _labels(value) if _is_label(label)}
    if names is not None:
        named = {label: names[label] for label in labels if label in range(len(names))}
    elif list(head) == [f"LABEL_{index}" for index in range(len(head))]:
        named = {label: f"LABEL_{label}" for label in labels if isinstance(label, int)}
    else:
        named = {label: str(label) for label in labels}
    if not labels or len(named) < len(labels) or not set(named.values()) <= set(head):
        return None
    return {label: list(head).index(name) for label, name in named.items()}


def head_labels(source: str, head: str) -> list[str]:
    """The names of what a checkpoint tells apart, in order of their ids; empty without such a head.

    Args:
        source, head: see `label_options`.
    """
    config = read_config(source)
    if not any(name.endswith(head) for name in config.architectures or ()):
        return []
    return [config.id2label[index] for index in range(config.num_labels)]


def _labels(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_label(label: Any) -> bool:
    # -1 marks rows whose label is kept secret
    return isinstance(label, str) or (isinstance(label, int) and label >= 0)


def _why(label: Any, known: list[Any]) -> str:
    if not _is_label(label):
        return "which is no class: classes are names or numbers from 0. Correct it or leave the row out."
    shown = ", ".join(map(repr, known[:MOST_SHOWN])) + (", …" if len(known) > MOST_SHOWN else "")
    return (
        f"which is none of the {len(known)} classes there are in training ({shown}): correct it or leave the row out."
    )


def first_rows(rows: Any, settings: Settings) -> Any:
    """The first `max_train_rows` and `max_eval_rows` rows of a `DatasetDict`; 0 = all."""
    for split, most in (("train", settings.max_train_rows), ("validation", settings.max_eval_rows)):
        if most:
            rows[split] = rows[split].select(range(min(most, len(rows[split]))))
    return rows


def label_options(names: Sequence[str], source: str, head: str) -> dict[str, Any]:
    """Keywords of `from_pretrained` that put label names into the model's config.

    Args:
        source: Hub id or folder of the checkpoint. head: how its class is called if it has such labels already, e.g.
            "ForTokenClassification".

    Raises:
        ValueError: the checkpoint has such a head, of other labels or in another order; "LABEL_0", … may be any.
    """
    there = head_labels(source, head)
    is_named = there != [f"LABEL_{index}" for index in range(len(names))]
    if there and is_named and there != list(names):
        raise ValueError(
            f"{source} already tells {len(there)} labels apart ({', '.join(there)}), but the rows have {len(names)} "
            f"({', '.join(names)}): begin with a checkpoint without {head}, or with rows whose labels are all among its own."
        )
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def token_loss(evaluated: Any, pad_token_id: int = -100) -> dict[str, float]:
    """{"token_loss": the mean loss over labels}; the Trainer's own is one over batches, whatever is in them.

    Args:
        evaluated: an `EvalPrediction` with losses (`include_for_metrics=["loss"]`): of each row that of its batch. Labels
            are (rows,), one of each row, or (rows, tokens).
        pad_token_id: what labels of tokens are padded with beside -100.
    """
    labels = evaluated.label_ids.reshape(len(evaluated.label_ids), -1)
    counts = ((labels != -100) & (labels != pad_token_id)).sum(1)
    # the last batch's loss is repeated as if the batch were full
    return {"token_loss": float((evaluated.losses[: len(counts)] * counts).sum() / counts.sum())}


def input_length(model: Any, tokenizer: Any, wanted: int = 0) -> int:
    """Longest input in tokens: `wanted`, or with 0 all that model and tokenizer can take.

    Raises:
        ValueError: the model has fewer positions; or nothing limits the input, so a length must be given.
    """
    positions = HostModel.of(model).max_positions
    if wanted and positions is not None and wanted > positions:
        raise ValueError(
            f"inputs of {wanted} tokens are asked for, but the model has {positions} positions: lower it, or convert "
            f"with --attention and --max_positions {wanted}."
        )
    length = wanted or min(positions or NO_LIMIT, tokenizer.model_max_length)
    if length >= NO_LIMIT:
        raise ValueError("neither model nor tokenizer limits the input: say how many tokens of it are read.")
    return length


def ensure_padding(model: Any, tokenizer: Any) -> None:
    """Rows of a batch need a padding token; where a tokenizer has none (GPT-2) its end-of-text token is used."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def with_baseline(finetune: Callable[[Any], RunRecord], settings: FinetuningSettings) -> RunRecord:
    """Finetune, and with `settings.baseline` the unconverted model too, in the same way, in `output_dir/baseline`.

    It reads as many tokens as it has positions, if that is less than `settings.max_length`. Its figures become
    `metrics["baseline"]` of the first run's result.

    Raises:
        ValueError: there is nothing to compare with, as the model is not converted.
    """
    if not settings.baseline:
        return finetune(settings)
    config = read_config(settings.model)
    is_converted = bool(getattr(config, "efficient_attention", None))
    if settings.attention == "none" or not (settings.attention or is_converted):
        raise ValueError(
            "baseline trains the unconverted model for comparison, but this run is it already: leave it out, or name a "
            "mechanism with --attention."
        )
    record = finetune(settings)
    positions = getattr(config, "efficient_source", {}).get("max_positions") if is_converted else None
    positions = positions or family_of(config.model_type).of(config).positions.limit(config) or NO_LIMIT
    folder = Path(settings.output_dir)
    plain = settings.replaced(
        attention="none",
        max_positions=0,
        positions=None,
        max_length=min(settings.max_length, positions),
        baseline=False,
        output_dir=str(folder / "baseline"),
        resume=settings.resume and (folder / "baseline").is_dir(),
    )
    record.add("baseline", finetune(plain).metrics["trained"])
    if is_first_process():
        record.write(folder / RESULT_NAME)
    return record
