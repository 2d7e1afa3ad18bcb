"""What a study consists of: its YAML file, and the trainings that follow from it."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path

import yaml
from detectron2.config import CfgNode

from gkd_d2.config import read_config
from gkd_d2.methods import build_method
from gkd_d2.runs import HEADLINE, Run, config_differences

# A training's place and hardware, and how it is stopped and resumed, do not change what it teaches.
_IRRELEVANT = (
    "OUTPUT_DIR",
    "GKD.TEACHER.WEIGHTS",
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
)
_NAME = re.compile(r"[\w.+-]+")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """How the teacher of a detector is trained.

    Attributes:
        config: its config file.
        options: keys and values that override it.
    """

    config: str
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Detector:
    """A pair of networks.

    Attributes:
        config: config file of the distiller; without losses it trains the student alone.
        teacher: trained first.
        options: keys and values that override ``config`` in all settings.
    """

    config: str
    teacher: Teacher
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to train the student.

    Attributes:
        options: keys and values that override the detector's config.
        tune: whether the scale of its weights is chosen on the tuning seeds.
        scale_of: the setting whose chosen scale it takes over.
        scale: what its weights are multiplied by beside the chosen scale.
        baseline: the setting that its gain is over; "": the study's first.
        detectors: names of the detectors it is for; empty: all.
    """

    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    tune: bool = False
    scale_of: str = ""
    scale: float = 1.0
    baseline: str = ""
    detectors: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How scales of weights are chosen: by the mean AP of trainings with seeds that are not reported.

    Attributes:
        seeds: none of the study's.
        scales: what all weights of a setting are multiplied by.
    """

    seeds: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        folder: its OUTPUT_DIR.
        config_file: of ``tools/train_net.py``.
        options: KEY VALUE pairs that override it.
    """

    folder: Path
    config_file: str
    options: tuple[str, ...]

    @property
    def run(self) -> Run:
        """What is in its folder."""
        return Run(self.folder.name, self.folder)

    def config(self) -> CfgNode:
        """The whole config."""
        return read_config(self.config_file, list(self.options))

    def done(self, dataset: str) -> bool:
        """Whether it has ended and was evaluated.

        Raises:
            ValueError: the folder holds another training.
        """
        if not (self.folder / "config.yaml").is_file():
            return False
        config = self.config()
        different = config_differences(self.run.config, config, _IRRELEVANT)
        if different:
            listed = "; ".join(f"{key} {there!r} there, {here!r} here" for key, (there, here) in different.items())
            raise ValueError(
                f"{self.folder} holds a training that the study does not describe (any more): {listed}. Delete the "
                "folder, or give the study another --output"
            )
        if not (self.folder / "model_final.pth").is_file() or self.run.iterations() < config.SOLVER.MAX_ITER:
            return False
        return bool(self.run.curve(self.run.prefix(dataset) + HEADLINE))

    def metrics(self, dataset: str) -> dict[str, float]:
        """The metrics of its last evaluation, in percent; 0 for what Detectron2 gives none of: without detections."""
        return {name: 0.0 if math.isnan(value) else value for name, value in self.run.metrics(dataset).items()}


