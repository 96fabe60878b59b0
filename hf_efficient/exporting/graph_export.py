"""Making a graph of a converted model, and comparing the file with the model at many lengths before it is given out."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_efficient.exporting.check import Row, chosen_lengths, figures, ordinary_tokens
from hf_efficient.exporting.graph import (
    BATCH,
    LENGTH,
    SHORTEST,
    Graph,
    GraphReport,
    GraphResult,
    GraphTarget,
    NamedOutputs,
    graph_module,
    input_names,
    program_of,
    stock_config,
)
from hf_efficient.exporting.target import Converted, Shapes
from hf_efficient.models.provenance import Provenance
from hf_efficient.patching.exact import eval_mode
from hf_efficient.profiling.environment import versions

BATCHES, PADDINGS = (1, 2, 5), ("right", "left")
# tokens that are compared at most, and a window where a mechanism has none
LONGEST, USUAL = 4096, 64
SIZES = ("attention_window", "block_size", "global_block_size", "stride", "rank", "num_landmarks", "segment_length")
LEFT_REFUSED = "Pad on the right only: the model itself refuses padding on the left."
ONE_SIDE = "Pad on one side: padding between real tokens, which the model itself refuses, gives other outputs here."
NO_CACHE = "Without a cache: each call gives the outputs of all tokens; text is not generated token by token."
logger = logging.getLogger(f"transformers.{__name__}")


def exported_graph(
    target: GraphTarget, source: Converted, opened: Any, lengths: Sequence[int] | None, tolerance: float
) -> GraphResult:
    """The graph of a model in a file that computes what the model does.

    Raises:
        ValueError: it can't be made, or an output differs by more than the tolerance. ImportError: a package is missing.
    """
    chosen = compared_lengths(lengths, source)
    module, names, longest = graph_module(source), input_names(source), source.host.max_positions
    made = tempfile.TemporaryDirectory(prefix="hf_efficient-")
    path = Path(made.name, target.file)
    program = program_of(module, names, longest)
    outputs = list(_called(module, _inputs(source, names, 1, SHORTEST, None)))
    target.write(program, outputs, path)
    graph = target.load(path)
    checks = list(_compared(module, graph, source, names, chosen))
    _require_close(checks, source, target, tolerance)
    report = _report(target, source, opened.name, checks, tolerance)
    report.inputs, report.outputs = names, outputs
    report.size = sum(file.stat().st_size for file in Path(made.name).iterdir())
    report.cautions = _cautions(source, module, checks)
    for caution in report.cautions:
        logger.warning(f"{target.file}: {caution}")
    return GraphResult(graph, opened.tokenizer, report, opened.folder, config=stock_config(source), made=made)  # type: ignore[arg-type]


def _report(target: GraphTarget, source: Converted, name: str, checks: list[Row], tolerance: float) -> GraphReport:
    longest = source.host.max_positions
    most = f"{SHORTEST} or more" if longest is None else f"{SHORTEST} to {longest}"
    return GraphReport(
        source=name,
        target=target.name,
        model_class=type(source.model).__name__,
        result_class=target.file,
        efficient_attention=source.config.efficient_attention,
        max_positions=longest,
        conditions=[f"For any number of texts of {most} tokens, in float32; all inputs have one shape."],
        cautions=[],
        usage=target.usage,
        tensors={},
        dropped=[],
        checks=checks,
        tolerance=tolerance,
        history=Provenance.of(source.model).history,
        versions=versions() | target.versions(),
        file=target.file,
        axes={BATCH: [1, None], LENGTH: [SHORTEST, longest]},
    )


def _cautions(source: Converted, module: NamedOutputs, checks: list[Row]) -> list[str]:
    """What callers must see to."""
    found = [NO_CACHE] if module.options else []
    if not any(row["padding"] == "left" for row in checks):
        return [*found, LEFT_REFUSED]
    return [*found, ONE_SIDE] if source.host.family.positions_skip_padding else found


def compared_lengths(lengths: Sequence[int] | None, source: Converted) -> list[int]:
    """Those asked for; else one shorter than a window or block, one and a half, two of them, a prime, and the longest: five,
    for which a window counts as no more than two fifths of the longest.

    Raises:
        ValueError: lengths that the model or a graph can't take.
    """
    if lengths is not None:
        chosen = chosen_lengths(lengths, source, Shapes())
        if chosen[0] < SHORTEST:
            raise ValueError(f"lengths={list(lengths)}: graphs are made for {SHORTEST} tokens or more.")
        return chosen
    most = min(source.host.max_positions or LONGEST // 4, LONGEST)
    size = min(_largest_size(source), most * 2 // 5)
    wanted = (size // 2 - 1, size * 3 // 2, 2 * size, _prime(5 * size // 2), most)
    return sorted({min(max(length, SHORTEST), most) for length in wanted})


def _largest_size(source: Converted) -> int:
    """Tokens of the largest window or block of any layer."""
    found = []
    for options in source.config.efficient_attention:
        for name in SIZES:
            value = options.get(name)
            found += [x for x in (value if isinstance(value, list) else [value]) if type(x) is int]
    return max(found, default=USUAL)


def _prime(limit: int) -> int:
    return next((x for x in range(limit, 2, -1) if all(x % y for y in range(2, int(x**0.5) + 1))), SHORTEST)


def _compared(
    module: NamedOutputs, graph: Graph, source: Converted, names: list[str], lengths: list[int]
) -> Iterator[Row]:
    """Figures at each length with padding on either side, for batches of one, two and five."""
    count = 0
    for length in lengths:
        for padding in PADDINGS:
            batch = BATCHES[count % len(BATCHES)]
            count += 1
            inputs = _inputs(source, names, batch, length, padding)
            try:
                expected = _called(module, inputs)
            except ValueError:
                if padding == "left":  # of models whose positions count it
                    continue
                raise
            row: Row = {"length": length, "batch": batch, "padding": padding}
            yield row | figures(graph(inputs), expected, inputs, "error", "argmax_agreement")


def _require_close(checks: list[Row], source: Converted, target: GraphTarget, tolerance: float) -> None:
    worst = max(checks, key=lambda row: row["error"])
    if not worst["error"] <= tolerance:
        raise ValueError(
            f"{target.file} and {type(source.model).__name__} differ by {worst['error']:.1e} of the largest output for "
            f"{worst['batch']} texts of {worst['length']} tokens with padding on the {worst['padding']}, more than "
            f"tolerance={tolerance:g}: nothing was made."
        )


@torch.no_grad()
def _called(module: NamedOutputs, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with eval_mode(module):
        found: dict[str, Tensor] = module(**inputs)
    return found


def _inputs(source: Converted, names: list[str], batch: int, length: int, padding: str | None) -> dict[str, Tensor]:
    """Random tokens; the first row is whole where there are more, and the others are padded by a half and less."""
    config, generator = source.config, torch.Generator().manual_seed(length)
    ordinary = ordinary_tokens(config)
    ids = ordinary[torch.randint(len(ordinary), (batch, length), generator=generator)]
    mask = torch.ones_like(ids)
    for row in range(batch > 1, batch) if padding is not None else ():
        count = length // (row + 2)
        mask[row, slice(length - count, None) if padding == "right" else slice(count)] = 0
    pad = getattr(config, "pad_token_id", None) or 0
    found = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    if "token_type_ids" in names:
        found["token_type_ids"] = torch.randint(2, ids.shape, generator=generator) * mask
    return found
