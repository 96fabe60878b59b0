"""The list of benchmark suites, and how each is run and printed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hf_efficient.benchmarks.attention import attention_rows, attention_suite, draw
from hf_efficient.benchmarks.content import content_rows, content_suite
from hf_efficient.benchmarks.curves import draw_curves
from hf_efficient.benchmarks.decode import decode_rows, decode_suite
from hf_efficient.benchmarks.encoder import encoder_rows, encoder_suite
from hf_efficient.benchmarks.export import export_rows, export_suite
from hf_efficient.benchmarks.fidelity import fidelity_rows, fidelity_suite
from hf_efficient.benchmarks.gpu import gpu_rows, gpu_suite
from hf_efficient.benchmarks.graphs import graphs_rows, graphs_suite
from hf_efficient.benchmarks.linear import linear_rows, linear_suite
from hf_efficient.benchmarks.models import memory_rows, memory_suite
from hf_efficient.benchmarks.recovery import recovery_rows, recovery_suite
from hf_efficient.benchmarks.streaming import streaming_rows, streaming_suite
from hf_efficient.benchmarks.suite.run import suite_run
from hf_efficient.benchmarks.suite.tables import draw_suite, suite_rows

Document = dict[str, Any]


class Suite(NamedTuple):
    """`run` measures and returns a JSON document; `rows` makes headings and rows of it, for people; `draw` a picture."""

    run: Callable[..., Document]
    rows: Callable[[Document], tuple[list[str], list[list[Any]]]]
    draw: Callable[[Document, Path], None] | None = None


SUITES = {
    "encoder": Suite(encoder_suite, encoder_rows, partial(draw_curves, panels=("pass",))),
    "decode": Suite(decode_suite, decode_rows, partial(draw_curves, panels=("width", "batch"))),
    "memory": Suite(memory_suite, memory_rows),
    "attention": Suite(attention_suite, attention_rows, draw),
    "content": Suite(content_suite, content_rows),
    "export": Suite(export_suite, export_rows),
    "fidelity": Suite(fidelity_suite, fidelity_rows),
    "gpu": Suite(gpu_suite, gpu_rows),
    "graphs": Suite(graphs_suite, graphs_rows),
    "linear": Suite(linear_suite, linear_rows),
    "recovery": Suite(recovery_suite, recovery_rows),
    "streaming": Suite(streaming_suite, streaming_rows),
    "suite": Suite(suite_run, suite_rows, draw_suite),
}
