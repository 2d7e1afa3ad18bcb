"""Detectron2's DefaultTrainer, for runs that are distributed, interrupted and repeated."""

from __future__ import annotations

import logging
import os
import weakref

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.engine import DefaultTrainer, hooks
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gkd_d2.checkpoint import StudentCheckpointer
from gkd_d2.data.loader import build_train_loader
from gkd_d2.data.mapper import FileNamingMapper
from gkd_d2.detector import load_running_state, running_state
from gkd_d2.distiller import GKDDistiller
from gkd_d2.engine.from_scratch import warn_of_frozen_random_weights
from gkd_d2.engine.hooks import PeriodicSaver, add_distillation_hooks
from gkd_d2.engine.train_step import TrainStep
from gkd_d2.evaluation import CompletingCOCOEvaluator, KITTIEvaluator

_AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def settle_seed(cfg: CfgNode, *, resume: bool) -> CfgNode:
    """Draw a seed where SEED is negative, for all processes alike; a resumed run keeps the one it had.

    Args:
        cfg: of the run; its OUTPUT_DIR/config.yaml names the seed of the run that is resumed.
        resume: whether a run in OUTPUT_DIR is resumed.

    Returns:
        A frozen config whose SEED is >= 0.
    """
    if cfg.SEED >= 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = comm.shared_random_seed()
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if resume and os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            cfg.SEED = yaml.safe_load(file)["SEED"]
    # The main process writes the file anew soon after.
    comm.synchronize()
    cfg.freeze()
    return cfg


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
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = StudentCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._running_states: list[dict[str, float]] = []
        self.register_hooks(self.build_hooks())
        add_distillation_hooks(self)

    def build_hooks(self) -> list[hooks.HookBase]:
        """Detectron2's, with a checkpointer for all processes; those of a distillation are added to them."""
        built = [hook for hook in super().build_hooks() if not isinstance(hook, hooks.PeriodicCheckpointer)]
        # A checkpoint comes before an evaluation, which takes long and may fail.
        place = next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
        return [*built[:place], PeriodicSaver(self.cfg.SOLVER.CHECKPOINT_PERIOD), *built[place:]]

    def resume_or_load(self, resume: bool = True) -> None:
        """Detectron2's; it also checks that all processes start at one iteration.

        Raises:
            RuntimeError: they don't, as where OUTPUT_DIR is a folder of each machine's own.
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

    def train(self):
        """Train from ``start_iter`` to the end, and evaluate."""
        if self.start_iter < self.max_iter:
            self._trainer.start(self.start_iter)
        # TorchScript compiles a function anew once it has seen it run, and its last bits change with that: a resumed
        # run would differ. On a GPU the compiled functions save memory, and nothing is equal bit by bit anyway.
        with torch.jit.optimized_execution(self.cfg.MODEL.DEVICE != "cpu"):
            return super().train()

    def save(self, name: str, *, resumable: bool = True) -> None:
        """Write a checkpoint; to be called in all processes.

        Args:
            name: of the file, without ".pth".
            resumable: whether a resume shall start from it.
        """
        self._running_states = comm.all_gather(running_state(self._student()))
        self.checkpointer.save(name, resumable=resumable, iteration=self.iter)

    def state_dict(self) -> dict:
        """Detectron2's, and what else a resume needs: the moving averages of each process, and what it depends on."""
        return {
            **super().state_dict(),
            # With the optimizer, which Detectron2 0.5 leaves out.
            "_trainer": self._trainer.state_dict(),
            "running_states": self._running_states,
            "run": self._identity(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Warns where the resumed run can't continue exactly."""
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        was, now = state_dict.get("run", {}), self._identity()
        changed = [f"{key} was {was.get(key)} and is {value}" for key, value in now.items() if was.get(key) != value]
        if changed:
            logging.getLogger(__name__).warning(
                "The resumed run does not continue exactly where it was left: %s", ", ".join(changed)
            )
        states = state_dict.get("running_states", [])
        if states:
            load_running_state(self._student(), states[comm.get_rank() % len(states)])

    def _identity(self) -> dict[str, int]:
        """What the order of images and the random draws depend on."""
        return {
            "SEED": self.cfg.SEED,
            "SOLVER.IMS_PER_BATCH": self.cfg.SOLVER.IMS_PER_BATCH,
            "SOLVER.ACCUMULATE_STEPS": self.cfg.SOLVER.ACCUMULATE_STEPS,
            "number of processes": comm.get_world_size(),
            "number of images": len(self._trainer.data_loader.dataset),
        }

    def _student(self) -> nn.Module:
        model = self._trainer.module
        return model.student if isinstance(model, GKDDistiller) else model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """An endless loader whose batches depend on the seed and the iteration alone; see gkd_d2.data.loader."""
        return build_train_loader(cfg, FileNamingMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """Detectron2's loader; an image that can't be read is named."""
        return build_detection_test_loader(cfg, dataset_name, mapper=FileNamingMapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """COCO-style average precision; for datasets of KITTI's form the official one too, ahead of it.

        Raises:
            NotImplementedError: the dataset's ``evaluator_type`` is another.
        """
        metadata = MetadataCatalog.get(dataset_name)
        kind = metadata.get("evaluator_type", "coco")
        if kind not in ("coco", "kitti"):
            raise NotImplementedError(f"dataset {dataset_name} asks for the evaluator {kind!r}, known are coco, kitti")
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        if not metadata.get("kitti_labelled", True):
            return KITTIEvaluator(dataset_name, folder, write_results=True)
        _convert_to_coco(dataset_name, folder)
        coco = CompletingCOCOEvaluator(dataset_name, output_dir=folder)
        if kind == "coco":
            return coco
        return DatasetEvaluators([KITTIEvaluator(dataset_name, folder, write_results=cfg.GKD.KITTI_RESULTS), coco])


def _convert_to_coco(dataset_name: str, folder: str) -> None:
    """Write a dataset's ground truth in COCO's form anew, once a process.

    COCOEvaluator would do so, but takes a file that an earlier run left in ``folder`` even if the data have changed.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("json_file") is not None:
        return
    path = os.path.join(folder, f"{dataset_name}_coco_format.json")
    if comm.is_main_process():
        convert_to_coco_json(dataset_name, path, allow_cached=False)
    comm.synchronize()
    metadata.json_file = path


def _distributed(model: nn.Module) -> nn.Module:
    """Wrap a model where there are several processes; Detectron2's own function asks for a GPU in each."""
    if comm.get_world_size() == 1:
        return model
    devices = [torch.cuda.current_device()] if model.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
