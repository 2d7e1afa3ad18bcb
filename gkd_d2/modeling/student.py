"""The plain detector that a config trains: of a distiller its student, without a teacher."""

from __future__ import annotations

import logging
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

from gkd_d2.config import architecture_key, detector_config, without_backbone_weights
from gkd_d2.utils.checkpoint import AverageCheckpointer, CompleteCheckpointer, holds_average
from gkd_d2.utils.finite import check_finite
from gkd_d2.utils.last_checkpoint import find_resumable
from gkd_d2.utils.registries import build_detector


def build_student(cfg: CfgNode) -> nn.Module:
    """Build the detector on the CPU, in eval mode, with random weights.

    Args:
        cfg: of a distiller or of a plain detector.

    Raises:
        ValueError: a name in ``cfg`` is not registered.
    """
    plain = without_backbone_weights(detector_config(cfg))
    plain.defrost()
    plain.MODEL.DEVICE = "cpu"
    return build_detector(plain, architecture_key(cfg)).eval()


def load_student(cfg: CfgNode, weights: Path, *, ema: bool = False) -> nn.Module:
    """Build the detector on the CPU, in eval mode, and load all of it.

    Args:
        cfg: of a distiller or of a plain detector.
        weights: a checkpoint, or a folder whose last one is taken, with a warning where ``last_checkpoint`` names none.
        ema: whether its averaged weights are loaded, in place of the raw ones; see :func:`has_ema`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: the file is no checkpoint, or leaves a part of the detector unset, or holds no averaged weights
            where ``ema`` is set.
        ValueError: a name in ``cfg`` is not registered, or a tensor holds infinite or NaN values.
    """
    path = find_checkpoint(weights)
    if weights.is_dir() and (warning := find_resumable(str(weights)).warning):
        logging.getLogger(__name__).warning("%s", warning)
    model = build_student(cfg)
    reader = AverageCheckpointer if ema else CompleteCheckpointer
    part = "the averaged weights (MODEL_EMA) of " if ema else ""
    reader(model).load_weights(str(path), key="", detector=f"{part}the student of the config")
    check_finite(model, "the student's")
    return model


def has_ema(weights: Path) -> bool:
    """Whether a checkpoint holds averaged weights beside the raw ones; no tensor is read.

    Args:
        weights: a checkpoint, or a folder whose last one is taken.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    return holds_average(str(find_checkpoint(weights)))


def find_checkpoint(weights: Path) -> Path:
    """The file that ``weights`` names.

    Args:
        weights: a checkpoint, or a folder whose last one is taken.

    Raises:
        FileNotFoundError: there is none.
    """
    path = weights
    if weights.is_dir():
        found = find_resumable(str(weights))
        if not found.paths:
            fault = found.fault or f"{weights} holds no last_checkpoint"
            raise FileNotFoundError(f"{fault}: name a checkpoint, or the OUTPUT_DIR of a run")
        path = Path(found.last)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    return path
