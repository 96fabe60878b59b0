"""Public tools for tests of mechanisms and families, here and elsewhere: tiny models, inputs, closeness with names."""

from hf_efficient.testing.check import check_family
from hf_efficient.testing.sizes import VOCABULARY
from hf_efficient.testing.tiny import BERT_LIKE, FAMILIES, T5_LIKE, TINY, assert_close, inputs_for, tiny_model

__all__ = [
    "BERT_LIKE",
    "FAMILIES",
    "T5_LIKE",
    "TINY",
    "VOCABULARY",
    "assert_close",
    "check_family",
    "inputs_for",
    "tiny_model",
]
