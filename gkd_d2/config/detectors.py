"""The plain detectors that a distiller's config describes: the student and its teacher."""

from __future__ import annotations

import os

from detectron2.config import CfgNode

from gkd_d2.config.keys import DISTILLER
from gkd_d2.config.read import merged_config


def architecture_key(cfg: CfgNode) -> str:
    """The key that sets the meta-architecture of the detector that ``cfg`` trains: see :func:`detector_config`."""
    return "GKD.STUDENT.META_ARCHITECTURE" if cfg.MODEL.META_ARCHITECTURE == DISTILLER else "MODEL.META_ARCHITECTURE"


def detector_architecture(cfg: CfgNode) -> str:
    """The meta-architecture of the detector that ``cfg`` trains, as :func:`architecture_key` sets it; may be empty."""
    return (
        cfg.GKD.STUDENT.META_ARCHITECTURE if cfg.MODEL.META_ARCHITECTURE == DISTILLER else cfg.MODEL.META_ARCHITECTURE
    )


def detector_config(cfg: CfgNode) -> CfgNode:
    """The config of the plain detector that ``cfg`` trains: of the student where ``cfg`` is a distiller's.

    Returns:
        A frozen copy whose MODEL.META_ARCHITECTURE is the detector's own.

    Raises:
        ValueError: GKD.STUDENT.META_ARCHITECTURE is not set.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == DISTILLER:
        if cfg.GKD.STUDENT.META_ARCHITECTURE in ("", DISTILLER):
            raise ValueError(
                f"GKD.STUDENT.META_ARCHITECTURE is {cfg.GKD.STUDENT.META_ARCHITECTURE!r}: set it to the student's "
                "meta-architecture, GeneralizedRCNN or RetinaNet"
            )
        cfg.MODEL.META_ARCHITECTURE = cfg.GKD.STUDENT.META_ARCHITECTURE
    cfg.freeze()
    return cfg


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's config, read from GKD.TEACHER.CONFIG_FILE; the modules in its GKD.IMPORTS are imported.

    Args:
        cfg: the distiller's config.

    Returns:
        A frozen config of a plain detector on the student's device, with GKD.TEACHER.WEIGHTS as its weights.

    Raises:
        ValueError: GKD.TEACHER.CONFIG_FILE or GKD.TEACHER.WEIGHTS is not set, the file is not a config, or
            GKD.TEACHER.ROI_BATCH_SIZE is negative or for a teacher without ROI heads.
        FileNotFoundError: the config file does not exist.
        ImportError: a module in its GKD.IMPORTS raises an error.
    """
    for key in ("CONFIG_FILE", "WEIGHTS"):
        if not cfg.GKD.TEACHER[key]:
            raise ValueError(f"GKD.TEACHER.{key} is empty: a teacher needs its config file and its checkpoint")
    path = cfg.GKD.TEACHER.CONFIG_FILE
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"GKD.TEACHER.CONFIG_FILE is {path!r}, which is no file. A relative path is looked for in the working "
            f"folder, {os.getcwd()}, and then, where gkd_d2.config.read_config reads the config, in the folder of the "
            "file that sets the key: give the config the teacher was trained with"
        )
    teacher = detector_config(merged_config(path, [], ()))
    teacher.defrost()
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher.MODEL.WEIGHTS = cfg.GKD.TEACHER.WEIGHTS
    if proposals := cfg.GKD.TEACHER.ROI_BATCH_SIZE:
        if proposals < 0:
            raise ValueError(f"GKD.TEACHER.ROI_BATCH_SIZE is {proposals}, but must be >= 0")
        if teacher.MODEL.META_ARCHITECTURE == "RetinaNet":
            raise ValueError(
                f"GKD.TEACHER.ROI_BATCH_SIZE is {proposals}, but {path} describes a RetinaNet, which samples no "
                "proposals: leave it at 0"
            )
        teacher.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = proposals
    # Its pictures would overwrite the student's.
    teacher.VIS_PERIOD = 0
    teacher.freeze()
    return teacher
