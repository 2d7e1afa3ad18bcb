"""What a study consists of: its YAML file, and the trainings that follow from it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import statistics
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

from detectron2.config import CfgNode

from gkd_d2.analysis.runs import HEADLINE, Run
from gkd_d2.config import DISTILLER, config_differences, read_config
from gkd_d2.methods import build_method
from gkd_d2.utils.config_merge import read_yaml

# A training's place, hardware and imports, and how it is stopped and resumed, do not change what it teaches. What the
# teacher's config file says is compared in the teacher's own training.
_IRRELEVANT = (
    "OUTPUT_DIR",
    "GKD.TEACHER.WEIGHTS",
    "GKD.TEACHER.CONFIG_FILE",
    "GKD.IMPORTS",
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
)
# What the study, or the command line, gives each training.
_GIVEN = ("OUTPUT_DIR", "SEED", "GKD.TEACHER.WEIGHTS", "MODEL.DEVICE")
_NAME = re.compile(r"\w[\w.+-]*")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """How the teacher of a detector is trained.

    Attributes:
        config: its config file, the same that ``GKD.TEACHER.CONFIG_FILE`` of the distiller's names.
        options: keys and values that override it, as of its schedule; not of its network.
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
        baseline: a setting that its gain is told over, beside that over the study's first.
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


