"""What a resumed run takes over: its seed, and what its checkpoint tells of the run that wrote it."""

from __future__ import annotations

import functools
import hashlib
import operator
import os
from collections.abc import Sequence

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from gkd_d2.config import config_differences
from gkd_d2.engine.run import Run
from gkd_d2.utils.checkpoint import file_of_weights
from gkd_d2.utils.config_merge import read_yaml

# Keys that may change at a resume without changing what is trained, of configs of yacs and of LazyConfigs.
_IRRELEVANT = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "MODEL.DEVICE",
    "MODEL.TIMM.PRETRAINED",
    "MODEL.TIMM.WEIGHTS",
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
    "MODEL_EMA.DEVICE",
    "MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY",
    "train.output_dir",
    "train.init_checkpoint",
    "train.device",
    "train.checkpointer",
    "train.eval_period",
    "train.log_period",
    "train.vis_period",
    "train.watch",
    "train.model_ema.device",
    "train.model_ema.use_ema_weights_for_eval_only",
    "dataloader.train.num_workers",
    "dataloader.test",
    "dataloader.evaluator",
)
# Nodes of a teacher's config that say how it was trained, or what the student's config says for both.
_IRRELEVANT_OF_TEACHER = (
    *_IRRELEVANT,
    "CUDNN_BENCHMARK",
    "DATALOADER",
    "DATASETS",
    "GKD",
    "INPUT",
    "MODEL_EMA",
    "SEED",
    "SOLVER",
)
# Of a run's config: where its teacher's files are, and a copy of the teacher's config.
_PLACES_OF_TEACHER = (
    "GKD.TEACHER.CONFIG_FILE.",
    "GKD.TEACHER.OPTS.",
    "GKD.TEACHER.WEIGHTS.",
    "model.teacher.",
    "model.teacher_file.",
    "model.teacher_weights.",
)
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
    cfg.SEED = draw_seed(cfg.OUTPUT_DIR, ("SEED",), resume=resume)
    cfg.freeze()
    return cfg


def draw_seed(folder: str, place: Sequence[str], *, resume: bool) -> int:
    """A seed for all processes alike, or that of the run that is resumed.

    Args:
        folder: of the run; its config.yaml names the seed of the run that is resumed.
        place: the key of the seed there, node by node.
        resume: whether a run in ``folder`` is resumed.

    Raises:
        ResumeError: config.yaml is damaged, or no config.
    """
    seed = comm.shared_random_seed()
    path = os.path.join(folder, "config.yaml")
    if resume and os.path.isfile(path):
        seed = _seed_of(path, place)
    # The main process writes the file anew soon after.
    comm.synchronize()
    return seed


def _seed_of(path: str, place: Sequence[str]) -> int:
    """The seed in the config of an earlier start."""
    key = ".".join(place)
    try:
        seed = functools.reduce(operator.getitem, place, read_yaml(path))
        if isinstance(seed, int) and seed >= 0:
            return seed
        reason = f"{path}: {key} is {seed!r}, but must be a whole number >= 0"
    except (KeyError, TypeError):
        reason = f"{path} holds no {key}"
    except ValueError as error:
        reason = str(error)
    raise ResumeError(f"{reason}. The run draws its seed, and can't be resumed without the one it had: set {key} to it")


def describe_run(run: Run, images: int) -> dict:
    """What decides what a run trains, and in which order, as strings and numbers for a checkpoint.

    Args:
        run: as its config describes it; of a distilled one the teacher's files are read.
        images: number of images in the training set.
    """
    described = {
        "config": run.identity(),
        "number of processes": comm.get_world_size(),
        "number of images": images,
    }
    if run.distilled:
        teacher = run.teacher()
        described["teacher"] = {
            "config": teacher.spec.dump(),
            "key": teacher.key,
            "weights": teacher.weights,
            "sha256": _checksum(teacher.weights),
        }
    return described


def run_differences(was: dict, now: dict) -> dict[str, str]:
    """Key -> what one run has and what another has instead, in words.

    A teacher's files are compared by their content and not by their places, where both runs know it.

    Args:
        was: from :func:`describe_run`; "teacher" may be absent.
        now: the same of the other run.
    """
    found = config_differences(*(yaml.safe_load(run["config"]) for run in (was, now)), _IRRELEVANT)
    found.update({key: (was[key], now[key]) for key in _COUNTS if was[key] != now[key]})
    teachers = [run["teacher"] for run in (was, now) if "teacher" in run]
    if len(teachers) == 2:
        for key in [key for key in found if f"{key}.".startswith(_PLACES_OF_TEACHER)]:
            del found[key]
        nodes = (yaml.safe_load(teacher["config"]) for teacher in teachers)
        for key, values in config_differences(*nodes, _IRRELEVANT_OF_TEACHER).items():
            found[f"the teacher's {key}"] = values
        if teachers[0]["sha256"] != teachers[1]["sha256"]:
            found[teachers[1]["key"]] = tuple(
                f"{teacher['weights']} with SHA-256 {teacher['sha256'][:12]}..." for teacher in teachers
            )
    return {key: f"{key} was {there} and is {here}" for key, (there, here) in found.items()}


def _checksum(path: str) -> str:
    """SHA-256 of a file; of a URL, that of its copy in Detectron2's cache."""
    digest = hashlib.sha256()
    with open(PathManager.get_local_path(file_of_weights(path)), "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
