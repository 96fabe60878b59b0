"""convert: a pretrained checkpoint to efficient attention, and a report of where each tensor came from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient.attention.base import EfficientAttentionConfig
from hf_efficient.attention.base.registry import ConfigLike, requested_configs
from hf_efficient.conversion.calibrate import bound_coverage, calibrate, calibration_batches, calibration_use
from hf_efficient.conversion.loading import (
    Source,
    load_stock,
    open_source,
    refuse_converted,
    split_options,
    takes_pictures,
)
from hf_efficient.conversion.offloading import chosen_streaming, new_folder, put_away_in
from hf_efficient.conversion.saving import Report, Result
from hf_efficient.conversion.sentence_transformers import max_seq_length
from hf_efficient.corpus import TextUse
from hf_efficient.families import ORIGINS, HostModel
from hf_efficient.families.positions import LongerInputs
from hf_efficient.families.readable import require_model
from hf_efficient.models.in_place import convert_in_place, revert, stock_class
from hf_efficient.models.loading import LOCATION_KEYWORDS
from hf_efficient.models.provenance import ABSENT, REPORT_NAME, Provenance, earlier_steps
from hf_efficient.patching.install import resolve_side
from hf_efficient.profiling.environment import versions

logger = logging.getLogger(f"transformers.{__name__}")


@dataclass
class ConversionReport(Report):
    """What a conversion did, tensor by tensor.

    Attributes:
        source, revision: where the original came from.
        model_class: the stock class, whose Efficient form the result is.
        efficient_attention: the installed options, as JSON.
        lengths: {side: longest input, in tokens, that this stack is made for now; `None` = any}.
        max_positions, positions, rope: usable positions after conversion, how the model got there, and numbers given for it.
        short_inputs: what that method does to inputs up to the old length: "unchanged", "changed", or `None` = no method.
        tensors: {name: {"status": "copied" | "extended" | "initialised" | "random", "from": …, "shape": […]}}; "random"
            are tensors that the source checkpoint lacks, e.g. a fresh classification head.
        ignored: tensors of the source checkpoint that its class does not use.
        calibration: how much of the calibration texts or rows was read, see `TextUse`; `None` = there were none.
        recast: {tensor: "dtype in the source checkpoint → dtype here"}, where they differ unasked.
        family: name and version of the distribution that the model's family came from; `None` = this package.
        fidelity: filled by `verify`, if it was run.
        history: every step that led to the model, see `Provenance`; later ones are added.
    """

    source: str
    revision: str | None
    model_class: str
    efficient_attention: list[dict[str, Any]]
    max_positions: int | None
    positions: str
    tensors: dict[str, dict[str, Any]]
    ignored: list[str] = field(default_factory=list)
    calibration: dict[str, int] | None = None
    recast: dict[str, str] = field(default_factory=dict)
    fidelity: dict[str, Any] | None = None
    family: dict[str, str] | None = None
    rope: dict[str, Any] | None = None
    lengths: dict[str, int | None] = field(default_factory=dict)
    short_inputs: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=versions)
    statuses: ClassVar[tuple[str, ...]] = ("copied", "extended", "initialised", "random")

    def __str__(self) -> str:
        """The number of tensors by where they came from, and the names of random ones."""
        lines = [f"{status:12}{count:6} tensors" for status, count in self.counts().items()]
        if self.calibration is not None:
            lines.append(f"calibrated on {TextUse(**self.calibration)}")
        return "\n".join([*lines, *(f"random: {name}" for name, t in self.tensors.items() if t["status"] == "random")])


class ConversionResult(Result):
    """A converted model with its tokenizer, or image processor, and the report; `save(path)` writes all.

    `tokenizer` is `None` if the source had none.
    """

    report: ConversionReport

    def _text_length(self) -> int | None:
        # only where the caller asked for another length: what cuts texts at 256 tokens goes on doing so
        asked = "model_max_length" in getattr(self.model.config, "efficient_source", {})
        return self.report.max_positions if asked else None


def convert(
    source: str | Path | PreTrainedModel,
    attention: ConfigLike,
    *,
    max_positions: int | None = None,
    positions: str | None = None,
    rope: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    calibration: Sequence[str] | Sequence[Mapping[str, Tensor]] | None = None,
    exact_every: int | None = None,
    streaming: bool | None = None,
    offload_folder: str | Path | None = None,
    **options: Any,
) -> ConversionResult:
    """Convert a pretrained checkpoint to efficient attention.

    Args:
        source: Hub id or folder of a checkpoint, or a loaded stock model, which is then converted in place.
        attention: a mechanism's name with its options as keywords, a config, its JSON form, or a list for hybrids.
        max_positions: longest input of the result, in tokens; `None` keeps the source's. T5 takes any length, only its
            tokenizer is told. For pictures: tokens of the largest one, see `GridPositions`.
        positions: how the model gets there. Tables: `"tile"` (the usual) or `"interpolate"`. Rotary positions:
            `"unchanged"`, which is usual where no layer sees farther than the old length, `"linear"`, `"ntk"`, `"yarn"`,
            `"llama3"` or `"longrope"`: see `PositionTable` and `RotaryPositions`.
        rope: numbers of that method for rotary positions, such as `{"beta_fast": 64}`.
        tokenizer: for a loaded model, or to use another than the source's. Of models of pictures: the image processor.
        revision: of the Hub repository.
        calibration: texts, or batches of inputs, from which mechanisms set constants such as centroids; see `calibrate`.
            Without it they start without data, and the report says so.
        exact_every: k ≥ 2: layers k - 1, 2k - 1, … keep full attention, all others are converted; instead of `layers`.
        streaming: leave the weights of a safetensors checkpoint in their files, from which they come in one by one when they
            are called or saved: memory for one layer is enough. `None` = where they take more than half the free memory.
            Needs accelerate. offload_folder: where new tensors wait, in a folder that goes with the process, until they are
            saved; by default where the system has temporary files.
        options: of the mechanism; and for a checkpoint as in `from_pretrained`: `subfolder`, `token`, `dtype`, `cache_dir`,
            `force_download`, `local_files_only`, `proxies`. `model_class`, a stock class or its name, says which head
            the checkpoint has; by default its config does, or its tensors do.

    Returns:
        `.model` (an Efficient class), `.tokenizer`, `.report`; `.save(path)` writes a checkpoint for the Auto classes.

    Raises:
        ValueError: an impossible setting, an unsupported architecture, unreadable weights, a tensor of unknown origin.
        OSError: the source can't be found.
    """
    require_model(source, "convert")
    loading, options = split_options(options)
    configs = requested_configs(attention, **options)
    folder = _folder_of_weights(source, streaming, offload_folder, calibration, loading | {"revision": revision})
    opened = open_source(source, tokenizer, load_stock, revision=revision, offload_folder=folder, **loading)
    refuse_converted(opened.name, opened.model.config)
    earlier = earlier_steps(opened.model, opened.folder)
    host = HostModel.of(opened.model)
    if folder is not None:
        host = replace(host, put_away=put_away_in(folder))
    configs = _with_exact_layers(configs, host, exact_every)
    length = max_positions or host.max_positions or _length_of(opened.tokenizer)
    configs = [_where_it_matters(config.for_length(length), host) for config in configs]
    batches = read = None
    if calibration is not None:
        batches = calibration_batches(calibration, opened.tokenizer, opened.model, host.max_positions)
        read = calibration_use(calibration, batches, opened.tokenizer, host.max_positions)
    stock_name = stock_class(opened.model).__name__
    entries: dict[str, Any] = opened.model.state_dict()
    before = {key: (entry.data_ptr(), entry.shape) for key, entry in entries.items() if isinstance(entry, Tensor)}
    origins, resized = convert_in_place(host, configs, LongerInputs(max_positions, positions, rope))
    provenance = Provenance.of(opened.model)
    provenance.history[:0], provenance.is_loaded = earlier, provenance.is_loaded or bool(earlier)
    if batches is not None:
        origins |= _calibrated(opened.model, batches, length)
    else:
        bound_coverage(opened.model, length)
    # what it cuts is for the first stack, unless that hears
    reads = opened.model.main_input_name == "input_ids" and host.max_positions in (None, max_positions)
    _tell_tokenizer(opened, max_positions if reads else None)
    report = _report(
        opened,
        host,
        provenance,
        revision=revision,
        model_class=stock_name,
        max_positions=max_positions,
        tensors=_account(opened.model, before, origins, resized, opened.missing),
        calibration=None if read is None else asdict(read),
    )
    given = None if batches is None else len(batches)
    provenance.history[-1] |= {"source": opened.name, "revision": revision, "loading": opened.given}
    provenance.history[-1]["calibration_batches"] = given
    provenance.reports[REPORT_NAME] = report
    return ConversionResult(opened.model, opened.tokenizer, report, opened.folder)


def _folder_of_weights(
    source: Any, streaming: bool | None, folder: str | Path | None, calibration: Any, loading: Mapping[str, Any]
) -> Path | None:
    """Where tensors wait that don't stay in memory; `None` = all of them do."""
    location = {k: loading[k] for k in ("variant", *LOCATION_KEYWORDS) if loading.get(k) is not None}
    if not chosen_streaming(source, streaming, **location):
        return None
    if calibration is not None:
        raise ValueError(
            "calibration runs the model on all texts at once, which needs its weights in memory: leave it out and start "
            "without data, or load them with --no-streaming (streaming=False)."
        )
    return new_folder(None if folder is None else Path(folder))


