"""What a run distils, in the few lines with which its training begins."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from gkd_d2.methods import Method
from gkd_d2.modeling.initialize import differing_heads
from gkd_d2.modeling.split import SplitDetector
from gkd_d2.utils.text import counted

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Logs, when it is called, a heading and five lines: method, levels, implementation of the losses, heads, teacher.

    Then it warns of what has no effect.

    To be called at the first training step, when weights are loaded, within an EventStorage.

    Attributes:
        method_name: as the config names it; of several, their names with " + " between them.
        method: of distillation.
        warmup_iters: over which its weights grow.
        student: the student.
        teacher: the teacher.
        pairs: the student's and the teacher's name of each distilled level.
        classes: the teacher's number of each of the student's classes, or None; None: both have the same classes.
        source: where the teacher comes from: its weights, and what describes it.
        weights: what the student's training starts from, such as "MODEL.WEIGHTS R-50.pkl".
        inherited: the heads that it was given when it was built.
        left_out: what the teacher was trained to detect and is not asked for, such as "masks".
        unused: a sentence for each key that is set and has no effect, see :func:`gkd_d2.methods.keys_without_effect`.

    Raises:
        RuntimeError: at the call: the implementation that the config asks for is not available.
    """

    method_name: str
    method: Method
    warmup_iters: int
    student: SplitDetector
    teacher: SplitDetector
    pairs: list[tuple[str, str]]
    classes: Sequence[int | None] | None
    source: str
    weights: str
    inherited: list[str]
    left_out: list[str]
    unused: list[str]

    def __call__(self) -> None:
        started = get_event_storage().iter == 0
        replaced = differing_heads(self.teacher, self.student, self.inherited) if started else []
        lines = {
            "method": self._method(),
            "levels": _levels(self.student, self.teacher, self.pairs, aligned=self.method.needs_features),
            "losses": f"computed by {self.method.implementation(self.student.model.device)}",
            "heads": _heads(self.inherited, replaced),
            "teacher": self._teacher(),
        }
        text = "".join(f"\n  {name + ':':<9}{line}" for name, line in lines.items())
        names = type(self.student.model).__name__, type(self.teacher.model).__name__
        _logger.info("Training a student %s with a teacher %s:%s", *names, text)
        if replaced:
            _logger.warning(
                "GKD.STUDENT.INIT_FROM_TEACHER is True, but %s replaced the heads that were copied from the teacher: "
                "%s. Choose weights of a backbone alone to inherit them",
                self.weights,
                ", ".join(replaced),
            )
        if comm.is_main_process():
            for sentence in self.unused:
                _logger.warning("%s", sentence)

    def _method(self) -> str:
        method, name = self.method, self.method_name
        if not method:
            return f"{name}, without a loss of a weight above 0: the student learns from the ground truth alone"
        on = [term for term in method.terms.values() if term.weight > 0]
        weights = ", ".join(f"{term.name} {term.ratio if method.by_ratio else term.weight:g}" for term in on)
        kind = "weights calibrated to the ratios" if method.by_ratio else "weights"
        off = ", ".join(term.name for term in method.terms.values() if term.weight == 0)
        ramp = f"; weights ramp up over {counted(self.warmup_iters, 'iteration')}" if self.warmup_iters else ""
        parameters = sum(parameter.numel() for parameter in method.parameters())
        own = f"; trains {counted(parameters, 'parameter')} of its own" if parameters else ""
        options = f"; {text}" if (text := method.describe()) else ""
        return f"{name}, {kind} {weights}{f' (off: {off})' if off else ''}{options}{ramp}{own}"

    def _teacher(self) -> str:
        text = self.source
        if self.classes is not None:
            known = sum(number is not None for number in self.classes)
            text += f"; {known} of its {self.teacher.num_classes} classes {'is' if known == 1 else 'are'} the student's"
            if known < len(self.classes):
                text += f", which has {len(self.classes) - known} more"
        if self.left_out:
            text += f"; without its head for {' and '.join(self.left_out)}, which the student does not detect"
        return text


def _levels(student: SplitDetector, teacher: SplitDetector, pairs: list[tuple[str, str]], *, aligned: bool) -> str:
    ours, theirs = student.output_shape(), teacher.output_shape()
    texts = []
    for name, other in pairs:
        width, wanted = ours[name].channels, theirs[other].channels
        channels = f"{width} channels"
        if width != wanted:
            channels = f"{width} to {wanted} channels, aligned" if aligned else f"{channels}, the teacher's {wanted}"
        texts.append(f"{name if name == other else f'{name} from {other}'} ({channels})")
    return ", ".join(texts)


def _heads(inherited: list[str], replaced: list[str]) -> str:
    if not inherited:
        return "not inherited from the teacher (GKD.STUDENT.INIT_FROM_TEACHER is False)"
    kept = [name for name in inherited if name not in replaced]
    return f"inherited from the teacher: {', '.join(kept) or 'none'}"
