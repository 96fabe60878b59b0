"""`hf-efficient convert` and `hf-efficient revert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_efficient.cli.catalogue import complete_mechanism
from hf_efficient.cli.common import (
    CacheDir,
    Checkpoint,
    Converted,
    Dtype,
    Json,
    MaxShardSize,
    ModelClass,
    Option,
    Out,
    Overwrite,
    Revision,
    Streaming,
    Subfolder,
    Token,
    emit,
    require_source,
    running,
)
from hf_efficient.cli.options import GIVEN, chosen_configs, parse_rope, read_texts, refuse_strays

if TYPE_CHECKING:
    from hf_efficient.conversion.convert import ConversionReport


def convert(
    context: typer.Context,
    source: Checkpoint,
    out: Out,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Mechanism, see hf-efficient list, or its JSON. Its options, see hf-efficient list NAME, are options here.",
            autocompletion=complete_mechanism,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with a mechanism or, for a hybrid, a list; instead of --attention.")
    ] = None,
    max_positions: Annotated[
        int | None, typer.Option(help="Longest input of the result, in tokens.", show_default="the source's")
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="How: tile or interpolate for tables; unchanged, linear, ntk, yarn, llama3 or longrope for rotary ones.",
            show_default="tile; unchanged where windows are short",
        ),
    ] = None,
    rope: Annotated[
        str | None,
        typer.Option(help="Numbers of that method for rotary positions, as JSON.", show_default="the method's own"),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="0,1,2 or 0-5.", show_default="all")] = None,
    exact_every: Annotated[
        int | None,
        typer.Option(help="K: layers K - 1, 2K - 1, … keep full attention; instead of --layers.", show_default="none"),
    ] = None,
    side: Annotated[
        str | None, typer.Option(help="encoder, decoder or both.", show_default="the encoder, if there is one")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    model_class: ModelClass = None,
    dtype: Dtype = None,
    cache_dir: CacheDir = None,
    token: Token = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Texts for mechanisms that start from data: .txt with one per line, .jsonl, or corpus, "
            "sample text from Python's documentation.",
            show_default="a start without data",
        ),
    ] = None,
    option: Option = None,
    streaming: Streaming = None,
    max_shard_size: MaxShardSize = "50GB",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a pretrained checkpoint and write it, with its tokenizer and a report, to OUT."""
    with running():
        refuse_strays(context, [source, str(out)], attention)
        configs = chosen_configs(
            attention, config, {"layers": layers, "side": side} | context.meta[GIVEN], option or []
        )
        require_source(source)
        from hf_efficient.attention.base.registry import training_words
        from hf_efficient.conversion.convert import convert as convert_checkpoint
        from hf_efficient.conversion.folders import OutputFolder
        from hf_efficient.corpus import sample_texts
        from hf_efficient.evaluation.verdict import quick_verdict

        target = OutputFolder(out, overwrite, [source, config, calibration])
        places: dict[str, Any] = dict(max_positions=max_positions, positions=positions, revision=revision)
        places |= dict(exact_every=exact_every, rope=parse_rope(rope))
        places |= dict(subfolder=subfolder, model_class=model_class, dtype=dtype, cache_dir=cache_dir, token=token)
        with target.beside() as folder:
            places |= dict(streaming=streaming, offload_folder=folder)
            result = convert_checkpoint(source, configs, **places, calibration=_calibration_texts(calibration))
            report = result.report
            report.history[-1]["settings"]["calibration"] = calibration
            result.write(target, max_shard_size)
        verdict = quick_verdict(result.model, result.tokenizer, sample_texts())
        names = dict.fromkeys(config["mechanism"] for config in report.efficient_attention)
        training = {name: training_words(name) for name in names}
    document = {
        "out": str(out),
        "counts": report.counts(),
        "verdict": verdict,
        "training": training,
        **report.to_dict(),
    }
    title, header = f"{source} → {out} ({report.model_class}): {verdict['text']}", ["what", "number", "which"]
    rows = [["training", None, f"{name}: {words}"] for name, words in training.items()]
    emit(document, as_json, title, header, _tensor_rows(report) + rows)


def _calibration_texts(given: str | None) -> list[str] | None:
    if given is None:
        return None
    from hf_efficient.corpus import offline_texts

    return offline_texts("train") if given == "corpus" else read_texts(Path(given))


def _tensor_rows(report: ConversionReport) -> list[list[Any]]:
    """Status, number and names of the tensors of a conversion report."""
    named: dict[str, list[str]] = {status: [] for status in report.counts()}
    for name, tensor in report.tensors.items():
        # copied tensors need no explanation, initialised ones only a word on where their values came from
        entry = {"copied": "bit for bit", "initialised": tensor["from"]}.get(tensor["status"], name)
        if entry not in named[tensor["status"]]:
            named[tensor["status"]].append(entry)
    rows: list[list[Any]] = [[status, report.counts()[status], "\n".join(named[status])] for status in named]
    if report.short_inputs is not None:
        sides = report.lengths if len(set(report.lengths.values())) > 1 else {}
        lengths = "\n".join(f"{side} {length}" for side, length in sides.items()) or report.max_positions
        rows.append([f"positions: {report.positions}", lengths, f"short inputs are {report.short_inputs}"])
    if report.calibration is not None:
        from hf_efficient.corpus import TextUse

        read = TextUse(**report.calibration)
        rows.append(["calibration tokens", read.tokens_used, str(read)])
    if report.ignored:
        rows.append(["not used", len(report.ignored), "\n".join(report.ignored)])
    return rows


def revert(
    converted: Converted,
    out: Out,
    streaming: Streaming = None,
    max_shard_size: MaxShardSize = "50GB",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the original checkpoint back: bit for bit, unless it was trained since."""
    with running():
        require_source(converted)
        from hf_efficient.conversion.revert import revert_checkpoint

        document = revert_checkpoint(converted, out, overwrite, streaming, max_shard_size)
    emit(document, as_json, f"{converted} → {out}", ["what", "value"], [list(item) for item in document.items()])
