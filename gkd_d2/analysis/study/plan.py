"""What a study consists of, and the trainings that follow from it."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

from detectron2.config import CfgNode

from gkd_d2.analysis.runs import HEADLINE
from gkd_d2.analysis.study.job import Job
from gkd_d2.config import read_config
from gkd_d2.methods import build_method


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
        for detector in self.detectors:
            found.append(self.teacher_config(detector).SOLVER.MAX_ITER)
            for name, setting in self.settings_of(detector).items():
                tuned = len(self.tuning.seeds) * len(self.tuning.scales) if setting.tune else 0
                cfg = self.student_config(detector, name)
                found += [cfg.SOLVER.MAX_ITER] * (tuned + len(self.seeds))
        return found

    def teacher_config(self, detector: str) -> CfgNode:
        """The config of a detector's teacher, without its folder.

        Raises:
            OSError: its file, or one that this names, can't be read.
            ValueError: the file, or an option, holds no config.
        """
        teacher = self.detectors[detector].teacher
        return _read(teacher.config, _pairs(teacher.options))

    def student_config(self, detector: str, name: str) -> CfgNode:
        """The config of a setting, without seed and folder, and with the weights that it gives itself.

        Raises:
            OSError: its file, or one that this names, can't be read.
            ValueError: the file, or an option, holds no config.
        """
        return _read(self.detectors[detector].config, self._options(detector, name))

    def weights(self, detector: str, name: str) -> dict[str, float]:
        """Key -> value, of the weights that a scale of a setting multiplies; empty where its method has none.

        Raises:
            TypeError, ValueError: see :func:`gkd_d2.methods.build_method`.
        """
        method = build_method(self.student_config(detector, name))
        if method.by_ratio:
            return {term.ratio_key: term.ratio for term in method.terms.values()}
        return {term.key: term.weight for term in method.terms.values()}

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
        weights = self.weights(detector, name) if scale != 1 else {}
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


def _pairs(options: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(text for key, value in options.items() for text in (key, str(value)))


@functools.cache
def _read(config_file: str, options: tuple[str, ...]) -> CfgNode:
    """The config of a file with options, which several ask for."""
    cfg = read_config(config_file, list(options))
    cfg.freeze()
    return cfg
