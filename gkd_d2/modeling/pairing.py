"""Which levels a teacher and a student share, and the refusal of pairs that do not match."""

from __future__ import annotations

import itertools

from detectron2.config import CfgNode
from torch import Tensor

from gkd_d2.data.classes import known_class_names
from gkd_d2.modeling.split import SplitDetector
from gkd_d2.utils.text import counted, listed

# Key of MODEL -> the ground truth that its head learns from, beside boxes.
_LABELLED = {"MASK_ON": "masks", "KEYPOINT_ON": "keypoints"}


def pair_levels(
    student: SplitDetector, teacher: SplitDetector, student_levels: list[str], teacher_levels: list[str]
) -> tuple[list[str], list[str]]:
    """The levels to distil, as the student and the teacher name them.

    Args:
        student: the student.
        teacher: the teacher.
        student_levels: GKD.FEATURES; empty: the levels that the heads of both networks use, by stride, without
            max-pooled copies of other levels.
        teacher_levels: GKD.TEACHER.FEATURES; empty: the same names as the student's.

    Returns:
        Two lists of equal length.

    Raises:
        ValueError: a level does not exist, is not used by a head, or its strides differ; or there is none.
    """
    if not student_levels and teacher_levels:
        raise ValueError("GKD.TEACHER.FEATURES is set, so GKD.FEATURES must name the student's level for each of them")
    if not student_levels:
        shared = student.head_features() & teacher.head_features()
        shared -= student.pooled_features() | teacher.pooled_features()
        student_levels = sorted(shared, key=lambda name: student.output_shape()[name].stride)
        if not student_levels:
            raise ValueError(
                f"the student's heads use {_names(student)}, the teacher's {_names(teacher)}: they share no level; "
                "set GKD.FEATURES and GKD.TEACHER.FEATURES"
            )
    teacher_levels = list(teacher_levels or student_levels)
    if len(teacher_levels) != len(student_levels):
        raise ValueError(
            f"GKD.FEATURES has {counted(len(student_levels), 'level')}, {', '.join(student_levels)}, but "
            f"GKD.TEACHER.FEATURES has {len(teacher_levels)}, {', '.join(teacher_levels)}"
        )
    for key, detector, levels in (
        ("GKD.FEATURES", student, student_levels),
        ("GKD.TEACHER.FEATURES", teacher, teacher_levels),
    ):
        if len(set(levels)) != len(levels):
            raise ValueError(f"{key} names a level twice: {', '.join(levels)}")
        absent = [name for name in levels if name not in detector.head_features()]
        if absent:
            raise ValueError(f"{key} names {', '.join(absent)}, but the heads use {_names(detector)} only")
    for ours, theirs in zip(student_levels, teacher_levels):
        strides = student.output_shape()[ours].stride, teacher.output_shape()[theirs].stride
        if strides[0] != strides[1]:
            raise ValueError(
                f"the student's {ours} has stride {strides[0]}, the teacher's {theirs} has stride {strides[1]}: "
                "pair levels of equal stride by GKD.FEATURES and GKD.TEACHER.FEATURES"
            )
    return list(student_levels), teacher_levels


def without_unlabelled_heads(teacher_cfg: CfgNode, cfg: CfgNode) -> tuple[CfgNode, list[str]]:
    """Leave those heads out of a teacher that could not be given their ground truth.

    Detectron2 loads masks and keypoints for a batch only where the config that trains, the student's, detects them.

    Args:
        teacher_cfg: the teacher's config.
        cfg: the student's config.

    Returns:
        A frozen copy of the teacher's config, and what it no longer detects: "masks", "keypoints".
    """
    teacher_cfg = teacher_cfg.clone()
    teacher_cfg.defrost()
    left_out = [key for key in _LABELLED if teacher_cfg.MODEL[key] and not cfg.MODEL[key]]
    for key in left_out:
        teacher_cfg.MODEL[key] = False
    teacher_cfg.freeze()
    return teacher_cfg, [_LABELLED[key] for key in left_out]


