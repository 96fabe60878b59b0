"""Source and result of an export on the same random tokens: how far apart their outputs are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_efficient.exporting.target import Call, Converted, Shapes, Target
from hf_efficient.families.probe import probe_inputs
from hf_efficient.patching.call_inputs import GLOBAL
from hf_efficient.patching.exact import eval_mode

LONGEST = 2048
SEPARATORS = 3
NEW_TOKENS = 16
SPAN_LOGITS = ("start_logits", "end_logits")
Row = dict[str, Any]


def chosen_lengths(lengths: Sequence[int] | None, source: Converted, shapes: Shapes) -> list[int]:
    """The lengths that are asked for, or three up to that of the position table, the middle one odd if it may be.

    Raises:
        ValueError: a length that is no integer ≥ 1, more than the model has positions, or not of these shapes.
    """
    own, size = source.host.max_positions, shapes.multiple
    most = own if shapes.most is None else shapes.most
    if lengths is not None and source.model.main_input_name != "input_ids":
        raise ValueError(
            f"lengths={lengths!r}: {source.stock.__name__} takes {source.model.main_input_name}, whose size its "
            "config says; leave lengths out."
        )
    if lengths is not None and (isinstance(lengths, (int, str)) or not lengths):
        raise ValueError(f"lengths={lengths!r} is not possible; give at least one, as (64, 512).")
    if shapes.length is not None:
        if lengths is not None and tuple(lengths) != (shapes.length,):
            raise ValueError(f"lengths={lengths!r}: the class takes texts of {shapes.length} tokens alone.")
        return [shapes.length]
    if lengths is None:
        longest = LONGEST // 2 if most is None else min(most, LONGEST)
        least, top = (shapes.beyond // size + 1) * size, longest // size * size
        if top < least:
            raise ValueError(
                f"{own} positions are too few: the class has this attention beyond {shapes.beyond} tokens."
            )
        middle = top * 3 // 8 | 1 if size == 1 else (least + top) // (2 * size) * size
        return sorted({max(min(64, top) // size * size, least), max(middle, least), top})
    for length in lengths:
        if type(length) is not int or length < 1 or (most is not None and length > most):
            what = "this model has positions for" if most == own else "the class takes no more than"
            limit = f"; {what} {most} tokens" if most is not None else ""
            raise ValueError(f"lengths={list(lengths)}: {length!r} is not possible; give integers ≥ 1{limit}.")
        if length <= shapes.beyond or length % size:
            raise ValueError(
                f"lengths={list(lengths)}: at {length} the class is not equal; give multiples of {size} above "
                f"{shapes.beyond}."
            )
    return sorted(set(lengths))


def largest_error(given: float | None, usual: float) -> float:
    """The tolerance that is asked for, or the usual one; raises ValueError for what is none."""
    if given is None:
        return usual
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not given >= 0:
        raise ValueError(f"tolerance={given!r} is not possible; give a relative error such as 1e-5.")
    return float(given)


def checked(
    source: Converted, result: PreTrainedModel, target: Target, lengths: list[int], tolerance: float | None
) -> list[Row]:
    """The figures of `compare`, in single precision; beyond the target's own tolerance in double, which has no rounding.

    Raises:
        ValueError: an error beyond the tolerance.
    """
    limit = largest_error(tolerance, target.tolerance)
    rows = compare(source, result, target, lengths)
    if tolerance is None and any(not row["error"] <= limit for row in rows):
        rows = compare(source, result, target, lengths, torch.float64)
    worst = max(rows, key=lambda row: row["error"])
    if not worst["error"] <= limit:
        raise ValueError(
            f"{type(result).__name__} and {type(source.model).__name__} differ by {worst['error']:.1e} of the largest "
            f"output at {worst['length']} tokens{' with padding' if worst['padded'] else ''}, more than "
            f"tolerance={limit:g}: nothing was made."
        )
    return rows


@torch.no_grad()
def compare(
    source: Converted, result: nn.Module, target: Target, lengths: list[int], dtype: torch.dtype = torch.float32
) -> list[Row]:
    """How far the result is from what it must equal, for every call of the target at every length, without and with padding.

    Args:
        dtype: to compute in; models with another are copied.

    Returns:
        Rows of `length` (`None` = of pictures or sound), `padded`, `global_tokens` (whether the call gave a mask of them),
        `dtype`, `error`, the largest difference of a real token's outputs over the largest output, and `argmax_agreement`
        of the logits, `None` where there are none. Where the source computes something else by itself, also `distance` and
        `distance_agreement`, the same figures against that.
    """
    ours, theirs = _in(dtype, source.model), _in(dtype, result)
    rows = []
    with eval_mode(ours), eval_mode(theirs):
        for length, is_padded in _shapes(ours, lengths, target.shapes(source).padding):
            for call in target.calls(source):
                inputs = _inputs(source, ours, length, is_padded, call)
                marks = call.marks(inputs["input_ids"], inputs["attention_mask"]) if call.marks else None
                given = {} if marks is None else {GLOBAL: marks}
                passed = inputs if is_padded or length is None else _without_mask(inputs)
                actual = theirs(**passed, **given)
                with target.expected(ours):
                    expected = ours(**passed, **(given if call.is_given else {}))
                row: Row = {"length": length, "padded": is_padded, "global_tokens": marks is not None}
                row["dtype"] = str(dtype).removeprefix("torch.")
                row |= figures(actual, expected, inputs, "error", "argmax_agreement")
                if target.has_distance:
                    row |= figures(actual, ours(**passed), inputs, "distance", "distance_agreement")
                rows.append(row)
    return rows


def _shapes(model: Any, lengths: list[int], may_pad: bool) -> list[tuple[int | None, bool]]:
    if model.main_input_name != "input_ids":
        return [(None, False)]
    return [
        (length, is_padded)
        for length in lengths
        for is_padded in (False, True)
        if not is_padded or (may_pad and length > 1)
    ]


def _in(dtype: torch.dtype, model: Any) -> Any:
    return model if {p.dtype for p in model.parameters()} == {dtype} else copy.deepcopy(model).to(dtype)


def _without_mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def _inputs(source: Converted, model: Any, length: int | None, is_padded: bool, call: Call) -> dict[str, Tensor]:
    """Two rows of random tokens, of which one is padded on the right by a third; of a head with choices, one row of two."""
    if length is None:
        return probe_inputs(model)
    config, place = model.config, model.device
    generator = torch.Generator().manual_seed(length)
    padding = getattr(config, "pad_token_id", None) or 0
    ordinary = ordinary_tokens(config, call.separator_token_id)
    ids = ordinary[torch.randint(len(ordinary), (2, length), generator=generator)]
    mask = torch.ones_like(ids)
    if is_padded:
        mask[1, length - max(length // 3, 1) :] = 0
    if call.separator_token_id is not None:
        for row, real in zip(ids, mask.sum(-1).tolist(), strict=True):
            _put_separators(row, real, call.separator_token_id)
    ids = torch.where(mask.bool(), ids, padding)
    inputs = {"input_ids": ids.to(place), "attention_mask": mask.to(place)}
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: value[None] for name, value in inputs.items()}
    if config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        # another number than of the input's tokens tells the outputs of both sides apart
        count = NEW_TOKENS + (length == NEW_TOKENS)
        tokens = ordinary[torch.randint(len(ordinary), (2, count), generator=generator)]
        inputs["decoder_input_ids"] = tokens.to(place)
    return inputs


def ordinary_tokens(config: Any, *others: int | None) -> Tensor:
    """Ids of the vocabulary without those that mean something to a model."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")
    special = [getattr(config, name, None) for name in names] + list(others)
    taken = {one for value in special for one in (value if isinstance(value, list) else [value])}
    size = config.get_text_config().vocab_size
    return torch.tensor([token for token in range(size) if token not in taken] or [0])


