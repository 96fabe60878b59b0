"""convert and revert: to efficient attention and back bit for bit, every tensor accounted for."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from ._version import __version__
from .base import ConfigLike, EfficientAttentionConfig, attention_configs
from .calibration import calibrate, calibration_batches
from .class_change import change_class, config_of_class, replace_config, stock_class
from .dispatch import CHILD, IMPLEMENTATION
from .expert_sites import mark_experts, uninstall_experts
from .families import family_of
from .families.base import POSITION_METHODS
from .models import CONFIGS, MODELS, EfficientModelMixin
from .patching import install, is_installed, plan, resolve_side, uninstall
from .saving import REPORT_NAME, Result
from .side_files import checkpoint_folder, max_seq_length


@dataclass
class ConversionReport:
    """What a conversion did, tensor by tensor.

    Attributes:
        source, revision: where the original came from.
        model_class: the stock class, whose Efficient form the result is.
        efficient_attention: the installed options, as JSON.
        max_positions, positions: usable positions after conversion, and how the table was lengthened.
        tensors: {name: {"status": "copied" | "extended" | "initialised" | "random", "from": …, "shape": […]}}; "random"
            are tensors that the source checkpoint lacks, e.g. a fresh classification head.
        ignored: tensors of the source checkpoint that its class has no place for.
        fidelity: filled by `verify`, if it was run.
    """

    source: str
    revision: str | None
    model_class: str
    efficient_attention: list[dict[str, Any]]
    max_positions: int | None
    positions: str
    tensors: dict[str, dict[str, Any]]
    ignored: list[str] = field(default_factory=list)
    fidelity: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def counts(self) -> dict[str, int]:
        """Number of tensors by status."""
        statuses = [tensor["status"] for tensor in self.tensors.values()]
        return {status: statuses.count(status) for status in ("copied", "extended", "initialised", "random")}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ConversionResult(Result):
    """A converted model with its tokenizer (`None` if the source had none) and the report; `save(path)` writes all."""

    report: ConversionReport
    report_name = REPORT_NAME

    def _text_length(self) -> int | None:
        # only where the caller asked for another length: what cuts texts at 256 tokens goes on doing so
        asked = "model_max_length" in getattr(self.model.config, "efficient_source", {})
        return self.report.max_positions if asked else None


def versions() -> dict[str, str]:
    """The versions that a recorded result depends on."""
    return {
        "hf_efficient": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def convert(
    source: str | Path | PreTrainedModel,
    attention: ConfigLike,
    *,
    max_positions: int | None = None,
    positions: str = "tile",
    tokenizer: Any = None,
    revision: str | None = None,
    calibration: Sequence[str] | Sequence[Mapping[str, Tensor]] | None = None,
    **options: Any,
) -> ConversionResult:
    """Convert a pretrained checkpoint to efficient attention.

    Args:
        source: Hub id or folder of a BERT, RoBERTa, GPT-2 or T5 checkpoint (or a relative), or a loaded stock model,
            which is then converted in place.
        attention: a mechanism's name with its options as keywords, a config, its JSON form, or a list for hybrids.
        max_positions: longest input of the result, in tokens; `None` keeps the source's. T5 has no table to lengthen,
            only its tokenizer is told.
        positions: `"tile"` or `"interpolate"`: how the position table is lengthened.
        tokenizer: for a loaded model, or to use another than the source's.
        revision: of the Hub repository.
        calibration: texts, or batches of inputs, from which mechanisms set what they take from data (centroids); see
            `calibration.calibrate`. Without it they keep a start that does without, and the report says so.

    Returns:
        `.model` (an Efficient class), `.tokenizer`, `.report`; `.save(path)` writes a checkpoint for the Auto classes.

    Raises:
        ValueError: an impossible setting, an unsupported architecture, unreadable weights, a tensor unaccounted for.
        OSError: the source can't be found.
    """
    configs = attention_configs(attention, **options)
    folder, info = None, None
    if isinstance(source, PreTrainedModel):
        model, name = source, source.config._name_or_path or type(source).__name__
    else:
        name = str(source)
        model, info = load_stock(name, revision)
        folder = checkpoint_folder(name, revision)
        tokenizer = tokenizer or load_tokenizer(name, revision)
    if getattr(model.config, "efficient_attention", None) or is_installed(model):
        raise ValueError(f"{name} already has efficient attention; revert it before converting it to something else.")
    stock_name = stock_class(model).__name__
    batches = None
    if calibration is not None:
        batches = calibration_batches(calibration, tokenizer, model, family_of(model).max_positions(model.config))
    before = {key: (tensor.data_ptr(), tensor.shape) for key, tensor in model.state_dict().items()}
    origins, resized = convert_in_place(model, configs, max_positions, positions)
    if batches is not None:
        origins |= _calibrated(model, batches)
    if tokenizer is None:
        warnings.warn(f"{name} has no tokenizer: only the model is converted.", stacklevel=2)
    elif max_positions is not None:
        # the way back needs what nothing else remembers
        model.config.efficient_source |= {
            "model_max_length": tokenizer.model_max_length,
            "max_seq_length": max_seq_length(folder) if folder else None,
        }
        tokenizer.model_max_length = max_positions
    report = ConversionReport(
        source=name,
        revision=revision,
        model_class=stock_name,
        efficient_attention=model.config.efficient_attention,
        max_positions=family_of(model).max_positions(model.config) or max_positions,
        positions=positions,
        tensors=_account(model, before, origins, resized, set(info["missing_keys"]) if info else set()),
        ignored=sorted(info["unexpected_keys"]) if info else [],
    )
    return ConversionResult(model, tokenizer, report, folder)


def _calibrated(model: PreTrainedModel, batches: list[Mapping[str, Tensor]]) -> dict[str, str]:
    try:
        return calibrate(model, batches)
    except BaseException:
        revert(model)
        raise


def convert_in_place(
    model: PreTrainedModel,
    configs: list[EfficientAttentionConfig],
    max_positions: int | None = None,
    positions: str = "tile",
) -> tuple[dict[str, str], list[str]]:
    """Turn a loaded stock model into its Efficient class.

    Returns:
        {new tensor: where its values came from}, and the names of the position tables that were lengthened.
    """
    family = family_of(model)
    if positions not in POSITION_METHODS:
        raise ValueError(f"positions={positions!r} is not possible; it must be one of {', '.join(POSITION_METHODS)}.")
    if max_positions is not None and (type(max_positions) is not int or max_positions < 1):
        raise ValueError(f"max_positions={max_positions!r} is not possible; it must be an integer ≥ 1.")
    if stock_class(model) not in MODELS:
        raise ValueError(
            f"{type(model).__name__} is no model class of transformers' {family.model_type}; load the checkpoint with one "
            f"of {', '.join(cls.__name__ for cls in MODELS if cls.config_class.model_type == family.model_type)}."
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "some weights are not loaded (offloaded or on the meta device): convert on a machine that holds the model, "
            "save it, and load the converted checkpoint with device_map."
        )
    sides = [stack.side for stack in family.stacks(model)]
    configs = [replace(config, side=_stored_side(config, sides)) for config in configs]
    before = family.max_positions(model.config)
    if max_positions is not None and before is not None and max_positions < before:
        raise ValueError(
            f"max_positions={max_positions} would drop positions; the source has {before}: give at least that."
        )
    plan(model, configs, max_positions if before is not None else None)  # refuse before anything changes
    implementation = model.config._attn_implementation
    tables = family.position_tables(model)
    resized = []
    if max_positions is not None and before is not None and max_positions != before:
        resized = family.resize_positions(model, max_positions, positions)
    try:
        origins = install(model, configs)
    except BaseException:
        if resized and before is not None:
            family.resize_positions(model, before, positions)
            for owner, name, table in tables:  # the very parameters that an optimiser may hold
                setattr(owner, name, table)
        raise
    efficient: Any = model
    config = model.config
    new = CONFIGS[family.model_type].from_dict(
        config.to_dict() | {"model_type": CONFIGS[family.model_type].model_type}, attn_implementation=IMPLEMENTATION
    )
    new.efficient_attention = [c.to_dict() for c in configs]
    new.efficient_source = {"max_positions": before, "positions": positions, "attn_implementation": implementation}
    new._name_or_path = config._name_or_path
    new.attn_implementation = IMPLEMENTATION
    mark_experts(new)
    change_class(model, MODELS[stock_class(model)], new)
    replace_config(model, config, new)
    model.all_tied_weights_keys.update(efficient._efficient_ties())
    return origins, resized


def _stored_side(config: EfficientAttentionConfig, sides: list[str]) -> str | None:
    wanted = resolve_side(config, sides)
    return config.side if not wanted else "both" if len(wanted) == 2 else wanted[0]


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `convert` in place: the original class, config and weights, bit for bit unless they were trained since.

    Experts stay as they are. In a model with experts alone this undoes `upcycle`, as long as they are still equal.

    Raises:
        ValueError: the model is no converted one, or has experts alone and they were trained apart.
    """
    if not isinstance(model, EfficientModelMixin):
        raise ValueError(f"{type(model).__name__} is no converted model: there is nothing to revert.")
    family = family_of(model)
    config, stock = model.config, model.stock_class
    # a model built from its config never had an original: its position table stays
    source = getattr(config, "efficient_source", {"max_positions": None})
    keeps_experts = bool(getattr(config, "efficient_experts", None) and config.efficient_attention)
    if not config.efficient_attention:
        uninstall_experts(model)
    else:
        uninstall(model, source.get("attn_implementation") or "sdpa")
    if source["max_positions"] is not None and source["max_positions"] != family.max_positions(config):
        family.resize_positions(model, source["max_positions"], source["positions"])
    # the stacks of a reloaded encoder-decoder model hold copies
    for old in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        if isinstance(old, type(config)):
            replace_config(model, old, config_of_class(old, type(model) if keeps_experts else stock))
    change_class(model, type(model) if keeps_experts else stock, model.config)
    model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if f".{CHILD}." not in k}
    return model


