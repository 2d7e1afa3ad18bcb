"""Which of several runs belong together: distilled students, their teachers, and the same students trained alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gkd_d2.analysis.runs import Run, architecture_of
from gkd_d2.config import config_differences, detector_config, teacher_config


def find_roles(runs: Sequence[Run]) -> dict[str, str]:
    """Run name -> "teacher", "student alone", "student distilled", or "" for a run that belongs to no distilled one."""
    roles = {run.name: "" for run in runs}
    distilled = [run for run in runs if run.distilled]
    for run in distilled:
        roles |= {baseline.name: "student alone" for baseline in find_baselines(run, runs)}
    for run in distilled:
        teacher = find_teacher(run, runs)
        if teacher is not None:
            roles[teacher.name] = "teacher"
    return roles | {run.name: "student distilled" for run in distilled}


def find_baselines(run: Run, runs: Sequence[Run]) -> list[Run]:
    """The runs that trained the student of a distilled run alone: their MODEL nodes are alike."""
    teacher = _named_teacher(run, runs)
    return [r for r in runs if r is not teacher and not r.distilled and r.architecture == run.architecture]


def find_teacher(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run that trained the teacher of a distilled run.

    It is the one whose folder holds GKD.TEACHER.WEIGHTS, else one of the architecture of GKD.TEACHER.CONFIG_FILE, else
    the largest that is larger than the student.
    """
    named = _named_teacher(run, runs)
    if named is not None:
        return named
    others = [r for r in runs if not r.distilled]
    # Runs of a LazyConfig are not compared.
    if os.path.isfile(path := run.config.GKD.TEACHER.CONFIG_FILE) and not path.endswith(".py"):
        architecture = architecture_of(teacher_config(run.config))
        alike = [r for r in others if r.architecture == architecture]
        if alike:
            return alike[0]
    larger = [r for r in others if r.parameters > run.parameters]
    return max(larger, key=lambda r: r.parameters, default=None)


def training_differences(run: Run, baseline: Run) -> dict[str, tuple]:
    """Key -> value in ``run`` and in ``baseline``, for what may explain a gain beside the distillation.

    The keys of GKD, the folder, the device, the loader's workers and how often is evaluated are left out.
    """
    ignored = ("GKD", "OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "TEST.EVAL_PERIOD", "VIS_PERIOD")
    return config_differences(detector_config(run.config), detector_config(baseline.config), ignored)


def _named_teacher(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run that wrote GKD.TEACHER.WEIGHTS."""
    folder = Path(run.config.GKD.TEACHER.WEIGHTS).resolve().parent
    return next((r for r in runs if not r.distilled and r.folder.resolve() == folder), None)
