"""What the losses can be asked for: their weights and options, and the checks of both."""

from __future__ import annotations

import dataclasses
import math

import torch

WEIGHTINGS = ("gradient", "attention", "uniform")
RECTIFIERS = ("abs", "relu")
IMPLEMENTATIONS = ("auto", "reference", "fused")
# Name of a loss's weight -> key of the loss.
LOSS_KEYS = {
    "gradient": "loss_gkd_gradient",
    "box": "loss_bmfi_box",
    "attention": "loss_bmfi_attention",
    "image": "loss_bmfi_image",
}
# float32 holds no larger one.
LARGEST_WEIGHT = torch.finfo(torch.float32).max


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the four losses; a loss of weight 0 is not computed.

    Those of a config, ``GKD.LOSS_WEIGHTS``, have other defaults: docs/results.md says why.

    Attributes:
        gradient: of ``loss_gkd_gradient``, the difference of the gradient maps.
        box: of ``loss_bmfi_box``, imitation of objects and their context.
        attention: of ``loss_bmfi_attention``, imitation of channel and spatial attention.
        image: of ``loss_bmfi_image``, imitation of the whole image.

    Raises:
        ValueError: a weight is negative, not finite or more than float32 holds.
    """

    gradient: float = 0.5
    box: float = 1e-3
    attention: float = 5e-4
    image: float = 1e-3

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= LARGEST_WEIGHT:
                raise ValueError(f"loss weight {name} is {value}, but must be a finite number >= 0 that float32 holds")

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))

    def scaled(self, factor: float) -> LossWeights:
        """All four weights times ``factor``."""
        return LossWeights(*(factor * value for value in dataclasses.astuple(self)))

    def need_student_grad(self) -> bool:
        """Whether the student's feature gradients enter any loss."""
        return self.gradient > 0

    def need_teacher_grad(self, weighting: str) -> bool:
        """Whether the teacher's feature gradients enter any loss under ``weighting``."""
        return self.gradient > 0 or (weighting == "gradient" and (self.box > 0 or self.image > 0))


def check_options(temperature: float, weighting: str, rectifier: str, implementation: str) -> None:
    """Check the options of :func:`gkd_d2.losses.distillation_losses` before there are features.

    Raises:
        ValueError: an option is unknown or out of range.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    check_choice("rectifier", rectifier, RECTIFIERS)
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}, but must be a finite number > 0")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check one option.

    Raises:
        ValueError: it is none of ``choices``.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}")
