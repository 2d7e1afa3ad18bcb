"""Builds the parts of a distiller: from its config, or from two detectors that are built already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from torch import nn

from gkd_d2.config import YacsSpec, architecture_key, detector_config, method_title, teacher_spec
from gkd_d2.config.differences import flattened
from gkd_d2.config.spec import EXTRA_HEADS
from gkd_d2.methods import Method, build_method, keys_without_effect
from gkd_d2.modeling.class_map import are_the_same, map_classes, student_class_names, warn_of_unknown_classes
from gkd_d2.modeling.initialize import copy_heads, warn_of_other_heads
from gkd_d2.modeling.pairing import channels_swapped, check_classes, check_pair, pair_levels
from gkd_d2.modeling.responses import check_responses
from gkd_d2.modeling.split import split_detector
from gkd_d2.modeling.summary import Summary
from gkd_d2.modeling.teacher import build_teacher
from gkd_d2.modeling.trainer_keys import TrainerKeys
from gkd_d2.utils.user_modules import import_modules


def build_parts(cfg: CfgNode) -> dict:
    """Build the method, the student, then the teacher, and check that they belong together.

    Args:
        cfg: of a distiller.

    Returns:
        The arguments of :class:`gkd_d2.GKDDistiller`.

    Raises:
        ValueError: an option is out of range, a name is not registered, or teacher and student do not match.
        CheckpointError: the teacher's checkpoint can't be read, or leaves a parameter unset.
    """
    # In a script of the user's own, whose config read_config has not read.
    import_modules(cfg.GKD.IMPORTS, "GKD.IMPORTS")
    method = build_method(cfg)
    ours = YacsSpec(detector_config(cfg), architecture_key(cfg))
    theirs = teacher_spec(cfg)
    # Masks and keypoints are loaded only where the config that trains, the student's, detects them.
    unlabelled = theirs.heads_beyond(ours.heads)
    teacher_classes = list(cfg.GKD.TEACHER.CLASSES)
    student = ours.build()
    parts = join(
        student,
        theirs.without(unlabelled).build,
        cfg.GKD.TEACHER.WEIGHTS,
        method,
        method_name=method_title(cfg),
        features=cfg.GKD.FEATURES,
        teacher_features=cfg.GKD.TEACHER.FEATURES,
        classes=student_class_names(ours.train_sets) if teacher_classes else (),
        teacher_classes=teacher_classes,
        init_from_teacher=cfg.GKD.STUDENT.INIT_FROM_TEACHER,
        warmup_iters=cfg.GKD.WARMUP_ITERS,
        proposals=cfg.GKD.TEACHER.PROPOSALS,
        one_pass=cfg.GKD.ONE_PASS,
        seed=max(cfg.SEED, 0),
        swap_channels=channels_swapped(ours.image_format, theirs.image_format),
        teacher_file=cfg.GKD.TEACHER.CONFIG_FILE,
        weights=f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}",
        left_out=unlabelled,
        unused=keys_without_effect(method, dict(flattened(cfg)), cfg.GKD.RATIOS),
    )
    check_classes(split_detector(student), ours, theirs, cfg.DATASETS.TEST, teacher_classes)
    return {**parts, "trainer_keys": TrainerKeys.from_config(cfg)}


def join(
    student: nn.Module,
    make_teacher: Callable[[], nn.Module],
    teacher_weights: str,
    method: Method,
    *,
    method_name: str,
    features: Sequence[str],
    teacher_features: Sequence[str],
    classes: Sequence[str],
    teacher_classes: Sequence[str],
    init_from_teacher: bool,
    warmup_iters: int,
    proposals: int,
    one_pass: bool,
    seed: int,
    swap_channels: bool,
    teacher_file: str,
    weights: str,
    left_out: Sequence[str],
    unused: Sequence[str],
) -> dict:
    """Build a student's teacher, load it, and check that the two belong together.

    Args:
        student: as built.
        make_teacher: makes the teacher, with random weights.
        teacher_weights: its checkpoint.
        method: of distillation.
        method_name: as the config names it; of several, their names with " + " between them.
        features: see GKD.FEATURES.
        teacher_features: see GKD.TEACHER.FEATURES.
        classes: names of the student's classes, where ``teacher_classes`` are given.
        teacher_classes: see GKD.TEACHER.CLASSES.
        init_from_teacher: see GKD.STUDENT.INIT_FROM_TEACHER.
        warmup_iters: see GKD.WARMUP_ITERS.
        proposals: see GKD.TEACHER.PROPOSALS.
        one_pass: see GKD.ONE_PASS.
        seed: >= 0, of all random streams beside the student's.
        swap_channels: see :class:`gkd_d2.modeling.teacher.FrozenTeacher`.
        teacher_file: what describes the teacher; empty where there is no such file.
        weights: what the student's training starts from, for the log.
        left_out: those of EXTRA_HEADS that the teacher is made without.
        unused: see :class:`Summary`.

    Returns:
        The arguments of :class:`gkd_d2.GKDDistiller`.

    Raises:
        ValueError: teacher and student do not match.
        CheckpointError: the teacher's checkpoint can't be read, or leaves a parameter unset.
    """
    if not teacher_weights:
        raise ValueError("GKD.TEACHER.WEIGHTS is empty: a teacher needs its checkpoint")
    split = split_detector(student)
    class_map = map_classes(classes, teacher_classes) if teacher_classes else None
    teacher = build_teacher(make_teacher, teacher_weights, seed, swap_channels=swap_channels, classes=class_map)
    check_pair(split, teacher.split, classes, teacher_classes)
    student_features, teacher_features = pair_levels(split, teacher.split, list(features), list(teacher_features))
    if method and method.needs_predictions:
        # Ahead of the heads to copy, which a pair that is refused has no use for.
        check_responses(method, split, teacher.split, zip(student_features, teacher_features), class_map)
    same_classes = are_the_same(class_map, teacher.split.num_classes)
    inherited = copy_heads(teacher.split, split, same_classes=same_classes) if init_from_teacher else []
    if inherited:
        warn_of_other_heads(teacher.split, split)
    if class_map is not None:
        warn_of_unknown_classes(classes, teacher_classes, class_map)
    return {
        "student": student,
        "teacher": teacher,
        "student_features": student_features,
        "teacher_features": teacher_features,
        "method": method,
        "warmup_iters": warmup_iters,
        "proposals": proposals,
        "one_pass": one_pass,
        "seed": seed,
        "announce": Summary(
            method_name=method_name,
            method=method,
            warmup_iters=warmup_iters,
            student=split,
            teacher=teacher.split,
            pairs=list(zip(student_features, teacher_features)),
            classes=class_map,
            source=teacher_weights + (f", described by {teacher_file}" if teacher_file else ""),
            weights=weights,
            inherited=inherited,
            left_out=[EXTRA_HEADS[head] for head in left_out],
            unused=list(unused),
        ),
    }
