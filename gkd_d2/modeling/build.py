"""Builds the parts of a distiller from its config."""

from __future__ import annotations

import functools

from detectron2.config import CfgNode

from gkd_d2.config import architecture_key, detector_config, teacher_config
from gkd_d2.methods import build_method
from gkd_d2.modeling.initialize import copy_heads, warn_of_other_heads
from gkd_d2.modeling.pairing import check_pair, pair_levels, without_unlabelled_heads
from gkd_d2.modeling.split import split_detector
from gkd_d2.modeling.summary import log_summary
from gkd_d2.modeling.teacher import build_teacher, swaps_channels
from gkd_d2.modeling.trainer_keys import TrainerKeys
from gkd_d2.utils.registries import build_detector
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
    student_cfg = detector_config(cfg)
    teacher_cfg, left_out = without_unlabelled_heads(teacher_config(cfg), student_cfg)
    swap_channels = swaps_channels(student_cfg.INPUT.FORMAT, teacher_cfg.INPUT.FORMAT)
    student = build_detector(student_cfg, architecture_key(cfg))
    split = split_detector(student)
    seed = max(cfg.SEED, 0)
    teacher = build_teacher(teacher_cfg, seed, swap_channels=swap_channels)
    check_pair(split, teacher.split, student_cfg, teacher_cfg)
    student_features, teacher_features = pair_levels(split, teacher.split, cfg.GKD.FEATURES, cfg.GKD.TEACHER.FEATURES)
    inherited = copy_heads(teacher.split, split) if cfg.GKD.STUDENT.INIT_FROM_TEACHER else []
    if inherited:
        warn_of_other_heads(student_cfg, teacher_cfg)
    pairs = list(zip(student_features, teacher_features))
    return {
        "student": student,
        "teacher": teacher,
        "student_features": student_features,
        "teacher_features": teacher_features,
        "method": method,
        "warmup_iters": cfg.GKD.WARMUP_ITERS,
        "one_pass": cfg.GKD.ONE_PASS,
        "seed": seed,
        "announce": functools.partial(
            log_summary, cfg, method, split, teacher.split, pairs, inherited=inherited, left_out=left_out
        ),
        "trainer_keys": TrainerKeys.from_config(cfg),
    }
