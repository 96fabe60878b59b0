"""`hf-efficient upcycle`."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_efficient.cli.common import (
    CacheDir,
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
from hf_efficient.cli.options import parse_layers


def upcycle(
    source: Annotated[str, typer.Argument(help="Hub id or folder of a checkpoint, converted or not.")],
    out: Out,
    num_experts: Annotated[int, typer.Option(help="Copies of the feed-forward part in each sparse layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts per token (1 or 2).")] = 1,
    capacity_factor: Annotated[
        float | None,
        typer.Option(
            help="Capacity factor: in training an expert takes at most this many times its even share, top-k/E of the "
            "batch's tokens, and drops the rest.",
            show_default="drop nothing",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="0,1,2 or 0-5, in each stack.", show_default="every other one from the second on"),
    ] = None,
    router_aux_loss_coef: Annotated[
        float, typer.Option(help="Weight of the load balance in the training loss.")
    ] = 1e-2,
    router_z_loss_coef: Annotated[float, typer.Option(help="Weight of the z-loss in the training loss.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of the router initialisation.")] = 0,
    revision: Revision = None,
    subfolder: Subfolder = None,
    model_class: ModelClass = None,
    dtype: Dtype = None,
    cache_dir: CacheDir = None,
    token: Token = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn feed-forward layers into sparse experts, each a copy, and write the checkpoint with a report to OUT."""
    with running():
        require_source(source)
        from hf_efficient.conversion.folders import OutputFolder
        from hf_efficient.conversion.upcycle import upcycle as upcycle_checkpoint

        target = OutputFolder(out, overwrite, [source])
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
            subfolder=subfolder,
            model_class=model_class,
            dtype=dtype,
            cache_dir=cache_dir,
            token=token,
        )
        result.write(target)
        report = result.report
    rows = [
        ["sparse layers", "\n".join(report.layers)],
        ["parameters", f"{report.source_parameters:,} → {report.parameters:,}"],
        ["of these met by a token", f"{report.active_parameters:,}"],
        [
            "outputs differ, in eval mode, by",
            f"{report.difference:.1e} of the largest (at most {report.tolerance:.0e})",
        ],
    ]
    document = {"out": str(out), "counts": report.counts(), **report.to_dict()}
    emit(document, as_json, f"{source} → {out} ({report.model_class})", ["what", "value"], rows)
