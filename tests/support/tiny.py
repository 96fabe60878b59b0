"""Tiny checkpoints and tokenizers on disk, for tests of what happens outside the attention layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import hf_efficient as he
from hf_efficient.testing import VOCABULARY, tiny_model

# special tokens by id, as the tiny configs of hf_efficient.testing have them; every other id n is the word "w<n>"
SPECIALS: dict[str, dict[str, tuple[str, int]]] = {
    "bert": {
        "pad_token": ("[PAD]", 0),
        "unk_token": ("[UNK]", 1),
        "cls_token": ("[CLS]", 2),
        "sep_token": ("[SEP]", 3),
        "mask_token": ("[MASK]", 4),
    },
    "roberta": {
        "cls_token": ("<s>", 0),
        "pad_token": ("<pad>", 1),
        "sep_token": ("</s>", 2),
        "unk_token": ("<unk>", 3),
        "mask_token": ("<mask>", 4),
    },
    "gpt2": {
        "bos_token": ("<s>", 0),
        "pad_token": ("<pad>", 1),
        "eos_token": ("</s>", 2),
        "unk_token": ("<unk>", 3),
    },
    "t5": {"pad_token": ("<pad>", 0), "eos_token": ("</s>", 1), "unk_token": ("<unk>", 2)},
}


def tiny_tokenizer(family: str, max_length: int = 128) -> Any:
    """Splits at spaces; "w7" is token 7."""
    specials = SPECIALS[family]
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    for token, index in specials.values():
        del vocabulary[f"w{index}"]
        vocabulary[token] = index
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=specials["unk_token"][0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "cls_token" in specials:
        cls, sep = specials["cls_token"], specials["sep_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls[0]} $A {sep[0]}", pair=f"{cls[0]} $A {sep[0]} $B {sep[0]}", special_tokens=[cls, sep]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        **{name: token for name, (token, _) in specials.items()},
    )


def words(count: int, start: int = 0) -> str:
    """A text of `count` tokens."""
    return " ".join(f"w{10 + (start + 7 * i) % 80}" for i in range(count))


def save_source(path: Path, family: str, **options: Any) -> Path:
    """An original tiny checkpoint with its tokenizer; options as for `tiny_model`."""
    tiny_model(family, **options).save_pretrained(path)
    tiny_tokenizer(family, options.get("positions", 128)).save_pretrained(path)
    return path


def converted(path: Path, family: str, mechanism: str = "longformer", max_positions: int = 256, **options: Any) -> Any:
    """A converted tiny checkpoint with tokenizer, by default windows of 8 and the first token global."""
    if mechanism == "longformer":
        options = {"attention_window": 8, "global_tokens": "first"} | options
    source = tiny_model(family)
    result = he.convert(
        source, mechanism, max_positions=max_positions, tokenizer=tiny_tokenizer(family.split("-")[-1]), **options
    )
    result.save(path)
    return path
