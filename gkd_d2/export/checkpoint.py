"""The student of a run as what stock Detectron2 reads: a config, a checkpoint and, if wanted, a TorchScript."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from gkd_d2.config import detector_config
from gkd_d2.export.torchscript import make_script
from gkd_d2.modeling.student import find_checkpoint, load_student
from gkd_d2.utils.files import fill, making_folder, replacing

CHECKPOINT, CONFIG, SCRIPT = "model.pth", "config.yaml", "model.ts"


def export_student(
    cfg: CfgNode, weights: Path, output: Path, *, half: bool = False, image: Tensor | None = None, force: bool = False
) -> dict[str, Path]:
    """Write a student as a plain Detectron2 checkpoint and config; nothing is written unless all of it can be.

    Args:
        cfg: of a distiller or of a plain detector.
        weights: a checkpoint of it, or a folder whose ``last_checkpoint`` names one.
        output: the folder to write to.
        half: store floating tensors in 16 bits.
        image: C,H,W in the channel order and the range of ``cfg``; makes a TorchScript that is checked on it.
        force: replace an earlier export in ``output``.

    Returns:
        The files written: ``checkpoint``, ``config`` and, with ``image``, ``script``.

    Raises:
        FileExistsError: ``output`` holds an export and ``force`` is not set.
        FileNotFoundError: there is no checkpoint.
        ValueError: ``output`` is the checkpoint's own folder, the checkpoint leaves a part of the student unset, or a
            number is too large for 16 bits.
        OSError: a file can't be written; an earlier export stays as it is.
        ExportError: this Detectron2 can't make a TorchScript of the student, or the script detects differently.
    """
    output = output.resolve()
    if find_checkpoint(weights).resolve().parent == output:
        raise ValueError(
            f"{output} is the folder of the checkpoint, whose config.yaml must stay: choose another folder"
        )
    present = [output / name for name in (CHECKPOINT, CONFIG, SCRIPT) if (output / name).exists()]
    if present and not force:
        raise FileExistsError(
            f"{output} holds {', '.join(path.name for path in present)} already: choose another folder, or replace "
            "them by --force"
        )
    model = load_student(cfg, weights)
    state = model.state_dict()
    if half:
        state = to_half(state)
        # So that the script computes with what the checkpoint holds.
        model.load_state_dict(state)
    script = None if image is None else make_script(model, image)

    written = {"checkpoint": output / CHECKPOINT, "config": output / CONFIG}
    text = stock_config(cfg, written["checkpoint"]).dump()
    content: dict[str, Callable[[IO[bytes]], object]] = {
        "checkpoint": lambda file: torch.save({"model": state}, file),
        "config": lambda file: file.write(text.encode()),
    }
    if script is not None:
        written["script"] = output / SCRIPT
        content["script"] = lambda file: file.write(script.save_to_buffer())
    with contextlib.ExitStack() as stack:
        stack.enter_context(making_folder(output))
        for name, path in written.items():
            _write(content[name], stack.enter_context(replacing(path)), path)
    for path in present:
        if path not in written.values():
            path.unlink()
    return written


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


def stock_config(cfg: CfgNode, weights: Path) -> CfgNode:
    """The config of the plain detector that ``cfg`` trains, with the keys of a fresh Detectron2 config alone.

    Args:
        cfg: of a distiller or of a plain detector.
        weights: what MODEL.WEIGHTS becomes.
    """
    stock = get_cfg()
    plain = _common(detector_config(cfg), stock)
    plain.MODEL.WEIGHTS = str(weights)
    # The run's own folder, where whoever trains or evaluates by this config would overwrite the run.
    plain.OUTPUT_DIR = stock.OUTPUT_DIR
    return plain


def _common(cfg: CfgNode, stock: CfgNode) -> CfgNode:
    """``cfg`` without the keys that ``stock`` lacks."""
    known = {key: value for key, value in cfg.items() if key in stock}
    return CfgNode({key: _common(v, stock[key]) if isinstance(v, CfgNode) else v for key, v in known.items()})


def to_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict with its floating tensors in 16 bits.

    Raises:
        ValueError: a finite number is beyond 65504 and would become infinite.
    """
    # Keeps the modules' versions, an attribute of the dictionary.
    rounded = copy.copy(state)
    for name, value in state.items():
        if value.is_floating_point():
            rounded[name] = value.half()
        if (value.isfinite() & ~rounded[name].isfinite()).any():
            raise ValueError(
                f"{name} holds numbers up to {value.abs().max().item():.3g}, beyond the 65504 that 16 bits can hold: "
                "export without --fp16"
            )
    return rounded
