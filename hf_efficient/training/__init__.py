"""What training a converted model needs beside the stock Trainer: callbacks, checkpoints, collators, attention transfer."""

from .callbacks import (
    KeepRandomState,
    LogReconstruction,
    LogRouting,
    NonFiniteLoss,
    RedrawFeatures,
    StopOnNonFiniteLoss,
    UpdateCentroids,
)
from .checkpoints import CompleteCheckpoints, last_complete_checkpoint, load_state, save_state
from .collators import LanguageModelCollator, SeededCollator, SpanCorruptionCollator
from .memory import SegmentCollator, SegmentMemory, segment_rows
from .transfer import AttentionTransfer, KeepBest, TransferOutput, blocks, layer_errors, trainable

__all__ = [
    "AttentionTransfer",
    "CompleteCheckpoints",
    "KeepBest",
    "KeepRandomState",
    "LanguageModelCollator",
    "LogReconstruction",
    "LogRouting",
    "NonFiniteLoss",
    "RedrawFeatures",
    "SeededCollator",
    "SegmentCollator",
    "SegmentMemory",
    "SpanCorruptionCollator",
    "StopOnNonFiniteLoss",
    "TransferOutput",
    "UpdateCentroids",
    "blocks",
    "last_complete_checkpoint",
    "layer_errors",
    "load_state",
    "save_state",
    "segment_rows",
    "trainable",
]
