"""Rotary positions: longer inputs through transformers' own `rope_parameters`."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficient.families.positions import LongerInputs, PositionScheme
from hf_efficient.families.stack import Stack

ORIGINAL = "original_max_position_embeddings"
# the numbers that each method takes; those of a method that is replaced go, all others (theta, shares, sections) stay
NUMBERS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "ntk": ("factor",),
    "yarn": ("factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"),
}
USUAL: dict[str, dict[str, Any]] = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
LISTS = ("short_factor", "long_factor")
EFFECTS = {
    "unchanged": "inputs up to {before} tokens give what they gave; longer ones show distances that it never saw",
    "linear": "all angles are divided by the factor: short inputs change",
    "ntk": "theta grows, which leaves fast angles nearly alone and divides slow ones: short inputs change",
    "yarn": "slow angles are divided, fast ones stay, logits are scaled: short inputs change",
    "llama3": "slow angles are divided, fast ones stay: short inputs change",
    "longrope": "each angle is divided by its own factor, rope=dict(short_factor=[…], long_factor=[…]), and logits are "
    "scaled: short inputs change, and with two different lists the longest row of a batch decides for all",
}


@dataclass(frozen=True)
class RotaryPositions(PositionScheme):
    """Queries and keys are rotated by angles that grow with their positions (Su et al. 2021, RoFormer, §3.4).

    A model takes inputs of any length, but distances beyond the length that it was made for are new to it. `"unchanged"`
    leaves its angles alone; `"linear"` (Chen et al. 2023), `"yarn"` (Peng et al. 2023), `"llama3"` (Llama 3.1) and
    `"longrope"` (Ding et al. 2024) are set in the config's `rope_parameters` and computed by transformers; `"ntk"` is
    `theta · factor^(d / (d - 2))` for d rotated entries. Where layers have `rope_parameters` by their kind, those of layers
    whose own window is shorter than the old length stay.

    Args:
        module: name of the module inside a stack that makes cosines and sines.
    """

    module: str = "rotary_emb"
    kind: ClassVar[str] = "rotary"
    methods: ClassVar[dict[str, bool]] = {"unchanged": True} | dict.fromkeys(NUMBERS, False)
    fields: ClassVar[tuple[str, ...]] = ("max_position_embeddings", "rope_parameters")

    def made_for(self, stack: Stack) -> int | None:
        length: int | None = getattr(stack.module.config, "max_position_embeddings", None)
        return length

    def dim(self, stack: Stack, layer_kind: str | None = None) -> int:
        """Entries of a head that are rotated; `layer_kind`: of `config.layer_types`, for hosts that tell kinds apart."""
        angles: Any = self._angles(stack)
        frequencies = getattr(angles, "inv_freq", None)
        if frequencies is None:
            frequencies = getattr(angles, f"{layer_kind}_inv_freq")
        return 2 * int(frequencies.shape[-1])

    def _angles(self, stack: Stack) -> Any:
        return stack.module.get_submodule(self.module)

    # what is asked for

    def check(self, stack: Stack, wanted: LongerInputs) -> None:
        if wanted.positions == "dynamic":
            raise ValueError(
                "positions='dynamic': the longest row of a batch would change the outputs of all others; use 'ntk', its "
                "static form, or another of " + ", ".join(self.methods) + "."
            )
        super().check(stack, wanted)
        if wanted.max_positions is None:
            return
        self._require_made_from_config(stack)
        for where, given in _parts(stack.module.config).items():
            if "dynamic" in given.get("rope_type", "default"):
                raise ValueError(
                    f"max_positions={wanted.max_positions}: rope_type='dynamic' of this model's rope_parameters{where} "
                    "follows the longest row of a batch, and max_position_embeddings. Leave max_positions out, or set "
                    "another rope_type first."
                )
        if wanted.positions is not None:
            self.parameters(stack, wanted.max_positions, wanted.positions, wanted.rope)

    def _require_made_from_config(self, stack: Stack) -> None:
        """Refuse rotations that would not follow the config, of the module itself or of layers with one of their own."""
        angles = self._angles(stack)
        if next(iter(inspect.signature(type(angles)).parameters), None) != "config":
            raise ValueError(f"{type(angles).__name__} is not made from a config, so max_positions can't be honoured.")
        inside = set(angles.modules())
        for name, module in stack.module.named_modules():
            if module not in inside and any("inv_freq" in buffer for buffer, _ in module.named_buffers(recurse=False)):
                raise ValueError(
                    f"{name} ({type(module).__name__}) has rotations of its own, so max_positions can't be honoured."
                )

    def check_rope(self, stack: Stack, wanted: LongerInputs) -> None:
        if wanted.positions not in NUMBERS:
            raise ValueError(
                f"rope={dict(wanted.rope or {})!r} are numbers of a method, but positions={wanted.positions!r}; give one of "
                f"{', '.join(NUMBERS)}."
            )
        for name, value in (wanted.rope or {}).items():
            if name not in NUMBERS[wanted.positions]:
                raise ValueError(
                    f"rope={{{name!r}: …}}: positions={wanted.positions!r} takes {', '.join(NUMBERS[wanted.positions])}."
                )
            _require_number(name, value)

    def method(self, stack: Stack, wanted: LongerInputs, farthest: int | None) -> str:
        before = self.made_for(stack)
        count = wanted.max_positions
        if wanted.positions is not None or count is None or before is None or count == before:
            return super().method(stack, wanted, farthest)
        if farthest is not None and farthest < before:
            return "unchanged"  # no query sees a distance that is new to the model
        effects = "".join(f"\n- positions={name!r}: {text.format(before=before)}" for name, text in EFFECTS.items())
        raise ValueError(
            f"max_positions={count}: this model was made for {before} positions, and some of its layers will see keys "
            f"farther away. Give every layer a window below {before} without global tokens, or say how its rotary positions "
            f"are to serve them:{effects}"
        )

    # the numbers

    def parameters(self, stack: Stack, count: int, method: str, rope: Mapping[str, Any] | None = None) -> Any:
        """`rope_parameters` with which the stack takes `count` tokens.

        Raises:
            ValueError: numbers that do not fit the method or the model.
        """
        config = stack.module.config
        before = self.made_for(stack) or count
        found = copy.deepcopy(config.rope_parameters)
        scaled = []
        for where, given in _parts(config).items():
            if method == "unchanged":
                _pin(given, config)
            elif _has_short_window(config, where, before):
                continue
            else:
                dim = self.dim(stack, where.removeprefix(" of ") or None)
                given = _scaled(given, config, count, method, dict(rope or {}), dim)
            scaled.append(where)
            if where:
                found[where.removeprefix(" of ")] = given
            else:
                found = given
        if not scaled:
            raise ValueError(
                f"positions={method!r} would change nothing: no layer of this model sees farther than {before} tokens. Use "
                "positions='unchanged'."
            )
        self._require_taken(stack, count, found)
        return found

    def _require_taken(self, stack: Stack, count: int, parameters: Any) -> None:
        """Refuse what the host would read otherwise from a saved config, or could not compute: some know few methods."""
        config, angles = stack.module.config, self._angles(stack)
        values = copy.deepcopy(config.to_dict()) | {"max_position_embeddings": count, "rope_parameters": parameters}
        try:
            read: Any = type(config).from_dict(copy.deepcopy(values))
            new: Any = type(angles)(read)
            kinds = _kinds(config) if "layer_type" in inspect.signature(type(angles).forward).parameters else [None]
            for kind in kinds:
                new(torch.zeros(1), torch.arange(2)[None], *[kind] * (kind is not None))
            reason = "" if read.rope_parameters == parameters else f"it reads {read.rope_parameters}"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            raise ValueError(f"{type(config).__name__} does not take rope_parameters={parameters}: {reason}.")

    @torch.no_grad()
    def lengthen(self, stack: Stack, count: int, method: str, rope: Mapping[str, Any] | None = None) -> list[str]:
        config: Any = stack.module.config
        record, before = self.record(stack), _state(self._angles(stack))
        parameters = self.parameters(stack, count, method, rope)
        self._set(stack, count, parameters)
        after = _state(self._angles(stack))
        if method == "unchanged" and not all(_equal(after[name], value) for name, value in before.items()):
            self.restore(stack, record)
            raise ValueError(
                f"max_positions={count}: the angles of {type(self._angles(stack)).__name__} follow "
                f"max_position_embeddings={config.max_position_embeddings}, so they can't stay unchanged: give another of "
                f"{', '.join(self.methods)} as positions."
            )
        return []

    def record(self, stack: Stack) -> dict[str, Any]:
        config: Any = stack.module.config
        return {name: copy.deepcopy(getattr(config, name)) for name in self.fields}

    def restore(self, stack: Stack, record: Mapping[str, Any]) -> None:
        if "rope_parameters" in record:
            self._set(stack, record["max_position_embeddings"], copy.deepcopy(record["rope_parameters"]))

    def _set(self, stack: Stack, count: int, parameters: Any) -> None:
        """Set the config and make the angles anew from it, as a model built from it has them."""
        config: Any = stack.module.config
        config.max_position_embeddings, config.rope_parameters = count, parameters
        angles = self._angles(stack)
        new = type(angles)(config)
        for name, buffer in new.named_buffers():
            old = angles._buffers.get(name, buffer)
            new._buffers[name] = buffer.to(old.device, old.dtype)
        # the module stays, with the hooks that it may have; those of accelerate are its `forward`
        kept = ("training", "forward")
        own = {name: value for name, value in vars(angles).items() if name.startswith("_") or name in kept}
        vars(angles).clear()
        vars(angles).update(vars(new) | own | {"_buffers": new._buffers})


def _parts(config: Any) -> dict[str, dict[str, Any]]:
    """{where: a copy of `rope_parameters`}: "" for all layers, or " of " and each kind of layer that is rotated."""
    found = copy.deepcopy(config.rope_parameters)
    nested = {f" of {name}": found[name] for name in _kinds(config) if isinstance(found.get(name), dict)}
    return nested or {"": found}


def _kinds(config: Any) -> list[str]:
    """The kinds of layers that a model has."""
    return list(dict.fromkeys(getattr(config, "layer_types", None) or ()))


def _has_short_window(config: Any, where: str, before: int) -> bool:
    window = getattr(config, "sliding_window", None)
    return where == " of sliding_attention" and window is not None and window < before


def _pin(given: dict[str, Any], config: Any) -> None:
    """Write down the factor that transformers would otherwise take from `max_position_embeddings`."""
    original = given.get(ORIGINAL)
    if given.get("rope_type") in ("longrope", "yarn") and given.get("factor") is None and original:
        given["factor"] = config.max_position_embeddings / original


def _scaled(
    given: dict[str, Any], config: Any, count: int, method: str, rope: dict[str, Any], dim: int
) -> dict[str, Any]:
    """`rope_parameters` for inputs of `count` tokens, made of those before."""
    kind = given.get("rope_type", "default")
    rope_type = "default" if method == "ntk" else method
    if kind not in ("default", rope_type):
        raise ValueError(
            f"positions={method!r}: this model's rope_parameters are of rope_type={kind!r} already, which it would replace. "
            f"Use positions={kind if kind in NUMBERS else 'unchanged'!r}{', whose factor grows,' if kind in NUMBERS else ''}"
            f"{' or unchanged' if kind in NUMBERS else ''}."
        )
    _pin(given, config)
    trained = stated = getattr(config, ORIGINAL, None) if ORIGINAL in NUMBERS[method] else None
    if kind == "default":
        trained = rope.get(ORIGINAL) or stated or config.max_position_embeddings
        factor = max(count / trained, 1.0)
    else:
        factor = (given.get("factor") or 1.0) * count / config.max_position_embeddings
    factor = float(rope.pop("factor", factor))
    if method == "ntk":
        if dim <= 2:
            raise ValueError("positions='ntk' needs more than 2 rotated entries per head; use positions='linear'.")
        return given | {"rope_theta": given["rope_theta"] * factor ** (dim / (dim - 2))}
    kept = given if kind == rope_type else {name: v for name, v in given.items() if name not in _ALL_NUMBERS}
    new = kept | {"rope_type": rope_type, "factor": factor}
    if stated is not None and rope.get(ORIGINAL, stated) != stated:
        raise ValueError(
            f"rope={{{ORIGINAL!r}: {rope[ORIGINAL]}}}: the config of this model says {stated}, and that counts."
        )
    if ORIGINAL in NUMBERS[method]:
        new.setdefault(ORIGINAL, trained)
    new = USUAL.get(method, {}) | new | {k: list(v) if k in LISTS else v for k, v in rope.items()}
    if method == "longrope":
        _require_lists(new, dim // 2)
    if method == "llama3" and not new["low_freq_factor"] < new["high_freq_factor"]:
        raise ValueError("rope: low_freq_factor must be below high_freq_factor.")
    if method == "yarn" and not (new.get("beta_slow") or 1) < (new.get("beta_fast") or 32):
        raise ValueError("rope: beta_slow must be below beta_fast.")
    return new


_ALL_NUMBERS = {name for names in NUMBERS.values() for name in names}


def _require_number(name: str, value: Any) -> None:
    def is_number(x: Any, low: float) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x >= low and x > 0

    if name == "truncate":
        rule, holds = "True or False", isinstance(value, bool)
    elif name in LISTS:
        rule, holds = (
            "a list of positive numbers",
            isinstance(value, list | tuple) and all(is_number(x, 0) for x in value),
        )
    elif name == "factor":
        rule, holds = "a number ≥ 1", is_number(value, 1)
    elif name == ORIGINAL:
        rule, holds = "an integer ≥ 1", type(value) is int and value >= 1
    else:
        rule, holds = "a positive number", is_number(value, 0)
    if not holds:
        raise ValueError(f"rope={{{name!r}: {value!r}}} is not possible; it must be {rule}.")


def _require_lists(parameters: dict[str, Any], count: int) -> None:
    for name in LISTS:
        given = parameters.get(name)
        if given is None or len(given) != count:
            there = "is missing" if given is None else f"has {len(given)} entries"
            raise ValueError(f"positions='longrope': {name} {there}; give rope=dict({name}=[…]) with {count} numbers.")


def _state(angles: nn.Module) -> dict[str, Any]:
    """What decides on cosines and sines: buffers and scalars."""
    scalars = {name: value for name, value in vars(angles).items() if "attention_scaling" in name}
    return {name: buffer.clone() for name, buffer in angles.named_buffers()} | scalars


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)
