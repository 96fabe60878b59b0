"""What training a converted model needs beside the stock Trainer: callbacks, checkpoints, collators, attention transfer."""

from hf_efficient.training.callbacks import (
    KeepRandomState,
    LogRouting,
    MechanismCallback,
    NonFiniteLoss,
    StopOnNonFiniteLoss,
)
from hf_efficient.training.checkpoints import CompleteCheckpoints, last_complete_checkpoint, load_state, save_state
from hf_efficient.training.data.collators import LanguageModelCollator, SeededCollator, SpanCorruptionCollator
from hf_efficient.training.data.segments import SegmentCollator, SegmentMemory, segment_rows
from hf_efficient.training.transfer.attention_transfer import AttentionTransfer, TransferOutput, blocks, trainable
from hf_efficient.training.transfer.keep_best import KeepBest
from hf_efficient.training.transfer.layer_errors import layer_errors

__all__ = [
    "AttentionTransfer",
    "CompleteCheckpoints",
    "KeepBest",
    "KeepRandomState",
    "LanguageModelCollator",
    "LogRouting",
    "MechanismCallback",
    "NonFiniteLoss",
    "SeededCollator",
    "SegmentCollator",
    "SegmentMemory",
    "SpanCorruptionCollator",
    "StopOnNonFiniteLoss",
    "TransferOutput",
    "blocks",
    "last_complete_checkpoint",
    "layer_errors",
    "load_state",
    "save_state",
    "segment_rows",
    "trainable",
]
