"""The plain detectors that a distiller's config describes: the student and its teacher."""

from __future__ import annotations

import contextlib
import os

from detectron2.config import CfgNode

from gkd_d2.config.keys import DISTILLER
from gkd_d2.config.lazy_spec import load_lazy_spec
from gkd_d2.config.read import file_of_model_zoo, merged_config
from gkd_d2.config.spec import DetectorSpec, YacsSpec


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


def without_backbone_weights(cfg: CfgNode) -> CfgNode:
    """A frozen copy whose backbone starts with no weights of its own, for a detector that a checkpoint sets whole."""
    cfg = cfg.clone()
    cfg.defrost()
    if "TIMM" in cfg.MODEL:
        cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.WEIGHTS = False, ""
    cfg.freeze()
    return cfg


def teacher_spec(cfg: CfgNode) -> DetectorSpec:
    """The teacher that GKD.TEACHER describes: by a config of yacs or by a LazyConfig, a ``.py`` file.

    A file that is found in no folder is looked for in Detectron2's model zoo. The modules in the GKD.IMPORTS of a
    config of yacs are imported; a ``.py`` file is run.

    Args:
        cfg: the distiller's config.

    Raises:
        ValueError: GKD.TEACHER.CONFIG_FILE or GKD.TEACHER.WEIGHTS is not set, the file is not a config, what
            GKD.TEACHER.OPTS change is not in it, or GKD.TEACHER.ROI_BATCH_SIZE is negative or for a teacher without ROI
            heads.
        FileNotFoundError: the config file does not exist.
        ImportError: a module in its GKD.IMPORTS raises an error.
    """
    path = _teacher_file(cfg)
    if path.endswith(".py"):
        with _naming_opts(cfg) as opts:
            spec = load_lazy_spec(path, opts).without_backbone_weights()
    else:
        spec = YacsSpec(_plain_teacher_config(cfg, path), file=path)
    return spec.with_proposals(cfg.GKD.TEACHER.ROI_BATCH_SIZE)


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The config of a teacher that :func:`teacher_spec` finds to be one of yacs.

    Args:
        cfg: the distiller's config.

    Returns:
        A frozen config of a plain detector on the student's device, with GKD.TEACHER.WEIGHTS as its weights.

    Raises:
        ValueError, FileNotFoundError, ImportError: as :func:`teacher_spec`.
    """
    return teacher_spec(cfg).cfg


def _plain_teacher_config(cfg: CfgNode, path: str) -> CfgNode:
    with _naming_opts(cfg) as opts:
        teacher = without_backbone_weights(detector_config(merged_config(path, opts, ())))
    teacher.defrost()
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher.MODEL.WEIGHTS = cfg.GKD.TEACHER.WEIGHTS
    # Its pictures would overwrite the student's.
    teacher.VIS_PERIOD = 0
    teacher.freeze()
    return teacher


def _teacher_file(cfg: CfgNode) -> str:
    for key in ("CONFIG_FILE", "WEIGHTS"):
        if not cfg.GKD.TEACHER[key]:
            raise ValueError(f"GKD.TEACHER.{key} is empty: a teacher needs its config file and its checkpoint")
    path = cfg.GKD.TEACHER.CONFIG_FILE
    if os.path.isfile(path):
        return path
    if (in_zoo := file_of_model_zoo(path)) is not None:
        return in_zoo
    raise FileNotFoundError(
        f"GKD.TEACHER.CONFIG_FILE is {path!r}, which is no file. A relative path is looked for in the working "
        f"folder, {os.getcwd()}, then, where gkd_d2.config.read_config reads the config, in the folder of the "
        "file that sets the key, and then in Detectron2's model zoo: give the config the teacher was trained with"
    )


@contextlib.contextmanager
def _naming_opts(cfg: CfgNode):
    """GKD.TEACHER.OPTS as text, as on a command line; an error says that the fault may be theirs."""
    opts = [str(part) for part in cfg.GKD.TEACHER.OPTS]
    try:
        yield opts
    except ValueError as error:
        if not opts:
            raise
        raise ValueError(f"with GKD.TEACHER.OPTS {opts}: {error}") from error
