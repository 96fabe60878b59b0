"""Attention pooling as a module of sentence-transformers: what stands in place of its mean over tokens."""

from __future__ import annotations

from typing import Any

from sentence_transformers.base.modules import Module
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from hf_efficient.attention.base.pooling import PoolingByMultiheadAttention


class AttentionPooling(Module):
    """One seed of `PoolingByMultiheadAttention` reads (B, N, hidden_size) token embeddings into (B, hidden_size).

    Sentence-transformers loads modules that are not its own, such as this one, with `trust_remote_code=True` only.
    """

    config_keys = ["hidden_size", "num_heads"]  # noqa: RUF012  # as every module there declares it

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.pooling = PoolingByMultiheadAttention(hidden_size, num_heads)

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        pooled = self.pooling(features["token_embeddings"], features["attention_mask"])
        return features | {"sentence_embedding": pooled[:, 0]}

    def get_embedding_dimension(self) -> int:
        return self.hidden_size

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> AttentionPooling:  # type: ignore[override]
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        place = {name: kwargs[name] for name in names if name in kwargs}
        model = cls(**cls.load_config(model_name_or_path, **place))
        cls.load_torch_weights(model_name_or_path, model=model, **place)
        return model


def pool_by_attention(encoder: Any, num_heads: int) -> None:
    """Put attention in place of the mean over tokens of a SentenceTransformer, whose embeddings stay what they are at first.

    Raises:
        ValueError: it pools in another way, which attention would not start as.
    """
    pooling = encoder[1]
    if isinstance(pooling, AttentionPooling):
        return
    mode = pooling.pooling_mode if isinstance(pooling, Pooling) else type(pooling).__name__
    if mode != "mean":
        raise ValueError(f"pooling='attention' starts as the mean of tokens, but this checkpoint pools by {mode!r}.")
    encoder[1] = AttentionPooling(pooling.get_embedding_dimension(), num_heads).to(encoder.device)
