"""What is tried: settings of every mechanism at the same cost, and the steps to cheaper and dearer ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.mechanism import EfficientAttentionConfig
from hf_efficient.attention.base.pattern import PatternAttentionConfig
from hf_efficient.attention.base.registry import get_mechanism, list_mechanisms, requested_configs, training_words
from hf_efficient.evaluation.cost import keys_per_query, setting_near
from hf_efficient.families import HostModel
from hf_efficient.patching.install import plan, resolve_side

MOST = 30
SHARES = (1 / 8, 1 / 4, 1 / 16, 1 / 2)
"""Keys per query ÷ those of full attention, in the order of their use."""
SINKS = 4
LARGEST_SHARE = 0.75
"""Settings that compare a query with more of its keys save nothing, and are not sought."""


@dataclass(frozen=True)
class Candidate:
    """Settings to be measured; equal ones are equal. `size` are the keys per query that they were sought for, if any."""

    configs: tuple[EfficientAttentionConfig, ...]
    size: float | None = dataclasses.field(default=None, compare=False)

    @property
    def attention(self) -> list[dict[str, Any]]:
        """The JSON form, which `convert` takes: what differs from a mechanism's defaults."""
        return [short_form(config) for config in self.configs]

    @property
    def name(self) -> str:
        """For people and as a key: the mechanism and the options that differ from its defaults."""
        return " + ".join(_in_words(one) for one in self.attention)

    @property
    def needs_training(self) -> bool:
        return any(needs_training(config.mechanism) for config in self.configs)

    @property
    def is_calibrated(self) -> bool:
        return any(hasattr(config.attention_class, "calibrate") for config in self.configs)


def needs_training(mechanism: str) -> bool:
    return training_words(mechanism).startswith("needs training")


def short_form(config: EfficientAttentionConfig) -> dict[str, Any]:
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    given = json.loads(json.dumps(config.to_dict()))
    changed = {
        name: value for name, value in given.items() if name in defaults and getattr(config, name) != defaults[name]
    }
    return {"mechanism": config.mechanism} | changed


def _in_words(attention: Mapping[str, Any]) -> str:
    options = [f"{k}={json.dumps(v).strip(chr(34))}" for k, v in attention.items() if k != "mechanism"]
    return " ".join([attention["mechanism"], *options])


