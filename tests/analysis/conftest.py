"""Runs whose folders are written by hand."""

from __future__ import annotations

import pytest
from detectron2.config import CfgNode
from tiny import detector_config

from gkd_d2.analysis.runs import Run


@pytest.fixture
def evaluated_config():
    """A function that makes the config of a tiny detector that is evaluated on datasets."""

    def make(*datasets: str, **options) -> CfgNode:
        cfg = detector_config("retinanet", **options)
        cfg.DATASETS.TEST = datasets or ("val",)
        return cfg

    return make


def _evaluation(iteration: int, ap: float, ap50: float, **other: float) -> dict:
    """The row of metrics.json that an evaluation writes."""
    return {"iteration": iteration, "bbox/AP": ap, "bbox/AP50": ap50} | other


@pytest.fixture
def runs(make_run, distiller_config, evaluated_config) -> list[Run]:
    """A teacher, two students alone, one distilled, and a run that has nothing to do with them."""
    distilled = distiller_config("retinanet", channels=8)
    distilled.DATASETS.TEST = ("val",)
    teacher, alone, other = evaluated_config(width=16), evaluated_config(channels=8), evaluated_config(width=4)
    first = {"iteration": 0, "total_loss": 3.0, "loss_cls": 2.0, "loss_box_reg": 1.0}
    last = {"iteration": 19, "total_loss": 2.0, "loss_cls": 1.5, "loss_box_reg": 0.5}
    repeated = alone.clone()
    repeated.SEED = 8
    return [
        make_run("teacher", teacher, [first, last, _evaluation(20, 40.0, 60.0, **{"bbox/AP-Car": 40.0})]),
        make_run("alone", alone, [first, last, _evaluation(20, 29.0, 52.0, **{"bbox/AP-Car": 29.0})]),
        make_run("again", repeated, [first, last, _evaluation(20, 31.0, 50.0, **{"bbox/AP-Car": 31.0})]),
        make_run(
            "distilled",
            distilled,
            [first, last | {"loss_gkd_gradient": 0.25}, _evaluation(20, 34.0, 50.5, **{"kitti/AP_moderate": 22.25})],
        ),
        make_run("other", other, [first, last, _evaluation(20, 1.0, float("nan"))]),
    ]
