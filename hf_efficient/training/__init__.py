"""What training a converted model needs beside the stock Trainer: callbacks, checkpoints, collators, attention transfer."""

from .callbacks import KeepRandomState, NonFiniteLoss, RedrawFeatures, StopOnNonFiniteLoss
from .checkpoints import CompleteCheckpoints, last_complete_checkpoint, load_state, save_state
from .collators import LanguageModelCollator, SeededCollator, SpanCorruptionCollator
from .transfer import AttentionTransfer, KeepBest, TransferOutput, blocks, layer_errors, trainable

__all__ = [
    "AttentionTransfer",
    "CompleteCheckpoints",
    "KeepBest",
    "KeepRandomState",
    "LanguageModelCollator",
    "NonFiniteLoss",
    "RedrawFeatures",
    "SeededCollator",
    "SpanCorruptionCollator",
    "StopOnNonFiniteLoss",
    "TransferOutput",
    "blocks",
    "last_complete_checkpoint",
    "layer_errors",
    "load_state",
    "save_state",
    "trainable",
]