class Grid:
    """Candidates for one model at one length.

    Only layers that see all keys are meant, where others have a window of the host's own: `layers`, `None` = all.

    Args:
        length: tokens of the longest text. untrained_only: leave out what needs training.
    """

    def __init__(self, host: HostModel, length: int, untrained_only: bool = False):
        self.host, self.length, self.untrained_only = host, length, untrained_only
        side = resolve_side(EfficientAttentionConfig(), [stack.side for stack in host.stacks])[0]
        stack = next(stack for stack in host.stacks if stack.side == side)
        geometries = [host.family.geometry(stack, layer) for layer in stack.layers]
        full = [g for g in geometries if g.sliding_window is None] or geometries
        self.geometry: AttentionGeometry = full[0]
        self.num_layers = len(geometries)
        self.layers = tuple(g.layer for g in full) if len(full) < len(geometries) else None
        self.keys = keys_per_query(None, self.geometry, length) or length
        self.refused: dict[str, str] = {}
        self.left_out: list[str] = []
        self._possible: set[str] = set()

    def all(self) -> list[Candidate]:
        """At most 30: mechanisms that work untrained at n/8 and n/4 keys per query, those that need training at n/8, and
        more settings of the first as far as there is room. `left_out` are the mechanisms for which there is none."""
        names = list_mechanisms()
        untrained = [name for name in names if not needs_training(name)]
        trained = [] if self.untrained_only else [name for name in names if name not in untrained]
        groups = [(untrained, SHARES[0]), (untrained, SHARES[1]), (trained, SHARES[0])]
        groups += [(untrained, share) for share in SHARES[2:]]
        found = [one for group, share in groups for name in group for one in self.near(name, share * self.keys)]
        kept = list(dict.fromkeys(found))[:MOST]
        measured = {config.mechanism for candidate in kept for config in candidate.configs}
        self.left_out = [name for name in names if name in self._possible - measured]
        return kept

    def given(self, candidates: Iterable[Any]) -> list[Candidate]:
        """What a caller names: mechanisms, whose settings are sought, and settings as they are.

        Raises:
            ValueError: none, or one that is not possible for the model.
        """
        named = [candidates] if isinstance(candidates, (str, Mapping, EfficientAttentionConfig)) else list(candidates)
        found: list[Candidate] = []
        for one in named:
            if isinstance(one, str) and one.strip()[:1] not in ("[", "{"):
                get_mechanism(one)  # a name that nobody knows is refused here
                sought = [c for share in SHARES for c in self.near(one, share * self.keys)]
                if not sought:
                    raise ValueError(f"candidates: {self.refused[one]}")
                found += sought
                continue
            chosen = Candidate(tuple(config.for_length(self.length) for config in requested_configs(one)))
            plan(self.host, list(chosen.configs))
            found.append(chosen)
        if not found:
            raise ValueError("candidates=[] leaves nothing to measure; name mechanisms or settings, or leave it out.")
        if self.untrained_only and (untaught := [one.name for one in found if one.needs_training]):
            raise ValueError(
                f"candidates names {', '.join(untaught)}, which need training: leave these out, or untrained_only."
            )
        return list(dict.fromkeys(found))

    def near(self, mechanism: str, keys: float) -> list[Candidate]:
        """The setting of a mechanism nearest to so many keys per query, and its form with first tokens that all see."""
        possible, forms = list[Candidate](), list[EfficientAttentionConfig]()
        reason = f"{mechanism} has no setting that compares a query with at most {LARGEST_SHARE:.0%} of its keys"
        config = setting_near(mechanism, self.geometry, self.length, keys)
        try:
            config = config or get_mechanism(mechanism).Config().for_length(self.length)
            forms = _forms(dataclasses.replace(config, layers=self.layers))
        except ValueError as error:
            reason = str(error)
        for one in forms:
            try:
                plan(self.host, [one])
                seen = keys_per_query(one, self.geometry, self.length)
                if seen is None or seen <= LARGEST_SHARE * self.keys:
                    possible.append(Candidate((one,), keys))
            except ValueError as error:
                reason = str(error).splitlines()[-1].removeprefix("- ")
        if possible:
            self._possible.add(mechanism)
            self.refused.pop(mechanism, None)
        elif mechanism not in self._possible:
            self.refused[mechanism] = reason
        return possible

    def layers_of(self, config: EfficientAttentionConfig) -> list[int]:
        """Indices of the layers that a setting is in."""
        return list(range(self.num_layers)) if config.layers is None else list(config.layers)

    def can_be_hybrid(self, config: EfficientAttentionConfig) -> bool:
        """Whether some of its layers can stay exact: not where they share a module, or tokens run through all."""
        layers = self.layers_of(config)
        try:
            plan(self.host, [dataclasses.replace(config, layers=tuple(layers[1:]))])
        except ValueError:
            return False
        return True

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """One geometric step cheaper and dearer, of a setting that was sought by its cost."""
        if candidate.size is None:
            return []
        steps = [candidate.size / 2**0.5, candidate.size * 2**0.5]
        mechanism = candidate.configs[0].mechanism
        return [one for keys in steps for one in self.near(mechanism, keys) if one != candidate]


def _forms(config: EfficientAttentionConfig) -> list[EfficientAttentionConfig]:
    """Beside a pattern's setting the one with sinks; instead of it the one with a global first token, where it has those."""
    options = {f.name for f in dataclasses.fields(config)}
    if not isinstance(config, PatternAttentionConfig):
        return [config]
    if "sink_tokens" in options:
        return [config, dataclasses.replace(config, sink_tokens=SINKS)]  # type: ignore[call-arg]
    if "global_tokens" in options:
        return [dataclasses.replace(config, global_tokens="first")]  # type: ignore[call-arg]
    return [config]
