"""Keys that a trainer of Detectron2 ignores, and how a training forward notices it."""

from __future__ import annotations

import dataclasses

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

_REMEDY = "train with gkd_d2.engine.trainer.Trainer, as tools/train_net.py does, or set it to"


@dataclasses.dataclass(frozen=True)
class TrainerKeys:
    """What a config asks of the trainer.

    Attributes:
        ims_per_batch: SOLVER.IMS_PER_BATCH, images of all processes.
        accumulate_steps: SOLVER.ACCUMULATE_STEPS.
        amp_dtype: SOLVER.AMP.DTYPE where SOLVER.AMP.ENABLED is set, or "".
        model_ema: MODEL_EMA.ENABLED, of which a forward can't tell whether it is heeded.
    """

    ims_per_batch: int
    accumulate_steps: int
    amp_dtype: str
    model_ema: bool

    @classmethod
    def from_config(cls, cfg: CfgNode) -> TrainerKeys:
        """Read them from the config of a run."""
        solver = cfg.SOLVER
        amp_dtype = solver.AMP.DTYPE if solver.AMP.ENABLED else ""
        return cls(solver.IMS_PER_BATCH, solver.ACCUMULATE_STEPS, amp_dtype, cfg.MODEL_EMA.ENABLED)

    def check(self, batch_size: int, device_type: str) -> None:
        """Check a training forward, and the autocast that surrounds it.

        Only what can't be meant is refused. A batch of another size, or no autocast at all, may be a measurement.

        Args:
            batch_size: number of images that this process was given.
            device_type: of the model, "cpu" or "cuda".

        Raises:
            ValueError: it is the whole batch where a part was asked for, or autocast is in float16 where bfloat16 was
                asked for.
        """
        if self.accumulate_steps > 1 and batch_size * comm.get_world_size() == self.ims_per_batch:
            raise ValueError(
                f"SOLVER.ACCUMULATE_STEPS is {self.accumulate_steps}, but this trainer computes the whole batch of "
                f"SOLVER.IMS_PER_BATCH {self.ims_per_batch} at once: {_REMEDY} 1"
            )
        # Of float16, the key's default, nobody can tell whether it was chosen.
        half = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        if self.amp_dtype == "bfloat16" and half == torch.float16:
            raise ValueError(f"SOLVER.AMP.DTYPE is bfloat16, but this trainer computes in float16: {_REMEDY} float16")
