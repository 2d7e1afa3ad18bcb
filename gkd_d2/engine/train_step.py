"""One optimizer step: its batch in parts, its precision, its random stream and its metrics."""

from __future__ import annotations

import contextlib
import logging
import math
import time

import numpy as np
import torch
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from gkd_d2.data.workers import outliving_sigterm
from gkd_d2.engine.blame import Blame
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.utils.finite import running_statistics
from gkd_d2.utils.random_streams import mix_seed, seed_everything

# In float16 steps whose loss or gradient overflows are left out while the scale is sought; more in a row are an error.
MAX_SKIPPED_STEPS = 20


class TrainStep(TrainerBase):
    """The part of the trainer that Detectron2 calls SimpleTrainer or AMPTrainer.

    Every step draws from a random stream of its seed, iteration and process, so that a resumed run draws what an
    uninterrupted one would.

    Args:
        model: a meta-architecture, or its DistributedDataParallel.
        data_loader: from :func:`gkd_d2.data.build.build_train_loader`.
        optimizer: of the model.
        seed: >= 0.
        accumulate_steps: number of equal parts of a batch whose gradients are computed one after the other and
            averaged, as over so many processes.
        amp_dtype: of autocast, torch.float16 (with a gradient scaler) or torch.bfloat16; None: no autocast.
        from_scratch: whether the model started without pretrained weights; the message of a fault depends on it.

    Attributes:
        stepped: whether the last iteration took the optimizer's step, which in float16 may be left out.
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
        self._device = self.module.device.type
        self._scaler = torch.amp.GradScaler(self._device, enabled=amp_dtype == torch.float16)
        self.stepped = False
        self._batches = None
        self._skipped = 0
        self._blame = Blame(self.module, optimizer, self._autocast, from_scratch=from_scratch)

    def start(self, iteration: int) -> None:
        """Start the loader's workers, at the batch of ``iteration``, from the model's weights as they are."""
        self._blame.start(iteration)
        self.data_loader.batch_sampler.first = iteration
        with outliving_sigterm():
            self._batches = iter(self.data_loader)

    def check_finite(self) -> None:
        """Refuse to go on with a model that holds infinite or NaN values; to be called in all processes.

        Raises:
            FloatingPointError: it does so in one process; the tensors are named.
        """
        faults = [fault for fault in comm.all_gather(self._blame.of_networks(statistics=True)) if fault]
        if faults:
            raise FloatingPointError(f"After iteration {self.iter} {faults[0]}")

    def run_step(self) -> None:
        """Compute the gradients of one batch and update the model.

        Raises:
            FloatingPointError: a loss is infinite or NaN; the images that cause it are named, or what to change where
                it is not the images' fault. In float16 a step with such a loss or gradient is left out instead, unless
                more than MAX_SKIPPED_STEPS of them come in a row.
        """
        start = time.perf_counter()
        batch = self._next_batch()
        data_time = time.perf_counter() - start
        seed_everything(mix_seed(self._seed, self.iter, comm.get_rank()))
        if isinstance(self.module, GKDDistiller):
            self.module.gradient_scale = self._scaler.get_scale()
        self.optimizer.zero_grad()
        # A step that is left out must not change them: they may hold NaN.
        statistics = running_statistics(self.module) if self._scaler.is_enabled() else []
        before = [statistic.clone() for statistic in statistics]
        losses = self._backward(batch)
        scale = self._scaler.get_scale()
        infinite = self._write_metrics(losses, data_time)
        fault = infinite or self._update()
        self.stepped = not fault
        if not fault:
            self._skipped = 0
            self._blame.sound_image = batch[0]
            return
        if not self._scaler.is_enabled() or self._skipped == MAX_SKIPPED_STEPS:
            origin = self._origin(losses, batch, overflow=not infinite)
            raise FloatingPointError(f"Iteration {self.iter}: {fault}; {origin}")
        self._skipped += 1
        self._scaler.update(scale * self._scaler.get_backoff_factor())
        for statistic, value in zip(statistics, before):
            statistic.copy_(value)
        logging.getLogger(__name__).warning("Iteration %d is left out: %s; scale %g", self.iter, fault, scale)

    def _next_batch(self) -> list[dict]:
        try:
            return next(self._batches)
        except (ConnectionError, EOFError):
            # A worker that is killed while it hands over a batch breaks the connection before torch hears of its end,
            # which it tells from a signal's handler.
            time.sleep(1)
            raise

    def _backward(self, batch: list[dict]) -> dict[str, Tensor]:
        """Add up the gradients of the batch's parts; returns the parts' mean losses."""
        size = len(batch) // self._accumulate_steps
        parts = [batch[first : first + size] for first in range(0, len(batch), size)]
        means: dict[str, Tensor] = {}
        for part in parts:
            with contextlib.ExitStack() as stack:
                if part is not parts[-1] and isinstance(self.model, DistributedDataParallel):
                    stack.enter_context(self.model.no_sync())
                with self._autocast():
                    losses = self._forward(part)
                self._scaler.scale(sum(losses.values()) / len(parts)).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach() / len(parts)
        return means

    def _forward(self, part: list[dict]) -> dict[str, Tensor]:
        try:
            return self.model(part)
        except FloatingPointError as error:
            # Detectron2's verdict comes before anything was looked at.
            found = str(error).removesuffix(" Training has diverged.")
            raise FloatingPointError(f"{found} Iteration {self.iter}; {self._blame.of_batch(part)}") from error

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

    def _origin(self, losses: dict[str, Tensor], batch: list[dict], *, overflow: bool) -> str:
        """Where a fault comes from, of which all processes know."""
        wrong = [name for name, value in losses.items() if not value.isfinite()]
        if wrong:
            return self._blame.of_batch(batch, wrong)
        return self._blame.of_gradients() if overflow else "the losses of this process are finite"

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device, self._amp_dtype, enabled=self._amp_dtype is not None)

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
