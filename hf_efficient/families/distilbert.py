"""DistilBERT: BERT without token types, in flat layers; its positions are learned, or sinusoids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_efficient.families.base import fill_linear
from hf_efficient.families.bert import IDS, TABLE, BertFamily
from hf_efficient.families.feed_forward import Dense
from hf_efficient.families.initialised import mark_initialised
from hf_efficient.families.positions import PositionTable
from hf_efficient.families.stack import Stack


@dataclass(frozen=True)
class DistilBertPositions(PositionTable):
    """Learned rows, or sinusoids where the config says so: these go on as they began, as long as nobody has trained them."""

    def rows(self, stack: Stack, rows: Tensor, count: int, method: str) -> Tensor:
        # the modeling file takes long to import
        from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings

        config: Any = stack.module.config
        if config.sinusoidal_pos_embds and method == "tile" and not rows.is_meta:
            made = torch.empty(max(count, len(rows)), config.dim)
            create_sinusoidal_embeddings(n_pos=len(made), dim=config.dim, out=made)
            made = made.to(rows)
            if torch.equal(made[: len(rows)], rows):
                return made[:count].clone()
        return super().rows(stack, rows, count, method)


class DistilBertFamily(BertFamily):
    """The host's own layer adds the residual of attention, and holds a feed-forward part `ffn`."""

    def feed_forward_name(self, layer: Any) -> str:
        return "ffn"

    def feed_forward_products(self, layer: Any) -> list[str]:
        return ["ffn.lin1", "ffn.lin2"]

    def feed_forward(self, layer: Any) -> Dense:
        part = layer.ffn
        up, down = part.lin1, part.lin2
        return Dense(up.weight.T, down.weight.T, up.bias, down.bias, part.activation, dropout=part.dropout.p)

    def clear_feed_forward(self, layer: Any) -> None:
        """Nothing is left of it."""

    def restore_feed_forward(self, layer: Any, dense: Dense, config: Any) -> None:
        layer.ffn = part = self.modeling.FFN(config)
        fill_linear(part.lin1, dense.up.T, dense.up_bias)
        fill_linear(part.lin2, dense.down.T, dense.down_bias)
        mark_initialised(part)


FAMILIES = (
    DistilBertFamily(
        model_type="distilbert",
        stack_classes=("DistilBertModel",),
        attention_classes=("DistilBertSelfAttention",),
        projections=("q_lin", "k_lin", "v_lin"),
        positions=DistilBertPositions(TABLE, (IDS,)),
        embeddings_module="embeddings",
        layers_module="transformer",
    ),
)