@dataclasses.dataclass(frozen=True)
class Study:
    """Several detectors, each trained in several settings with several seeds.

    Attributes:
        title: heading of the report.
        dataset: name of the validation set that the report is about.
        detectors: name -> pair of networks.
        settings: name -> setting; the first is the baseline, the student alone.
        seeds: reported.
        prepare: a tool of tools/ with arguments, that makes the data.
        options: keys and values that override the configs of all students.
        tuning: of weights.
        output: folder of all its runs.
    """

    title: str
    dataset: str
    detectors: Mapping[str, Detector]
    settings: Mapping[str, Setting]
    seeds: tuple[int, ...]
    output: Path
    prepare: tuple[str, ...] = ()
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    tuning: Tuning = Tuning()

    def __post_init__(self):
        names = [*self.detectors, *self.settings]
        bad = [name for name in names if not _NAME.fullmatch(name) or name == "teacher"]
        if bad:
            raise ValueError(f"{bad[0]!r} is no name of a folder: use letters, digits, '_', '.', '+' and '-'")
        for field in ("detectors", "settings", "seeds"):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty")
        for config in (file for pair in self.detectors.values() for file in (pair.config, pair.teacher.config)):
            if not Path(config).is_file():
                raise ValueError(f"{config} is no file: name configs relative to the working folder")
        for name, setting in self.settings.items():
            self._check_setting(name, setting)
        shared = set(self.seeds) & set(self.tuning.seeds)
        if shared:
            raise ValueError(f"tuning.seeds: {shared.pop()} is one of the reported seeds, too")
        if any(setting.tune for setting in self.settings.values()) and not (self.tuning.seeds and self.tuning.scales):
            raise ValueError("a setting is to be tuned, but tuning.seeds or tuning.scales is empty")

    def _check_setting(self, name: str, setting: Setting) -> None:
        for field, other in (("scale_of", setting.scale_of), ("baseline", setting.baseline)):
            if other and other not in self.settings:
                raise ValueError(f"settings.{name}.{field}: there is no setting {other}")
        if setting.scale_of and not self.settings[setting.scale_of].tune:
            raise ValueError(f"settings.{name}.scale_of: {setting.scale_of} is not tuned")
        unknown = set(setting.detectors) - set(self.detectors)
        if unknown:
            raise ValueError(f"settings.{name}.detectors: there is no detector {unknown.pop()}")
        if setting.scale <= 0:
            raise ValueError(f"settings.{name}.scale is {setting.scale}, but must be > 0")

    def settings_of(self, detector: str) -> dict[str, Setting]:
        """Name -> setting, of those that are for a detector."""
        return {name: s for name, s in self.settings.items() if not s.detectors or detector in s.detectors}

    def teacher_job(self, detector: str) -> Job:
        """The training of a detector's teacher."""
        teacher = self.detectors[detector].teacher
        folder = self.output / detector / "teacher"
        return Job(folder, teacher.config, (*_pairs(teacher.options), "OUTPUT_DIR", str(folder)))

    def tuning_jobs(self, detector: str, name: str) -> dict[float, list[Job]]:
        """Scale -> trainings by which a setting's scale is chosen; empty where none is."""
        if not self.settings[name].tune:
            return {}
        return {
            scale: [self._job(detector, name, scale, seed) for seed in self.tuning.seeds]
            for scale in self.tuning.scales
        }

    def chosen_scale(self, detector: str, name: str) -> float:
        """The scale of the highest mean AP on the tuning seeds; 1 where a setting's weights are not tuned.

        Raises:
            ValueError: the tuning trainings are not all there.
        """
        jobs = self.tuning_jobs(detector, self.settings[name].scale_of or name)
        means = {
            scale: statistics.fmean(job.metrics(self.dataset)[HEADLINE] for job in some) for scale, some in jobs.items()
        }
        return max(means, key=means.__getitem__, default=1.0)

    def student_jobs(self, detector: str, name: str) -> dict[int, Job]:
        """Seed -> the reported training.

        Raises:
            ValueError: the scale of its weights is not chosen yet.
        """
        scale = self.chosen_scale(detector, name) * self.settings[name].scale
        return {seed: self._job(detector, name, scale, seed) for seed in self.seeds}

    def _job(self, detector: str, name: str, scale: float, seed: int) -> Job:
        pair, setting = self.detectors[detector], self.settings[name]
        options = _pairs({**pair.options, **self.options, **setting.options})
        teacher = self.teacher_job(detector).folder / "model_final.pth"
        folder = self.output / detector / name / f"weights_x{scale:g}" / f"seed_{seed}"
        place = ("SEED", str(seed), "GKD.TEACHER.WEIGHTS", str(teacher), "OUTPUT_DIR", str(folder))
        weights = _scaled_weights(pair.config, options, scale)
        return Job(folder, pair.config, (*options, *weights, *place))


def read_study(path: Path, output: Path) -> Study:
    """Read a study.

    Args:
        path: of the YAML file, whose keys are the attributes of :class:`Study`.
        output: folder of all its runs.

    Raises:
        ValueError: what is wrong in it.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        detectors = {
            name: _build(Detector, f"detectors.{name}", {**fields, "teacher": _build(Teacher, name, fields["teacher"])})
            for name, fields in data.pop("detectors").items()
        }
        settings = {name: _build(Setting, f"settings.{name}", v or {}) for name, v in data.pop("settings").items()}
        tuning = _build(Tuning, "tuning", data.pop("tuning", {}))
        return _build(Study, "study", {**data, "detectors": detectors, "settings": settings, "tuning": tuning}, output)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _build(kind: type, place: str, fields: Mapping, *output: Path):
    """A dataclass of what stands at a place of the file."""
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = set(fields) - known
    if unknown:
        raise ValueError(f"{place}: unknown key {unknown.pop()}; there are {', '.join(sorted(known - {'output'}))}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if output:
        values["output"] = output[0]
    return kind(**values)


def _pairs(options: Mapping[str, object]) -> list[str]:
    return [text for key, value in options.items() for text in (key, str(value))]


def _scaled_weights(config_file: str, options: list[str], scale: float) -> list[str]:
    """The weights of a config's method, multiplied."""
    if scale == 1.0:
        return []
    terms = build_method(read_config(config_file, options)).terms.values()
    return [text for term in terms for text in (term.key, str(scale * term.weight))]
