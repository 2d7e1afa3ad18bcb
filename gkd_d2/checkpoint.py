"""Detectron2's checkpointer, where a checkpoint that does not fit is an error."""

from __future__ import annotations

from collections.abc import Iterable

from detectron2.checkpoint import DetectionCheckpointer


class StudentCheckpointer(DetectionCheckpointer):
    """Refuses a checkpoint that sets nothing of the model."""

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        names = _decisive(self.model.state_dict())
        if names <= set(incompatible.missing_keys):
            raise ValueError(
                f"the checkpoint sets none of the model's {len(names)} tensors: the model has {_some(names)}, the "
                f"checkpoint {_some(incompatible.unexpected_keys)}. MODEL.WEIGHTS must name a checkpoint of this "
                "detector or of its backbone"
            )
        return incompatible


class CompleteCheckpointer(DetectionCheckpointer):
    """Refuses a checkpoint that leaves anything of the model unset: for networks that are used as they are."""

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        unset = sorted(_decisive(incompatible.missing_keys))
        if unset:
            shapes = "".join(
                f"\n  {name}: {tuple(there)} in the checkpoint, {tuple(here)} in the model"
                for name, there, here in incompatible.incorrect_shapes
            )
            raise ValueError(
                f"the checkpoint leaves {len(unset)} of the model's parameters unset: {', '.join(unset)}{shapes}"
            )
        return incompatible


def _decisive(names: Iterable[str]) -> set[str]:
    """``names`` without BatchNorm's counters: old checkpoints lack them, and torch then sets them by itself."""
    return {name for name in names if not name.endswith("num_batches_tracked")}


def _some(names: Iterable[str]) -> str:
    """The first few of ``names`` for a message."""
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "nothing"