def load_stock(name: str, revision: str | None = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A checkpoint in the class its config names, and transformers' loading info.

    Raises:
        ValueError: unsupported architecture, or weights that can't be read.
    """
    config = AutoConfig.from_pretrained(name, revision=revision)
    if getattr(config, "efficient_attention", None):
        raise ValueError(f"{name} already has efficient attention; revert it before converting it to something else.")
    return load_as_it_is(name, revision)


def load_as_it_is(name: str, revision: str | None = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A checkpoint, original or not, in the class its config names, and transformers' loading info; raises as above."""
    config = AutoConfig.from_pretrained(name, revision=revision)
    family_of(config.model_type)
    classes = (cls for pair in MODELS.items() for cls in pair)
    heads = {cls.__name__: cls for cls in classes if cls.config_class.model_type == config.model_type}
    cls: Any = next((heads[n] for n in config.architectures or () if n in heads), AutoModel)
    with _readable(name):
        model, info = cls.from_pretrained(name, revision=revision, output_loading_info=True, use_safetensors=True)
    model.eval()
    return model, info


def load_converted(name: str | Path) -> PreTrainedModel:
    """A converted checkpoint in the Efficient class that its config names.

    Raises:
        ValueError: the checkpoint is not converted, or its weights can't be read.
    """
    config = AutoConfig.from_pretrained(name)
    classes = {cls.__name__: cls for cls in MODELS.values()}
    cls = next((classes[n] for n in config.architectures or () if n in classes), None)
    if cls is None:
        raise ValueError(
            f"{name} is a {config.model_type!r} checkpoint without efficient attention; convert it first."
        )
    with _readable(name):
        model = cls.from_pretrained(name)
    model.eval()
    return model


@contextmanager
def _readable(name: str | Path) -> Iterator[None]:
    """Say which checkpoint it is that can't be read, whatever the reader's own message."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"the weights of {name} can't be read: {error}. Is a file truncated or of another format?"
        ) from error


def load_tokenizer(name: str, revision: str | None) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError):
        return None
    # without tokenizer files transformers makes one up, which knows a few special tokens and nothing else
    return tokenizer if len(tokenizer) - len(tokenizer.get_added_vocab()) > 16 else None


def _account(
    model: PreTrainedModel,
    before: dict[str, tuple[int, torch.Size]],
    origins: dict[str, str],
    resized: list[str],
    missing: set[str],
) -> dict[str, dict[str, Any]]:
    """The status of every tensor of the converted model; a tensor without one, or one lost on the way, is an error."""
    tensors: dict[str, dict[str, Any]] = {}
    unaccounted = []
    for name, tensor in model.state_dict().items():
        if name in origins:
            status, origin = "initialised", origins[name]
        elif name in resized:
            status, origin = "extended", f"{name}, {before[name][1][0]} rows"
        elif name in missing:
            status, origin = "random", "absent from the source checkpoint"
        elif before.get(name) == (tensor.data_ptr(), tensor.shape):
            status, origin = "copied", name
        else:
            unaccounted.append(name)
            continue
        tensors[name] = {"status": status, "from": origin, "shape": list(tensor.shape)}
    unaccounted += [name for name in before if name not in tensors]
    if unaccounted:
        raise ValueError(
            f"{len(unaccounted)} tensors are unaccounted for, e.g. {unaccounted[0]}: nothing was converted."
        )
    return tensors
