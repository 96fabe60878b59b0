"""BERT: separate q, k, v projections, absolute positions from row 0."""

from .base import ModelFamily

POSITION_BUFFERS = (("position_ids", "arange"), ("token_type_ids", "zeros"))

FAMILIES = (
    ModelFamily(
        model_type="bert",
        stack_class="BertModel",
        attention_class="BertSelfAttention",
        position_table="embeddings.position_embeddings",
        position_buffers=POSITION_BUFFERS,
    ),
)
