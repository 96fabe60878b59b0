"""What a call says of its tokens, brought into one form before any mechanism sees it: one row for each row of tokens."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efficient.families import SOUND
from hf_efficient.ops.graph import is_captured, is_tracing

GLOBAL = "global_attention_mask"
MASKS = ("attention_mask", GLOBAL, "encoder_attention_mask")
BESIDE = ("token_type_ids", "position_ids")


class CallShape(NamedTuple):
    """Rows B of a call, the N tokens of each that come in, and the tokens in the call's cache, which come before them."""

    rows: int
    new: int
    seen: int

    @property
    def tokens(self) -> int:
        return self.seen + self.new


def shape_of(call: dict[str, Any]) -> CallShape | None:
    """The shape of a call; `None` = it has no tokens, which the host refuses."""
    ids, embeddings, cache = (call.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values"))
    if ids is not None:
        *rows, new = ids.shape
    elif embeddings is not None:
        *rows, new = embeddings.shape[:-1]
    else:
        return None
    return CallShape(prod(rows), new, 0 if cache is None else cache.get_seq_length())


def refuse_marked_sound(call: dict[str, Any]) -> None:
    """Raise ValueError for global tokens named in a mask beside samples or spectra, of which frames are still to be made."""
    sound = next((name for name in SOUND if call.get(name) is not None), None)
    if sound is not None and call.get(GLOBAL) is not None:
        raise ValueError(
            f"{GLOBAL} was given, but {sound} has no tokens that it could name: leave it out, and convert with a rule such "
            "as global_tokens='first'."
        )


def checked_inputs(call: dict[str, Any], shape: CallShape, is_causal: bool, names: dict[str, str]) -> dict[str, Any]:
    """Those of a call's inputs that change: masks are (B, S) then, whatever form they had; `None` = it hides nothing, where
    that is the same to the host, which looks for packed rows in calls without a cache.

    A mask of (1, S) serves all rows, and one of (A, C, S) has the rows of a host that folds its A · C choices into rows.

    Args:
        names: what the caller calls an input of this stack, where that differs.

    Raises:
        ValueError: an input that is no tensor, has another shape, or a mask with values other than 0 and 1, as far as
            values are known.
    """
    encoder = call.get("encoder_hidden_states")
    sizes = {name: (shape.rows, shape.tokens) for name in MASKS} | {name: (shape.rows, shape.new) for name in BESIDE}
    if encoder is not None:
        sizes["encoder_attention_mask"] = (encoder.shape[0], encoder.shape[1])
    else:
        del sizes["encoder_attention_mask"]
    changes: dict[str, Any] = {}
    for name, (rows, columns) in sizes.items():
        if (given := call.get(name)) is None:
            continue
        given = _as_rows(names.get(name, name), given, rows, columns, is_causal and name == GLOBAL)
        changes[name] = given.expand(rows, -1) if name in MASKS and given.shape[0] != rows else given
    if GLOBAL in changes and is_tracing():
        raise ValueError(
            "global_attention_mask decides by its values what is computed, which a traced or exported graph can't follow: "
            "convert with a rule, such as global_tokens='first', or run the model itself."
        )
    hides_nothing = _check_values({names.get(name, name): changes[name] for name in MASKS if name in changes})
    if shape.seen and names.get(MASKS[0], MASKS[0]) in hides_nothing:
        changes[MASKS[0]] = None
    return {name: given for name, given in changes.items() if given is not call[name]}


def _as_rows(name: str, given: Any, rows: int, columns: int, may_be_shorter: bool) -> Tensor:
    """(B or 1, S) entries, one per token."""
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} is a {type(given).__name__}: give a tensor, as torch.tensor({name}) makes one.")
    shape = tuple(given.shape)
    flat = given.flatten(0, 1) if given.dim() == 3 and shape[0] * shape[1] == rows else given
    flat = flat[None] if given.dim() == 1 and name == "position_ids" else flat
    if flat.dim() > 2 and name.endswith("attention_mask") and name != GLOBAL:
        raise ValueError(
            f"{name} of shape {shape}: efficient attention takes (batch, tokens) padding masks only. "
            "For another pattern convert with the mechanism that has it."
        )
    fits = flat.dim() == 2 and flat.shape[0] in (1, rows)
    if not fits or not (flat.shape[1] == columns or (may_be_shorter and flat.shape[1] < columns)):
        raise ValueError(_other_shape(name, shape, rows, columns, may_be_shorter))
    return flat


def _other_shape(name: str, shape: tuple[int, ...], rows: int, columns: int, may_be_shorter: bool) -> str:
    wanted = " or ".join(str((count, columns)) for count in dict.fromkeys((rows, 1)))
    text = f"{name} of shape {shape} must be {wanted}"
    if may_be_shorter:
        return f"{text}, one entry per token; it may also end earlier: tokens behind its end are not global."
    return f"{text}, one entry per token{', also for those in a cache' if name.endswith('attention_mask') else ''}."


# ---- values ------------------------------------------------------------------------------------------------------


def _check_values(masks: dict[str, Tensor]) -> set[str]:
    """Refuse masks that do not consist of 0 and 1; of all of them the device is asked once.

    Returns:
        Those of which it is known that all their values are 1.
    """
    hides_nothing: set[str] = set()
    if is_tracing():
        return hides_nothing
    for name, mask in list(masks.items()):
        if mask.device.type == "cpu" and mask.dtype == torch.long and mask.numel() and not is_captured():
            low, high = (int(x) for x in mask.aminmax())  # one pass over the tokens
            if low < 0 or high > 1:
                raise ValueError(_other_value(name, mask))
            del masks[name]
            hides_nothing |= {name} if low else set()
    wrong = {name: (mask != mask.bool()).any() for name, mask in masks.items() if mask.dtype != torch.bool}
    # all tokens hidden: what an additive mask says where it hides nothing
    wrong |= {name: wrong[name] | ~mask.any() for name, mask in masks.items() if _may_be_additive(name, mask)}
    if not wrong:
        return hides_nothing
    if is_captured():
        for name, flag in wrong.items():
            torch._assert_async(~flag, f"{name} must hold 1 for tokens that count, and 0 for all others.")
    elif bool(torch.stack(list(wrong.values())).any()):
        name = next(name for name, flag in wrong.items() if flag)
        raise ValueError(_other_value(name, masks[name]))
    return hides_nothing


def _may_be_additive(name: str, mask: Tensor) -> bool:
    return mask.is_floating_point() and name != GLOBAL and mask.numel() > 0


def _other_value(name: str, mask: Tensor) -> str:
    others = mask[mask != mask.bool()]
    value = 0.0 if not len(others) else others[0].item()
    text = f"{name} has the value {value:g}"
    if name == GLOBAL:
        return f"{text}; it must hold 1 for global tokens and 0 for all others."
    if mask.is_floating_point() and not value > 0:
        return (
            f"{text}{' everywhere' if value == 0 else ''}, as an additive mask has; it must hold 1 for real tokens and 0 "
            f"for padding: give ({name} == 0).long()."
        )
    return (
        f"{text}; global tokens are named in global_attention_mask: it must hold 1 for real tokens and 0 for padding."
    )
