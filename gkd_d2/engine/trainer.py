"""Detectron2's DefaultTrainer, for runs that are distributed, interrupted and repeated."""

from __future__ import annotations

import logging
import os
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gkd_d2.data.build import build_train_loader
from gkd_d2.data.mapper import FileNamingMapper
from gkd_d2.engine.from_scratch import warn_of_frozen_random_weights
from gkd_d2.engine.hooks import FirstLines, PeriodicSaver, add_distillation_hooks, release_sigterm
from gkd_d2.engine.output import naming_output
from gkd_d2.engine.resume import ResumeError, describe_run, run_differences, settle_seed
from gkd_d2.engine.train_step import TrainStep
from gkd_d2.engine.writers import build_writers
from gkd_d2.evaluation import build_evaluator
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.split import load_running_state, running_state
from gkd_d2.utils.checkpoint import StudentCheckpointer
from gkd_d2.utils.finite import check_finite

_AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Trainer(DefaultTrainer):
    """Trains any detector of a Detectron2 config, distilled or alone.

    Beyond Detectron2's own: a resumed run continues exactly as an uninterrupted one would, several processes work on
    CPUs too, batches may be computed in parts, and autocast in bfloat16.

    Args:
        cfg: of the run. Where SEED is negative one is drawn; see :func:`settle_seed`.
    """

    def __init__(self, cfg: CfgNode):
        # Not DefaultTrainer's own, which wraps a model for GPUs only and starts the loader before a resume is known.
        super(DefaultTrainer, self).__init__()
        cfg = self.auto_scale_workers(settle_seed(cfg, resume=False), comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = TrainStep(
            _distributed(model),
            self.build_train_loader(cfg),
            optimizer,
            seed=cfg.SEED,
            accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
            amp_dtype=_AMP_DTYPES[cfg.SOLVER.AMP.DTYPE] if cfg.SOLVER.AMP.ENABLED else None,
            from_scratch=not cfg.MODEL.WEIGHTS,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = StudentCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._run = describe_run(cfg, len(self._trainer.data_loader.dataset))
        self._running_states: list[dict[str, float]] = []
        self.register_hooks([*self.build_hooks(), FirstLines()])
        add_distillation_hooks(self)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Detectron2's; it also scales GKD.WARMUP_ITERS, GKD.WATCH_PERIOD and GKD.VIS_PERIOD as it does its own counts.

        A period above 0 stays at 1 or more.
        """
        reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if reference in (0, num_workers):
            return scaled
        scale = num_workers / reference
        frozen = scaled.is_frozen()
        scaled.defrost()
        for key, least in (("WARMUP_ITERS", 0), ("WATCH_PERIOD", 1), ("VIS_PERIOD", 1)):
            if cfg.GKD[key] > 0:
                scaled.GKD[key] = max(least, round(cfg.GKD[key] / scale))
        if frozen:
            scaled.freeze()
        return scaled

    def build_hooks(self) -> list[hooks.HookBase]:
        """Detectron2's, with a checkpointer for all processes; those of a distillation are added to them."""
        built = [h for h in super().build_hooks() if h is not None and not isinstance(h, hooks.PeriodicCheckpointer)]
        saver = PeriodicSaver(self.cfg.SOLVER.CHECKPOINT_PERIOD)
        # A checkpoint comes before what takes long and may fail, and again after PreciseBN, which changes the model.
        slow = next(i for i, hook in enumerate(built) if isinstance(hook, (hooks.PreciseBN, hooks.EvalHook)))
        evaluation = next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
        again = [saver] if evaluation > slow else []
        # Before the writers, which close at the end.
        augmented = [hooks.EvalHook(0, self._test_with_augmentation)] if self.cfg.TEST.AUG.ENABLED else []
        return [
            *built[:slow],
            saver,
            *built[slow:evaluation],
            *again,
            built[evaluation],
            *augmented,
            *built[evaluation + 1 :],
        ]

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's, whose errors name what can't be written; see gkd_d2.engine.writers."""
        return build_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def resume_or_load(self, resume: bool = True) -> None:
        """Detectron2's; it also checks that all processes start at one iteration, and from finite weights.

        Where the config differs from that of the resumed run, a warning names the keys. The learning rate and its
        schedule, momentum, weight decay and all else of the config apply from the first resumed iteration.

        Raises:
            ResumeError: the checkpoint does not hold the whole model, or is of other trainable parameters.
            RuntimeError: the processes start at different iterations, as where OUTPUT_DIR is a folder of each machine's
                own.
            ValueError: the teacher or the detector that is trained holds infinite or NaN values.
        """
        if not (resume and self.checkpointer.has_checkpoint()):
            warn_of_frozen_random_weights(self.cfg, self._student())
        super().resume_or_load(resume)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise RuntimeError(
                f"the processes would start at iterations {', '.join(map(str, starts))}: OUTPUT_DIR "
                f"{self.cfg.OUTPUT_DIR} must be one folder that all machines share"
            )
        model = self._trainer.module
        if isinstance(model, GKDDistiller):
            model.check_finite()
        else:
            check_finite(model, "the detector's")

    def train(self):
        """Train from ``start_iter`` to the end, and evaluate."""
        if self.start_iter < self.max_iter:
            self._trainer.start(self.start_iter)
        # TorchScript compiles a function anew once it has seen it run, and its last bits change with that: a resumed
        # run would differ. On a GPU the compiled functions save memory, and nothing is equal bit by bit anyway.
        try:
            with torch.jit.optimized_execution(self.cfg.MODEL.DEVICE != "cpu"):
                return super().train()
        finally:
            release_sigterm(self)

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
            FloatingPointError: ``resumable`` is set, and the model holds infinite or NaN values: an earlier checkpoint
                is the one to resume.
            OSError: it can't be written; the message names the last whole one.
        """
        if resumable:
            self._trainer.check_finite()
        self._running_states = comm.all_gather(running_state(self._student()))
        # Of the checkpoint itself the checkpointer tells.
        with naming_output(self.cfg.OUTPUT_DIR, os.path.join(self.cfg.OUTPUT_DIR, "last_checkpoint")):
            self.checkpointer.save(name, resumable=resumable, iteration=self.iter)

    def state_dict(self) -> dict:
        """Detectron2's, and what else a resume needs: the moving averages of each process, and the run's config."""
        return {
            **super().state_dict(),
            # With the optimizer, which Detectron2 0.5 leaves out.
            "_trainer": self._trainer.state_dict(),
            "running_states": self._running_states,
            "run": {**self._run, "optimizer": type(self.optimizer).__name__},
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
        changed = run_differences(state_dict["run"], self._run)
        there, here = state_dict["_trainer"]["parameters"], self._trainer.parameter_names()
        if self.checkpointer.unset or set(there) != set(here):
            of_model = [text for key, text in changed.items() if key.startswith(("MODEL.", "GKD."))]
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
        super().load_state_dict(state_dict)
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

    def _test_with_augmentation(self) -> dict:
        return self.test_with_TTA(self.cfg, self._student())

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """An endless loader whose batches depend on the seed and the iteration alone; see gkd_d2.data.build."""
        return build_train_loader(cfg, FileNamingMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """Detectron2's loader; an image that can't be read is named."""
        return build_detection_test_loader(cfg, dataset_name, mapper=FileNamingMapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """COCO-style average precision; for datasets of KITTI's form the official one and VOC's too, ahead of it.

        Raises:
            ValueError: the dataset's ``evaluator_type`` is another.
        """
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return build_evaluator(
            dataset_name, folder, kitti_results=cfg.GKD.KITTI_RESULTS, voc_strict=cfg.GKD.KITTI_VOC_STRICT
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict:
        """Detectron2's.

        Raises:
            OutputError: the files of the evaluation can't be written to OUTPUT_DIR.
        """
        with naming_output(cfg.OUTPUT_DIR, f"a file of the evaluation in {cfg.OUTPUT_DIR}"):
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Evaluate with test-time augmentation, as Detectron2's tools/train_net.py does.

        Args:
            cfg: of the run.
            model: a GeneralizedRCNN.

        Returns:
            As :meth:`test` does, "_TTA" appended to each of the outer keys.
        """
        logging.getLogger(__name__).info("Running inference with test-time augmentation ...")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, os.path.join(folder, name)) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{key}_TTA": value for key, value in results.items()}


def _distributed(model: nn.Module) -> nn.Module:
    """Wrap a model where there are several processes; Detectron2's own function asks for a GPU in each."""
    if comm.get_world_size() == 1:
        return model
    devices = [torch.cuda.current_device()] if model.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