def _put_separators(row: Tensor, real: int, separator: int) -> None:
    """Three in a row of `real` tokens, as RoBERTa's tokenizer puts them around a pair of texts.

    Raises:
        ValueError: there is no room for them.
    """
    if real < 2 * SEPARATORS:
        raise ValueError(f"lengths: {len(row)} tokens have no room for a question and its context; give at least 9.")
    row[[real // 3, real // 3 + 1, real - 1]] = separator


def figures(actual: Any, expected: Any, inputs: dict[str, Tensor], error: str, agreement: str) -> Row:
    """The largest relative difference of all outputs, and the share of equal decisions by logits."""
    worst, agreeing = 0.0, []
    for name, ours in _tensors(expected).items():
        pair = ours, _tensors(actual)[name]
        ours, theirs = (_real(name, output, inputs) for output in pair)
        difference = ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-30)).item()
        worst = max(worst, difference) if difference == difference else float("inf")
        if name.endswith("logits") and ours.shape[-1] > 1:
            # a span is chosen among the tokens of a row
            ours, theirs = (_hidden(x, inputs) for x in pair) if name in SPAN_LOGITS else (ours, theirs)
            agreeing.append((theirs.argmax(-1) == ours.argmax(-1)).double().mean().item())
    return {error: worst, agreement: min(agreeing, default=None)}


def _tensors(output: Any) -> dict[str, Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _real(name: str, output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """`output` without what stands at padding, where it has an entry per token; else all of it."""
    mask = inputs.get("attention_mask")
    if mask is None or output.shape[: mask.dim()] != mask.shape:
        return output
    # classes are as many as tokens by chance only
    return output[mask.bool()] if output.dim() > mask.dim() or name in SPAN_LOGITS else output


def _hidden(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    if output.shape != inputs["attention_mask"].shape:
        return output  # of the decoder's tokens, none of which is padding
    return output.masked_fill(inputs["attention_mask"] == 0, float("-inf"))
