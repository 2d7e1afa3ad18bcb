"""The student of a run for where it is used: stock Detectron2, TorchScript and ONNX."""

from gkd_d2.export.errors import ExportError
from gkd_d2.export.pictures import pictures_in, read_picture, sample_pictures
from gkd_d2.export.write import Forms, export_student

__all__ = ["ExportError", "Forms", "export_student", "pictures_in", "read_picture", "sample_pictures"]
