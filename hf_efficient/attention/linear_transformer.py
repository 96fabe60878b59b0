"""Linear Transformer: the feature map elu(x) + 1 in place of the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_efficient.attention.base import AttentionGeometry, EfficientAttentionConfig, MechanismFacts, register_mechanism
from hf_efficient.attention.base.kernel import KernelAttention


@dataclass(frozen=True, kw_only=True)
class LinearTransformerAttentionConfig(EfficientAttentionConfig):
    """Options of Linear Transformer attention: none except `layers` and `side`."""

    mechanism: ClassVar[str] = "linear_transformer"

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        return geometry.head_dim


@register_mechanism
class LinearTransformerAttention(KernelAttention):
    """Kernel attention with a fixed map of positive features, sharpened by one learned number per head.

    With `x = q √(s √D)` or `k √(s √D)` (q and k themselves where s = 1 / √D), and α = exp(log α) per head, one for queries
    and one for keys, 1 at the start:

        φ(x) = elu(α x) + 1     (α x + 1 where x > 0, else exp(α x))
        y_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)

    It does not approximate the softmax and must be trained. O(N D²) time, O(N D) memory; causal decoding keeps one
    (D, D + 1) state per head. Attention dropout drops whole keys.

    Source: Katharopoulos et al. 2020 (arXiv 2006.16236), §3.2 and 3.3. Departure: α, which the paper does not have.
    """

    Config = LinearTransformerAttentionConfig
    config: LinearTransformerAttentionConfig
    transfer_learning_rate: ClassVar[float] = 1e-2
    traceable = True
    facts = MechanismFacts(
        title="Linear Transformer",
        paper="arXiv 2006.16236",
        kind="kernel",
        time="n·d²",
        memory="n·d",
        exact_when="never; another kernel than the softmax",
        training="needed: without it most of the model is lost",
    )

    def __init__(self, config: LinearTransformerAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        self.query_log_scale = nn.Parameter(torch.empty(geometry.num_heads))
        self.key_log_scale = nn.Parameter(torch.empty(geometry.num_heads))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.query_log_scale)
        nn.init.zeros_(self.key_log_scale)

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        return {"query_log_scale": "zero", "key_log_scale": "zero"}

    def log_features(self, x: Tensor, name: str) -> Tensor:
        log_scale = self.query_log_scale if name == "query" else self.key_log_scale
        x = x * log_scale.to(x.dtype).exp()[:, None, None]
        # each branch sees only arguments that it can differentiate
        return torch.where(x > 0, F.relu(x).log1p(), x)
