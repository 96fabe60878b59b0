"""Random input for any model, by what its config says of vocabulary, pictures and sound."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

LOWEST_ID, HIGHEST_ID = 5, 99


def probe_inputs(model: Any, length: int = 48, seed: int = 0) -> dict[str, Tensor]:
    """Two rows for a stock model, by its `main_input_name`: of tokens, row 1 is padded on the right by a third.

    Raises:
        ValueError: the model takes something else than tokens, pictures or sound.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    place: dict[str, Any] = {"device": parameter.device}
    config, main = model.config, model.main_input_name
    vocabulary = min(HIGHEST_ID, getattr(config.get_text_config(), "vocab_size", None) or HIGHEST_ID)
    ids = torch.randint(min(LOWEST_ID, vocabulary - 1), vocabulary, (2, length), generator=generator).to(**place)
    mask = torch.ones_like(ids)
    mask[1, length - length // 3 :] = 0

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=parameter.device, dtype=parameter.dtype)

    inputs: dict[str, Tensor]
    if main == "input_ids":
        inputs = {"input_ids": ids, "attention_mask": mask}
    elif main == "pixel_values":
        channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 64)
        sides = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        inputs = {main: noise(2, channels, *sides)}
        if "spatial_shapes" in inspect.signature(model.forward).parameters:  # patches, of a grid for each picture
            shapes = torch.tensor([[4, 6], [4, 4]], device=parameter.device)
            real = (torch.arange(24, device=parameter.device) < shapes.prod(1, keepdim=True)).long()
            patches = noise(2, 24, channels * config.patch_size**2)
            inputs = {main: patches, "pixel_attention_mask": real, "spatial_shapes": shapes}
    elif main == "input_features":
        inputs = {main: noise(2, _channels(config), 2 * getattr(config, "max_source_positions", 60))}
    elif main == "input_values":
        inputs = {main: noise(2, 16000)}
    else:
        raise ValueError(f"{type(model).__name__} takes {main}: no input is known that could prove a conversion.")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, : max(length // 2, 1)]
    return inputs


def _channels(config: Any) -> int:
    names = ("num_mel_bins", "input_feat_per_channel", "feature_size", "feature_projection_input_dim")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 80)


def token_outputs(output: Any) -> Tensor:
    """The logits or last hidden states of a model's output, without what is no tensor."""
    logits = getattr(output, "logits", None)
    found: Tensor = logits if isinstance(logits, Tensor) else output[0]
    return found


def real_part(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """`output` at the tokens that are not padding, where it has an entry per token; else all of it."""
    mask = inputs.get("attention_mask", inputs.get("pixel_attention_mask"))
    if mask is None or "decoder_input_ids" in inputs or output.dim() < 3 or output.shape[:2] != mask.shape:
        return output
    return output[mask.bool()]
