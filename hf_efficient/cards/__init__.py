"""The model card of a checkpoint, from what was recorded of it."""
