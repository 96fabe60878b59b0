"""Perplexity by position: what each way to longer inputs does beyond the old length, and to what is before it."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient.attention.base.registry import ConfigLike
from hf_efficient.families import HostModel
from hf_efficient.families.positions import LongerInputs
from hf_efficient.models.registry import is_efficient
from hf_efficient.patching.exact import eval_mode
from hf_efficient.patching.temporary import patch_attention
from hf_efficient.profiling.environment import versions
from hf_efficient.profiling.json_files import finite

# those of the methods that need no numbers of one's own, of all schemes of positions
USUAL = ("unchanged", "linear", "ntk", "yarn", "recompute", "tile", "interpolate")


@dataclass
class PositionComparison:
    """Perplexity of the next token over ranges of positions, for each method; JSON-serialisable by `to_dict`.

    Attributes:
        made_for: longest input, in tokens, that the model was made for.
        ranges: (first, last) position of each range.
        perplexity: {method: a figure for each range}.
        short_inputs: {method: what it does to inputs up to the old length, "unchanged" or "changed"}.
        refused: {method: why it is not possible for this model}.
        settings: the model, its attention, and how many rows of how many tokens were read.
    """

    made_for: int
    ranges: list[tuple[int, int]]
    perplexity: dict[str, list[float]]
    short_inputs: dict[str, str]
    refused: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=versions)

    def __str__(self) -> str:
        """A row per range and a column per method, for a terminal of 80 columns."""
        width = min(12, 66 // max(len(self.perplexity), 1))
        rows = [["positions", *self.perplexity]]
        for index, (first, last) in enumerate(self.ranges):
            rows.append([f"{first}-{last}", *(f"{values[index]:.4g}" for values in self.perplexity.values())])
        rows.append(["short inputs", *(self.short_inputs[method] for method in self.perplexity)])
        said = self.settings
        head = f"Perplexity by position of {said['rows']} × {said['tokens']} tokens, {said['attention'] or 'full attention'}"
        lines = textwrap.wrap(f"{head}; made for {self.made_for}", 80)
        lines += [f"{name:<14}" + "".join(f"{cell:>{width}}" for cell in cells) for name, *cells in rows]
        for method, reason in self.refused.items():
            lines += textwrap.wrap(f"{method}: not possible: {reason}", 80)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return finite(asdict(self))


@torch.no_grad()
def perplexity_by_position(
    model: PreTrainedModel,
    input_ids: Tensor,
    methods: Sequence[str] | None = None,
    *,
    attention: ConfigLike | None = None,
    **options: Any,
) -> PositionComparison:
    """Compare the values of `positions=` that `convert` takes, before choosing one.

    Each lengthens the model to N tokens, and is undone. Positions 0 … N - 2 are those of the tokens that the next one is
    predicted from; their ranges halve the length that the model was made for, and double beyond it. One forward pass of
    (1, N) per row and method.

    Args:
        model: stock causal language model that was made for fewer than N tokens.
        input_ids: (B, N) tokens of long texts, without padding.
        methods: `None` = all usual ones that the model has.
        attention, options: the mechanism of all layers meanwhile, as for `patch_attention`; `None` = full attention.

    Raises:
        ValueError: another kind of model, or rows that are not longer than it was made for.
    """
    host = HostModel.of(model)
    made_for, scheme = _checked(host, input_ids), host.family.positions
    ranges = _ranges(made_for, input_ids.shape[1])
    perplexity: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    for method in methods or [name for name in USUAL if name in scheme.methods]:
        record = host.record_positions(list(host.lengths)) | {"positions": method}
        weights = [entry for stack in host.stacks for entry in scheme.weights(stack)]
        try:
            scheme.check(host.stacks[0], LongerInputs(input_ids.shape[1], method))
            host.lengthen(input_ids.shape[1], method)
        except ValueError as error:
            refused[method] = str(error)
            continue
        try:
            perplexity[method] = _measured(model, input_ids, ranges, attention, options)
        finally:
            host.restore_positions(record)
            for module, weight in weights:
                module.weight = weight
    settings: dict[str, Any] = {
        "model": model.config._name_or_path,
        "attention": None if attention is None else str(attention),
    }
    settings |= {"options": options, "rows": len(input_ids), "tokens": input_ids.shape[1]}
    short = {name: "unchanged" if scheme.methods[name] else "changed" for name in perplexity}
    return PositionComparison(made_for, ranges, perplexity, short, refused, settings)


def _checked(host: HostModel, input_ids: Tensor) -> int:
    """The length that a model was made for; raises as `perplexity_by_position`."""
    name = type(host.model).__name__
    if is_efficient(type(host.model)):
        raise ValueError(f"{name} is converted: give the original, and its mechanism as attention=.")
    is_causal = all(host.family.is_causal(stack, layer) for stack in host.stacks for layer in stack.layers)
    if not is_causal or not host.model.can_generate():
        raise ValueError(f"{name} is no causal language model, so the next token has no perplexity.")
    made_for = next(iter(host.made_for.values()), None)
    if made_for is None or input_ids.dim() != 2 or input_ids.shape[1] <= made_for:
        raise ValueError(
            f"input_ids of shape {tuple(input_ids.shape)}: give (B, N) tokens with N above {made_for}, the length "
            f"that {name} was made for."
        )
    return made_for


def _ranges(made_for: int, length: int) -> list[tuple[int, int]]:
    edges = [0, made_for // 2, made_for]
    while edges[-1] < length - 1:
        edges.append(min(2 * edges[-1], length - 1))
    return [(first, end - 1) for first, end in itertools.pairwise(edges)]


def _measured(
    model: Any, input_ids: Tensor, ranges: list[tuple[int, int]], attention: ConfigLike | None, options: dict[str, Any]
) -> list[float]:
    handle = None if attention is None else patch_attention(model, attention, **options)
    total = torch.zeros(input_ids.shape[1] - 1, dtype=torch.float64)
    try:
        with eval_mode(model):
            for row in input_ids.to(model.device):
                logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
                total += F.cross_entropy(logits, row[1:], reduction="none").double().cpu()
    finally:
        if handle is not None:
            handle.undo()
    losses = [float(total[first : last + 1].mean()) / len(input_ids) for first, last in ranges]
    return [math.exp(loss) if loss < 700 else math.inf for loss in losses]
