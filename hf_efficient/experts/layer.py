"""Sparse experts: a feed-forward layer as E copies of it, of which a router picks one or two for each token.

Router, in fp32: p = softmax(W_r x), x a token's input of the layer. The copies start equal (sparse upcycling), so in
eval mode a layer computes what it did before as long as the weights of a token's experts sum to 1:

    top_k = 1:   y = p_e / sg(p_e) · FFN_e(x),               e = argmax p, sg = no gradient through it
    top_k = 2:   y = Σ_e p_e / (p_a + p_b) · FFN_e(x),       e in {a, b}, the two largest

With one expert the usual p_e · FFN_e(x) would shrink the output to p_e of it; p_e / sg(p_e) is 1 and has the gradient of
log p_e. Sources: Fedus et al. 2022, §2 (one expert, capacity, load balance);
Lepikhin et al. 2021, §2.2 (capacity of two experts: 2 T / E); Zoph et al. 2022, §3 (z-loss);
Komatsuzaki et al. 2023, §3 (copies of a trained layer, router from N(0, 0.02²), every other layer).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_mm

from hf_efficient.families.feed_forward import Dense
from hf_efficient.ops.choice import first_largest, rounding

ROUTER_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """What `config.efficient_experts` says, as JSON.

    Args:
        num_experts: E, copies of the feed-forward part in a sparse layer.
        top_k: experts of a token, 1 or 2.
        capacity_factor: cf; in training an expert takes at most C = ceil(cf · top_k · T / E) of the top_k · T assignments of
            a batch's T real tokens and drops the others, which get 0 from it: 1 is the even load, at which new routers,
            whose load is uneven, drop most. `None` = none is dropped. Never in eval mode.
        layers: which layers of each stack, from 0; `None` = every other one, from the second on.
        router_aux_loss_coef, router_z_loss_coef: of the load balance and of the z-loss in the training loss.
        seed: of the routers' start.

    Raises:
        ValueError: a value that is not possible.
    """

    num_experts: int = 8
    top_k: int = 1
    capacity_factor: float | None = None
    layers: tuple[int, ...] | None = None
    router_aux_loss_coef: float = 1e-2
    router_z_loss_coef: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.num_experts) is not int or self.num_experts < 1:
            raise ValueError(f"num_experts={self.num_experts!r} is not possible; it must be an integer ≥ 1.")
        if type(self.top_k) is not int or self.top_k not in (1, 2):
            raise ValueError(f"top_k={self.top_k!r} is not possible; a token has 1 or 2 experts.")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}; lower it.")
        factor = self.capacity_factor
        if factor is not None and not (_is_number(factor) and factor > 0):
            raise ValueError(f"capacity_factor={factor!r} is not possible; it must be a number > 0, or None.")
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)!r} is not possible; it must be a number ≥ 0.")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} is not possible; it must be an integer ≥ 0.")
        if self.layers is not None:
            good = isinstance(self.layers, (list, tuple)) and all(type(i) is int and i >= 0 for i in self.layers)
            if not good or not self.layers:
                raise ValueError(f"layers={self.layers!r} is not possible; give layer indices from 0, or None.")
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> ExpertsConfig:
        """The config that `to_dict` describes. Raises ValueError for unknown fields."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"experts have no option {', '.join(unknown)}; their options are {', '.join(known)}.")
        return cls(**options)

    @property
    def has_loss(self) -> bool:
        """Whether routers have a loss at all."""
        return self.router_aux_loss_coef > 0 or self.router_z_loss_coef > 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": None if self.layers is None else list(self.layers)}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


class Routing(NamedTuple):
    """How a layer's last batch was routed: scalars and (E,) in fp32.

    Attributes:
        balance: E Σ_e f_e p̄_e over real tokens; f_e assignments to expert e per token, p̄_e mean probability. Least, at
            an even load, is top_k.
        z: mean of LSE(W_r x)² over real tokens.
        load: (E,) share of the assignments that each expert was chosen for, dropped ones included.
        dropped: share of the assignments that found their expert full.
    """

    balance: Tensor
    z: Tensor
    load: Tensor
    dropped: Tensor


