"""One optimizer step: its batch in parts, its precision, its random stream and its metrics."""

from __future__ import annotations

import contextlib
import logging
import math
import time

import numpy as np
import torch
from detectron2.engine.train_loop import TrainerBase
from detectron2.layers import FrozenBatchNorm2d
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from gkd_d2.distiller import GKDDistiller
from gkd_d2.engine import from_scratch
from gkd_d2.streams import mix_seed, seed_everything
from gkd_d2.text import counted

# In float16 steps whose loss or gradient overflows are left out while the scale is sought; more in a row are an error.
MAX_SKIPPED_STEPS = 20


class TrainStep(TrainerBase):
    """The part of the trainer that Detectron2 calls SimpleTrainer or AMPTrainer.

    Every step draws from a random stream of its seed, iteration and process, so that a resumed run draws what an
    uninterrupted one would.

    Args:
        model: a meta-architecture, or its DistributedDataParallel.
        data_loader: from :func:`gkd_d2.data.loader.build_train_loader`.
        optimizer: of the model.
        seed: >= 0.
        accumulate_steps: number of equal parts of a batch whose gradients are computed one after the other and
            averaged, as over so many processes.
        amp_dtype: of autocast, torch.float16 (with a gradient scaler) or torch.bfloat16; None: no autocast.
        from_scratch: whether the model started without pretrained weights; the message of a fault depends on it.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: DataLoader,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        accumulate_steps: int = 1,
        amp_dtype: torch.dtype | None = None,
        from_scratch: bool = False,
    ):
        super().__init__()
        model.train()
        self.model = model
        self.module = model.module if isinstance(model, DistributedDataParallel) else model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self._seed = seed
        self._accumulate_steps = accumulate_steps
        self._amp_dtype = amp_dtype
        self._from_scratch = from_scratch
        self._device = self.module.device.type
        self._scaler = torch.amp.GradScaler(self._device, enabled=amp_dtype == torch.float16)
        self._batches = None
        self._skipped = 0
        # The first image of the last batch whose losses were finite.
        self._innocent: dict | None = None

    def start(self, iteration: int) -> None:
        """Start the loader's workers, at the batch of ``iteration``."""
        self.data_loader.batch_sampler.first = iteration
        self._batches = iter(self.data_loader)

    def run_step(self) -> None:
        """Compute the gradients of one batch and update the model.

        Raises:
            FloatingPointError: a loss is infinite or NaN; the images that cause it are named, or what to change where
                it is not the images' fault. In float16 a step with such a loss or gradient is left out instead, unless
                more than MAX_SKIPPED_STEPS of them come in a row.
        """
        start = time.perf_counter()
        batch = next(self._batches)
        data_time = time.perf_counter() - start
        seed_everything(mix_seed(self._seed, self.iter, comm.get_rank()))
        if isinstance(self.module, GKDDistiller):
            self.module.gradient_scale = self._scaler.get_scale()
        self.optimizer.zero_grad()
        statistics = self._running_statistics() if self._scaler.is_enabled() else []
        before = [statistic.clone() for statistic in statistics]
        losses = self._backward(batch)
        scale = self._scaler.get_scale()
        fault = self._write_metrics(losses, data_time) or self._update()
        if not fault:
            self._skipped = 0
            self._innocent = batch[0]
            return
        if not self._scaler.is_enabled() or self._skipped == MAX_SKIPPED_STEPS:
            raise FloatingPointError(f"Iteration {self.iter}: {fault}; {self._origin(losses, batch)}")
        self._skipped += 1
        self._scaler.update(scale * self._scaler.get_backoff_factor())
        for statistic, value in zip(statistics, before):
            statistic.copy_(value)
        logging.getLogger(__name__).warning("Iteration %d is left out: %s; scale %g", self.iter, fault, scale)

    def _running_statistics(self) -> list[Tensor]:
        """Those of the batch norms, which a step that is left out must not change: it may hold NaN."""
        norms = [m for m in self.module.modules() if isinstance(m, _NormBase) and m.training]
        return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]

    def _backward(self, batch: list[dict]) -> dict[str, Tensor]:
        """Add up the gradients of the batch's parts; returns the parts' mean losses."""
        size = len(batch) // self._accumulate_steps
        parts = [batch[first : first + size] for first in range(0, len(batch), size)]
        means: dict[str, Tensor] = {}
        for part in parts:
            with contextlib.ExitStack() as stack:
                if part is not parts[-1] and isinstance(self.model, DistributedDataParallel):
                    stack.enter_context(self.model.no_sync())
                with torch.autocast(self._device, self._amp_dtype, enabled=self._amp_dtype is not None):
                    losses = self._forward(part)
                self._scaler.scale(sum(losses.values()) / len(parts)).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach() / len(parts)
        return means

    def _forward(self, part: list[dict]) -> dict[str, Tensor]:
        try:
            return self.model(part)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} Iteration {self.iter}; {self._blame(part)}") from error

    def _write_metrics(self, losses: dict[str, Tensor], data_time: float) -> str:
        """Put the losses, averaged over the processes, into the EventStorage; returns which of them are not finite."""
        numbers = torch.stack([value.float() for value in losses.values()]).tolist()
        rows = comm.all_gather((dict(zip(losses, numbers)), data_time))
        # All processes judge the same numbers alike.
        means = {name: float(np.mean([row[name] for row, _ in rows])) for name in losses}
        if all(math.isfinite(value) for value in means.values()):
            storage = get_event_storage()
            # The slowest process decides.
            storage.put_scalar("data_time", max(seconds for _, seconds in rows))
            storage.put_scalar("total_loss", sum(means.values()))
            storage.put_scalars(**means)
        return ", ".join(f"{name} is {value}" for name, value in means.items() if not math.isfinite(value))

    def _update(self) -> str:
        """Take the optimizer's step; returns why it was left out, if it was."""
        # Gradient clipping, where it is enabled, is part of the optimizer's step and must see unscaled gradients.
        if self._scaler.is_enabled():
            self._scaler.unscale_(self.optimizer)
        scale = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        # The scaler tells of a step that it left out by its scale alone.
        return "a gradient is infinite or NaN" if self._scaler.get_scale() < scale else ""

    def _origin(self, losses: dict[str, Tensor], batch: list[dict]) -> str:
        """Where a fault comes from, of which all processes know."""
        if all(torch.isfinite(value) for value in losses.values()):
            return "the losses of this process are finite"
        return self._blame(batch)

    def _blame(self, batch: list[dict]) -> str:
        """The images that reproduce a fault by themselves, or what to change where the fault is the model's."""
        if not _finite(self.module):
            return (
                "the weights themselves are not finite, as the gradients of a step before were not: resume an earlier "
                f"checkpoint, and {self._advice()}"
            )
        if isinstance(self.module, GKDDistiller) and not _finite(self.module.teacher):
            return "the teacher's weights are not finite: set GKD.TEACHER.WEIGHTS to a sound checkpoint"
        names = [str(x.get("file_name", "an image without file_name")) for x in batch]
        if any(isinstance(m, (nn.SyncBatchNorm, NaiveSyncBatchNorm)) for m in self.module.modules()):
            return (
                "with synchronised norms the images can't be tried one by one. Look at those of the batch, "
                f"{', '.join(names)}; if they are sound, {self._advice()}"
            )
        guilty = [name for name, x in zip(names, batch) if self._fails(x)]
        if not guilty:
            return f"no image of the batch causes it by itself: {self._advice()}"
        others = [self._innocent] if self._innocent is not None else []
        if len(guilty) < len(batch) or (others and not any(map(self._fails, others))):
            return (
                f"of the {counted(len(batch), 'image')} of the batch, these cause it by themselves: {', '.join(guilty)}"
            )
        if len(batch) == 1 and not others:
            return f"{guilty[0]}, the only image of the batch, causes it by itself; if it is sound, {self._advice()}"
        return f"every image causes it, so it is not the images' fault: {self._advice()}"

    def _advice(self) -> str:
        """What to change where a model diverges."""
        advice = "lower SOLVER.BASE_LR, or clip the gradients by SOLVER.CLIP_GRADIENTS"
        if isinstance(self.module, GKDDistiller) and self.module.method:
            advice += ", or lower the weights of the distillation losses whose gkd_ratio/* in metrics.json is above 1"
        frozen = any(isinstance(module, FrozenBatchNorm2d) for module in self.module.modules())
        if self._from_scratch and (frozen or not all(p.requires_grad for p in self.module.parameters())):
            advice += f". MODEL.WEIGHTS is empty, so that frozen layers keep their random values: {from_scratch.ADVICE}"
        return advice

    def _fails(self, image: dict) -> bool:
        try:
            with torch.autocast(self._device, self._amp_dtype, enabled=self._amp_dtype is not None):
                return not all(torch.isfinite(value) for value in self.module([image]).values())
        except FloatingPointError:
            return True

    def state_dict(self) -> dict:
        """The optimizer's and the gradient scaler's state, and the parameters' names: tensors, numbers and strings."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "parameters": self.parameter_names(),
            "grad_scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """
        The optimizer keeps its own parameter groups and hyper-parameters, and takes over what it knows about each
        parameter, such as its momentum.

        Args:
            state_dict: from :meth:`state_dict`, of the same parameters in any order and any groups; without a scaler's
                state the scale is sought anew.
        """
        saved = state_dict["optimizer"]["state"]
        number = {name: index for index, name in enumerate(state_dict["parameters"])}
        numbers = [number[name] for name in self.parameter_names()]
        state = {index: saved[other] for index, other in enumerate(numbers) if other in saved}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if state_dict.get("grad_scaler"):
            self._scaler.load_state_dict(state_dict["grad_scaler"])

    def parameter_names(self) -> list[str]:
        """Names, as in a checkpoint of the model, of the parameters that the optimizer trains, in its order."""
        names = {id(tensor): name for name, tensor in self.module.state_dict(keep_vars=True).items()}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]


def _finite(model: nn.Module) -> bool:
    return all(torch.isfinite(parameter).all() for parameter in model.parameters())
