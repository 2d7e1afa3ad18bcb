"""Ways to run the steps of a distiller, each with one thing changed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from detectron2.utils.events import get_event_storage

from gkd_d2.methods import Method
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.measure import Measurement

_FEWER_PROPOSALS = {"half the proposals": 2, "an eighth of the proposals": 8}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to run the steps.

    Attributes:
        context: to be entered around the steps.
        dtype: of autocast; None: float32.
    """

    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    dtype: torch.dtype | None = None


class _EveryBatch(Measurement):
    """Measures the losses in each forward."""

    def due(self) -> bool:
        self.ask(get_event_storage().iter)
        return super().due()


def make_settings(
    distiller: GKDDistiller, device: str, methods: Mapping[str, Method] = MappingProxyType({})
) -> dict[str, Setting]:
    """All settings of a distiller by name: "default", then those with one thing changed.

    Args:
        distiller: changed only while a setting's context is entered.
        device: "cpu" or "cuda", where it is.
        methods: name -> a method without parameters of its own, in place of the distiller's; each is a setting.
    """
    teacher = distiller.teacher
    compiled = torch.compile(teacher.backbone)
    settings = {
        "default": Setting(),
        # As in the iterations that calibrate weights, and in those of the watch.
        "measured": Setting(lambda: _replaced(distiller, "listeners", [_EveryBatch()])),
        "two passes": Setting(lambda: _replaced(distiller, "one_pass", False)),
        "channels_last": Setting(lambda: _channels_last(distiller)),
        "compiled teacher": Setting(lambda: _replaced(teacher, "backbone", compiled)),
        "bfloat16": Setting(dtype=torch.bfloat16),
    }
    for name, method in methods.items():
        settings[name] = Setting(functools.partial(_replaced, distiller, "method", method))
    if device == "cuda":
        settings["float16"] = Setting(dtype=torch.float16)
    if hasattr(teacher, "roi_heads"):
        number = teacher.roi_heads.batch_size_per_image
        for name, divisor in _FEWER_PROPOSALS.items():
            fewer = functools.partial(_replaced, teacher.roi_heads, "batch_size_per_image", number // divisor)
            settings[name] = Setting(fewer)
    return settings


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object):
    """``owner`` with another attribute."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _channels_last(distiller: GKDDistiller):
    """Weights of both networks in the layout that makes the features channels_last."""
    distiller.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        distiller.to(memory_format=torch.contiguous_format)
