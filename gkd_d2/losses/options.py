"""What the losses can be asked for: their weights and options, and the checks of both."""

from __future__ import annotations

import dataclasses
import math
import numbers

import torch

WEIGHTINGS = ("gradient", "attention", "attention_gradient", "uniform")
RECTIFIERS = ("abs", "relu")
MAP_REGIONS = ("image", "boxes")
# The importances of a gradient map, and those that need no feature and weigh the imitation alone.
MAP_IMPORTANCES = ("channel", "element")
IMPORTANCES = (*MAP_IMPORTANCES, "norm", "student")
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

    The defaults are those of a config's ``GKD.LOSS_WEIGHTS``: docs/results.md says why.

    Attributes:
        gradient: of ``loss_gkd_gradient``, the difference of the gradient maps.
        box: of ``loss_bmfi_box``, imitation of objects and their context.
        attention: of ``loss_bmfi_attention``, imitation of channel and spatial attention.
        image: of ``loss_bmfi_image``, imitation of the whole image.

    Raises:
        ValueError: a weight is no number, negative, not finite or more than float32 holds.
    """

    gradient: float = 2e-3
    box: float = 1e-2
    attention: float = 0.0
    image: float = 1e-3

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            check_weight(f"loss weight {name}", value)

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))

    def scaled(self, factor: float) -> LossWeights:
        """All four weights times ``factor``."""
        return LossWeights(*(factor * value for value in dataclasses.astuple(self)))

    @property
    def imitates(self) -> bool:
        """Whether features are imitated: the losses that the weights of channels and cells enter."""
        return self.box > 0 or self.image > 0


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What the losses can be asked for beside their weights; formulas: docs/method.md.

    The defaults are those of a config's keys of the same names, as ``GKD.MAP_REGION``.

    Attributes:
        temperature: of the attention softmax, > 0.
        weighting: of the imitation: "gradient", "attention", "attention_gradient" or "uniform".
        rectifier: of the gradient maps: "abs" or "relu".
        map_region: where maps are compared: "image", all cells alike, or "boxes", in and around the objects.
        importance: how gradients make the importance of cells: "channel", "element", "norm" or "student".
        importance_floor: the part of a cell's weight in the imitation that is the same for all cells, in [0, 1].
        importance_cap: the most that a cell may weigh there, in multiples of the mean, >= 1, before the floor is
            applied; 0: no limit. Both apply to every weighting.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    temperature: float = 0.5
    weighting: str = "gradient"
    rectifier: str = "abs"
    map_region: str = "boxes"
    importance: str = "channel"
    importance_floor: float = 0.0
    importance_cap: float = 0.0

    def __post_init__(self):
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("rectifier", self.rectifier, RECTIFIERS)
        check_choice("map_region", self.map_region, MAP_REGIONS)
        check_choice("importance", self.importance, IMPORTANCES)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}, but must be a finite number > 0")
        if not 0 <= self.importance_floor <= 1:
            raise ValueError(f"importance_floor is {self.importance_floor}, but must be in [0, 1]")
        if not (self.importance_cap == 0 or (math.isfinite(self.importance_cap) and self.importance_cap >= 1)):
            raise ValueError(
                f"importance_cap is {self.importance_cap}, but must be a finite number >= 1, or 0 for no limit"
            )

    @property
    def map_importance(self) -> str:
        """The importance of the maps that are compared, one of those that depend on the feature."""
        return self.importance if self.importance in MAP_IMPORTANCES else "element"

    def weighs_by_gradient(self, weights: LossWeights) -> bool:
        """Whether gradients weigh the cells in the imitation."""
        return weights.imitates and self.weighting in ("gradient", "attention_gradient")

    def need_student_grad(self, weights: LossWeights) -> bool:
        """Whether the student's feature gradients enter any loss."""
        return weights.gradient > 0 or (self.weighs_by_gradient(weights) and self.importance == "student")

    def need_teacher_grad(self, weights: LossWeights) -> bool:
        """Whether the teacher's feature gradients enter any loss."""
        if weights.gradient > 0 or (weights.imitates and self.weighting == "gradient"):
            return True
        return self.weighs_by_gradient(weights) and self.importance != "student"

    def need_cell_grads(self, weights: LossWeights) -> bool:
        """Whether more of the gradients than their spatial means enters any loss."""
        return self.importance != "channel" and (weights.gradient > 0 or self.weighs_by_gradient(weights))

    def unfused(self, weights: LossWeights) -> list[str]:
        """The options that only the reference implementation supports, in words, as far as they affect a loss."""
        limits = weights.imitates and self.weighting != "uniform"
        return [
            text
            for name, text in self._on_importance().items()
            if (self.need_cell_grads(weights) if name == "importance" else limits)
        ]

    def without_effect(self, weights: LossWeights) -> list[str]:
        """The options on importance that are set and change no loss, in words."""
        used = self.unfused(weights)
        return [text for text in self._on_importance().values() if text not in used]

    def _on_importance(self) -> dict[str, str]:
        """Name of an option on importance that is set -> the option in words."""
        # A field's default is its class's attribute.
        names = ("importance", "importance_floor", "importance_cap")
        return {
            name: f"{name} {getattr(self, name)!r}"
            for name in names
            if getattr(self, name) != getattr(LossOptions, name)
        }


def check_implementation(implementation: str, options: LossOptions, weights: LossWeights) -> None:
    """Check who is to compute the losses, before there are features.

    Raises:
        ValueError: there is no such implementation, or it does not support an option.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    unfused = options.unfused(weights)
    if implementation == "fused" and unfused:
        raise ValueError(
            f"implementation is 'fused', but only 'reference' supports {', '.join(unfused)}: choose it, or 'auto'"
        )


def check_weight(name: str, value: float) -> None:
    """Check the weight of a loss.

    Raises:
        ValueError: it is no number, negative, not finite or more than float32 holds.
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and 0 <= value <= LARGEST_WEIGHT):
        raise ValueError(f"{name} is {value!r}, but must be a finite number >= 0 that float32 holds")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check one option.

    Raises:
        ValueError: it is none of ``choices``.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}")
