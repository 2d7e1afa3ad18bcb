"""What a resumed run takes over: its seed, and what its checkpoint tells of the run that wrote it."""

from __future__ import annotations

import hashlib
import os

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from gkd_d2.config import DISTILLER, config_differences, teacher_config, with_absolute_teacher
from gkd_d2.utils.config_merge import read_yaml

# Keys that may change at a resume without changing what is trained.
_IRRELEVANT = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.TEST",
    "TEST",
    "SOLVER.CHECKPOINT_PERIOD",
    "VIS_PERIOD",
    "GKD.VIS_PERIOD",
    "GKD.WATCH_PERIOD",
    "GKD.WATCH_PATIENCE",
    "GKD.WATCH_MAX_RATIO",
    "GKD.KITTI_RESULTS",
    "GKD.IMPORTS",
)
# Nodes of a teacher's config that say how it was trained, or what the student's config says for both.
_IRRELEVANT_OF_TEACHER = (*_IRRELEVANT, "CUDNN_BENCHMARK", "DATALOADER", "DATASETS", "GKD", "INPUT", "SEED", "SOLVER")
_COUNTS = ("number of processes", "number of images")


class ResumeError(RuntimeError):
    """A checkpoint can't be resumed with the config of the run."""


def settle_seed(cfg: CfgNode, *, resume: bool) -> CfgNode:
    """Draw a seed where SEED is negative, for all processes alike; a resumed run keeps the one it had.

    Args:
        cfg: of the run; its OUTPUT_DIR/config.yaml names the seed of the run that is resumed.
        resume: whether a run in OUTPUT_DIR is resumed.

    Returns:
        A frozen config whose SEED is >= 0.

    Raises:
        ResumeError: OUTPUT_DIR/config.yaml is damaged, or no config.
    """
    if cfg.SEED >= 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = comm.shared_random_seed()
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if resume and os.path.isfile(path):
        cfg.SEED = _seed_of(path)
    # The main process writes the file anew soon after.
    comm.synchronize()
    cfg.freeze()
    return cfg


def _seed_of(path: str) -> int:
    """SEED of the config of an earlier start."""
    try:
        seed = read_yaml(path)["SEED"]
        if isinstance(seed, int) and seed >= 0:
            return seed
        reason = f"{path}: SEED is {seed!r}, but must be a whole number >= 0"
    except (KeyError, TypeError):
        reason = f"{path} holds no SEED"
    except ValueError as error:
        reason = str(error)
    raise ResumeError(f"{reason}. The run draws its seed, and can't be resumed without the one it had: set SEED to it")


def describe_run(cfg: CfgNode, images: int) -> dict:
    """What decides what a run trains, and in which order, as strings and numbers for a checkpoint.

    Args:
        cfg: of the run; of a distiller the teacher's files are read.
        images: number of images in the training set.
    """
    run = {
        "config": with_absolute_teacher(cfg).dump(),
        "number of processes": comm.get_world_size(),
        "number of images": images,
    }
    if cfg.MODEL.META_ARCHITECTURE == DISTILLER:
        run["teacher"] = {"config": teacher_config(cfg).dump(), "sha256": _checksum(cfg.GKD.TEACHER.WEIGHTS)}
    return run


def run_differences(was: dict, now: dict) -> dict[str, str]:
    """Key -> what one run has and what another has instead, in words.

    A teacher's files are compared by their content and not by their places, where both runs know it.

    Args:
        was: from :func:`describe_run`; "teacher" may be absent.
        now: the same of the other run.
    """
    before, after = (CfgNode.load_cfg(run["config"]) for run in (was, now))
    found = config_differences(before, after, _IRRELEVANT)
    found.update({key: (was[key], now[key]) for key in _COUNTS if was[key] != now[key]})
    teachers = [run["teacher"] for run in (was, now) if "teacher" in run]
    if len(teachers) == 2:
        found.pop("GKD.TEACHER.CONFIG_FILE", None)
        nodes = (CfgNode.load_cfg(teacher["config"]) for teacher in teachers)
        for key, values in config_differences(*nodes, _IRRELEVANT_OF_TEACHER).items():
            found[f"{key} of GKD.TEACHER.CONFIG_FILE"] = values
        found.pop("GKD.TEACHER.WEIGHTS", None)
        sums = [teacher["sha256"] for teacher in teachers]
        if sums[0] != sums[1]:
            found["GKD.TEACHER.WEIGHTS"] = tuple(
                f"{cfg.GKD.TEACHER.WEIGHTS} with SHA-256 {checksum[:12]}..."
                for cfg, checksum in zip((before, after), sums)
            )
    return {key: f"{key} was {there} and is {here}" for key, (there, here) in found.items()}


def _checksum(path: str) -> str:
    """SHA-256 of a file; of a URL, that of its copy in Detectron2's cache."""
    digest = hashlib.sha256()
    with open(PathManager.get_local_path(path), "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
