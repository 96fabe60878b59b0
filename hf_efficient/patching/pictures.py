"""What a call says of its pictures: their size decides how many tokens there are, and where they stand."""

from __future__ import annotations

from typing import Any, NamedTuple

from hf_efficient.families import GridPositions, PositionScheme
from hf_efficient.patching.call_inputs import CallShape

INTERPOLATE = "interpolate_pos_encoding"


class Pictures(NamedTuple):
    """The shape of a call with pictures, and what is added to its keywords."""

    shape: CallShape
    keywords: dict[str, Any]


def pictures_of(
    call: dict[str, Any], config: Any, positions: PositionScheme, parameters: list[str]
) -> Pictures | None:
    """What follows from the pictures of a call; `None` = it has none, or their tokens lie in no grid.

    Args:
        parameters: of the stack. Where one tells it to interpolate its positions, a model that was made to take larger
            pictures is told so.

    Raises:
        ValueError: larger pictures than the model was made to take.
    """
    pixels = call.get("pixel_values")
    if not isinstance(positions, GridPositions) or not positions.in_order or getattr(pixels, "ndim", 0) != 4:
        return None
    assert pixels is not None
    size = (pixels.shape[-2], pixels.shape[-1])
    (rows, columns), largest = positions.patches(config, size), positions.largest(config)
    shape = CallShape(pixels.shape[0], positions.prefix_tokens(config) + rows * columns, 0)
    if largest is not None and shape.tokens > largest:
        raise ValueError(
            f"pictures of {rows} × {columns} patches are {shape.tokens} tokens, but the model has {largest} positions: make "
            f"them smaller, or convert with max_positions={shape.tokens} or more."
        )
    keywords: dict[str, Any] = {}
    if (rows, columns) != positions.grid(config):
        keywords["efficient_grid"] = (rows, columns)
    if largest is not None and INTERPOLATE in parameters and size != positions.size(config):
        keywords[INTERPOLATE] = True
    return Pictures(shape, keywords)
