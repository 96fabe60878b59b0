"""Tiny models of every architecture, their inputs, closeness with names."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_efficient.families.probe import probe_inputs
from hf_efficient.testing.sizes import LEFT_OUT, VOCABULARY, tiny_sizes

BERT_LIKE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    bos_token_id=0,
    eos_token_id=2,
)
# inner width 4 · 8 = 32 differs from d_model, as in T5-small's relatives
T5_LIKE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    d_model=40,
    d_kv=8,
    d_ff=48,
    num_heads=4,
    dropout_rate=0.0,
    decoder_start_token_id=0,
    relative_attention_max_distance=24,
    relative_attention_num_buckets=16,
)
# model_type: (config class, model class, sizes, name of the number of layers)
TINY: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertConfig", "BertForMaskedLM", BERT_LIKE | {"pad_token_id": 0}, "num_hidden_layers"),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", BERT_LIKE | {"pad_token_id": 1}, "num_hidden_layers"),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForMaskedLM", BERT_LIKE | {"pad_token_id": 1}, "num_hidden_layers"),
    "camembert": ("CamembertConfig", "CamembertForMaskedLM", BERT_LIKE | {"pad_token_id": 1}, "num_hidden_layers"),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        ),
        "n_layer",
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5_LIKE, "num_layers"),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", T5_LIKE, "num_layers"),
    "umt5": ("UMT5Config", "UMT5ForConditionalGeneration", T5_LIKE, "num_layers"),
}
FAMILIES = ("bert", "roberta", "gpt2", "t5")
LARGEST = 3e7
"""Parameters of a tiny model at most."""


def tiny_model(model_type: str, *, layers: int = 2, positions: int = 128, seed: int = 0, **overrides: Any) -> Any:
    """A random model of a few thousand parameters in eval mode, fp32, with weights large enough that attention matters.

    Args:
        model_type: a key of `TINY`, or any other that transformers has a model for, which gets sizes by the usual names of
            its config's fields. positions: usable positions (ignored by T5). overrides: further config fields.

    Raises:
        ValueError: no model of that type, or one that is not tiny with these sizes.
    """
    if model_type not in TINY:
        return _tiny_by_names(model_type, layers, positions, seed, overrides)
    config_name, model_name, sizes, layers_name = TINY[model_type]
    sizes = sizes | {layers_name: layers} | overrides
    if not model_type.endswith("t5"):
        offset = sizes["pad_token_id"] + 1 if model_type not in ("bert", "gpt2") else 0
        sizes["n_positions" if model_type == "gpt2" else "max_position_embeddings"] = positions + offset
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**sizes))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            # T5 does not scale its logits
            nn.init.normal_(parameter, std=0.1 if "SelfAttention.q" in name or "SelfAttention.k" in name else 0.25)
    return model.eval()


def _tiny_by_names(model_type: str, layers: int, positions: int, seed: int, overrides: dict[str, Any]) -> Any:
    config_class = transformers.CONFIG_MAPPING[model_type]
    failure: Exception | None = None
    for left_out in LEFT_OUT:
        sizes = tiny_sizes(config_class, positions + 4, left_out)
        sizes = {name: layers if "layers" in name else size for name, size in sizes.items()} | overrides
        try:
            model = random_model(config_class(**sizes), seed)
            with torch.no_grad():
                model(**probe_inputs(model, 8))
            return model
        except Exception as error:
            failure = failure or error
    raise ValueError(f"no tiny model of {model_type}: {type(failure).__name__}: {failure}") from failure


def random_model(config: Any, seed: int = 0) -> Any:
    """A random model of a config's first of these classes: with two stacks, for masked or causal text, any.

    Raises:
        ValueError: there is none, or it has more than `LARGEST` parameters.
    """
    config_class = type(config)
    heads = ("ForSeq2SeqLM", "ForSpeechSeq2Seq", "ForMaskedLM", "ForCausalLM", "")
    autos = (getattr(transformers, f"AutoModel{head}") for head in heads)
    found: Any = next(
        (auto._model_mapping.get(config_class, None) for auto in autos if config_class in auto._model_mapping), None
    )
    if found is None:
        raise ValueError("no Auto class has a model for it")
    cls = found[0] if isinstance(found, tuple) else found
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters with the usual names of sizes")
    torch.manual_seed(seed)
    model = cls(config).eval()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # computed by a formula
            continue
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
        elif "sink" in name:
            nn.init.normal_(parameter, std=2.0)
        elif not torch.isfinite(parameter).all() or parameter.abs().max() > 1e3:
            nn.init.ones_(parameter)
    return model


def inputs_for(
    model: Any, batch: int = 3, length: int = 97, *, padded: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """Random input of one forward pass; row 1 is padded on the right and row 2 on the left when `padded`.

    Encoder-decoder models get decoder inputs of the same length and padding.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded and batch > 1:
        mask[1, length - length // 3 :] = 0
    if padded and batch > 2:
        mask[2, : length // 4] = 0
    pad = model.config.pad_token_id if model.config.pad_token_id is not None else 0
    ids = torch.where(mask.bool(), ids, pad)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
        inputs["decoder_attention_mask"] = mask
    return inputs


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float, what: str = "result", where: Tensor | None = None
) -> None:
    """Largest difference ≤ tolerance × largest expected magnitude, over the rows where `where` (B, N) is True.

    Raises:
        AssertionError: naming `what`, the relative difference and the tolerance; also for NaN and for different shapes.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert not actual.isnan().any(), f"{what}: NaN"
    if where is not None:
        actual, expected = actual[where.bool()], expected[where.bool()]
    assert actual.numel(), f"{what}: nothing to compare"
    scale = expected.abs().max().clamp(min=1e-30)
    difference = ((actual - expected).abs().max() / scale).item()
    assert difference <= tolerance, f"{what}: relative difference {difference:.2e} > {tolerance:.0e}"
