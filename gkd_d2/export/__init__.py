"""The student of a run for where it is used: stock Detectron2, and TorchScript."""

from gkd_d2.export.checkpoint import export_student
from gkd_d2.export.torchscript import ExportError, sample_image

__all__ = ["ExportError", "export_student", "sample_image"]
