"""What a run distils, in the few lines with which its training begins."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage

from gkd_d2.methods import Method
from gkd_d2.modeling.initialize import differing_heads
from gkd_d2.modeling.split import SplitDetector
from gkd_d2.utils.text import counted

_logger = logging.getLogger(__name__)


def log_summary(
    cfg: CfgNode,
    method: Method,
    student: SplitDetector,
    teacher: SplitDetector,
    pairs: list[tuple[str, str]],
    *,
    inherited: list[str],
    left_out: list[str],
) -> None:
    """Log a heading and five lines: method and weights, levels, implementation of the losses, heads, teacher.

    To be called at the first training step, when weights are loaded, within an EventStorage.

    Args:
        cfg: the distiller's config.
        method: of distillation.
        student: the student.
        teacher: the teacher.
        pairs: the student's and the teacher's name of each distilled level.
        inherited: the heads that the student was given by the teacher when it was built.
        left_out: what the teacher was trained to detect and is not asked for, such as "masks".

    Raises:
        RuntimeError: the implementation that the config asks for is not available.
    """
    replaced = differing_heads(teacher, student, inherited) if get_event_storage().iter == 0 else []
    lines = {
        "method": _method(cfg, method),
        "levels": _levels(student, teacher, pairs),
        "losses": f"computed by {method.implementation(student.model.device)}",
        "heads": _heads(inherited, replaced),
        "teacher": _teacher(cfg, left_out),
    }
    text = "".join(f"\n  {name + ':':<9}{line}" for name, line in lines.items())
    names = type(student.model).__name__, type(teacher.model).__name__
    _logger.info("Training a student %s with a teacher %s:%s", *names, text)
    if replaced:
        _logger.warning(
            "GKD.STUDENT.INIT_FROM_TEACHER is True, but MODEL.WEIGHTS %s replaced the heads that were copied from the "
            "teacher: %s. Choose weights of a backbone alone to inherit them",
            cfg.MODEL.WEIGHTS,
            ", ".join(replaced),
        )


def _method(cfg: CfgNode, method: Method) -> str:
    if not method:
        return f"{cfg.GKD.METHOD}, without a loss of a weight above 0: the student learns from the ground truth alone"
    weights = ", ".join(f"{term.name} {term.weight:g}" for term in method.terms.values() if term.weight > 0)
    off = ", ".join(term.name for term in method.terms.values() if term.weight == 0)
    ramp = f"; weights ramp up over {counted(cfg.GKD.WARMUP_ITERS, 'iteration')}" if cfg.GKD.WARMUP_ITERS else ""
    parameters = sum(parameter.numel() for parameter in method.parameters())
    own = f"; trains {counted(parameters, 'parameter')} of its own" if parameters else ""
    options = f"; {text}" if (text := method.describe()) else ""
    return f"{cfg.GKD.METHOD}, weights {weights}{f' (off: {off})' if off else ''}{options}{ramp}{own}"


def _levels(student: SplitDetector, teacher: SplitDetector, pairs: list[tuple[str, str]]) -> str:
    ours, theirs = student.output_shape(), teacher.output_shape()
    texts = []
    for name, other in pairs:
        width, wanted = ours[name].channels, theirs[other].channels
        channels = f"{width} channels" if width == wanted else f"{width} to {wanted} channels, aligned"
        texts.append(f"{name if name == other else f'{name} from {other}'} ({channels})")
    return ", ".join(texts)


def _heads(inherited: list[str], replaced: list[str]) -> str:
    if not inherited:
        return "not inherited from the teacher (GKD.STUDENT.INIT_FROM_TEACHER is False)"
    kept = [name for name in inherited if name not in replaced]
    return f"inherited from the teacher: {', '.join(kept) or 'none'}"


def _teacher(cfg: CfgNode, left_out: list[str]) -> str:
    text = f"{cfg.GKD.TEACHER.WEIGHTS}, described by {cfg.GKD.TEACHER.CONFIG_FILE}"
    if left_out:
        text += f"; without its head for {' and '.join(left_out)}, which the student does not detect"
    return text
