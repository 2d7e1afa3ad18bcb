"""What a run needs of its datasets is looked at before anything is built."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from gkd_d2.config import DISTILLER
from gkd_d2.data.builtin import check_datasets
from gkd_d2.data.classes import class_names, known_class_names, largest_category
from gkd_d2.evaluation.coco_evaluation import check_coco_ground_truth
from gkd_d2.pairing import check_class_names
from gkd_d2.text import counted, listed

# The node of MODEL that holds NUM_CLASSES; other meta-architectures are known once they are built.
_CLASS_NODES = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "RetinaNet": "RETINANET"}


def dataset_problems(cfg: CfgNode, *, eval_only: bool) -> list[str]:
    """What is wrong with the datasets of a run: absent, of other classes than the model, impossible to evaluate.

    Test sets are loaded once, so that a fault in them is not found after the training.

    Args:
        cfg: the config of the run, a distiller's or a plain detector's.
        eval_only: whether it only evaluates.

    Returns:
        A sentence for each problem.
    """
    used = list(dict.fromkeys([*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]))
    if not used or not (eval_only or cfg.DATASETS.TRAIN):
        return [f"DATASETS.{'TEST' if eval_only else 'TRAIN'} is empty: there is no data to use"]
    problems = _absent(used)
    if problems:
        return problems
    problems = [
        f"DATASETS.TEST names {name}: {reason}"
        for name in dict.fromkeys(cfg.DATASETS.TEST)
        if (reason := _unusable_for_tests(cfg, name))
    ]
    distilled = cfg.MODEL.META_ARCHITECTURE == DISTILLER
    architecture = cfg.GKD.STUDENT.META_ARCHITECTURE if distilled else cfg.MODEL.META_ARCHITECTURE
    problems += _other_classes(cfg, architecture, used)
    return problems or _other_order(cfg)


def teacher_class_problems(cfg: CfgNode, teacher: CfgNode) -> list[str]:
    """Where a teacher's classes are not those of the student's datasets or of its own.

    The teacher's own datasets need not be registered or there.

    Args:
        cfg: the distiller's config.
        teacher: the teacher's config.

    Returns:
        A sentence for each problem.
    """
    architecture, file = teacher.MODEL.META_ARCHITECTURE, cfg.GKD.TEACHER.CONFIG_FILE
    ours = [name for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]) if known_class_names(name)]
    own = [name for name in dict.fromkeys(teacher.DATASETS.TRAIN) if known_class_names(name) and name not in ours]
    problems = [
        *_other_classes(teacher, architecture, ours, file, "take a teacher that was trained on the student's classes"),
        *_other_classes(teacher, architecture, own, file, "both must be as in the teacher's training"),
    ]
    if problems:
        return problems
    try:
        check_class_names(cfg, teacher)
    except ValueError as error:
        return [str(error)]
    return []


def _absent(names: Iterable[str]) -> list[str]:
    problems = []
    broken: dict[str, list[str]] = {}
    for name in names:
        try:
            check_datasets([name])
        except (KeyError, OSError) as error:
            # Training and test set often lie in one folder, whose absence is said once.
            reason = error.args[0] if isinstance(error, KeyError) else str(error)
            broken.setdefault(reason, []).append(name)
            continue
        # Datasets in COCO's form that Detectron2 or the user registered.
        metadata = MetadataCatalog.get(name)
        for key in ("json_file", "image_root"):
            path = metadata.get(key)
            if path and not PathManager.exists(path):
                problems.append(f"DATASETS names {name}, whose {key} {path} does not exist: put it there")
    return problems + [f"DATASETS names {', '.join(names)}: {reason}" for reason, names in broken.items()]


def _unusable_for_tests(cfg: CfgNode, name: str) -> str:
    """Why a test set can't be loaded or evaluated, or nothing."""
    metadata = MetadataCatalog.get(name)
    try:
        if metadata.get("evaluator_type", "coco") == "coco":
            check_coco_ground_truth(name, masks=cfg.MODEL.MASK_ON, keypoints=cfg.MODEL.KEYPOINT_ON)
        elif metadata.evaluator_type == "kitti":
            DatasetCatalog.get(name)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _other_classes(
    cfg: CfgNode, architecture: str, names: Iterable[str], file: str = "", remedy: str = ""
) -> Iterator[str]:
    """A sentence for each dataset that has not as many classes as a detector; ``file`` is of its config."""
    node = _CLASS_NODES.get(architecture)
    if node is None:
        return
    number = cfg.MODEL[node].NUM_CLASSES
    setting = f"MODEL.{node}.NUM_CLASSES{f' of {file}' if file else ''} is {number}"
    for name in names:
        try:
            classes = class_names(name)
            highest = largest_category(name) if classes is None else None
        # A loader of the user's own may raise anything.
        except Exception as error:
            yield f"DATASETS names {name}, whose classes can't be read: {type(error).__name__}: {error}"
            continue
        if classes is not None and len(classes) != number:
            found = f"{counted(len(classes), 'class', 'classes')} ({listed(classes)})"
            yield f"{setting}, but dataset {name} has {found}: {remedy or f'set it to {len(classes)}'}"
        elif highest is not None and highest >= number:
            found = f"annotations of category_id {highest}, counted from 0"
            yield f"{setting}, but dataset {name} has {found}: {remedy or f'set it to at least {highest + 1}'}"


def _other_order(cfg: CfgNode) -> list[str]:
    """Where one class has different numbers in two datasets, of which the second is evaluated wrongly."""
    problems = []
    for trained, tested in itertools.product(dict.fromkeys(cfg.DATASETS.TRAIN), dict.fromkeys(cfg.DATASETS.TEST)):
        ours, theirs = ([name.casefold() for name in known_class_names(d) or ()] for d in (trained, tested))
        moved = [name for name in theirs if name in ours and ours.index(name) != theirs.index(name)]
        if moved:
            problems.append(
                f"class {moved[0]} is number {ours.index(moved[0])} of the training set {trained}, but number "
                f"{theirs.index(moved[0])} of the test set {tested}: give both the same classes in the same order; in "
                "COCO's form the ids of the categories decide the order"
            )
    return problems