def check_pair(student: SplitDetector, teacher: SplitDetector, cfg: CfgNode, teacher_cfg: CfgNode) -> None:
    """Refuse a teacher that detects other things, needs other inputs, or sees other pictures, than the student.

    Args:
        student: the student.
        teacher: the teacher.
        cfg: the student's config.
        teacher_cfg: the teacher's config.

    Raises:
        ValueError: the number of classes differs between the two or from that of the student's datasets, as far as it
            is known; the names of classes or the number of channels of the image differ; or the teacher's
            losses need what the student's batches do not hold.
    """
    if student.num_classes != teacher.num_classes:
        raise ValueError(
            f"the student detects {counted(student.num_classes, 'class', 'classes')}, the teacher "
            f"{teacher.num_classes}: a teacher must be trained on the student's classes"
        )
    for dataset in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        names = known_class_names(dataset)
        if names is not None and len(names) != student.num_classes:
            raise ValueError(
                f"the student and the teacher detect {counted(student.num_classes, 'class', 'classes')}, but dataset "
                f"{dataset} has {counted(len(names), 'class', 'classes')} ({listed(names)}): give both detectors its "
                "classes, or take other datasets"
            )
    check_class_names(cfg, teacher_cfg)
    if teacher_cfg.MODEL.LOAD_PROPOSALS and not cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is True for the teacher and False for the student, so that the teacher would get no "
            "proposals: set it and DATASETS.PROPOSAL_FILES_TRAIN for the student, or choose a teacher with an RPN"
        )
    for key, kind in _LABELLED.items():
        if not cfg.MODEL[key] and getattr(getattr(teacher.model, "roi_heads", None), key.lower(), False):
            raise ValueError(
                f"the teacher's {type(teacher.model.roi_heads).__name__} learns from {kind} although its MODEL.{key} "
                f"is False, and the student's MODEL.{key} is False, so that no {kind} are loaded: set it for the "
                "student, or choose a teacher without them"
            )
    ours, theirs = len(cfg.MODEL.PIXEL_MEAN), len(teacher_cfg.MODEL.PIXEL_MEAN)
    if ours != theirs:
        raise ValueError(
            f"the number of values in MODEL.PIXEL_MEAN is {ours} for the student and {theirs} for the teacher, but "
            "they see one batch"
        )


def check_class_names(cfg: CfgNode, teacher_cfg: CfgNode) -> None:
    """Refuse a teacher that was trained on other classes, as far as the names of both are known.

    Names may differ in case. Datasets that are not registered or whose files are not there are left out: a teacher may
    come from elsewhere.

    Args:
        cfg: the student's config.
        teacher_cfg: the teacher's config.

    Raises:
        ValueError: of DATASETS.TRAIN of both, two datasets have different classes or another order of them.
    """
    ours, theirs = (
        {dataset: names for dataset in config.DATASETS.TRAIN if (names := known_class_names(dataset))}
        for config in (cfg, teacher_cfg)
    )
    for (dataset, names), (other, other_names) in itertools.product(ours.items(), theirs.items()):
        if [name.casefold() for name in names] != [name.casefold() for name in other_names]:
            raise ValueError(
                f"the student's dataset {dataset} has the classes {listed(names, 100)}, the teacher's {other} has "
                f"{listed(other_names, 100)}: a teacher must be trained on the student's classes, in their order. "
                "Where they are the same classes under other names, set DATASETS.TRAIN to () in the teacher's config"
            )


def _names(detector: SplitDetector) -> str:
    return ", ".join(sorted(detector.head_features()))


def check_trained(features: dict[str, Tensor], levels: list[str]) -> None:
    """Check that a loss of the student's features would train it.

    Args:
        features: level name -> N,C,H,W, from the student's backbone.
        levels: names of the distilled ones.

    Raises:
        RuntimeError: a level carries no gradient.
    """
    for name in levels:
        if not features[name].requires_grad:
            raise RuntimeError(
                f"the student's {name} carries no gradient, so the distillation losses would teach nothing: "
                "is the student's whole backbone frozen?"
            )


def check_sizes(levels: list[str], student: list[Tensor], teacher: list[Tensor]) -> None:
    """Check that the features of a batch can be compared cell by cell.

    Args:
        levels: the student's names of the distilled levels.
        student: its features, N,C,H,W a level.
        teacher: the teacher's.

    Raises:
        RuntimeError: they differ in height or width.
    """
    for name, ours, theirs in zip(levels, student, teacher):
        if ours.shape[2:] != theirs.shape[2:]:
            raise RuntimeError(
                f"the student's {name} is {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)} (N,C,H,W) for "
                "one batch: the two networks pad or downsample differently and can't be paired"
            )
