"""Which levels a teacher and a student share, and the refusal of pairs that do not match."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from gkd_d2.config import DetectorSpec
from gkd_d2.config.spec import EXTRA_HEADS
from gkd_d2.data.classes import known_class_names
from gkd_d2.modeling.class_map import check_number_of_classes, check_teachers_datasets
from gkd_d2.modeling.split import SplitDetector
from gkd_d2.utils.text import counted, listed


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


def check_pair(
    student: SplitDetector,
    teacher: SplitDetector,
    classes: Sequence[str] = (),
    teacher_classes: Sequence[str] = (),
) -> None:
    """Refuse a teacher that detects other things than the student, or whose losses a batch of the student's can't give.

    Args:
        student: the student.
        teacher: the teacher, without those of EXTRA_HEADS that the student lacks.
        classes: names of the student's classes, where ``teacher_classes`` are given.
        teacher_classes: GKD.TEACHER.CLASSES; empty: both have the same classes.

    Raises:
        ValueError: the number of classes or of the images' channels differs, or the number of names from that of the
            classes; or the teacher's losses need what the student's batches do not hold.
    """
    if teacher_classes:
        check_number_of_classes(teacher_classes, teacher.num_classes)
        if len(classes) != student.num_classes:
            raise ValueError(
                f"the student detects {counted(student.num_classes, 'class', 'classes')}, but the names of its classes "
                f"are {len(classes)}, {listed(classes)}: give it as many"
            )
    elif student.num_classes != teacher.num_classes:
        raise ValueError(
            f"the student detects {counted(student.num_classes, 'class', 'classes')}, the teacher "
            f"{teacher.num_classes}: a teacher must be trained on the student's classes, or all of its classes be "
            "named in GKD.TEACHER.CLASSES"
        )
    channels = [len(getattr(split.model, "pixel_mean", ())) for split in (student, teacher)]
    if channels[0] != channels[1] and all(channels):
        raise ValueError(
            f"the student's images have {counted(channels[0], 'channel')}, the teacher's {channels[1]} (the number of "
            "values in MODEL.PIXEL_MEAN, or pixel_mean), but they see one batch"
        )
    if _takes_proposals(teacher) and not _takes_proposals(student):
        raise ValueError(
            "the teacher has no proposal generator and takes proposals with the images (MODEL.LOAD_PROPOSALS), which "
            "the student's batches do not hold: load them for the student too, or choose a teacher with an RPN"
        )
    for head, truth in EXTRA_HEADS.items():
        if _has_head(teacher, head) and not _has_head(student, head):
            raise ValueError(
                f"the teacher's {type(teacher.model.roi_heads).__name__} learns from {truth}, although its config does "
                f"not say so, and the student does not detect {truth}, so that none are loaded: give the student a "
                f"{head} head, or choose a teacher without"
            )


def check_classes(
    student: SplitDetector,
    spec: DetectorSpec,
    teacher: DetectorSpec,
    test_sets: Sequence[str],
    teacher_classes: Sequence[str] = (),
) -> None:
    """Refuse datasets of other classes than the detectors', and a teacher of other classes than the student's.

    Args:
        student: as built.
        spec: of the student.
        teacher: of the teacher.
        test_sets: names of the student's datasets for evaluation.
        teacher_classes: GKD.TEACHER.CLASSES; empty: both have the same classes.

    Raises:
        ValueError: as far as they are known, the number or the names of the classes differ.
    """
    for dataset in dict.fromkeys([*spec.train_sets, *test_sets]):
        names = known_class_names(dataset)
        if names is not None and len(names) != student.num_classes:
            raise ValueError(
                f"the student detects {counted(student.num_classes, 'class', 'classes')}, but dataset {dataset} has "
                f"{counted(len(names), 'class', 'classes')} ({listed(names)}): give it as many, or take other datasets"
            )
    if teacher_classes:
        check_teachers_datasets(teacher_classes, teacher.train_sets)
    else:
        check_class_names(spec.train_sets, teacher.train_sets)


def check_class_names(train_sets: Sequence[str], teacher_sets: Sequence[str]) -> None:
    """Refuse a teacher that was trained on other classes, as far as the names of both are known.

    Names may differ in case. Datasets that are not registered or whose files are not there are left out: a teacher may
    come from elsewhere.

    Args:
        train_sets: the student's training sets.
        teacher_sets: the teacher's.

    Raises:
        ValueError: two of them have different classes or another order of them.
    """
    ours, theirs = (
        {dataset: names for dataset in datasets if (names := known_class_names(dataset))}
        for datasets in (train_sets, teacher_sets)
    )
    for (dataset, names), (other, other_names) in itertools.product(ours.items(), theirs.items()):
        if [name.casefold() for name in names] != [name.casefold() for name in other_names]:
            raise ValueError(
                f"the student's dataset {dataset} has the classes {listed(names, 100)}, the teacher's {other} has "
                f"{listed(other_names, 100)}: a teacher must be trained on the student's classes, in their order, or "
                "all of its classes be named in GKD.TEACHER.CLASSES. Where they are the same classes under other "
                "names, let the teacher's config name no training set"
            )


def channels_swapped(student: str, teacher: str) -> bool:
    """Whether a teacher takes RGB images where the student takes BGR, or the other way round.

    Args:
        student: the order of the channels of the student's images, as "BGR".
        teacher: that of the teacher's.

    Raises:
        ValueError: they differ otherwise.
    """
    if student != teacher and {student, teacher} != {"RGB", "BGR"}:
        raise ValueError(
            f"the student is given images in {student}, which can't be made into the teacher's {teacher}: the order of "
            "channels is INPUT.FORMAT, or image_format of a mapper, and must be the same, or RGB and BGR"
        )
    return student != teacher


def _takes_proposals(detector: SplitDetector) -> bool:
    return getattr(detector.model, "proposal_generator", detector) is None


def _has_head(detector: SplitDetector, head: str) -> bool:
    """Whether it has one of EXTRA_HEADS."""
    return bool(getattr(getattr(detector.model, "roi_heads", None), f"{head}_on", False))


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
