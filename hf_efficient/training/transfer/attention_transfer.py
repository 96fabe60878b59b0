"""Attention transfer: mechanisms learn to do what full attention does in the same model, layer by layer or end to end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_efficient.patching.exact import Teacher, converted_layers, eval_mode, mechanism_of
from hf_efficient.patching.names import MODULE_NAME
from hf_efficient.training.transfer.layer_errors import LayerCall, is_mechanism, watch
from hf_efficient.training.transfer.losses import END_TO_END, LOCAL, end_to_end, layer_loss_parts, quotient

__all__ = ["AttentionTransfer", "TransferOutput", "blocks", "trainable"]

LossSpec = str | Sequence[str] | Mapping[str, float]


@dataclass
class TransferOutput(ModelOutput):
    """What a model returns while its attention is being transferred.

    Attributes:
        loss: the weighted sum of the chosen losses, a scalar.
        layer_loss: (L,) without gradients: of each transferred layer, or with `hidden_states` of each layer's output.
    """

    loss: Tensor | None = None
    layer_loss: Tensor | None = None


class AttentionTransfer:
    """Context manager in which `model(**batch)` returns the loss between the mechanisms and full attention.

        with AttentionTransfer(model):
            Trainer(model=model, …).train()

    Inside, the model returns a `TransferOutput`, so the stock Trainer and any other loop train it like any model; class,
    weights and checkpoints stay what they are, and on exit every hook and flag is gone. Make a Trainer inside the block:
    it then sees what is trained, and that the loss is a mean per batch. It evaluates rows without labels only if told
    `label_names=["input_ids"]`.

    Losses:
        "attention_output" (per layer, the default): Σ‖ŷ - y‖² / Σ‖y‖² over real positions, on the heads' outputs before the
            output projection; the loss is the mean over layers.
        "attention_weights" (per layer): the mean over heads and real queries of -Σ_j P_ij log P̂_ij, for mechanisms
            that can show their weights. O(N²) memory.
        "hidden_states" (end to end): the mean over layers of Σ‖Ĥ - H‖² / Σ‖H‖² over real positions.
        "logits" (end to end): KL(teacher ‖ student) in nats, the mean over real positions.
        "embedding" (end to end): 1 - cosine of the mean-pooled last states of the (encoder) stack.

    Per layer, full attention is computed on the very same q, k, v and handed on to the next layer, which so sees the
    teacher's states: no graph spans layers, dropout is off, and only the mechanisms' own parameters require gradients, those
    of the layers named in `layers`. What only extra global tokens go through (ETC) has no teacher and rests. End to end, a
    pass of the `Teacher` (the model before conversion, as it was when this was made) comes before the student's own;
    whatever requires gradients learns: see `trainable`.

    O(N²) time for the teacher. Sources: Zhang et al. 2024, "LoLCATs" (arXiv 2410.10254), §3.2, and "The Hedgehog & the
    Porcupine" (arXiv 2402.04347), §4.2. Deviation: errors are relative to the teacher, so that layers weigh the same.

    Args:
        model: a converted model, with adapters or not.
        losses: a name, names, or {name: weight}; all per layer or all end to end.
        layers: names from `converted_layers`; only these learn, the others compute full attention and nothing else.

    Raises:
        ValueError: no converted layer, an unknown loss or layer, losses of both kinds, `layers` with losses end to end or
            of layers that share parameters with others, or nothing to train.
    """

    def __init__(self, model: Any, losses: LossSpec = "attention_output", layers: Iterable[str] | None = None):
        self.model = model
        self.losses = _weights_of(losses)
        self.is_local = next(iter(self.losses)) in LOCAL
        converted = converted_layers(model)
        if not converted:
            raise ValueError(f"{type(model).__name__} has no converted layer, so there is nothing to transfer.")
        self.layers = list(converted) if layers is None else list(layers)
        _check_layers(converted, self.layers, self.is_local)
        self.teacher = None if self.is_local else Teacher(model)
        self._handles: list[Any] = []
        self._frozen: list[nn.Parameter] = []
        self._recorded: dict[str, dict[str, tuple[Any, Any]]] = {}
        self._cleanup = ExitStack()
        self._answer: Any = None
        self._batch: dict[str, Any] = {}
        self._asks_teacher = self._learns = False

    def __enter__(self) -> AttentionTransfer:
        if "_attention_transfer" in self.model.__dict__:
            raise ValueError(
                "an attention transfer of this model is already active: leave it before entering another."
            )
        if self.is_local:
            self._freeze()
            self._watch_layers()
        # first and last of the model's hooks, so that all others see the call as they always do
        enter = self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        leave = self.model.register_forward_hook(self._finish, always_call=True)
        self._handles += [enter, leave]
        self._loss_flag = self.model.__dict__.get("accepts_loss_kwargs")
        # the Trainer divides by accumulation steps only where the model does not promise to
        self.model.__dict__["accepts_loss_kwargs"] = False
        self.model.__dict__["_attention_transfer"] = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._cleanup.close()
        for handle in self._handles:
            handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._handles, self._frozen = [], []
        del self.model.__dict__["_attention_transfer"]
        if self._loss_flag is None:
            del self.model.__dict__["accepts_loss_kwargs"]
        else:
            self.model.__dict__["accepts_loss_kwargs"] = self._loss_flag

    def parameters(self, layer: str) -> list[nn.Parameter]:
        """The parameters of one layer's mechanism that learn."""
        return [p for p in mechanism_of(converted_layers(self.model)[layer]).parameters() if p.requires_grad]

    def _freeze(self) -> None:
        learning = {id(p) for name in self.layers for p in self.parameters(name)}
        if not learning:
            raise ValueError(
                "none of these mechanisms has parameters to train: choose losses end to end, such as "
                "{'hidden_states': 1.0}, and train the attention weights with trainable(model, 'attention')."
            )
        self._frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in learning]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def _watch_layers(self) -> None:
        self._resting = []
        for name, layer in converted_layers(self.model).items():
            mechanism = mechanism_of(layer)
            if name in self.layers:
                self._handles += watch(mechanism, partial(self._record, name), lambda: self._learns)
            elif mechanism.num_extra_tokens(mechanism.config):  # the others must still not see these
                self._handles += watch(mechanism, lambda call: None, lambda: False)
            else:
                self._resting.append((layer, mechanism))

    def _record(self, name: str, call: LayerCall) -> None:
        """Add a call up with others of the same layer: packed rows come as several."""
        parts = self._recorded.setdefault(name, {})
        for kind in self.losses:
            new = layer_loss_parts(kind, call)
            before = parts.get(kind, (0.0, 0.0))
            parts[kind] = (before[0] + new[0], before[1] + new[1])

    def _layer_loss(self, name: str) -> Tensor:
        parts = self._recorded[name]
        loss: Any = sum(weight * quotient(*parts[kind]) for kind, weight in self.losses.items())
        # data-parallel training waits for a gradient of every parameter, also of those without a part in the loss
        return loss + 0.0 * sum(p.sum().to(loss.device, loss.dtype) for p in self.parameters(name))

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._asks_teacher:
            return None
        if args:
            raise ValueError("while attention is transferred, call the model with keywords: model(input_ids=…).")
        if torch.compiler.is_compiling():
            raise ValueError(
                "attention transfer records what layers do, which can't be compiled: leave compilation off."
            )
        if kwargs.pop("num_items_in_batch", None) is not None:
            raise ValueError(
                "num_items_in_batch was given, but the transfer's loss is a mean per batch: make the Trainer inside the "
                "`with AttentionTransfer(…)` block, so that it divides by accumulation steps itself."
            )
        kwargs = {**kwargs, "return_dict": True, "use_cache": False}
        if self.is_local:
            self._enter_local(model)
            return args, kwargs
        kwargs["output_hidden_states"] = True
        self._batch = kwargs  # before other hooks of the model put extra tokens into it
        self._asks_teacher = True
        try:
            assert self.teacher is not None
            self._answer = self.teacher(**kwargs)
        finally:
            self._asks_teacher = False
        return args, kwargs

    def _enter_local(self, model: Any) -> None:
        self._recorded, self._learns = {}, torch.is_grad_enabled()
        self._cleanup.enter_context(eval_mode(model, keep=is_mechanism))
        self._cleanup.callback(torch.set_grad_enabled, self._learns)
        torch.set_grad_enabled(False)
        for layer, mechanism in self._resting:
            self._cleanup.callback(layer._modules.__setitem__, MODULE_NAME, mechanism)
            layer._modules[MODULE_NAME] = None

    def _finish(self, model: Any, args: tuple[Any, ...], output: Any) -> TransferOutput | None:
        if self._asks_teacher:
            return None
        self._cleanup.close()
        answer, batch, self._answer, self._batch = self._answer, self._batch, None, {}
        if output is None:  # the call raised
            return None
        if not self.is_local:
            return TransferOutput(*end_to_end(self.losses, output, answer, batch))
        missing = [name for name in self.layers if name not in self._recorded]
        if missing:
            raise ValueError(f"this call did not reach {len(missing)} of the layers to transfer, e.g. {missing[0]}.")
        recorded = [self._layer_loss(name) for name in self.layers]
        losses = torch.stack([loss.to(recorded[0].device) for loss in recorded])
        self._recorded = {}
        return TransferOutput(loss=losses.mean(), layer_loss=losses.detach())


