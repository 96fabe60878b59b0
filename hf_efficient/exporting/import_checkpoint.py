"""import_checkpoint: transformers' own long models as converted ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient.attention.base.registry import stored_attention
from hf_efficient.conversion.convert import ConversionReport, ConversionResult
from hf_efficient.conversion.loading import Source, load_as_it_is, open_source, split_options
from hf_efficient.exporting.bigbird import BigBirdTarget
from hf_efficient.exporting.check import checked, chosen_lengths
from hf_efficient.exporting.led import LEDTarget
from hf_efficient.exporting.longformer import LongformerTarget
from hf_efficient.exporting.longt5 import LongT5Target
from hf_efficient.exporting.names import fill
from hf_efficient.exporting.nystromformer import NystromformerTarget
from hf_efficient.exporting.origin import Origin
from hf_efficient.exporting.target import ClassTarget, Converted, TensorReport, shared_values
from hf_efficient.families import HostModel
from hf_efficient.families.readable import require_model
from hf_efficient.models.config import is_hub_id
from hf_efficient.models.provenance import ABSENT, REPORT_NAME, Provenance, watch
from hf_efficient.models.registry import CONFIGS, MODELS

SOURCES: dict[str, ClassTarget] = {
    "longformer": LongformerTarget(),
    "led": LEDTarget(),
    "longt5": LongT5Target(),
    "big_bird": BigBirdTarget(),
    "nystromformer": NystromformerTarget(),
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
    """A long model of transformers as a converted BERT, RoBERTa, BART or T5 with its weights and its outputs.

    A `Longformer…` becomes RoBERTa of the same head with `longformer`; where its class marks global tokens itself, so does
    its rule: `global_tokens="first"` for sequence classification, `"before_separator"` for question answering. An `LED…`
    becomes BART with `longformer` in the encoder. A `LongT5…` becomes T5 with `local`, or with
    `longt5(pooling="rms", log_count=False)`. A `BigBird…` becomes BERT with
    `bigbird(num_random_blocks=0, first_block_weight=1 + r)`, which stays so for short texts, where its class turns to full
    attention for good, and in which the last real block is global, not the last padded one. A `Nystromformer…` becomes BERT
    with `nystromformer(pinv_init="batch")`, for texts of any length and with padding.

    Args:
        source: Hub id or folder, or a loaded model, which is left as it is.
        lengths, tolerance: of the comparison of both models, as in `export`.
        tokenizer: for a loaded model, or to use another than the source's. revision: of the Hub repository.
        options: as in `convert`: `subfolder`, `token`, `dtype`, `cache_dir`, `model_class` and so on.

    Returns:
        `.model` (an Efficient class), `.tokenizer`, `.report`; `.save(path)` writes a checkpoint for the Auto classes. What
        `export` made becomes what it was made of again, of that architecture and with its rule of global tokens (but a
        Nystromformer with `pinv_init="batch"`), and can be reverted. Other checkpoints can't be, as they never had full
        attention: `export(…, to="longformer")` gives the source again.

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
        ignored=sorted(
            {*opened.ignored, *opened.model.state_dict()} - {one["from"].split(",")[0] for one in tensors.values()}
        ),
        recast=opened.recast,
        history=provenance.history,
    )
    provenance.reports[REPORT_NAME] = report
    return ConversionResult(model, opened.tokenizer, report, opened.folder)


def _imported(target: ClassTarget, opened: Source) -> tuple[PreTrainedModel, TensorReport]:
    """The Efficient model with the tensors of the source, in eval mode; and where they are from."""
    theirs: Any = opened.model
    origin = Origin.of(theirs.config)
    original = None if origin is None else origin.model_class
    stock = getattr(transformers, target.imported_name(type(theirs).__name__, original))
    config = _config(target, stock, opened, origin)
    names = target.names(stock.__name__, config.efficient_attention[0]["mechanism"])
    found = {names.here(name): tensor for name, tensor in theirs.state_dict().items()}
    if len(found) != len(theirs.state_dict()):
        raise ValueError(f"tensors of {opened.name} would have the same name: nothing was imported.")
    target.complete(config, found, theirs)
    model = MODELS[stock](config, **target.imported_keywords(theirs)).to(theirs.device)
    fill(model, found)
    if model.can_generate() and theirs.can_generate():
        model.generation_config = type(model.generation_config).from_dict(theirs.generation_config.to_dict())
    return model.eval(), {name: _told(names.there(name), tensor, opened) for name, tensor in found.items()}


def _config(target: ClassTarget, stock: Any, opened: Source, origin: Origin | None) -> Any:
    """The Efficient config: with the values of the source's, and what the original's had besides."""
    theirs: Any = opened.model
    values = ({} if origin is None else origin.values) | shared_values(theirs.config, stock.config_class)
    config: Any = CONFIGS[stock.config_class.model_type](**values)
    config.efficient_attention = [target.options_of(theirs)]
    if origin is None:
        base = {"base_model": opened.name} if is_hub_id(opened.name) else {}
        config.efficient_source = {"import": target.name} | base
        return config
    attention = stored_attention(origin.attention)
    if origin.is_as_exported(config.efficient_attention[0]) and target.keeps(attention, theirs):
        config.efficient_attention = attention
    if origin.source:
        config.efficient_source = origin.source
    return config


def _told(name: str, tensor: Tensor, opened: Source) -> dict[str, Any]:
    """What the report says of a tensor; a position table may have more or fewer rows in front of the first token's."""
    status, origin = ("random", ABSENT) if name in opened.missing else ("copied", name)
    before = opened.model.state_dict().get(name, tensor)
    more = len(tensor) - len(before) if tensor.dim() else 0
    if more:
        status = "extended" if more > 0 else status
        origin += f", after {more} rows that no token has" if more > 0 else f", without its first {-more} rows"
    return {"status": status, "from": origin, "shape": list(tensor.shape)}
