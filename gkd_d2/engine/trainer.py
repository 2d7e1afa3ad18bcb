"""Detectron2's DefaultTrainer, for runs that are distributed, interrupted and repeated."""

from __future__ import annotations

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import DefaultTrainer, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from gkd_d2.data.build import build_train_loader
from gkd_d2.data.mapper import FileNamingMapper
from gkd_d2.engine.exact_trainer import ExactTrainer
from gkd_d2.engine.hooks import FirstLines, PeriodicSaver, add_distillation_hooks
from gkd_d2.engine.model_ema import ModelEMA, named_ema
from gkd_d2.engine.output import naming_output
from gkd_d2.engine.resume import settle_seed
from gkd_d2.engine.run import YacsRun
from gkd_d2.engine.writers import build_writers
from gkd_d2.evaluation import build_evaluator


class Trainer(ExactTrainer, DefaultTrainer):
    """Trains any detector of a Detectron2 config of yacs, distilled or alone; see :class:`ExactTrainer`.

    What a class derived from Detectron2's DefaultTrainer may change, such as build_evaluator, may be changed here too.

    Args:
        cfg: of the run. Where SEED is negative one is drawn; see :func:`settle_seed`.
    """

    def __init__(self, cfg: CfgNode):
        cfg = self.auto_scale_workers(settle_seed(cfg, resume=False), comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        super().__init__(
            YacsRun(cfg),
            model,
            self.build_train_loader(cfg),
            optimizer,
            self.build_lr_scheduler(cfg, optimizer),
            max_iter=cfg.SOLVER.MAX_ITER,
            seed=cfg.SEED,
        )
        self.cfg = cfg
        self.register_hooks([*self.build_hooks(), FirstLines()])
        add_distillation_hooks(self)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Detectron2's; it also scales the counts of GKD as it does its own.

        These are WARMUP_ITERS, BALANCE_ITERS, WATCH_PERIOD and VIS_PERIOD, of which the last three stay at 1 or more.
        """
        reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if reference in (0, num_workers):
            return scaled
        scale = num_workers / reference
        frozen = scaled.is_frozen()
        scaled.defrost()
        for key, least in (("WARMUP_ITERS", 0), ("BALANCE_ITERS", 1), ("WATCH_PERIOD", 1), ("VIS_PERIOD", 1)):
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
        averaged = [hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self._test_average)] if self.ema is not None else []
        # Before the writers, which close at the end.
        augmented = [hooks.EvalHook(0, self._test_with_augmentation)] if self.cfg.TEST.AUG.ENABLED else []
        return [
            *built[:slow],
            saver,
            *built[slow:evaluation],
            *again,
            built[evaluation],
            *averaged,
            *augmented,
            *built[evaluation + 1 :],
        ]

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's, whose errors name what can't be written; see gkd_d2.engine.writers."""
        return build_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def _loop(self):
        return DefaultTrainer.train(self)

    def _test_average(self) -> dict:
        return self.test_with_EMA(self.cfg, self.model, self.ema)

    def _test_with_augmentation(self) -> dict:
        return self.test_with_TTA(self.cfg, self._student())

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """An endless loader whose batches depend on the seed and the iteration alone; see gkd_d2.data.build."""
        return build_train_loader(cfg, FileNamingMapper(DatasetMapper(cfg, is_train=True)))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """Detectron2's loader; an image that can't be read is named."""
        mapper = FileNamingMapper(DatasetMapper(cfg, is_train=False))
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

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
    def test_with_EMA(cls, cfg: CfgNode, model: nn.Module, ema: ModelEMA) -> dict:
        """Evaluate the average of a model's weights; the model is as before afterwards.

        Args:
            cfg: of the run.
            model: a meta-architecture, or its DistributedDataParallel.
            ema: of its weights, or of its student's.

        Returns:
            As :meth:`test` does, "_EMA" appended to each of the outer keys.
        """
        logging.getLogger(__name__).info("Running inference with averaged weights (MODEL_EMA) ...")
        with ema.applied():
            return named_ema(cls.test(cfg, model, cls._build_evaluators(cfg, "inference_EMA")))

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
        evaluators = cls._build_evaluators(cfg, "inference_TTA")
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{key}_TTA": value for key, value in results.items()}

    @classmethod
    def _build_evaluators(cls, cfg: CfgNode, folder: str) -> list[DatasetEvaluator]:
        """One for each dataset, which writes to a folder of its own below ``folder`` of OUTPUT_DIR."""
        place = os.path.join(cfg.OUTPUT_DIR, folder)
        return [cls.build_evaluator(cfg, name, os.path.join(place, name)) for name in cfg.DATASETS.TEST]