class Router(nn.Linear):
    """(T, hidden) → (T, E) logits, in fp32 whatever the model's precision."""

    def __init__(self, hidden_size: int, num_experts: int, **factory: Any):
        super().__init__(hidden_size, num_experts, bias=False, **factory)

    def forward(self, rows: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(rows.to(wide), self.weight.to(wide))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if not self.weight.is_meta:
            drawn = torch.randn(self.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
            with torch.no_grad():
                self.weight.copy_(ROUTER_STD * drawn)


class ExpertLayer(nn.Module):
    """(B, N, hidden) → (B, N, hidden): E copies of a feed-forward part and their router; see the page's equations.

    In training, tokens beyond an expert's capacity get 0 from it: first choices of all tokens go before second ones, each
    in the order of the batch (row by row, from the left). Padding is computed as ever, but takes no capacity and is in no
    statistic. O(top_k · B · N · hidden · inner) time, E times the weights.

    Attributes:
        tokens: (B, S ≥ N) or shorter by the extra tokens in front, nonzero = real token; `None` = all real. Set before a
            call.
        recording: whether `routing` is recorded; off while a checkpointed layer is computed again.
        routing: of the last recorded call, with its gradient until the loss is made.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(self, config: ExpertsConfig, dense: Dense, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        like: dict[str, Any] = {"device": dense.up.device, "dtype": dense.up.dtype}
        self.router = Router(dense.up.shape[0], config.num_experts, **like)
        self.router.reset_parameters(generator)
        for name in ("up", "down", "up_bias", "down_bias"):
            weight = getattr(dense, name)
            self.register_parameter(name, None if weight is None else _copies(weight, config.num_experts))
        self.activation, self.is_gated = dense.activation, dense.is_gated
        self.inner_dropout, self.dropout = dense.inner_dropout, dense.dropout
        self.tokens: Tensor | None = None
        self.recording = False
        self.routing: Routing | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.router(rows)
        probs = logits.softmax(-1)
        chosen = self._chosen(probs)
        best = probs.gather(-1, chosen)
        # one expert: 1 with the gradient of log p
        weights = best / (best.detach() if self.config.top_k == 1 else best.sum(-1, keepdim=True))
        if self.training:
            token_mask = self._real(hidden_states)
            kept = self._within_capacity(chosen, token_mask)
            weights = weights * kept
            routing = describe_routing(logits, probs, chosen, kept, token_mask)
            if self.recording:
                self.routing = routing
            # also where a checkpointed layer is computed again, which is then all that has gradients
            is_recorded = self.routing is not None and not torch.compiler.is_compiling()
            if is_recorded and self.router.weight.requires_grad and self.config.has_loss:
                require_router_loss(logits, routing)
        out = self.run_experts(rows, chosen, weights)
        return F.dropout(out, self.dropout, self.training).reshape(hidden_states.shape)

    def _chosen(self, probs: Tensor) -> Tensor:
        """(T, k) the experts of largest (T, E) probability, best first; of equal ones the first."""
        left, chosen = probs.detach().to(torch.promote_types(probs.dtype, torch.float32)), []
        for _ in range(self.config.top_k):
            chosen.append(first_largest(left, rounding(left.new_ones(())))[..., None])
            left = left.scatter(-1, chosen[-1], -1.0)
        return torch.cat(chosen, dim=-1)

    def _real(self, hidden_states: Tensor) -> Tensor:
        """(T,) bool, True = real token."""
        b, n = hidden_states.shape[:2]
        if self.tokens is None:
            return torch.ones(b * n, dtype=torch.bool, device=hidden_states.device)
        # a mask may also cover tokens in a cache, and extra tokens may precede those that it covers
        tokens = self.tokens[:, -n:].bool()
        return F.pad(tokens, (n - tokens.shape[1], 0), value=True).reshape(-1)

    def _within_capacity(self, chosen: Tensor, token_mask: Tensor) -> Tensor:
        """(T, k) bool, False = the expert was full; (T, k) chosen experts, (T,) real tokens."""
        if self.config.capacity_factor is None:
            return torch.ones_like(chosen, dtype=torch.bool)
        experts = self.config.num_experts
        assignments = token_mask.sum().double() * self.config.top_k
        capacity = torch.ceil(assignments * self.config.capacity_factor / experts)
        queue = chosen.T.reshape(-1, 1)
        real = token_mask.repeat(self.config.top_k)
        arrived = F.one_hot(queue[:, 0], experts) * real[:, None]
        position = arrived.cumsum(0).gather(1, queue)[:, 0]
        return ((position <= capacity) | ~real).view(self.config.top_k, -1).T

    def run_experts(self, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(T, hidden) sums of the chosen experts' outputs; (T, k) indices and weights."""
        # transformers' experts interface has this too, but takes its choice of implementation from configs that dense
        # models do not have, and knows neither fp64, dropout between the products, nor autocast
        k = self.config.top_k
        expert, order = chosen.reshape(-1).sort(stable=True)
        numbers = torch.arange(self.config.num_experts, device=expert.device)
        ends = torch.searchsorted(expert, numbers, right=True).to(torch.int32)
        inner = _product(rows[order // k], self.up, self.up_bias, expert, ends)
        if self.is_gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * inner
        else:
            inner = self.activation(inner)
        inner = F.dropout(inner, self.inner_dropout, self.training)
        out = _product(inner, self.down, self.down_bias, expert, ends)
        back = out[order.argsort()].unflatten(0, (-1, k))
        return (back * weights.unsqueeze(-1)).sum(1).to(out.dtype)

    def dense(self, expert: int) -> Dense:
        """One of the experts."""
        up_bias, down_bias = (None if bias is None else bias[expert] for bias in (self.up_bias, self.down_bias))
        weights = self.up[expert], self.down[expert], up_bias, down_bias
        return Dense(*weights, self.activation, self.is_gated, self.inner_dropout, self.dropout)

    def are_equal(self) -> bool:
        """Whether the experts are still copies of one feed-forward part."""
        return all(bool((p == p[:1]).all()) for p in self.parameters(recurse=False))

    def __getstate__(self) -> dict[str, Any]:
        # what belongs to one call is neither copied nor pickled
        return self.__dict__ | {"tokens": None, "routing": None}

    def extra_repr(self) -> str:
        e, hidden, inner = self.up.shape
        return f"{e} experts of {hidden} → {inner // 2 if self.is_gated else inner}, top_k={self.config.top_k}"


def _copies(weight: Tensor, number: int) -> nn.Parameter:
    stacked = weight.detach().expand(number, *weight.shape)
    return nn.Parameter(stacked.clone(memory_format=torch.contiguous_format), requires_grad=weight.requires_grad)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor, ends: Tensor) -> Tensor:
    """(S, out): row i of (S, in) times `weight[expert[i]]`; rows are sorted by expert, whose last ones are before `ends`."""
    device, dtype = rows.device.type, weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    rows, weight = rows.to(dtype), weight.to(dtype)
    fits = dtype != torch.float64 and all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    # torch's kernel takes no fp64 and wants strides of whole 16 bytes
    product: Any = _grouped_mm if fits else torch.ops.transformers.grouped_mm_fallback
    out = product(rows, weight, ends)
    return out if bias is None else out + bias.to(dtype)[expert]


def describe_routing(logits: Tensor, probs: Tensor, chosen: Tensor, kept: Tensor, token_mask: Tensor) -> Routing:
    """`Routing` of (T, E) logits and probabilities, (T, k) choices and which of them were kept, (T,) real tokens."""
    experts, k = probs.shape[-1], chosen.shape[-1]
    real = token_mask.to(probs.dtype)
    count = real.sum().clamp(min=1)
    assigned = (F.one_hot(chosen, experts).sum(1) * real[:, None]).sum(0) / count
    mean = (probs * real[:, None]).sum(0) / count
    return Routing(
        balance=experts * (assigned * mean).sum(),
        z=(logits.logsumexp(-1).square() * real).sum() / count,
        load=assigned / k,
        dropped=1 - (kept * real[:, None]).sum() / (k * count),
    )


LOST = (
    "the routers would be trained without their loss (load balance and z-loss): what is trained on was computed outside the "
    "model. Call the model without labels and add hf_efficient.experts.loss.router_loss(model) to the loss after each call, "
    "in a Trainer by compute_loss_func=…; or set router_aux_loss_coef and router_z_loss_coef to 0."
)


def require_router_loss(logits: Tensor, routing: Routing) -> None:
    """Have a backward pass that reaches a router's (T, E) logits, but not what its loss is made of, raise ValueError.

    A loss of the model has the routers' part in it; label smoothing, `compute_loss_func` and other losses that are computed
    from its outputs have not.
    """
    if not logits.requires_grad:
        return
    reached: list[bool] = []
    for figure in (routing.balance, routing.z):
        figure.register_hook(lambda gradient: reached.append(True))

    def check(gradient: Tensor) -> None:
        # what is made of the logits has its gradient before they have theirs
        if not reached:
            raise ValueError(LOST)

    logits.register_hook(check)


def expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """{qualified name: layer} of every sparse layer, in order of the modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertLayer)}
