"""The family of every model type that has none written for it: what can be found by looking at the model."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn, cast

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from hf_efficient.attention.base.geometry import Rotary, SourceAttention
from hf_efficient.families.base import ModelFamily
from hf_efficient.families.stack import AttentionLayer, Heads, Stack

CROSS = ("cross", "encoder_attn", "encdec", "inter_attn")
"""Parts of names of attention over another sequence."""
COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_attn_heads")
WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "qk_head_dim")
HIDDEN = ("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "embedding_size")


@dataclass(frozen=True, kw_only=True)
class GenericFamily(ModelFamily):
    """Finds attention by the source of its class, and heads by their usual names.

    A layer is self-attention that calls transformers' AttentionInterface and whose name does not say that it looks at
    another sequence. Nothing of this is certain, so a model is compared with itself before it counts as converted.
    Projections, positions and feed-forward layers stay unknown; what needs them is refused.
    """

    stack_classes: tuple[str, ...] = ()
    attention_classes: tuple[str, ...] = ()
    projections: tuple[str, ...] = ()
    needs_proof = True

    @property
    def modeling(self) -> Any:
        config = CONFIG_MAPPING[self.model_type]
        try:
            return importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
        except ModuleNotFoundError as error:
            raise ValueError(
                f"no model family for model_type {self.model_type!r}, and transformers has no modeling file for it: {error}"
            ) from error

    @property
    def has_attention(self) -> bool:
        """Whether some class of the modeling file calls transformers' AttentionInterface."""
        modeling = self.modeling
        kinds: list[Any] = [cls for _, cls in inspect.getmembers(modeling, inspect.isclass)]
        return any(dispatches(kind) for kind in kinds if kind.__module__ == modeling.__name__)

    def stacks(self, model: nn.Module) -> list[Stack]:
        """All stacks with self-attention: the innermost models around it.

        Raises:
            ValueError: there is none that calls the interface.
        """
        owners: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, PreTrainedModel)}
        found: dict[str, Stack] = {}
        home = self.modeling.__name__
        for name, module in model.named_modules():
            kind = cast("Any", type(module))
            if kind.__module__ != home or not dispatches(kind):
                continue
            around = [n for n in owners if n == "" or name.startswith(f"{n}.")]
            owner = max(around, key=len) if around else ""
            stack = found.setdefault(owner, Stack(owner, owners.get(owner, model), "encoder"))
            if self.is_cross_attention(name, module):
                stack.cross_attention.append(module)
                continue
            stack.side = "decoder" if _says_causal(module) else stack.side
            stack.layers.append(AttentionLayer(name, module, len(stack.layers)))
        stacks = [stack for stack in found.values() if stack.layers]
        if not stacks:
            self._refuse_without_attention(model)
        return stacks

    def _refuse_without_attention(self, model: nn.Module) -> NoReturn:
        parts = {
            part.config.model_type
            for part in model.modules()
            if isinstance(part, PreTrainedModel) and part is not model
        } - {self.model_type}
        inside = f" It is made of other models ({', '.join(sorted(parts))}): convert those." if parts else ""
        raise ValueError(
            f"no model family for model_type {self.model_type!r}, and it can't be converted without one: its attention does "
            f"not go through AttentionInterface.{inside}"
        )

    def is_cross_attention(self, name: str, module: nn.Module) -> bool:
        text = f"{name}.{type(module).__name__}".lower()
        return bool(getattr(module, "is_cross_attention", False)) or any(word in text for word in CROSS)

    def is_causal(self, stack: Stack, layer: AttentionLayer) -> bool:
        return _says_causal(layer.module)

    def rotary(self, stack: Stack, layer: AttentionLayer) -> Rotary | None:
        """By the frequencies that hosts keep where they make the angles."""
        found = (x for name, x in stack.module.named_buffers() if name.endswith("inv_freq"))
        frequencies = next(found, None)
        return None if frequencies is None else Rotary(2 * frequencies.shape[-1])

    def heads(self, module: Any) -> Heads:
        config = getattr(module, "config", None)
        query = _number(module, COUNTS) or _number(config, COUNTS) or 1
        width = _number(module, WIDTHS) or _number(config, WIDTHS) or (_number(config, HIDDEN) or query) // query
        groups = _number(module, ("num_key_value_groups",))
        key_value = _number(module, ("num_key_value_heads",)) or (query // groups if groups else query)
        return Heads(query, key_value, width, _number(module, ("v_head_dim",)) or width)

    def has_projection_bias(self, module: Any) -> bool:
        return False

    def hidden_size(self, stack: Stack) -> int:
        return _number(stack.module.config, HIDDEN) or 0

    def source_attention(self, module: Any) -> SourceAttention:
        raise ValueError(
            f"{self.model_type} has no model family of its own, so nothing is known about the projections of a layer, which "
            "this mechanism starts from: write one, see CONTRIBUTING.md."
        )

    def projection_refusal(self, module: Any) -> str | None:
        return f"{self.model_type} has no model family of its own that knows them"


@cache
def dispatches(cls: Any) -> bool:
    """Whether a module class calls one of transformers' attention functions by name."""
    try:
        return issubclass(cls, nn.Module) and "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False


def _says_causal(module: Any) -> bool:
    return bool(getattr(module, "is_causal", getattr(module, "is_decoder", False)))


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    return next((v for name in names if type(v := getattr(owner, name, None)) is int and v > 0), None)
