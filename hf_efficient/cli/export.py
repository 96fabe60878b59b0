"""`hf-efficient export` and `hf-efficient import`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hf_efficient.cli.common import (
    CacheDir,
    Checkpoint,
    Converted,
    Dtype,
    Json,
    ModelClass,
    Out,
    Overwrite,
    Revision,
    Subfolder,
    Token,
    emit,
    require_source,
    running,
)
from hf_efficient.cli.options import parse_lengths

Lengths = Annotated[
    str | None,
    typer.Option(help="Tokens to compare at, as 64,512,1500.", show_default="three up to 2048, of graphs five"),
]
Tolerance = Annotated[
    float | None, typer.Option(help="Largest relative error of an output.", show_default="1e-5, for T5 and onnx 1e-4")
]


def export(
    source: Converted,
    out: Out,
    to: Annotated[
        str,
        typer.Option(
            help="stock (the class that was converted, with full attention), longformer, led, longt5, bigbird or "
            "nystromformer (transformers' own long classes), onnx or program (one graph for any length, as it is)."
        ),
    ],
    lengths: Lengths = None,
    tolerance: Tolerance = None,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="To stock: drop parameters of the attention that were trained.")
    ] = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a converted checkpoint as a class of transformers, or as a graph, to OUT, after a comparison of both."""
    with running():
        require_source(source)
        chosen = parse_lengths(lengths)
        from hf_efficient.conversion.folders import OutputFolder
        from hf_efficient.exporting.export import export as export_checkpoint

        target = OutputFolder(out, overwrite, [source])
        options: dict[str, Any] = dict(tolerance=tolerance, accept_loss=accept_loss)
        result = export_checkpoint(source, to, chosen, **options, revision=revision, subfolder=subfolder)
        result.write(target)
        report = result.report
    title = f"{source} → {out} ({report.result_class})"
    document = {"out": str(out), "counts": report.counts(), "error": report.error, **report.to_dict()}
    emit(document, as_json, title, *report.rows())
    if not as_json:
        typer.echo("\n".join([*report.conditions, *report.cautions, "", report.usage]))


def import_command(
    source: Checkpoint,
    out: Out,
    lengths: Lengths = None,
    tolerance: Tolerance = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    model_class: ModelClass = None,
    dtype: Dtype = None,
    cache_dir: CacheDir = None,
    token: Token = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a Longformer, LED, LongT5, BigBird or Nystromformer checkpoint as a converted one to OUT."""
    with running():
        require_source(source)
        chosen = parse_lengths(lengths)
        from hf_efficient.conversion.folders import OutputFolder
        from hf_efficient.exporting.import_checkpoint import import_checkpoint

        target = OutputFolder(out, overwrite, [source])
        places: dict[str, Any] = dict(revision=revision, subfolder=subfolder, model_class=model_class, dtype=dtype)
        places["tolerance"] = tolerance
        result = import_checkpoint(source, chosen, **places, cache_dir=cache_dir, token=token)
        result.write(target)
        report = result.report
    document = {"out": str(out), "counts": report.counts(), **report.to_dict()}
    rows = [[status, count] for status, count in report.counts().items() if count]
    emit(document, as_json, f"{source} → {out} ({type(result.model).__name__})", ["what", "number"], rows)
