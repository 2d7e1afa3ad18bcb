"""The exponential moving average of the weights of the detector that is trained."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from gkd_d2.engine.devices import fault_of_device
from gkd_d2.utils.checkpoint import EMA_STATE, CheckpointError
from gkd_d2.utils.checkpoint_files import is_plain
from gkd_d2.utils.finite import is_finite
from gkd_d2.utils.text import listed


@dataclasses.dataclass(frozen=True)
class EMAOptions:
    """The node MODEL_EMA of a config.

    Attributes:
        enabled: MODEL_EMA.ENABLED.
        decay: MODEL_EMA.DECAY.
        device: MODEL_EMA.DEVICE.
        alone: MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY.
    """

    enabled: bool = False
    decay: float = 0.999
    device: str = ""
    alone: bool = False

    def problems(self, *, eval_only: bool) -> list[str]:
        """A sentence for each option that can't be met.

        Args:
            eval_only: whether the run only evaluates.
        """
        if not self.enabled:
            if not (eval_only and self.alone):
                return []
            return [
                "MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY is True, but MODEL_EMA.ENABLED is False, so that the raw "
                "weights would be evaluated: set both to True, or both to False"
            ]
        found = []
        if not 0 <= self.decay < 1:
            found.append(f"MODEL_EMA.DECAY is {self.decay}, but must be at least 0 and below 1, such as 0.999")
        if self.device and (fault := fault_of_device(self.device)):
            found.append(
                f"MODEL_EMA.DEVICE is {self.device!r}, {fault}: set it to '', for the device of the model, or to cpu"
            )
        return found


class ModelEMA:
    """Averages a detector's weights over its training: ``average <- decay * average + (1 - decay) * weights``.

    That is done for parameters and floating-point buffers, frozen ones and BatchNorm's running statistics included, as
    d2go does by default and without a warm-up of the decay; other buffers are copied. What does not change in the
    training stays exactly as it is. Buffers that no checkpoint holds are not averaged.

    Args:
        detector: the student, under whose own names the average is kept.
        decay: at least 0 and below 1.
        device: of the average; empty: that of the detector.

    Attributes:
        started: whether there is an average, from :meth:`start` or from a checkpoint.
    """

    def __init__(self, detector: nn.Module, decay: float, device: str = ""):
        self._detector = detector
        self._decay = decay
        self._device = device
        self._average: dict[str, Tensor] = {}

    @property
    def started(self) -> bool:
        return bool(self._average)

    def start(self) -> None:
        """Begin with the detector's weights as they are."""
        self._average = {name: self._placed(tensor).clone() for name, tensor in _tensors(self._detector).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the detector's weights; to be called after each of the optimizer's steps."""
        averages, weights = [], []
        for name, tensor in _tensors(self._detector).items():
            if tensor.is_floating_point():
                averages.append(self._average[name])
                weights.append(self._placed(tensor))
            else:
                self._average[name].copy_(tensor)
        # Where both are equal the interpolation is exact; a sum of two products would drift.
        torch._foreach_lerp_(averages, weights, 1 - self._decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the detector the average instead of its weights, which it has back afterwards, bit for bit.

        In the meantime these take the memory of a second copy.
        """
        raw = copy.deepcopy(self._detector.state_dict())
        try:
            self._detector.load_state_dict(self.state_dict())
            yield
        finally:
            self._detector.load_state_dict(raw)

    def not_finite(self) -> list[str]:
        """Names of the averages that hold infinite or NaN values."""
        return [name for name, tensor in self._average.items() if not is_finite(tensor)]

    def state_dict(self) -> dict[str, Tensor]:
        """The detector's, of the average; to be loaded like the "model" of a checkpoint."""
        state = self._detector.state_dict()
        state.update(self._average)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from the average of a checkpoint.

        Args:
            state_dict: from :meth:`state_dict`; of what else it holds nothing is taken.

        Raises:
            CheckpointError: it lacks a tensor of the detector, or has it in another shape, or with infinite or NaN
                values, or something else in its place.
        """
        tensors = _tensors(self._detector)
        if fault := _fault_of_average(state_dict, tensors):
            raise CheckpointError(
                f"the averaged weights of the checkpoint ({EMA_STATE}) are {fault}: to go on without them, set "
                "MODEL_EMA.ENABLED to False"
            )
        self._average = {
            name: state_dict[name].to(device=self._device or tensor.device, dtype=tensor.dtype, copy=True)
            for name, tensor in tensors.items()
        }

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device) if self._device else tensor


def _tensors(detector: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a detector, without its modules' extra states."""
    return {name: value for name, value in detector.state_dict().items() if isinstance(value, Tensor)}


def _fault_of_average(loaded: object, tensors: Mapping[str, Tensor]) -> str:
    """Why what a file held is no average of some tensors, as the end of a sentence; empty where it is one."""
    if not isinstance(loaded, Mapping):
        return f"no tensors by their names, but a {type(loaded).__name__}"
    found = {name: loaded[name] for name in tensors if name in loaded}
    if other := [name for name, value in found.items() if not (isinstance(value, Tensor) and is_plain(value))]:
        return f"no dense tensors of numbers, in {listed(other, 3)}"
    if unfit := [n for n, tensor in tensors.items() if n not in found or found[n].shape != tensor.shape]:
        return f"of another detector, by {listed(unfit, 3)}"
    if wrong := [name for name, value in found.items() if not is_finite(value)]:
        return f"infinite or NaN in {listed(wrong, 3)}"
    return ""


def loaded_ema(options: EMAOptions, detector: nn.Module, checkpoint: Mapping) -> ModelEMA | None:
    """What an evaluation alone evaluates beside a detector that has just been loaded.

    Args:
        options: of the run.
        detector: in which the average takes the place of the weights if ``options.alone`` is set.
        checkpoint: what else its checkpoint holds.

    Returns:
        The average that is to be evaluated after the detector; None where it is not asked for or not there, of which a
        warning tells.

    Raises:
        CheckpointError: ``options.alone`` is set and there is no average, or it is one of another detector.
    """
    if not options.enabled:
        return None
    if EMA_STATE not in checkpoint:
        lacks = "the checkpoint holds no averaged weights: it was trained without MODEL_EMA.ENABLED"
        if options.alone:
            raise CheckpointError(
                f"MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY is True, but {lacks}. Set it to False, for the raw weights"
            )
        logging.getLogger(__name__).warning("Only the raw weights are evaluated, for %s", lacks)
        return None
    average = ModelEMA(detector, options.decay, options.device)
    average.load_state_dict(checkpoint[EMA_STATE])
    if not options.alone:
        return average
    detector.load_state_dict(average.state_dict())
    logging.getLogger(__name__).info("The averaged weights are evaluated in place of the raw ones")
    return None


def named_ema(results: dict) -> dict:
    """An evaluation's results with "_EMA" appended to each of the outer keys, as Detectron2 appends "_TTA"."""
    return {f"{key}_EMA": value for key, value in results.items()}
