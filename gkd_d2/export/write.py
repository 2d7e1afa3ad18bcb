"""Writes a student in all forms that are asked for, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from detectron2.config import CfgNode
from torch import Tensor

from gkd_d2.export.checkpoint import stock_config, to_half
from gkd_d2.export.onnx import OnnxDetector, check_runs, make_onnx
from gkd_d2.export.pictures import read_picture
from gkd_d2.export.quantize import quantize
from gkd_d2.export.torchscript import make_script
from gkd_d2.modeling.student import find_checkpoint, has_ema, load_student
from gkd_d2.utils.files import fill, making_folder, replacing
from gkd_d2.utils.last_checkpoint import has_checkpoint

# Form -> name of its file.
FILES = {
    "checkpoint": "model.pth",
    "averaged checkpoint": "model_ema.pth",
    "config": "config.yaml",
    "TorchScript": "model.ts",
    "ONNX": "model.onnx",
    "ONNX int8": "model_int8.onnx",
    "table": "export.md",
}
# Folder of what an evaluation of these writes.
EVALUATION = "inference"


@dataclasses.dataclass(frozen=True)
class Forms:
    """What a student is written as, beside a checkpoint and a config.

    Attributes:
        half: store the checkpoints' floating tensors in 16 bits; the other forms compute with these numbers in 32.
        ema: the config and the other forms are of the averaged weights (MODEL_EMA), not of the raw ones.
        torchscript: write a TorchScript.
        onnx: write an ONNX file.
        size: height and width that the ONNX file's input is fixed to; None: any.
        calibration: picture files by which the ONNX file is also quantized to 8 bits; empty: it is not.
    """

    half: bool = False
    ema: bool = False
    torchscript: bool = False
    onnx: bool = False
    size: tuple[int, int] | None = None
    calibration: Sequence[Path] = ()


def export_student(
    cfg: CfgNode,
    weights: Path,
    output: Path,
    forms: Forms = Forms(),
    *,
    pictures: Sequence[Tensor] = (),
    force: bool = False,
) -> dict[str, Path]:
    """Write a student as a plain Detectron2 checkpoint and config, and in other forms; all of it or nothing.

    Averaged weights that the checkpoint holds are written as a checkpoint of their own.

    Args:
        cfg: of a distiller or of a plain detector.
        weights: a checkpoint of it, or a folder whose ``last_checkpoint`` names one.
        output: the folder to write to.
        forms: what else is written.
        pictures: from :func:`gkd_d2.export.sample_pictures`, on which a TorchScript and an ONNX file are compared with
            the student.
        force: replace an earlier export in ``output``.

    Returns:
        The files written, by their keys in :data:`FILES`.

    Raises:
        FileExistsError: ``output`` holds an export and ``force`` is not set.
        FileNotFoundError: there is no checkpoint.
        ValueError: ``output`` is the folder of the checkpoint or of another run, the checkpoint leaves a part of the
            student unset or holds no averaged weights that are asked for, or a number is too large for 16 bits.
        OSError: a file can't be written, as where its name is that of a folder; an earlier export stays as it is.
        ExportError: the student can't be made into one of the forms, or one detects differently.
    """
    output = output.resolve()
    if find_checkpoint(weights).resolve().parent == output:
        raise ValueError(
            f"{output} is the folder of the checkpoint, whose config.yaml must stay: choose another folder"
        )
    if has_checkpoint(str(output)):
        raise ValueError(f"{output} is the folder of a run, whose config.yaml must stay: choose another folder")
    present = [output / name for name in (*FILES.values(), EVALUATION) if (output / name).exists()]
    if present and not force:
        raise FileExistsError(
            f"{output} holds {', '.join(path.name for path in present)} already: choose another folder, or replace "
            "them by --force"
        )
    for path in present:
        if path.is_dir() and path.name != EVALUATION:
            raise IsADirectoryError(f"{path} is a folder, where a file would be written: choose another folder")
    models = {"checkpoint": load_student(cfg, weights)}
    if forms.ema or has_ema(weights):
        with contextlib.nullcontext() if forms.ema else _doing_without_average():
            models["averaged checkpoint"] = load_student(cfg, weights, ema=True)
    states = {form: model.state_dict() for form, model in models.items()}
    chosen = "averaged checkpoint" if forms.ema else "checkpoint"
    model = models[chosen]
    if forms.half:
        states = {form: to_half(state) for form, state in states.items()}
        # So that the other forms compute with what the checkpoint holds.
        model.load_state_dict(states[chosen])
    text = stock_config(cfg, output / FILES[chosen]).dump()
    content: dict[str, Callable[[IO[bytes]], object]] = {
        form: functools.partial(torch.save, {"model": state}) for form, state in states.items()
    }
    content["config"] = lambda file: file.write(text.encode())
    if forms.torchscript:
        script = make_script(model, list(pictures))
        content["TorchScript"] = lambda file: file.write(script.save_to_buffer())
    if forms.onnx:
        exported = make_onnx(model, cfg, pictures, forms.size)
        content["ONNX"] = lambda file: file.write(exported.SerializeToString())
        if forms.calibration:
            quantized = quantize(exported, (read_picture(cfg, path) for path in forms.calibration))
            check_runs(OnnxDetector(quantized.SerializeToString()), pictures, "ONNX file in 8 bits")
            content["ONNX int8"] = lambda file: file.write(quantized.SerializeToString())

    written = {form: output / FILES[form] for form in content}
    with contextlib.ExitStack() as stack:
        stack.enter_context(making_folder(output))
        for form, path in written.items():
            _write(content[form], stack.enter_context(replacing(path)), path)
    for path in present:
        if path.name == EVALUATION:
            shutil.rmtree(path)
        elif path not in written.values():
            path.unlink()
    return written


@contextlib.contextmanager
def _doing_without_average() -> Iterator[None]:
    """Warn of averaged weights that can't be used, where nothing but a file of their own is made of them."""
    try:
        yield
    except ValueError as error:
        logging.getLogger(__name__).warning("%s is not written: %s", FILES["averaged checkpoint"], error)


def _write(write: Callable[[IO[bytes]], object], temporary: Path, path: Path) -> None:
    """Write a file under another name, and see that it reaches the disk.

    Raises:
        OSError: it can't be written; the message names ``path``.
    """
    try:
        fill(temporary, write)
    except (OSError, RuntimeError) as error:
        # Where torch can't write it complains about its file, and what the system said comes before.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} can't be written ({reason}); is the disk full?") from error
