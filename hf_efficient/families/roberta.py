"""RoBERTa and its relatives: BERT whose first real position is row padding_idx + 1."""

from hf_efficient.families.bert import POSITION_BUFFERS, TABLE, BertFamily
from hf_efficient.families.positions import TableAfterPadding


class RobertaFamily(BertFamily):
    """Without `position_ids`, positions count tokens that are not padding."""

    positions_skip_padding = True


FAMILIES = tuple(
    RobertaFamily(
        model_type=model_type,
        stack_classes=(f"{prefix}Model",),
        attention_classes=(f"{prefix}SelfAttention",),
        positions=TableAfterPadding(TABLE, POSITION_BUFFERS),
        embeddings_module="embeddings",
        layers_module="encoder",
    )
    for model_type, prefix in (("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert"))
)
