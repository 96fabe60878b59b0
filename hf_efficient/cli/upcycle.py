"""`hf-efficient upcycle`: a thin layer over upcycling.

What all commands share is imported from `cli` when one runs: `cli` itself imports this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_efficient.cli.options import parse_layers


def upcycle(
    source: Annotated[str, typer.Argument(help="Hub id or folder of a checkpoint, converted or not.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    num_experts: Annotated[int, typer.Option(help="Copies of the feed-forward part in each sparse layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts of a token: 1 or 2.")] = 1,
    capacity_factor: Annotated[
        float | None,
        typer.Option(help="In training an expert takes this many times 1/E of a batch.", show_default="drop nothing"),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="0,1,2 or 0-5, in each stack.", show_default="every other one from the second on"),
    ] = None,
    router_aux_loss_coef: Annotated[
        float, typer.Option(help="Weight of the load balance in the training loss.")
    ] = 1e-2,
    router_z_loss_coef: Annotated[float, typer.Option(help="Weight of the z-loss in the training loss.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the routers' start.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint in OUT, if there is one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Turn feed-forward layers into sparse experts, each a copy, and write the checkpoint with a report to OUT."""
    from hf_efficient.cli.common import _emit, _require_free, _require_source, _running

    with _running():
        _require_source(source)
        _require_free(out, overwrite, source)
        from hf_efficient.conversion.upcycle import upcycle as upcycle_checkpoint

        result = upcycle_checkpoint(
            source,
            num_experts,
            top_k=top_k,
            capacity_factor=capacity_factor,
            layers=None if layers is None else parse_layers(layers),
            router_aux_loss_coef=router_aux_loss_coef,
            router_z_loss_coef=router_z_loss_coef,
            seed=seed,
            revision=revision,
        )
        result.save(out, overwrite)
        report = result.report
    rows = [
        ["sparse layers", "\n".join(report.layers)],
        ["parameters", f"{report.source_parameters:,} → {report.parameters:,}"],
        ["of these met by a token", f"{report.active_parameters:,}"],
        ["outputs differ by", f"{report.difference:.1e} of the largest (at most {report.tolerance:.0e})"],
    ]
    document = {"out": str(out), "counts": report.counts(), **report.to_dict()}
    _emit(document, as_json, f"{source} → {out} ({report.model_class})", ["what", "value"], rows)
