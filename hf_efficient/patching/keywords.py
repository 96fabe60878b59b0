"""Keywords that a host hands down to its attention layers: honoured, harmless, or refused by name."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from threading import get_ident
from typing import Any, cast

from hf_efficient.families import Stack
from hf_efficient.ops.graph import is_captured
from hf_efficient.patching.hooks import attach, state_of
from hf_efficient.patching.names import KEPT

HARMLESS = {
    "cache_position": "indices of the new tokens in the cache, of which the cache itself tells",
    "deterministic": "asks FlashAttention for the same sums each time, which all forms here give",
    "efficient_tokens": "counts for the losses of sparse experts",
    "encoder_attention_mask": "belongs to cross-attention, which gets its mask as attention_mask",
    "encoder_hidden_states": "belongs to cross-attention, which projects them itself",
    "labels": "are for the loss",
    "logits_to_keep": "is for the head",
    "num_items_in_batch": "is for the loss",
    "output_hidden_states": "is for the stack",
    "output_router_logits": "is for sparse experts",
    "position_ids": "are in queries and keys already; packed rows are told apart before any layer runs",
    "return_dict": "is for the stack",
    "sliding_window": "is said by the mask, whose rank is compared with the config's window",
    "token_type_ids": "are in the embeddings already",
    "use_cache": "is for the stack",
}
"""{keyword: why an attention layer may leave it alone}."""
REFUSED = {
    "block_indices": "it names the blocks of keys that each query sees, by their content",
    "cu_seq_lens_k": "it tells packed sequences apart, which position_ids that start again do",
    "cu_seq_lens_q": "it tells packed sequences apart, which position_ids that start again do",
    "indices": "it names the keys that each query sees, by their content",
    "sinks": "its sinks differ from token to token",
}
"""{keyword that some host passes: what it would mean}."""


def refuse_unknown(module: Any, keywords: dict[str, Any]) -> None:
    """Raise ValueError for a keyword with a value that is neither an argument of the attention function nor harmless."""
    for name, value in keywords.items():
        if value is None or name in HARMLESS or (name == "output_attentions" and not value):
            continue
        text = f"a tensor of shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
        meaning = f" ({REFUSED[name]})" if name in REFUSED else ""
        raise ValueError(
            f"{type(module).__name__} got {name}={text}, which efficient attention does not honour{meaning}: leave it out "
            "where it comes from the call. Where the model itself passes it, this layer computes something else than "
            "softmax attention with padding, and can't be converted."
        )


# ---- attention classes that do not hand on what they get ----------------------------------------------------------


def keep_for_attention(stack: Stack, hands_on: bool) -> None:
    """Have our keywords kept for the attention function, where classes of the host would drop them.

    Args:
        hands_on: the stack hands on what it gets; it may still be the attention modules that drop it (CLIP).
    """
    if hands_on:
        for layer in stack.layers:
            if _drops_keywords(cast("Any", type(layer.module))):
                attach(layer.module, KEPT, {}, before=_keep, after=_forget)
        return
    kept: dict[int, Any] = {}  # of one call, for all its layers
    attach(stack.module, KEPT, kept, before=_keep, after=_forget)
    for layer in stack.layers:
        attach(layer.module, KEPT, kept)


def with_kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function that also gets the keywords that were kept for this call."""

    @functools.wraps(function)
    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        kept = state_of(module, KEPT) or {}
        return function(module, *args, **kwargs, **kept.get(_thread(), {}))

    return attend


def _keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ours = {k: v for k, v in kwargs.items() if k.startswith("efficient_") or k == "global_attention_mask"}
    state_of(module, KEPT)[_thread()] = ours


def _forget(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    state_of(module, KEPT).pop(_thread(), None)


def _thread() -> int:
    """Whose call it is: threads may share a model, as those of `DataParallel` share this state. A graph has one."""
    return 0 if is_captured() else get_ident()


@functools.cache
def _drops_keywords(cls: Any) -> bool:
    """Whether the forward of an attention class takes further keywords without handing them on."""
    try:
        return len(re.findall(r"[(,\s]\*\*[a-z]", inspect.getsource(cls.forward))) == 1
    except (OSError, TypeError):
        return False
