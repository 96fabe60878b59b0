"""export: a converted model in a class that others can run, compared with its source before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_efficient.conversion.loading import load_as_it_is, open_source
from hf_efficient.conversion.sentence_transformers import MODULES
from hf_efficient.exporting.bigbird import BigBirdTarget
from hf_efficient.exporting.check import checked, chosen_lengths, largest_error
from hf_efficient.exporting.graph import GraphTarget
from hf_efficient.exporting.graph_export import exported_graph
from hf_efficient.exporting.led import LEDTarget
from hf_efficient.exporting.longformer import LongformerTarget
from hf_efficient.exporting.longt5 import LongT5Target
from hf_efficient.exporting.nystromformer import NystromformerTarget
from hf_efficient.exporting.onnx import OnnxTarget
from hf_efficient.exporting.origin import origin_of
from hf_efficient.exporting.program import ProgramTarget
from hf_efficient.exporting.report import ExportReport, ExportResult
from hf_efficient.exporting.stock import StockTarget
from hf_efficient.exporting.target import ClassTarget, Converted, Target, TensorReport
from hf_efficient.families import HostModel
from hf_efficient.families.readable import require_model
from hf_efficient.models.in_place import require_convertible
from hf_efficient.models.provenance import Provenance
from hf_efficient.models.registry import is_efficient
from hf_efficient.profiling.json_files import read_json

TARGETS: dict[str, Any] = {
    target.name: target
    for target in (
        StockTarget,
        LongformerTarget,
        LEDTarget,
        LongT5Target,
        BigBirdTarget,
        NystromformerTarget,
        OnnxTarget,
        ProgramTarget,
    )
}
logger = logging.getLogger(f"transformers.{__name__}")


def export(
    source: str | Path | PreTrainedModel,
    to: str,
    lengths: Sequence[int] | None = None,
    *,
    tolerance: float | None = None,
    accept_loss: bool = False,
    tokenizer: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> ExportResult:
    """A converted model as a class of transformers, or as a graph, for those who do not have this package.

    The source is left as it is. Source and result are run on the same random tokens at each length, without padding and with
    padding on the right; cost: a few passes of both models at each length, in single precision at least.

    Args:
        source: folder or Hub id of a converted checkpoint, or a loaded converted model.
        to: `"stock"`, the class that was converted, with full attention on the positions that the model has now;
            `"longformer"`, from BERT, RoBERTa and their relatives with `longformer` or `local`; `"led"`, from BART with one
            of these in the encoder; `"longt5"`, from T5 and mT5 with `local` or `longt5(pooling="rms", log_count=False)` in
            the encoder; `"bigbird"`, from BERT with `bigbird(num_random_blocks=0, first_block_weight=1 + r)`;
            `"nystromformer"`, from BERT with `nystromformer`, which there scales its pseudo-inverse in another way;
            `"onnx"` and `"program"` (`torch.export`), one graph for any number of texts of any length, as it is, from
            encoders and, without a cache, decoders. Graphs are compared at five lengths, with padding on either side, for
            one, two and five texts; `onnx` needs the packages of `hf-efficient[onnx]`.
        lengths: in tokens; by default three up to the number of positions, and up to 2048; of graphs five, up to 4096.
        tolerance: largest relative error of an output, by default 1e-5, for T5 and `onnx` 1e-4.
        accept_loss: for `"stock"`: drop parameters of the attention that were trained.
        tokenizer: for a loaded model, or to use another than the source's.
        revision, subfolder: of the Hub repository.

    Returns:
        `.model`, `.tokenizer`, `.report`; `.save(path)` writes a folder for `from_pretrained`. Its config says what the
        source was converted from, so that `import_checkpoint` gives a model that can be reverted.

    Raises:
        ValueError: no such target; a model that it can't express, with the setting that it could; a result that is further
            from its source than the tolerance. OSError: the source can't be found. ImportError: a package is missing.
    """
    target = _target(to, accept_loss)
    largest_error(tolerance, target.tolerance)
    require_model(source, "export")
    opened = open_source(source, tokenizer, load_as_it_is, revision=revision, subfolder=subfolder)
    if not is_efficient(type(opened.model)) or not opened.model.config.efficient_attention:
        raise ValueError(f"{opened.name} has no efficient attention, so there is nothing to export.")
    host = HostModel.of(opened.model)
    require_convertible(host, "export")
    converted = Converted(host, opened.tokenizer)
    reasons = [*target.refusals(converted), *_modules_of_ours(opened.folder)]
    if getattr(opened.model.config, "efficient_experts", None):
        reasons.append("nothing else has experts like these: export the model as it was before `upcycle`")
    if reasons:
        raise ValueError(
            f"{opened.name} can't be exported to {to!r}:\n" + "\n".join(f"- {reason}." for reason in reasons)
        )
    if isinstance(target, GraphTarget):
        return exported_graph(target, converted, opened, lengths, largest_error(tolerance, target.tolerance))
    chosen = chosen_lengths(lengths, converted, target.shapes(converted))
    model, tensors = target.build(converted)
    if isinstance(target, ClassTarget):
        origin = origin_of(converted, model.config, target.options_of(model))
        if origin is not None:
            origin.note(model.config)
    report = ExportReport(
        source=opened.name,
        target=to,
        model_class=type(opened.model).__name__,
        result_class=type(model).__name__,
        efficient_attention=opened.model.config.efficient_attention,
        max_positions=target.shapes(converted).most or host.max_positions,
        conditions=target.conditions(converted),
        cautions=target.cautions(converted),
        usage=target.usage(converted),
        tensors=tensors,
        dropped=_dropped(opened.model, tensors),
        checks=checked(converted, model, target, chosen, tolerance),
        tolerance=largest_error(tolerance, target.tolerance),
        history=Provenance.of(opened.model).history,
    )
    for caution in report.cautions:
        logger.warning(f"{report.result_class}: {caution}")
    return ExportResult(model, opened.tokenizer, report, opened.folder)


def _target(to: str, accept_loss: bool) -> Target | GraphTarget:
    if to not in TARGETS:
        raise ValueError(f"to={to!r} is not possible; it must be one of {', '.join(TARGETS)}.")
    if accept_loss and to != StockTarget.name:
        raise ValueError(
            f"accept_loss is for to='stock', which drops what was trained; {to!r} keeps all weights: leave it out."
        )
    found: Target | GraphTarget = StockTarget(accept_loss) if to == StockTarget.name else TARGETS[to]()
    return found


def _dropped(model: PreTrainedModel, tensors: TensorReport) -> list[str]:
    """Tensors whose values the result has nowhere."""
    ours = model.state_dict()
    kept = {ours[name].data_ptr() for one in tensors.values() if (name := one["from"].split(",")[0]) in ours}
    return sorted(name for name, tensor in ours.items() if tensor.data_ptr() not in kept)


def _modules_of_ours(folder: Path | None) -> list[str]:
    """What sentence-transformers would load from this package, of which the exported folder must not need anything."""
    file = None if folder is None else folder / MODULES
    modules = read_json(file, list) if file is not None and file.is_file() else []
    types = [str(module.get("type")) for module in modules if isinstance(module, dict)]
    ours = [name for name in types if name.startswith("hf_efficient.")]
    return [f"{MODULES} names {name}, which needs hf_efficient: pool without it, or remove the file" for name in ours]