def _weights_of(losses: LossSpec) -> dict[str, float]:
    names = {losses: 1.0} if isinstance(losses, str) else losses
    weights = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    unknown = [name for name in weights if name not in LOCAL + END_TO_END]
    if unknown or not weights:
        raise ValueError(f"losses={losses!r} is not possible; they are {', '.join(LOCAL + END_TO_END)}.")
    if len({name in LOCAL for name in weights}) > 1:
        raise ValueError(
            f"losses={losses!r} mixes losses per layer ({', '.join(LOCAL)}) with losses end to end: transfer per layer "
            "first, then end to end."
        )
    return {name: float(weight) for name, weight in weights.items()}


def _check_layers(converted: Mapping[str, nn.Module], layers: list[str], is_local: bool) -> None:
    unknown = [name for name in layers if name not in converted]
    if unknown or not layers:
        raise ValueError(f"layers={layers!r} are not all converted layers; these are {list(converted)}.")
    rest = [name for name in converted if name not in layers]
    if rest and not is_local:
        raise ValueError("losses end to end train the whole model: leave `layers` out.")
    inside, outside = (
        {id(p) for n in names for p in mechanism_of(converted[n]).parameters()} for names in (layers, rest)
    )
    if inside & outside:
        raise ValueError(f"{layers} share parameters with {rest}: transfer them together.")


