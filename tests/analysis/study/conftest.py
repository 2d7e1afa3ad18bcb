"""Studies of the toy detectors, and folders of trainings that never ran."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import yaml

from gkd_d2.analysis.study.job import Job
from gkd_d2.analysis.study.plan import Study
from gkd_d2.analysis.study.read import read_study


@pytest.fixture
def small_study(project) -> dict:
    """What the YAML file of a small study holds."""
    configs = project / "configs" / "toy"
    teacher = {"config": str(configs / "teachers" / "retinanet.yaml")}
    return {
        "title": "Small",
        "dataset": "toy_kitti_val",
        "seeds": [1, 2, 3],
        "tuning": {"seeds": [101, 102], "scales": [0.2, 1, 5]},
        "detectors": {"retinanet": {"config": str(configs / "gkd_retinanet.yaml"), "teacher": teacher}},
        "settings": {"alone": {"options": {"GKD.METHOD": "none"}}, "gkd": {"tune": True}},
    }


@pytest.fixture
def make_study(small_study, tmp_path) -> Callable[..., Study]:
    """A function that writes the small study, with top-level keys changed, and reads it.

    ``beside`` are its settings beside the student alone.
    """

    def make(*, beside: dict | None = None, **changes) -> Study:
        if beside is not None:
            changes["settings"] = {"alone": small_study["settings"]["alone"]} | beside
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(small_study | changes, sort_keys=False))
        return read_study(path, tmp_path / "small")

    return make


@pytest.fixture
def tuned_study(make_study) -> Study:
    """The student alone, a tuned setting and one that takes over its weights: nine trainings with the teacher's."""
    beside = {"gkd": {"tune": True}, "half": {"scale_of": "gkd", "scale": 0.5}}
    return make_study(seeds=[1, 2], tuning={"seeds": [101], "scales": [1, 5]}, beside=beside)


@pytest.fixture
def finish() -> Callable[..., None]:
    """A function that fills the folder of a training as if it had ended."""

    def fill(job: Job, ap: float, *, time: float | None = None, **metrics: float) -> None:
        job.folder.mkdir(parents=True)
        (job.folder / "config.yaml").write_text(job.config.dump())
        (job.folder / "model_final.pth").touch()
        (job.folder / "last_checkpoint").write_text("model_final.pth")
        last = {"iteration": job.config.SOLVER.MAX_ITER - 1, "total_loss": 1.0, "bbox/AP": ap, "bbox/AP50": 2 * ap}
        if time is not None:
            last["time"] = time
        (job.folder / "metrics.json").write_text(json.dumps(last | metrics) + "\n")

    return fill
