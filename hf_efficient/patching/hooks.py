"""Hooks on the modules of a host, and the state that they need.

A hook is a plain function; its state is an attribute of the module that it is called with, so that copies and pickles of a
model are complete. Whatever attaches hooks does so under a name of its own, and is detached by that name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

# the attribute of a module that holds {part: what it attached there}
HOOK_STATE = "_efficient_hooks"


class _Attached(NamedTuple):
    state: Any
    hooks: tuple[Callable[..., Any] | None, ...] = ()


def attach(
    module: nn.Module,
    part: str,
    state: Any = None,
    *,
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
    after_first: bool = False,
) -> None:
    """Put the hooks of a part on a module, together with their state.

    Args:
        before: `before(module, args, kwargs)`, a forward pre-hook. after: `after(module, args, kwargs, output)`.
        after_first: `after` runs before all forward hooks that the module has already.
    """
    module.__dict__.setdefault(HOOK_STATE, {})[part] = _Attached(state, (before, after))
    if before is not None:
        module.register_forward_pre_hook(before, with_kwargs=True)
    if after is not None:
        module.register_forward_hook(after, with_kwargs=True, prepend=after_first)


def state_of(module: nn.Module, part: str) -> Any:
    """The state of a part on this module; `None` = it has none, or is not attached."""
    attached = module.__dict__.get(HOOK_STATE, {}).get(part)
    return None if attached is None else attached.state


def detach(root: nn.Module, *parts: str) -> None:
    """Take hooks and state of these parts off all modules of `root`, as far as they are there."""
    for module in root.modules():
        attached = module.__dict__.get(HOOK_STATE, {})
        ours = {hook for part in parts if part in attached for hook in attached.pop(part).hooks}
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)
        if not attached:
            module.__dict__.pop(HOOK_STATE, None)


@contextmanager
def without_mechanisms(root: nn.Module) -> Iterator[None]:
    """Inside, a state that has a method `without_mechanism` is what that returns: its hooks do nothing for mechanisms."""
    entries = [
        (attached, part, entry)
        for module in root.modules()
        for attached in (module.__dict__.get(HOOK_STATE, {}),)
        for part, entry in attached.items()
        if hasattr(entry.state, "without_mechanism")
    ]
    try:
        for attached, part, entry in entries:
            attached[part] = entry._replace(state=entry.state.without_mechanism())
        yield
    finally:
        for attached, part, entry in entries:
            attached[part] = entry
