"""Whether the weights that a module shows are those that its call computes with.

Adapters, quantised layers, offloading, pruning and parametrisations live in the *call* of a module: whoever reads its weight
sees the original, a packed or an empty tensor. So forward passes call modules, and whatever must read weights asks here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

# what can be read: these classes themselves, since a subclass may compute otherwise
READABLE = (
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.sparse.Embedding",
    "transformers.pytorch_utils.Conv1D",
)
# whose subclasses of these are what the model's own class has there: OPT's table of positions
OWN = ("hf_efficient.", "transformers.models.")
ADAPTER_LIBRARIES = ("peft", "adapters", "loralib")
PACKED = ("torch.ao.", "torchao.", "bitsandbytes.", "optimum.quanto.")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

ADAPTED = "carries an adapter: merge it first (`merge_and_unload`), or convert before adapting"
QUANTISED = "is quantised: convert the original, then quantise the result"
OFFLOADED = "is offloaded: convert on a machine that holds the model, then offload the result"
SHARDED = "is sharded over processes: gather its weights first, or convert before sharding"
PARAMETRISED = (
    "has a parametrisation: make it permanent first (`torch.nn.utils.parametrize.remove_parametrizations`), "
    "or convert before"
)
COMPUTED = (
    "has a weight that is computed in every call (pruning, weight or spectral norm) or kept elsewhere: make it permanent "
    "first (`prune.remove`, `remove_weight_norm`, …), or convert before"
)


def is_adapter(module: object) -> bool:
    """Whether a module was put there by a library of adapters, around another one or around a whole model."""
    return any(cls.__module__.partition(".")[0] in ADAPTER_LIBRARIES for cls in type(module).__mro__)


def altered(module: nn.Module) -> str | None:
    """Why the call of a module computes with other weights than it shows, and the remedy; `None` = no sign of that.

    The text goes on after the name of the module. O(parameters of the module itself), no weight is looked at.
    """
    if is_adapter(module):
        return ADAPTED
    if parametrize.is_parametrized(module):
        return PARAMETRISED
    if any(isinstance(module.__dict__.get(name), Tensor) for name in ("weight", "bias")):
        return COMPUTED
    # packed layers have a method of that name
    weight = getattr(module, "weight", None)
    if (callable(weight) and not isinstance(weight, nn.Module)) or any(
        c.__module__.startswith(PACKED) for c in type(module).__mro__
    ):
        return QUANTISED
    reasons = [_altered_tensor(module, p) for p in module._parameters.values() if p is not None]
    reasons = [reason for reason in reasons if reason]
    if reasons:
        return reasons[0]
    readable = [name.rpartition(".")[2] for name in map(_full_name, type(module).__mro__[1:]) if name in READABLE]
    if readable and not type(module).__module__.startswith(OWN):
        return f"is a {type(module).__name__}, which may compute otherwise than the {readable[0]} that it was: put that back"
    return None


def not_plain(module: nn.Module) -> str | None:
    """Why the weight and bias of a linear layer or an embedding can't be read, and the remedy; `None` = they can."""
    reason = altered(module)
    if reason is None and _full_name(type(module)) not in READABLE:
        return f"is a {type(module).__name__} in place of the layer that the model had: put that back"
    return reason


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a product with its weight is all that a call of this module does, now and for whoever listens to it."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not any(getattr(module, hooks) for hooks in HOOKS)
        and all(type(p) is nn.Parameter and _is_real(p) for p in module._parameters.values() if p is not None)
        and isinstance(module._parameters.get("weight"), nn.Parameter)
    )


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_real(parameter: Tensor) -> bool:
    return (
        parameter.is_floating_point()
        and parameter.element_size() > 1  # 8 bits need a scale
        and not parameter.is_meta
        and parameter.numel() > 0
    )


def _altered_tensor(module: nn.Module, parameter: Any) -> str | None:
    # tensors that only record shapes (torch's fake ones) stand for ordinary ones
    is_plain = type(parameter) is nn.Parameter or type(parameter).__module__.startswith("torch._subclasses.")
    if hasattr(parameter, "ds_id") or hasattr(parameter, "placements"):
        return SHARDED
    if not is_plain or not parameter.is_floating_point() or parameter.element_size() == 1:
        return QUANTISED
    # a model that was built on the meta device has no weights as yet; one whose hooks bring them in has
    if parameter.is_meta and hasattr(module, "_hf_hook"):
        return OFFLOADED
    return None