@dataclasses.dataclass
class Job:
    """One training.

    Attributes:
        folder: its OUTPUT_DIR.
        config_file: of ``tools/train_net.py``.
        options: KEY VALUE pairs that override it.
        dataset: name of the validation set that it is to be evaluated on.
    """

    folder: Path
    config_file: str
    options: tuple[str, ...]
    dataset: str
    _finished: Run | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    @functools.cached_property
    def config(self) -> CfgNode:
        """The whole config."""
        return read_config(self.config_file, list(self.options))

    def finished(self) -> Run | None:
        """What it left in its folder; None before it has ended and was evaluated.

        Raises:
            ValueError: the folder holds another training, or a file in it is damaged.
        """
        if self._finished is None:
            self._finished = self._look()
        return self._finished

    def _look(self) -> Run | None:
        run = Run(self.folder.name, self.folder)
        # One that failed before its first checkpoint left nothing to go on with, and nothing to mix up.
        if not run.has_checkpoint:
            return None
        distils = self.config.MODEL.META_ARCHITECTURE == DISTILLER
        # Of a teacher's training the defaults of GKD may have changed since.
        different = config_differences(run.config, self.config, _IRRELEVANT if distils else (*_IRRELEVANT, "GKD"))
        if different:
            listed = "; ".join(f"{key} {there!r} there, {here!r} here" for key, (there, here) in different.items())
            raise ValueError(
                f"{self.folder} holds a training that the study does not describe (any more): {listed}. Delete the "
                "folder, or give the study another --output"
            )
        if not (self.folder / "model_final.pth").is_file() or run.iterations() < self.config.SOLVER.MAX_ITER:
            return None
        return run if run.curve(run.prefix(self.dataset) + HEADLINE) else None

    def iterations(self) -> int:
        """The number of iterations that were trained, of those that a resume goes on from."""
        run = Run(self.folder.name, self.folder)
        return run.iterations() if run.has_checkpoint else 0

    def metrics(self) -> dict[str, float]:
        """The metrics of its last evaluation, in percent; 0 for what Detectron2 gives none of: without detections.

        It must have finished.
        """
        metrics = self.finished().metrics(self.dataset)
        return {name: 0.0 if math.isnan(value) else value for name, value in metrics.items()}


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
    prepare: tuple[str | int | float, ...] = ()
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    tuning: Tuning = Tuning()
    # Each is made, and looks into its folder, once.
    _jobs: dict[Path, Job] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        self._check_names()
        self._check_tuning()
        for name, setting in self.settings.items():
            self._check_setting(name, setting)
        for detector in self.detectors:
            self._check_configs(detector)

    def _check_names(self) -> None:
        names = [*self.detectors, *self.settings]
        bad = [name for name in names if not _NAME.fullmatch(name) or name == "teacher"]
        if bad:
            raise ValueError(f"{bad[0]!r} is no name of a folder here: use letters, digits, '_', '.', '+' and '-'")
        for field in ("detectors", "settings", "seeds"):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty")
        first, setting = next(iter(self.settings.items()))
        if setting.detectors:
            raise ValueError(f"settings.{first}.detectors: the first setting is the baseline, and for all detectors")
        owners = {"options": self.options}
        for name, pair in self.detectors.items():
            owners |= {f"detectors.{name}.options": pair.options}
        owners |= {f"settings.{name}.options": setting.options for name, setting in self.settings.items()}
        for place, options in owners.items():
            given = set(options) & set(_GIVEN)
            if given:
                raise ValueError(f"{place}: {given.pop()} is given to each training by the study itself")

    def _check_tuning(self) -> None:
        for place, seeds in (("seeds", self.seeds), ("tuning.seeds", self.tuning.seeds)):
            if min(seeds, default=0) < 0 or len(set(seeds)) < len(seeds):
                raise ValueError(f"{place} is {list(seeds)}, but must be different numbers >= 0")
        scales = self.tuning.scales
        if not all(0 < scale < math.inf for scale in scales) or len(set(scales)) < len(scales):
            raise ValueError(f"tuning.scales is {list(scales)}, but must be different numbers > 0")
        shared = set(self.seeds) & set(self.tuning.seeds)
        if shared:
            raise ValueError(f"tuning.seeds: {shared.pop()} is one of the reported seeds, too")
        if any(setting.tune for setting in self.settings.values()) and not (self.tuning.seeds and scales):
            raise ValueError("a setting is to be tuned, but tuning.seeds or tuning.scales is empty")

    def _check_setting(self, name: str, setting: Setting) -> None:
        place = f"settings.{name}"
        unknown = set(setting.detectors) - set(self.detectors)
        if unknown:
            raise ValueError(f"{place}.detectors: there is no detector {unknown.pop()}")
        for field, other in (("scale_of", setting.scale_of), ("baseline", setting.baseline)):
            if other and other not in self.settings:
                raise ValueError(f"{place}.{field}: there is no setting {other}")
            absent = [d for d in self.detectors if name in self.settings_of(d) and other not in self.settings_of(d)]
            if other and absent:
                raise ValueError(f"{place}.{field}: {other} is not for the detector {absent[0]}, but {name} is")
        if setting.scale_of and setting.tune:
            raise ValueError(f"{place}: its weights can't have both a scale of their own, tune, and scale_of another")
        if setting.scale_of and not self.settings[setting.scale_of].tune:
            raise ValueError(f"{place}.scale_of: {setting.scale_of} is not tuned")
        if not 0 < setting.scale < math.inf:
            raise ValueError(f"{place}.scale is {setting.scale}, but must be > 0")

    def _check_configs(self, detector: str) -> None:
        """Read all that a detector's trainings are configured by."""
        pair = self.detectors[detector]
        for file in (pair.config, pair.teacher.config):
            if not Path(file).is_file():
                raise ValueError(
                    f"detectors.{detector}: {file} is no file: name configs relative to the working folder"
                )
        cfg = _config(f"detectors.{detector}.teacher", pair.teacher.config, _pairs(pair.teacher.options))
        self._check_dataset(f"detectors.{detector}.teacher", cfg)
        for name, setting in self.settings_of(detector).items():
            place = f"settings.{name} of {detector}"
            cfg = _config(place, pair.config, self._options(detector, name))
            self._check_dataset(place, cfg)
            if cfg.MODEL.META_ARCHITECTURE != DISTILLER:
                raise ValueError(
                    f"detectors.{detector}.config: MODEL.META_ARCHITECTURE of {pair.config} must be {DISTILLER}"
                )
            try:
                weights = _weights(pair.config, self._options(detector, name))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{place}: {error}") from None
            if not weights and (setting.tune or setting.scale_of or setting.scale != 1):
                raise ValueError(f"{place}: the method {cfg.GKD.METHOD} has no weights to scale")

    def _check_dataset(self, place: str, cfg: CfgNode) -> None:
        if self.dataset not in cfg.DATASETS.TEST:
            raise ValueError(
                f"dataset is {self.dataset}, but {place} is evaluated on {', '.join(cfg.DATASETS.TEST) or 'nothing'}"
            )

    def settings_of(self, detector: str) -> dict[str, Setting]:
        """Name -> setting, of those that are for a detector."""
        return {name: s for name, s in self.settings.items() if not s.detectors or detector in s.detectors}

    def teacher_job(self, detector: str) -> Job:
        """The training of a detector's teacher."""
        teacher = self.detectors[detector].teacher
        return self._job(self.output / detector / "teacher", teacher.config, _pairs(teacher.options))

    def jobs(self) -> list[Job]:
        """All trainings but those whose weights are not chosen yet."""
        found = []
        for detector in self.detectors:
            found.append(self.teacher_job(detector))
            for name in self.settings_of(detector):
                found += [job for jobs in self.tuning_jobs(detector, name).values() for job in jobs]
                found += self.student_jobs(detector, name).values()
        return found

    def lengths(self) -> list[int]:
        """The iterations of each training, those included whose weights are not chosen yet."""
        found = []
        for detector, pair in self.detectors.items():
            found.append(self.teacher_job(detector).config.SOLVER.MAX_ITER)
            for name, setting in self.settings_of(detector).items():
                tuned = len(self.tuning.seeds) * len(self.tuning.scales) if setting.tune else 0
                cfg = _read(pair.config, self._options(detector, name))
                found += [cfg.SOLVER.MAX_ITER] * (tuned + len(self.seeds))
        return found

    def student_config(self, detector: str) -> CfgNode:
        """The config of the student alone, without seed and folder."""
        return _read(self.detectors[detector].config, self._options(detector, next(iter(self.settings))))

    def tuning_jobs(self, detector: str, name: str) -> dict[float, list[Job]]:
        """Scale -> trainings by which a setting's scale is chosen; empty where none is."""
        if not self.settings[name].tune:
            return {}
        return {
            scale: [self._student_job(detector, name, scale, seed) for seed in self.tuning.seeds]
            for scale in self.tuning.scales
        }

    def scale(self, detector: str, name: str) -> float | None:
        """What the weights of a setting's config are multiplied by in the reported trainings.

        Where they are tuned it is the scale of the highest mean AP on the tuning seeds, times the setting's own.

        Returns:
            None while one of the trainings that the scale is chosen by is missing.
        """
        setting = self.settings[name]
        jobs = self.tuning_jobs(detector, setting.scale_of or name)
        if not all(job.finished() for some in jobs.values() for job in some):
            return None
        means = {scale: statistics.fmean(job.metrics()[HEADLINE] for job in some) for scale, some in jobs.items()}
        return max(means, key=means.__getitem__, default=1.0) * setting.scale

    def student_jobs(self, detector: str, name: str) -> dict[int, Job]:
        """Seed -> the reported training; empty while the scale of the weights is not chosen."""
        scale = self.scale(detector, name)
        if scale is None:
            return {}
        return {seed: self._student_job(detector, name, scale, seed) for seed in self.seeds}

    def check_folders(self) -> None:
        """Look into the folders of all trainings that may be needed, at every scale that may be chosen.

        Raises:
            ValueError: one holds another training, or a file in it is damaged.
        """
        for job in self._possible_jobs():
            job.finished()

    def _possible_jobs(self) -> Iterator[Job]:
        for detector in self.detectors:
            yield self.teacher_job(detector)
            for name, setting in self.settings_of(detector).items():
                for jobs in self.tuning_jobs(detector, name).values():
                    yield from jobs
                for scale in self.tuning.scales if setting.tune or setting.scale_of else (1.0,):
                    for seed in self.seeds:
                        yield self._student_job(detector, name, scale * setting.scale, seed)

    def _student_job(self, detector: str, name: str, scale: float, seed: int) -> Job:
        config = self.detectors[detector].config
        options = self._options(detector, name)
        # At 1 the job is given none, so that its config is the one that is written.
        weights = _weights(config, options) if scale != 1 else {}
        scaled = [text for key, weight in weights.items() for text in (key, str(scale * weight))]
        place = ("SEED", str(seed), "GKD.TEACHER.WEIGHTS", str(self.output / detector / "teacher" / "model_final.pth"))
        folder = self.output / detector / name / f"weights_x{scale:g}" / f"seed_{seed}"
        return self._job(folder, config, (*options, *scaled, *place))

    def _job(self, folder: Path, config_file: str, options: tuple[str, ...]) -> Job:
        if folder not in self._jobs:
            self._jobs[folder] = Job(folder, config_file, (*options, "OUTPUT_DIR", str(folder)), self.dataset)
        return self._jobs[folder]

    def _options(self, detector: str, name: str) -> tuple[str, ...]:
        """KEY VALUE pairs of a setting, without the seed's and the folder's."""
        return _pairs({**self.detectors[detector].options, **self.options, **self.settings[name].options})