def _report(
    opened: Source, host: HostModel, provenance: Provenance, *, max_positions: int | None, **facts: Any
) -> ConversionReport:
    """The report of a model that was converted in place, which the last step of `provenance` is."""
    settings = provenance.history[-1]["settings"]
    return ConversionReport(
        source=opened.name,
        efficient_attention=opened.model.config.efficient_attention,
        max_positions=host.max_positions or max_positions,
        positions=settings["positions"],
        rope=settings["rope"],
        lengths=host.made_for,
        short_inputs=host.short_inputs(max_positions, settings["positions"]),
        ignored=opened.ignored,
        history=provenance.history,
        recast=opened.recast,
        family=ORIGINS.get(host.family.model_type),
        **facts,
    )


def _with_exact_layers(
    configs: list[EfficientAttentionConfig], host: HostModel, exact_every: int | None
) -> list[EfficientAttentionConfig]:
    """The configs for all layers but every k-th."""
    if exact_every is None:
        return configs
    if type(exact_every) is not int or exact_every < 2:
        raise ValueError(f"exact_every={exact_every!r} is not possible; it must be an integer ≥ 2, or None.")
    if any(config.layers is not None for config in configs) or len(configs) > 1:
        raise ValueError(
            f"exact_every={exact_every} and layers both say which layers are converted: give one mechanism without layers, "
            "or leave exact_every out."
        )
    wanted = resolve_side(configs[0], [stack.side for stack in host.stacks])
    counts = {len(stack.layers) for stack in host.stacks if stack.side in wanted}
    if len(counts) > 1:
        raise ValueError(
            f"exact_every={exact_every} with stacks of {' and '.join(map(str, sorted(counts)))} layers: give a list with "
            "one config per side, each with its layers."
        )
    layers = tuple(i for i in range(max(counts, default=0)) if (i + 1) % exact_every)
    return [replace(configs[0], layers=layers)] if layers else configs


