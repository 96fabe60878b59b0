"""Converted models in classes that others run, and checkpoints of those classes as converted models."""

from hf_efficient.exporting.export import TARGETS, export
from hf_efficient.exporting.import_checkpoint import import_checkpoint
from hf_efficient.exporting.report import EXPORT_NAME, ExportReport, ExportResult

__all__ = ["EXPORT_NAME", "TARGETS", "ExportReport", "ExportResult", "export", "import_checkpoint"]