def read_study(path: Path, output: Path) -> Study:
    """Read a study.

    Args:
        path: of the YAML file, whose keys are the attributes of :class:`Study`.
        output: folder of all its runs.

    Raises:
        OSError: there is no such file.
        ValueError: what is wrong in it, and where.
    """
    data = read_yaml(path)
    try:
        return _build(Study, "", data, output=output)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _build(kind: type, place: str, data: object, **given):
    """A dataclass of what stands at a place of the file; what is ``given`` does not stand there."""
    fields = _mapping(place, data)
    known = {field.name: field for field in dataclasses.fields(kind) if field.init and field.name not in given}
    for name in fields:
        if name not in known:
            raise ValueError(f"{_in(place)}unknown key {name}; there are {', '.join(known)}")
    for name, field in known.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in fields:
            raise ValueError(f"{_in(place)}the key {name} is missing")
    hints = typing.get_type_hints(kind)
    start = f"{place}." if place else ""
    values = {name: _value(hints[name], start + name, value) for name, value in fields.items()}
    return kind(**values, **given)


def _value(hint, place: str, value: object):
    """What stands at a place of the file, as the attribute whose type is ``hint``.

    Lists become tuples.
    """
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, place, value)
    if kind is Mapping:
        return {name: _value(inner[1], f"{place}.{name}", item) for name, item in _mapping(place, value).items()}
    if kind is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{place} is {value!r}, but must be a list")
        return tuple(_value(inner[0], f"{place}[{number}]", item) for number, item in enumerate(value))
    # Python takes True for the number 1.
    fits = isinstance(value, bool) == (hint is bool) and isinstance(value, int | float if hint is float else hint)
    if hint is not object and not fits:
        name = {str: "text", int: "a whole number", float: "a number such as 1.0e-3", bool: "true or false"}.get(
            hint, "text or a number"
        )
        raise ValueError(f"{place} is {value!r}, but must be {name}")
    return value


def _mapping(place: str, data: object) -> Mapping:
    data = {} if data is None else data
    if not isinstance(data, Mapping):
        raise ValueError(f"{_in(place)}there must be keys and values, but there is {data!r}")
    for name in data:
        if not isinstance(name, str):
            raise ValueError(f"{_in(place)}the key {name!r} is no text for YAML: put it in quotes")
    return data


def _in(place: str) -> str:
    return f"{place}: " if place else ""


def _pairs(options: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(text for key, value in options.items() for text in (key, str(value)))


@functools.cache
def _read(config_file: str, options: tuple[str, ...]) -> CfgNode:
    """The config of a file with options, which several ask for."""
    cfg = read_config(config_file, list(options))
    cfg.freeze()
    return cfg


def _config(place: str, config_file: str, options: tuple[str, ...]) -> CfgNode:
    """The config of a file with options.

    Raises:
        ValueError: it is none; the text names the place in the study that asks for it.
    """
    try:
        return _read(config_file, options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def _weights(config_file: str, options: tuple[str, ...]) -> dict[str, float]:
    """Key -> value, of the weights of a config's method."""
    terms = build_method(_read(config_file, options)).terms.values()
    return {term.key: term.weight for term in terms}
