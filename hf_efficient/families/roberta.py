"""RoBERTa and its relatives: BERT whose first real position is row padding_idx + 1."""

from transformers import PreTrainedConfig

from hf_efficient.families.bert import POSITION_BUFFERS, BertFamily


class RobertaFamily(BertFamily):
    """Positions count from `pad_token_id + 1`: the rows up to there belong to padding."""

    def position_offset(self, config: PreTrainedConfig) -> int:
        return config.pad_token_id + 1


FAMILIES = tuple(
    RobertaFamily(
        model_type=model_type,
        stack_class=f"{prefix}Model",
        attention_class=f"{prefix}SelfAttention",
        position_table="embeddings.position_embeddings",
        position_buffers=POSITION_BUFFERS,
        embeddings_module="embeddings",
        layers_module="encoder",
    )
    for model_type, prefix in (("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert"))
)
