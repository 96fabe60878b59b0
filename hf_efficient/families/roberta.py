"""RoBERTa and its relatives: BERT whose first real position is row padding_idx + 1."""

from transformers import PreTrainedConfig

from hf_efficient.families.bert import POSITION_BUFFERS, BertFamily
from hf_efficient.families.stack import Stack


class RobertaFamily(BertFamily):
    """Positions count from `padding_idx + 1`: the rows up to there belong to padding.

    The embeddings take `padding_idx` from `config.pad_token_id` when they are made, and keep it.
    """

    positions_skip_padding = True

    def position_offset(self, config: PreTrainedConfig) -> int:
        if config.pad_token_id is None:
            raise ValueError(
                f"pad_token_id=None: {self.model_type} counts positions from it; set it to the id of the padding token."
            )
        return config.pad_token_id + 1

    def first_position(self, stack: Stack) -> int:
        embeddings = stack.module.get_submodule(self.embeddings_module or "")
        return int(embeddings.padding_idx) + 1  # type: ignore[arg-type]


FAMILIES = tuple(
    RobertaFamily(
        model_type=model_type,
        stack_classes=(f"{prefix}Model",),
        attention_classes=(f"{prefix}SelfAttention",),
        position_table="embeddings.position_embeddings",
        position_buffers=POSITION_BUFFERS,
        embeddings_module="embeddings",
        layers_module="encoder",
    )
    for model_type, prefix in (("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert"))
)
