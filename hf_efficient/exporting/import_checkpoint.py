"""import_checkpoint: transformers' own long models as converted ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient.conversion.convert import ConversionReport, ConversionResult
from hf_efficient.conversion.loading import Source, load_as_it_is, open_source, split_options
from hf_efficient.exporting.bigbird import BigBirdTarget
from hf_efficient.exporting.check import checked, chosen_lengths
from hf_efficient.exporting.longformer import LongformerTarget
from hf_efficient.exporting.longt5 import LongT5Target
from hf_efficient.exporting.names import fill
from hf_efficient.exporting.target import ClassTarget, Converted, TensorReport, shared_values, without_pooler
from hf_efficient.families import HostModel
from hf_efficient.families.readable import require_model
from hf_efficient.models.config import is_hub_id
from hf_efficient.models.provenance import ABSENT, REPORT_NAME, Provenance, watch
from hf_efficient.models.registry import CONFIGS, MODELS

SOURCES: dict[str, ClassTarget] = {
    "longformer": LongformerTarget(),
    "longt5": LongT5Target(),
    "big_bird": BigBirdTarget(),
}
"""By `model_type`."""


def import_checkpoint(
    source: str | Path | PreTrainedModel,
    lengths: Sequence[int] | None = None,
    *,
    tolerance: float | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    **options: Any,
) -> ConversionResult:
    """A Longformer, LongT5 or BigBird checkpoint as a converted RoBERTa, T5 or BERT with its weights and its outputs.

    A `Longformer…` becomes RoBERTa of the same head with `longformer`; where its class marks global tokens itself, so does
    its rule: `global_tokens="first"` for sequence classification, `"before_separator"` for question answering. A `LongT5…`
    becomes T5 with `local`, or with `longt5(pooling="rms", log_count=False)`. A `BigBird…` becomes BERT with
    `bigbird(num_random_blocks=0, first_block_weight=1 + r)`, which stays so for short texts, where its class turns to full
    attention for good, and in which the last real block is global, not the last padded one.

    Args:
        source: Hub id or folder, or a loaded model, which is left as it is.
        lengths, tolerance: of the comparison of both models, as in `export`.
        tokenizer: for a loaded model, or to use another than the source's. revision: of the Hub repository.
        options: as in `convert`: `subfolder`, `token`, `dtype`, `cache_dir`, `model_class` and so on.

    Returns:
        `.model` (an Efficient class), `.tokenizer`, `.report`; `.save(path)` writes a checkpoint for the Auto classes. It
        can't be reverted, as it never had full attention: `export(…, to="longformer")` gives the source again.

    Raises:
        ValueError: another architecture, a setting without a mechanism, or outputs that differ. OSError: no such source.
    """
    require_model(source, "import")
    loading, others = split_options(options)
    if others:
        raise ValueError(f"{', '.join(others)} can't be chosen here: the checkpoint says what its attention is.")
    opened = open_source(source, tokenizer, load_as_it_is, revision=revision, **loading)
    kind = opened.model.config.model_type
    if kind not in SOURCES:
        raise ValueError(
            f"{opened.name} is a {kind} checkpoint, which is not imported ({', '.join(SOURCES)} are); "
            "hf_efficient.convert takes checkpoints with full attention."
        )
    target = SOURCES[kind]
    model, tensors = _imported(target, opened)
    host = HostModel.of(model)
    converted = Converted(host, opened.tokenizer)
    checks = checked(
        converted, opened.model, target, chosen_lengths(lengths, converted, target.shapes(converted)), tolerance
    )
    settings = {"attention": model.config.efficient_attention, "max_positions": None, "positions": None}
    provenance = Provenance.of(model)
    provenance.add("import", opened.name, settings, revision=revision, loading=opened.given, checks=checks)
    watch(model)
    report = ConversionReport(
        source=opened.name,
        revision=revision,
        model_class=type(opened.model).__name__,
        efficient_attention=model.config.efficient_attention,
        max_positions=host.max_positions,
        positions="as in the source",
        tensors=tensors,
        ignored=sorted({*opened.ignored, *opened.model.state_dict()} - {one["from"] for one in tensors.values()}),
        recast=opened.recast,
        history=provenance.history,
    )
    provenance.reports[REPORT_NAME] = report
    return ConversionResult(model, opened.tokenizer, report, opened.folder)


def _imported(target: ClassTarget, opened: Source) -> tuple[PreTrainedModel, TensorReport]:
    """The Efficient model with the tensors of the source, in eval mode; and where they are from."""
    theirs: Any = opened.model
    stock = getattr(transformers, target.imported_name(type(theirs).__name__))
    options = target.options_of(theirs)
    config: Any = CONFIGS[stock.config_class.model_type](**shared_values(theirs.config, stock.config_class))
    config.efficient_attention = [options]
    config.efficient_source = {"import": target.name}
    if is_hub_id(opened.name):
        config.efficient_source["base_model"] = opened.name
    names = target.names(stock.__name__, options["mechanism"])
    found = {names.here(name): tensor for name, tensor in theirs.state_dict().items()}
    if len(found) != len(theirs.state_dict()):
        raise ValueError(f"tensors of {opened.name} would have the same name: nothing was imported.")
    target.complete(config, found, theirs)
    model = MODELS[stock](config, **without_pooler(theirs)).to(theirs.device)
    fill(model, found)
    if model.can_generate() and theirs.can_generate():
        model.generation_config = type(model.generation_config).from_dict(theirs.generation_config.to_dict())
    report = {name: _origin(names.there(name), tensor, opened.missing) for name, tensor in found.items()}
    return model.eval(), report


def _origin(name: str, tensor: Tensor, missing: set[str]) -> dict[str, Any]:
    status, origin = ("random", ABSENT) if name in missing else ("copied", name)
    return {"status": status, "from": origin, "shape": list(tensor.shape)}
