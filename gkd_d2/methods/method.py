"""What a method of distillation is, and the registry of those that GKD.METHOD and GKD.METHODS can name."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from fvcore.common.registry import Registry
from torch import Tensor, nn

from gkd_d2.losses.options import LossOptions, check_weight
from gkd_d2.losses.reference import accumulation_dtype
from gkd_d2.methods.predictions import Responses
from gkd_d2.utils.text import did_you_mean

# How the weights of the losses are given: by ratios of gradients, or as they are.
CALIBRATE = "calibrate"
BALANCES = (CALIBRATE, "fixed")

METHOD_REGISTRY = Registry("METHOD")
METHOD_REGISTRY.__doc__ = """
Registry of the methods of distillation. A registered function is called with the config and returns a
:class:`Method`; its name is what GKD.METHOD is set to, or one of GKD.METHODS.
"""


@dataclasses.dataclass(frozen=True)
class Level:
    """One level of one training batch of N images, as a method sees it.

    Attributes:
        student: N,C,H,W, the student's feature, brought to the teacher's channels where they differ. Only it receives a
            gradient.
        teacher: N,C,H,W, the teacher's feature.
        boxes: N tensors K,4 of ground truth, xyxy, pixels of the padded batch; K may be 0.
        image_size: (height, width) of the padded batch in pixels.
        student_grad: N,C,H,W, the gradient of the student's own detection loss with respect to ``student``, times a
            positive number that all levels share; where channels differ N,C,1,1, its spatial mean, unless the method,
            or one that runs beside it, needs the gradient of each cell. None where the method does not need it.
        teacher_grad: the same of the teacher.
        anchors: the student's own at all distilled levels, one tensor H,W,A,4 a level, xyxy in pixels of the padded
            batch: A anchors in each cell. None where the method does not need them.
        index: of this level among the distilled ones, as in ``anchors``.
        name: of this level, the student's, as in :meth:`Method.build_parameters`.
        responses: what the heads predict from the features. None where the method does not need them.
    """

    student: Tensor
    teacher: Tensor
    boxes: list[Tensor]
    image_size: tuple[int, int]
    student_grad: Tensor | None = None
    teacher_grad: Tensor | None = None
    anchors: Sequence[Tensor] | None = None
    index: int = 0
    name: str = ""
    responses: Responses | None = None


@dataclasses.dataclass(frozen=True)
class Term:
    """One loss of a method.

    Attributes:
        name: in reports, as in ``gkd_ratio/<name>``.
        weight: what the loss is multiplied by; at 0 it is left out.
        key: of the config, where the weight is set.
        level_assigned: whether an object counts only at the levels it is assigned to, so that the loss is rightly 0 at
            a level to which no object of a batch belongs. Such a loss is judged over all levels together.
        ratio: under GKD.BALANCE "calibrate", how large its gradient at the student's features is to be beside that of
            the detection losses, where GKD.RATIOS does not say; at 0 it is left out.

    Raises:
        ValueError: the weight or the ratio is no number, negative, not finite or more than float32 holds.
    """

    name: str
    weight: float
    key: str
    level_assigned: bool = False
    ratio: float = 0.3

    def __post_init__(self):
        check_weight(self.key, self.weight)
        check_weight(self.ratio_key, self.ratio)

    @property
    def ratio_key(self) -> str:
        """The key of the config where the ratio is set."""
        return f"GKD.RATIOS.{self.name.upper()}"


class Method(nn.Module):
    """The losses by which a student imitates its teacher: a class of it implements :meth:`forward`.

    Each loss is a sum over levels: a call with some of the levels gives their part of it, which is how the watch over
    the losses measures them level by level.

    It may have parameters, see :meth:`build_parameters`, which train with the student. A distiller's checkpoints hold
    them as ``method.*``, and an exported student does not.

    Args:
        terms: key in the model's loss dictionary, which begins with "loss_" -> the loss.

    Attributes:
        terms: the same; :meth:`weigh_by_ratio` changes their weights.
        by_ratio: whether the weights of the losses are to be calibrated, see :meth:`weigh_by_ratio`.
        needs_features: whether :attr:`Level.student` must have the teacher's channels. Without it the distiller builds
            no convolutions to align them.
        needs_student_grad: whether :attr:`Level.student_grad` is asked for.
        needs_teacher_grad: whether :attr:`Level.teacher_grad` is asked for.
        needs_cell_grads: whether the mean over cells of :attr:`Level.student_grad` would not do.
        needs_anchors: whether :attr:`Level.anchors` is asked for.
        needs_cross_predictions: whether :attr:`Level.responses` is, with what the teacher's heads predict from the
            student's features.
        needs_student_predictions: whether :attr:`Level.responses` is, with what the student's heads predict.
        map_options: what the gradient maps in pictures are computed with.

    Raises:
        ValueError: a key does not begin with "loss_", or two losses have one name.
        TypeError: the class has neither forward nor __call__ of its own.
    """

    needs_features: bool = True
    needs_student_grad: bool = False
    needs_teacher_grad: bool = False
    needs_cell_grads: bool = False
    needs_anchors: bool = False
    needs_cross_predictions: bool = False
    needs_student_predictions: bool = False
    map_options: LossOptions = LossOptions()

    def __init__(self, terms: dict[str, Term]):
        super().__init__()
        if type(self).forward is Method.forward and type(self).__call__ is nn.Module.__call__:
            raise TypeError(f"{type(self).__name__} computes no losses: give it a method forward(self, levels, factor)")
        wrong = [key for key in terms if not key.startswith("loss_")]
        if wrong:
            raise ValueError(f"{type(self).__name__} calls a loss {wrong[0]!r}, but its key must begin with 'loss_'")
        names = [term.name for term in terms.values()]
        # GKD.RATIOS does not tell them apart otherwise.
        if len({name.lower() for name in names}) != len(names):
            raise ValueError(f"{type(self).__name__} has two losses of one name: {', '.join(names)}")
        self.terms = terms
        self.by_ratio = False

    def weigh_by_ratio(self, ratios: Mapping[str, float]) -> None:
        """Set the weight of each loss of a ratio above 0 to 1 and those of the others to 0, ahead of a calibration.

        The distiller then multiplies the losses by what a calibration finds: :class:`gkd_d2.modeling.balance.Balance`.
        To be called before :meth:`build_parameters`.

        Args:
            ratios: name of a loss, in capitals or not -> its ratio, where that is not the default, :attr:`Term.ratio`.

        Raises:
            ValueError: a loss has no such name, or a ratio is given twice, no number, negative, not finite or too
                large.
        """
        names = [term.name.lower() for term in self.terms.values()]
        given: dict[str, float] = {}
        for written, ratio in ratios.items():
            name = str(written).lower()
            # A method without a loss trains the student alone, which any config may be asked for.
            if names and name not in names:
                raise ValueError(
                    f"GKD.RATIOS.{name.upper()} is set, but no loss has this name: the losses are "
                    f"{', '.join(names)}{did_you_mean(name, names)}"
                )
            if name in given:
                raise ValueError(
                    f"GKD.RATIOS has {name.upper()} twice, in capitals and in small letters: keep the capitals"
                )
            given[name] = ratio
        self.by_ratio = True
        for key, term in self.terms.items():
            # Checked before it is asked whether it is 0.
            term = dataclasses.replace(term, ratio=given.get(term.name.lower(), term.ratio))
            self.terms[key] = dataclasses.replace(term, weight=1.0 if term.ratio else 0.0)

    def setting(self, term: Term) -> tuple[str, float]:
        """The key of the config that says how hard a loss pulls, its ratio's or its weight's, and the value there."""
        return (term.ratio_key, term.ratio) if self.by_ratio else (term.key, term.weight)

    def check_options(self) -> None:
        """Check the options against the weights, once these are settled: see :func:`settle_weights`.

        Raises:
            ValueError: an option does not go with the losses that are on.
        """

    def __bool__(self) -> bool:
        """Whether any loss has a weight above 0."""
        return any(term.weight > 0 for term in self.terms.values())

    @property
    def needs_predictions(self) -> bool:
        """Whether :attr:`Level.responses` is asked for."""
        return self.needs_cross_predictions or self.needs_student_predictions

    def active(self) -> dict[str, str]:
        """Key of the loss -> its name, for the losses of a weight above 0."""
        return {key: term.name for key, term in self.terms.items() if term.weight > 0}

    def describe(self) -> str:
        """The options beside the weights, in words for the log; empty where there are none."""
        return ""

    def implementation(self, device: torch.device) -> str:
        """Who computes the losses of features on a device, in words for the log.

        Raises:
            RuntimeError: the implementation that the config asks for does not work there.
        """
        return "PyTorch"

    def build_parameters(self, channels: Mapping[str, int]) -> None:
        """Build the parameters, if there are any. The distiller calls it once, before the first :meth:`forward`.

        It draws from a random stream of its own, so that all other weights and the data stay as they are without it.
        DistributedDataParallel requires every parameter to take part in the losses of every batch: build none for a
        loss of weight 0. Where no loss has a weight above 0, it is not called.

        Args:
            channels: the student's name of each distilled level, as :attr:`Level.name` -> the channels that both
                features have there, the teacher's.
        """

    def forward(self, levels: Sequence[Level], factor: float = 1.0) -> dict[str, Tensor]:
        """The losses of some levels.

        Args:
            levels: of one batch, at least one.
            factor: of all weights, from the warm-up.

        Returns:
            Key of the loss -> scalar, weighted, for all of :meth:`active` at least.
        """
        raise NotImplementedError


class LevelwiseMethod(Method, ABC):
    """A method that says what its losses are at one level; weights and the sum over levels are added here.

    Features and gradients come in float32, in float64 where the student's features are float64.
    """

    @abstractmethod
    def level_losses(self, level: Level) -> dict[str, Tensor]:
        """Key of the loss -> scalar without its weight; those of weight 0 may be left out."""

    def forward(self, levels, factor=1.0):
        found = [self._checked_losses(level) for level in levels]
        return {key: factor * self.terms[key].weight * sum(losses[key] for losses in found) for key in self.active()}

    def _checked_losses(self, level: Level) -> dict[str, Tensor]:
        losses = self.level_losses(widened(level))
        if not self.active().keys() <= losses.keys() <= self.terms.keys():
            raise ValueError(
                f"level_losses of {type(self).__name__} returned {', '.join(losses)}, but its terms are "
                f"{', '.join(self.terms)}"
            )
        return losses


def settle_weights(method: Method, balance: str, ratios: Mapping[str, float]) -> None:
    """Have a method that was built with its own weights be weighted as a config says.

    Args:
        method: changed in place.
        balance: GKD.BALANCE.
        ratios: GKD.RATIOS, which count under "calibrate"; see :meth:`Method.weigh_by_ratio`.

    Raises:
        ValueError: ``balance`` is none of :data:`BALANCES`, a ratio is wrong, or see :meth:`Method.check_options`.
    """
    if balance not in BALANCES:
        raise ValueError(f"GKD.BALANCE is {balance!r}, but must be one of {', '.join(BALANCES)}")
    if not isinstance(ratios, Mapping):
        raise ValueError(f"GKD.RATIOS is {ratios!r}, but must be a group of ratios, each under the name of a loss")
    if balance == CALIBRATE:
        method.weigh_by_ratio(ratios)
    method.check_options()


def widened(level: Level) -> Level:
    """A level in the dtype that losses are accumulated in, all but the student's feature constant.

    Args:
        level: as the distiller gives it.

    Returns:
        A copy whose features and gradients are float32, float64 where the student's feature is float64.
    """
    dtype = accumulation_dtype(level.student)

    def constant(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype)

    return dataclasses.replace(
        level,
        student=level.student.to(dtype),
        teacher=constant(level.teacher),
        student_grad=constant(level.student_grad),
        teacher_grad=constant(level.teacher_grad),
    )
