"""Checks of a study as a whole, before it trains anything."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from detectron2.config import CfgNode

from gkd_d2.analysis.study.plan import Setting, Study
from gkd_d2.config import DISTILLER, method_title

# What the study, or the command line, gives each training.
_GIVEN = ("OUTPUT_DIR", "SEED", "GKD.TEACHER.WEIGHTS", "MODEL.DEVICE")
_NAME = re.compile(r"\w[\w.+-]*")


class StudyError(ValueError):
    """What is wrong with a study.

    Args:
        text: the message.
        place: the keys that lead to the value at fault; none where several do not fit together.
    """

    def __init__(self, text: str, *place: object):
        super().__init__(text)
        self.place = place


def check_study(study: Study) -> None:
    """Check that the values of a study fit together, and that its trainings have configs.

    Raises:
        StudyError: they do not.
    """
    _check_names(study)
    _check_options(study)
    _check_tuning(study)
    for name, setting in study.settings.items():
        _check_setting(study, name, setting)
    for detector in study.detectors:
        _check_configs(study, detector)


def _check_names(study: Study) -> None:
    for field in ("detectors", "settings"):
        for name in getattr(study, field):
            if not _NAME.fullmatch(name) or name == "teacher":
                text = f"{name!r} is no name of a folder here: use letters, digits, '_', '.', '+' and '-'"
                raise StudyError(text, field, name)
    for field in ("detectors", "settings", "seeds"):
        if not getattr(study, field):
            raise StudyError(f"{field} is empty", field)
    first, setting = next(iter(study.settings.items()))
    if setting.detectors:
        text = f"settings.{first}.detectors: the first setting is the baseline, and for all detectors"
        raise StudyError(text, "settings", first, "detectors")


def _check_options(study: Study) -> None:
    owners = {("options",): study.options}
    owners |= {("detectors", name, "options"): pair.options for name, pair in study.detectors.items()}
    owners |= {("settings", name, "options"): setting.options for name, setting in study.settings.items()}
    for place, options in owners.items():
        for key in _GIVEN:
            if key in options:
                raise StudyError(f"{'.'.join(place)}: {key} is given to each training by the study itself", *place, key)


def _check_tuning(study: Study) -> None:
    for place, seeds in ((("seeds",), study.seeds), (("tuning", "seeds"), study.tuning.seeds)):
        if min(seeds, default=0) < 0 or len(set(seeds)) < len(seeds):
            raise StudyError(f"{'.'.join(place)} is {list(seeds)}, but must be different numbers >= 0", *place)
    scales = study.tuning.scales
    if not all(0 < scale < math.inf for scale in scales) or len(set(scales)) < len(scales):
        text = f"tuning.scales is {list(scales)}, but must be different numbers > 0"
        raise StudyError(text, "tuning", "scales")
    shared = set(study.seeds) & set(study.tuning.seeds)
    if shared:
        raise StudyError(f"tuning.seeds: {shared.pop()} is one of the reported seeds, too")
    if any(setting.tune for setting in study.settings.values()) and not (study.tuning.seeds and scales):
        raise StudyError("a setting is to be tuned, but tuning.seeds or tuning.scales is empty")


def _check_setting(study: Study, name: str, setting: Setting) -> None:
    def fail(field: str, text: str) -> None:
        raise StudyError(f"settings.{name}{text}", "settings", name, field)

    unknown = set(setting.detectors) - set(study.detectors)
    if unknown:
        fail("detectors", f".detectors: there is no detector {unknown.pop()}")
    for field, other in (("scale_of", setting.scale_of), ("baseline", setting.baseline)):
        if other and other not in study.settings:
            fail(field, f".{field}: there is no setting {other}")
        absent = [d for d in study.detectors if name in study.settings_of(d) and other not in study.settings_of(d)]
        if other and absent:
            fail(field, f".{field}: {other} is not for the detector {absent[0]}, but {name} is")
    if setting.scale_of and setting.tune:
        fail("scale_of", ": its weights can't have both a scale of their own, tune, and scale_of another")
    if setting.scale_of and not study.settings[setting.scale_of].tune:
        fail("scale_of", f".scale_of: {setting.scale_of} is not tuned")
    if not 0 < setting.scale < math.inf:
        fail("scale", f".scale is {setting.scale}, but must be > 0")


def _check_configs(study: Study, detector: str) -> None:
    """Read all that a detector's trainings are configured by."""
    pair = study.detectors[detector]
    for file, *keys in ((pair.config, "config"), (pair.teacher.config, "teacher", "config")):
        if not Path(file).is_file():
            text = f"detectors.{detector}: {file} is no file: name configs relative to the working folder"
            raise StudyError(text, "detectors", detector, *keys)
    _check_config(study, f"detectors.{detector}.teacher", study.teacher_config, detector)
    for name, setting in study.settings_of(detector).items():
        place = f"settings.{name} of {detector}"
        cfg = _check_config(study, place, study.student_config, detector, name)
        if cfg.MODEL.META_ARCHITECTURE != DISTILLER:
            text = f"detectors.{detector}.config: MODEL.META_ARCHITECTURE of {pair.config} must be {DISTILLER}"
            raise StudyError(text, "detectors", detector, "config")
        try:
            weights = study.weights(detector, name)
        except (TypeError, ValueError) as error:
            raise StudyError(f"{place}: {error}") from None
        if not weights and (setting.tune or setting.scale_of or setting.scale != 1):
            raise StudyError(f"{place}: the method {method_title(cfg)} has no weights to scale")


def _check_config(study: Study, place: str, read: Callable[..., CfgNode], *names: str) -> CfgNode:
    """Read the config of a detector, or a setting of it, which has to be evaluated on the study's dataset."""
    try:
        cfg = read(*names)
    except (OSError, ValueError) as error:
        raise StudyError(f"{place}: {error}") from None
    if study.dataset not in cfg.DATASETS.TEST:
        evaluated = ", ".join(cfg.DATASETS.TEST) or "nothing"
        raise StudyError(f"dataset is {study.dataset}, but {place} is evaluated on {evaluated}")
    return cfg
