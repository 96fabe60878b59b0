"""ViT and its relatives: encoders of pictures, cut into patches that lie in a grid."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_efficient.attention.base.geometry import AttentionGeometry, Rotary
from hf_efficient.families.base import ModelFamily
from hf_efficient.families.grid import GridPositions
from hf_efficient.families.stack import AttentionLayer, Stack


class ViTFamily(ModelFamily):
    """Separate q, k, v projections; the host's layer adds the residual. Nothing is padded, and there are no ids."""

    def side(self, stack: Any) -> str:
        return "encoder"


class DINOv3Family(ViTFamily):
    """Queries and keys of patches are rotated by their place in the picture: half of each head by rows, half by columns."""

    def rotary(self, stack: Stack, layer: AttentionLayer) -> Rotary | None:
        return Rotary(self.heads(layer.module).width)


class BeitFamily(ViTFamily):
    """Positions may also be biases over both axes, as a tensor of N × N, which are refused."""

    def geometry(self, stack: Stack, layer: AttentionLayer, max_positions: int | None = None) -> AttentionGeometry:
        for name in ("use_relative_position_bias", "use_shared_relative_position_bias"):
            if getattr(stack.module.config, name):
                raise ValueError(
                    f"{name}=True: this checkpoint adds a relative bias of tokens × tokens to its logits, which efficient "
                    "attention does not compute: it can't be converted."
                )
        return super().geometry(stack, layer, max_positions)


class ViTMAEFamily(ViTFamily):
    """The encoder sees a random part of the patches, shuffled. The decoder of its pre-training stays as it is."""

    def stacks(self, model: nn.Module) -> list[Stack]:
        found = super().stacks(model)
        layers = {layer.module for stack in found for layer in stack.layers}
        kind = getattr(self.modeling, self.attention_classes[0])
        for stack in found:
            stack.cross_attention += [m for m in model.modules() if isinstance(m, kind) and m not in layers]
        return found


USUAL: dict[str, Any] = {"positions": GridPositions()}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# model_type: (prefix of the class names, what differs from ViT)
RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {"stack_classes": ("ViTModel",)}),
    "deit": ("DeiT", {"stack_classes": ("DeiTModel",), "positions": GridPositions(prefix=2)}),
    "vit_msn": ("ViTMSN", {"stack_classes": ("ViTMSNModel",)}),
    "ijepa": ("IJepa", {"stack_classes": ("IJepaModel",), "positions": GridPositions(prefix=0)}),
    "dinov2": ("Dinov2", {"stack_classes": ("Dinov2Model", "Dinov2Backbone"), "since": "5.23"}),
    "dinov2_with_registers": (
        "Dinov2WithRegisters",
        {"stack_classes": ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"), "since": "5.23"},
    ),
}


def _tower(name: str, prefix: str, **different: Any) -> ViTFamily:
    """The encoder of pictures of a model of texts and pictures."""
    model = f"{prefix}VisionModel"
    usual: dict[str, Any] = dict(
        module_name=name, stack_classes=(model,), attention_classes=(f"{prefix}Attention",), model_classes=(model,)
    )
    return ViTFamily(model_type=f"{name}_vision_model", projections=PROJECTIONS, **usual | different)


FAMILIES = (
    *(
        ViTFamily(
            model_type=name, attention_classes=(f"{prefix}Attention",), projections=PROJECTIONS, **USUAL | different
        )
        for name, (prefix, different) in RELATIVES.items()
    ),
    DINOv3Family(
        model_type="dinov3_vit",
        stack_classes=("DINOv3ViTModel", "DINOv3ViTBackbone"),
        attention_classes=("DINOv3ViTAttention",),
        projections=PROJECTIONS,
        positions=GridPositions(is_square=False),
    ),
    BeitFamily(
        model_type="beit",
        stack_classes=("BeitModel",),
        attention_classes=("BeitAttention",),
        projections=PROJECTIONS,
        positions=GridPositions(),
    ),
    ViTMAEFamily(
        model_type="vit_mae",
        stack_classes=("ViTMAEModel",),
        attention_classes=("ViTMAEAttention",),
        projections=PROJECTIONS,
        positions=GridPositions(in_order=False),
    ),
    _tower(
        "clip",
        "CLIP",
        model_classes=("CLIPVisionModel", "CLIPVisionModelWithProjection"),
        positions=GridPositions(),
    ),
    _tower("siglip", "Siglip", positions=GridPositions(prefix=0)),
    _tower("siglip2", "Siglip2", positions=GridPositions(prefix=0, in_order=False, is_square=False)),
)
