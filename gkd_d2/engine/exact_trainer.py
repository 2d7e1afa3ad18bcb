"""What all trainers share: runs that are distributed, interrupted and repeated."""

from __future__ import annotations

import logging
import os
import weakref

import torch
from detectron2.engine import hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default as default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from gkd_d2.data.build import BatchSampler
from gkd_d2.engine.from_scratch import consider_loaded, warn_of_frozen_random_weights
from gkd_d2.engine.hooks import Calibration, release_sigterm
from gkd_d2.engine.model_ema import ModelEMA
from gkd_d2.engine.output import naming_output
from gkd_d2.engine.resume import ResumeError, describe_run, run_differences
from gkd_d2.engine.run import Run
from gkd_d2.engine.train_step import TrainStep
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.split import load_running_state, running_state
from gkd_d2.utils.checkpoint import EMA_STATE, StudentCheckpointer
from gkd_d2.utils.finite import check_finite
from gkd_d2.utils.text import listed

# An amp_dtype of a run -> that of autocast.
AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "": None}


class ExactTrainer(TrainerBase):
    """Trains a detector, distilled or alone, whatever kind of config describes it.

    A resumed run continues exactly as an uninterrupted one would, several processes work on CPUs too, batches may be
    computed in parts, and autocast in bfloat16. A class of it builds what is trained and adds its hooks.

    Args:
        run: as its config describes it.
        model: a meta-architecture, on its device.
        data_loader: from :func:`gkd_d2.data.build.seeded_loader`.
        optimizer: of the model.
        scheduler: of the learning rate.
        max_iter: number of iterations.
        seed: >= 0.
        ddp: options of DistributedDataParallel, where there are several processes.

    Attributes:
        ema: the average of the student's weights; None where the run keeps none.

    Raises:
        TypeError: the loader is another one.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        data_loader: DataLoader,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        *,
        max_iter: int,
        seed: int,
        ddp: dict | None = None,
    ):
        # Not that of the next class, which may be Detectron2's DefaultTrainer and build everything itself.
        TrainerBase.__init__(self)
        if not isinstance(getattr(data_loader, "batch_sampler", None), BatchSampler):
            raise TypeError(
                f"the training loader is a {type(data_loader).__name__} that can't start at a given batch, which an "
                "exact resume needs: make it by gkd_d2.data.build.seeded_loader"
            )
        self.run = run
        self._trainer = TrainStep(
            _distributed(model, **(ddp or {})),
            data_loader,
            optimizer,
            seed=seed,
            accumulate_steps=run.accumulate_steps,
            amp_dtype=AMP_DTYPES[run.amp_dtype],
            from_scratch=not run.weights,
        )
        self.scheduler = scheduler
        self.checkpointer = StudentCheckpointer(model, run.output_dir, trainer=weakref.proxy(self))
        options = run.model_ema
        self.ema = ModelEMA(self._student(), options.decay, options.device) if options.enabled else None
        if self.ema is not None:
            self.checkpointer.add_checkpointable(EMA_STATE, self.ema)
        self.start_iter = 0
        self.max_iter = max_iter
        self._described = describe_run(run, len(data_loader.dataset))
        self._running_states: list[dict[str, float]] = []

    @property
    def model(self) -> nn.Module:
        """The meta-architecture, or its DistributedDataParallel."""
        return self._trainer.model

    @property
    def data_loader(self) -> DataLoader:
        """That the training reads."""
        return self._trainer.data_loader

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the model."""
        return self._trainer.optimizer

    def run_step(self) -> None:
        """One iteration: see :class:`TrainStep`; the average follows a step that the optimizer took."""
        self._trainer.iter = self.iter
        self._trainer.run_step()
        if self.ema is not None and self._trainer.stepped:
            self.ema.update()

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint of the output folder, or else the weights that the run starts from.

        All processes must start at one iteration, and from finite weights.

        Where the config differs from that of the resumed run, a warning names the keys. The learning rate and its
        schedule, momentum, weight decay and all else of the config apply from the first resumed iteration. A warning
        also tells of averaged weights that the checkpoint holds and the run does not keep, or the reverse.

        Raises:
            ResumeError: the checkpoint does not hold the whole model, or is of other trainable parameters.
            CheckpointError: it can't be read, or its averaged weights are not those of the model.
            RuntimeError: the processes start at different iterations, as where OUTPUT_DIR is a folder of each machine's
                own.
            ValueError: the teacher or the detector that is trained holds infinite or NaN values.
        """
        resumed = resume and self.checkpointer.has_checkpoint()
        if not (resumed or self.run.weights):
            warn_of_frozen_random_weights(self._student())
        rest = self.checkpointer.resume_or_load(self.run.weights, resume=resume)
        if resumed:
            self.start_iter = self.iter + 1
            consider_loaded(self._student())
        self._settle_ema(resumed, dropped=resumed and EMA_STATE in rest)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise RuntimeError(
                f"the processes would start at iterations {', '.join(map(str, starts))}: OUTPUT_DIR "
                f"{self.run.output_dir} must be one folder that all machines share"
            )
        model = self._trainer.module
        if isinstance(model, GKDDistiller):
            model.check_finite()
        else:
            check_finite(model, "the detector's")

    def _settle_ema(self, resumed: bool, *, dropped: bool) -> None:
        """Start the average where there is none to go on from; say so where a resumed run had, or has, another."""
        logger, source = logging.getLogger(__name__), self.checkpointer.source
        if self.ema is None:
            if dropped:
                logger.warning(
                    "MODEL_EMA.ENABLED is False: the averaged weights that %s holds are dropped, and are not in the "
                    "checkpoints of the resumed run. To go on with them, set it to True",
                    source,
                )
            return
        if resumed and self.ema.started:
            return
        if resumed:
            logger.warning(
                "MODEL_EMA.ENABLED is True, but %s holds no averaged weights: the average starts from its raw weights "
                "at iteration %d",
                source,
                self.start_iter,
            )
        self.ema.start()

    def train(self):
        """Train from ``start_iter`` to the end, and evaluate."""
        if self.ema is not None and not self.ema.started:
            self.ema.start()
        if self.start_iter < self.max_iter:
            self._trainer.start(self.start_iter)
        # TorchScript compiles a function anew once it has seen it run, and its last bits change with that: a resumed
        # run would differ. On a GPU the compiled functions save memory, and nothing is equal bit by bit anyway.
        try:
            with torch.jit.optimized_execution(self.run.device != "cpu"):
                return self._loop()
        finally:
            release_sigterm(self)

    def _loop(self):
        return TrainerBase.train(self, self.start_iter, self.max_iter)

    def after_train(self) -> None:
        """Detectron2's; where the training has failed, what fails here because of that does not take its place."""
        failed = self.iter < self.max_iter
        if failed:
            # Detectron2 would evaluate after a failure in the last iteration, and wait for processes that are gone.
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)]
        try:
            super().after_train()
        except Exception:
            if not failed:
                raise
            logging.getLogger(__name__).exception("After the training had failed, its end did, too:")

    def save(self, name: str, *, resumable: bool = True) -> None:
        """Write a checkpoint; to be called in all processes.

        Args:
            name: of the file, without ".pth".
            resumable: whether a resume shall start from it.

        Raises:
            FloatingPointError: ``resumable`` is set, and the model or the average of its weights holds infinite or NaN
                values: an earlier checkpoint is the one to resume.
            OSError: it can't be written; the message names the last whole one.
        """
        if resumable:
            self._trainer.check_finite()
            self._check_ema()
        self._running_states = comm.all_gather(running_state(self._student()))
        # Of the checkpoint itself the checkpointer tells.
        with naming_output(self.run.output_dir, os.path.join(self.run.output_dir, "last_checkpoint")):
            self.checkpointer.save(name, resumable=resumable, iteration=self.iter)

    def _check_ema(self) -> None:
        """Refuse to go on with an average that holds infinite or NaN values; to be called in all processes."""
        found = comm.all_gather(self.ema.not_finite() if self.ema is not None else [])
        if names := next(filter(None, found), []):
            raise FloatingPointError(
                f"After iteration {self.iter} the averaged weights (MODEL_EMA) are not finite ({listed(names, 3)}): "
                "resume an earlier checkpoint"
            )

    def state_dict(self) -> dict:
        """Detectron2's, and what else a resume needs: the moving averages of each process, and the run's config."""
        return {
            **super().state_dict(),
            # With the optimizer, which Detectron2 0.5 leaves out.
            "_trainer": self._trainer.state_dict(),
            "running_states": self._running_states,
            "run": {**self._described, "optimizer": type(self.optimizer).__name__},
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Detectron2's; a warning names what differs from the run that wrote the checkpoint.

        Raises:
            ResumeError: see :meth:`resume_or_load`.
        """
        source = self.checkpointer.source
        start_anew = (
            f"to start from its weights, set MODEL.WEIGHTS {source}, without --resume and in another OUTPUT_DIR"
        )
        if not {"config", "optimizer"} <= state_dict.get("run", {}).keys():
            raise ResumeError(
                f"{source} was not written by this version of the trainer and can't be resumed: {start_anew}"
            )
        changed = run_differences(state_dict["run"], self._described)
        there, here = state_dict["_trainer"]["parameters"], self._trainer.parameter_names()
        if self.checkpointer.unset or set(there) != set(here):
            names = ("MODEL.", "GKD.", "model.", "the teacher's ")
            of_model = [text for key, text in changed.items() if key.startswith(names)]
            raise ResumeError(
                f"{source} can't be resumed, because the model or its trainable parameters have changed: "
                f"{', '.join(of_model) or 'its code has changed'}; {start_anew}"
            )
        optimizer, other = type(self.optimizer).__name__, state_dict["run"]["optimizer"]
        if optimizer != other:
            raise ResumeError(
                f"{source} can't be resumed, because it was trained by the optimizer {other} and this trainer builds "
                f"{optimizer}: {start_anew}"
            )
        super().load_state_dict(self._without_calibration(state_dict))
        self._trainer.load_state_dict(state_dict["_trainer"])
        self._set_learning_rates()
        if changed:
            logging.getLogger(__name__).warning(
                "From iteration %d the resumed run differs from the one before: %s",
                self.iter + 1,
                ", ".join(changed.values()),
            )
        states = state_dict.get("running_states", [])
        if states:
            load_running_state(self._student(), states[comm.get_rank() % len(states)])

    def _without_calibration(self, state_dict: dict) -> dict:
        """A checkpoint's state, without what was calibrated where the run's weights are fixed; a warning says so."""
        saved = state_dict.get("hooks", {})
        name = Calibration.__qualname__
        if name not in saved or any(isinstance(hook, Calibration) for hook in self._hooks):
            return state_dict
        logging.getLogger(__name__).warning(
            "The weights of the losses that were calibrated in %s are dropped: GKD.BALANCE is not calibrate any more, "
            "and those of the config apply. calibrated_weights.yaml beside it holds them for the config",
            self.checkpointer.source,
        )
        return {**state_dict, "hooks": {other: state for other, state in saved.items() if other != name}}

    def _set_learning_rates(self) -> None:
        """Set those of the iteration that comes next; the optimizer is as new, the scheduler has been loaded."""
        groups = self.optimizer.param_groups
        if self.iter + 1 > self.max_iter:
            # Beyond the end of the schedule there is no rate, and no iteration to use one.
            return
        if isinstance(self.scheduler, LRMultiplier):
            # A function of the iteration alone, unlike some of PyTorch's schedulers.
            self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
            rates = self.scheduler.get_lr()
        else:
            rates = self.scheduler.get_last_lr()
        for group, rate in zip(groups, rates):
            group["lr"] = rate

    def _student(self) -> nn.Module:
        model = self._trainer.module
        return model.student if isinstance(model, GKDDistiller) else model


def _distributed(model: nn.Module, *, fp16_compression: bool = False, **options) -> nn.Module:
    """Wrap a model where there are several processes; Detectron2's own function asks for a GPU in each."""
    if comm.get_world_size() == 1:
        return model
    devices = [torch.cuda.current_device()] if model.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=devices, **{"broadcast_buffers": False, **options})
    if fp16_compression:
        wrapped.register_comm_hook(state=None, hook=default_hooks.fp16_compress_hook)
    return wrapped
