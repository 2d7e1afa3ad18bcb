"""The config node GKD and what follows from it."""

from gkd_d2.config.detectors import (
    architecture_key,
    detector_architecture,
    detector_config,
    teacher_config,
    teacher_spec,
    without_backbone_weights,
)
from gkd_d2.config.differences import config_differences
from gkd_d2.config.keys import DISTILLER, add_gkd_config
from gkd_d2.config.method_names import method_names, method_title
from gkd_d2.config.read import read_config, read_distiller_config, with_absolute_teacher
from gkd_d2.config.spec import DetectorSpec, YacsSpec

__all__ = [
    "DISTILLER",
    "DetectorSpec",
    "YacsSpec",
    "add_gkd_config",
    "architecture_key",
    "config_differences",
    "detector_architecture",
    "detector_config",
    "method_names",
    "method_title",
    "read_config",
    "read_distiller_config",
    "teacher_config",
    "teacher_spec",
    "with_absolute_teacher",
    "without_backbone_weights",
]