# ---- what is trained ---------------------------------------------------------------------------------------------

TRAINABLE = ("mechanism", "attention", "all")


def trainable(model: Any, what: str) -> int:
    """Let one part of `model` require gradients and nothing else. Returns the number of trained values.

    "mechanism": what the converted layers' mechanisms added; "attention": these and the hosts' q, k, v and output
    projections in converted layers; "all": everything. For adapters let peft choose, with `modules_to_save=["efficient"]`.

    Raises:
        ValueError: another name, or nothing of that kind.
    """
    if what not in TRAINABLE:
        raise ValueError(f"train={what!r} is not possible; it must be one of {', '.join(TRAINABLE)}.")
    layers = converted_layers(model)
    chosen = [p for layer in layers.values() for p in mechanism_of(layer).parameters()]
    if what == "attention":
        chosen += [p for name, layer in layers.items() for p in _projections(model, name, layer)]
    if what == "all":
        chosen = list(model.parameters())
    if not chosen:
        raise ValueError(
            f"train={what!r}: these mechanisms have no parameters of their own; give 'attention' or 'all'."
        )
    ids = {id(p) for p in chosen}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in ids)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _projections(model: Any, name: str, attention: nn.Module) -> Iterator[nn.Parameter]:
    """Query, key, value and output projections of one attention layer."""
    for child, module in attention.named_children():
        if child not in (MODULE_NAME, "relative_attention_bias"):
            yield from module.parameters()
    # BERT and its relatives keep the output projection beside the module that mixes
    output = getattr(model.get_submodule(name.rpartition(".")[0]), "output", None)
    dense: Any = getattr(output, "dense", None)
    if dense is not None:
        yield from dense.parameters()


def blocks(model: Any, size: int) -> list[list[str]]:
    """The converted layers in groups of `size`, to be transferred one group after another, each as `layers=…`.

    Graphs and optimiser states are then those of one group at a time, and every layer learns what it would learn alone: the
    loss is the mean over the group, which Adam's step does not depend on.
    """
    if size < 1:
        raise ValueError(f"blocks of {size} layers are not possible; give at least 1.")
    names = list(converted_layers(model))
    return [names[first : first + size] for first in range(0, len(names), size)]
