"""Size, time and average precision of a student's forms, of the files as they were written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from tabulate import tabulate
from torch import Tensor, nn

from gkd_d2.engine.trainer import Trainer
from gkd_d2.export.errors import ExportError
from gkd_d2.export.onnx import OnnxDetector
from gkd_d2.export.pictures import load_dataset
from gkd_d2.export.torchscript import detect_by_script
from gkd_d2.export.tracing import detect
from gkd_d2.modeling.student import load_student
from gkd_d2.utils.text import counted
from gkd_d2.utils.timing import milliseconds

Detect = Callable[[Tensor], Instances]
# Metric of an evaluation -> its column, where it was evaluated.
_METRICS = {"bbox/AP": "AP", "kitti/AP_moderate": "KITTI AP moderate"}
# TorchScript compiles a function anew in its first calls.
_WARM_UP = 3


@dataclasses.dataclass
class Measured:
    """One form of a student.

    Attributes:
        megabytes: size of its file.
        milliseconds: median time for one image.
        metrics: heading -> average precision, in percent; empty where it was not evaluated.
    """

    megabytes: float
    milliseconds: float
    metrics: dict[str, float]


def load_forms(cfg: CfgNode, written: Mapping[str, Path]) -> dict[str, Detect]:
    """Load what was written.

    Args:
        cfg: of the student.
        written: from :func:`gkd_d2.export.export_student`.

    Returns:
        Form -> a function from an image, C,H,W, to the detections in its size; without the config.
    """

    def checkpoint(path: Path) -> Detect:
        return functools.partial(detect, load_student(cfg, path))

    def onnx(path: Path) -> Detect:
        return OnnxDetector(path.read_bytes()).detect

    loaders: dict[str, Callable[[Path], Detect]] = {
        "checkpoint": checkpoint,
        "averaged checkpoint": checkpoint,
        "TorchScript": lambda path: functools.partial(detect_by_script, torch.jit.load(path)),
        "ONNX": onnx,
        "ONNX int8": onnx,
    }
    return {form: loaders[form](path) for form, path in written.items() if form in loaders}


def check_test_sets(cfg: CfgNode) -> None:
    """Load the datasets in DATASETS.TEST, before any work.

    Raises:
        ExportError: there is none, or one is not registered, can't be loaded, or holds no annotations.
    """
    if not cfg.DATASETS.TEST:
        raise ExportError("--evaluate needs a dataset, but DATASETS.TEST names none")
    for name in cfg.DATASETS.TEST:
        if not any(entry.get("annotations") for entry in load_dataset(name)):
            raise ExportError(
                f"--evaluate: DATASETS.TEST names {name}, which holds no annotations to compare detections with"
            )


def measure_forms(
    cfg: CfgNode, written: Mapping[str, Path], picture: Tensor, *, repeats: int, folder: Path | None = None
) -> dict[str, Measured]:
    """Measure all forms of a student on the CPU, taking turns.

    Args:
        cfg: of the student.
        written: from :func:`gkd_d2.export.export_student`.
        picture: C,H,W, that the time is measured on.
        repeats: turns whose median counts.
        folder: for the files of the evaluation on the datasets in DATASETS.TEST; None: there is none.

    Returns:
        Form -> what was measured, for all but the config.
    """
    forms = load_forms(cfg, written)
    calls = [functools.partial(found, picture) for found in forms.values()]
    times = dict(zip(forms, milliseconds(calls, repeats=repeats, warm_up=_WARM_UP)))
    return {
        form: Measured(
            written[form].stat().st_size / 1e6,
            times[form],
            {} if folder is None else _evaluate(cfg, found, folder / form.replace(" ", "_")),
        )
        for form, found in forms.items()
    }


class _Detector(nn.Module):
    """A form of a student where Detectron2 evaluates a model."""

    def __init__(self, found: Detect):
        super().__init__()
        self._found = found

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        return [
            {"instances": detector_postprocess(self._found(x["image"]), x["height"], x["width"])}
            for x in batched_inputs
        ]


def _evaluate(cfg: CfgNode, found: Detect, folder: Path) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in cfg.DATASETS.TEST:
        evaluator = Trainer.build_evaluator(cfg, name, str(folder / name))
        results = inference_on_dataset(_Detector(found), Trainer.build_test_loader(cfg, name), evaluator)
        for metric, heading in _METRICS.items():
            group, _, key = metric.partition("/")
            if key in results.get(group, {}):
                start = f"{name}: " if len(cfg.DATASETS.TEST) > 1 else ""
                metrics[f"{start}{heading}"] = results[group][key]
    return metrics


def describe_forms(measured: Mapping[str, Measured], picture: Tensor, repeats: int, datasets: Sequence[str]) -> str:
    """A Markdown table of what was measured, and a sentence of how.

    Args:
        measured: from :func:`measure_forms`.
        picture: that the time was measured on.
        repeats: turns whose median counted.
        datasets: names of those that were evaluated on.
    """
    headings = list(dict.fromkeys(name for form in measured.values() for name in form.metrics))
    rows = [
        [form, one.megabytes, one.milliseconds, *(one.metrics.get(name) for name in headings)]
        for form, one in measured.items()
    ]
    table = tabulate(
        rows,
        ["form", "MB", "ms per image", *headings],
        tablefmt="pipe",
        floatfmt=("", ".1f", ".1f", *[".2f"] * len(headings)),
    )
    height, width = picture.shape[1:]
    on = f" Average precision on {', '.join(datasets)}, in percent." if headings else ""
    return (
        f"{table}\n\nms is the median of {counted(repeats, 'time')} on the CPU "
        f"({counted(torch.get_num_threads(), 'thread')}), one image of {height} x {width} pixels, the forms taking "
        f"turns.{on}\n"
    )