def _where_it_matters(config: EfficientAttentionConfig, host: HostModel) -> EfficientAttentionConfig:
    """The config for those layers of a stack whose own window is larger than what the mechanism shows, if it names none."""
    wanted = resolve_side(config, [stack.side for stack in host.stacks])
    stacks = [stack for stack in host.stacks if stack.side in wanted]
    if config.layers is not None or len(stacks) != 1:
        return config
    geometries = [host.family.geometry(stacks[0], layer) for layer in stacks[0].layers]
    spared = [g.layer for g in geometries if config.attention_class.repeats_window(config, g)]
    if not spared:
        return config
    kept = tuple(g.layer for g in geometries if g.layer not in spared)
    logger.warning(
        f"{config.mechanism} gains nothing in {stacks[0].side} layers {spared}: their own windows are not larger than its "
        f"reach. {'They stay as they are; layers=… converts them.' if kept else 'Smaller options would make them cheaper.'}"
    )
    return replace(config, layers=kept) if kept else config


def _length_of(tokenizer: Any) -> int | None:
    length = getattr(tokenizer, "model_max_length", None)
    # transformers' number for "any length" is larger than any
    return length if length and length < 10**6 else None


def _calibrated(model: PreTrainedModel, batches: list[Mapping[str, Tensor]], length: int | None) -> dict[str, str]:
    try:
        return calibrate(model, batches, length)
    except BaseException:
        revert(model)
        raise


def _tell_tokenizer(opened: Source, max_positions: int | None) -> None:
    """Give the tokenizer its new length, and note the old one for the way back."""
    if opened.tokenizer is None:
        missing = "image processor" if takes_pictures(opened.model) else "tokenizer"
        logger.warning(f"{opened.name} has no {missing}: only the model is converted.")
    elif max_positions is not None and hasattr(opened.tokenizer, "model_max_length"):
        # the way back needs what nothing else remembers
        opened.model.config.efficient_source |= {
            "model_max_length": opened.tokenizer.model_max_length,
            "max_seq_length": max_seq_length(opened.folder) if opened.folder else None,
        }
        opened.tokenizer.model_max_length = max_positions


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
            status, origin = "random", ABSENT
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
