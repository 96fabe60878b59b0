"""What training a converted model needs beside the stock Trainer: callbacks."""

from .callbacks import RedrawFeatures

__all__ = ["RedrawFeatures"]
