"""`show`: the picture of which keys each query sees, printed as text and saved as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.pattern import PatternAttentionConfig
from hf_efficient.attention.base.registry import ConfigLike, attention_configs
from hf_efficient.profiling.json_files import whole_file
from hf_efficient.visualize.render import as_figure, as_text, title
from hf_efficient.visualize.visibility import Visibility, require_drawable


class PatternPicture(Visibility):
    """What every query of one layer sees: `print` draws it in the terminal, `save` as PNG, `facts` has its figures."""

    def __str__(self) -> str:
        return as_text(self)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the picture as PNG: one panel per distinct head pattern, up to 4, colours by the pattern's parts.

        Raises:
            ValueError: `path` does not end in `.png`.
            FileExistsError: there is something at `path` and `overwrite` is False.
            ImportError: matplotlib is not installed.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise ValueError(f"{path}: pictures are written as PNG; give a name that ends in .png.")
        if path.exists() and not overwrite:
            raise FileExistsError(
                f"{path} exists; choose another name, or overwrite it with --overwrite / overwrite=True."
            )
        figure = as_figure(self)
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=130, metadata={"Title": title(self)})
        return path


def show(
    config: ConfigLike,
    *,
    length: int = 1024,
    is_causal: bool = False,
    num_heads: int = 12,
    layer: int = 0,
    num_layers: int = 12,
    **options: Any,
) -> PatternPicture:
    """What every query of a layer sees: `print(he.show("longformer", attention_window=256, global_tokens="first"))`.

    Args:
        config: one mechanism, in any form that `convert` takes; `options` go with a name.
        length: n, tokens of the row; all of them real.
        is_causal: the layer of a decoder: additionally key ≤ query.
        num_heads, layer, num_layers: of the stack, for mechanisms that differ by head or layer.

    Raises:
        ValueError: a mechanism whose visible keys depend on more than positions, several mechanisms, options that do
            not fit the layer, a size that is not positive.

    O(tiles of 64 × 64) time and memory, never an n × n mask.
    """
    chosen, *others = attention_configs(config, **options)
    if others:
        raise ValueError(f"a picture shows one mechanism, and here are {1 + len(others)}; draw them one by one.")
    require_drawable(chosen.mechanism)
    assert isinstance(chosen, PatternAttentionConfig)
    geometry = _geometry(chosen, length, is_causal, num_heads, layer, num_layers)
    return PatternPicture.of(chosen, geometry, length)


def _geometry(
    config: PatternAttentionConfig, length: int, is_causal: bool, num_heads: int, layer: int, num_layers: int
) -> AttentionGeometry:
    """The layer to draw, after everything that speaks against it."""
    for name, size in (("length", length), ("num_heads", num_heads), ("num_layers", num_layers)):
        if size < 1:
            raise ValueError(f"{name}={size} is not possible; it must be at least 1.")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer={layer} does not exist among {num_layers} layers, which count from 0.")
    geometry = AttentionGeometry(
        num_heads=num_heads,
        head_dim=64,
        hidden_size=64 * num_heads,
        layer=layer,
        num_layers=num_layers,
        side="decoder" if is_causal else "encoder",
        is_causal=is_causal,
        has_relative_bias=False,
        projection_bias=True,
        max_positions=None,
    )
    reasons = config.attention_class.unsupported(config, geometry)
    parts = (config, *getattr(config, "patterns", ()))
    for part in (one for one in parts if getattr(one, "separator_token_id", None) is not None):
        reasons.append(
            f"global_tokens={part.global_tokens!r} depends on the text: give positions such as 0,1,2 instead"
        )
    if reasons:
        raise ValueError(f"{config.mechanism} can't be drawn like this: {'; '.join(reasons)}.")
    return geometry
