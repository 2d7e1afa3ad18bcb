"""Detectron2's DefaultTrainer with an evaluator and a checkpointer that refuses what does not fit."""

from __future__ import annotations

import os
import weakref

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

from gkd_d2.checkpoint import StudentCheckpointer


class Trainer(DefaultTrainer):
    """Trains any detector of a Detectron2 config, distilled or alone."""

    def build_hooks(self):
        # DefaultTrainer makes its checkpointer just before its hooks, and offers no method of its own for it.
        self.checkpointer = StudentCheckpointer(self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        return super().build_hooks()

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """COCO-style average precision.

        Raises:
            NotImplementedError: the dataset's ``evaluator_type`` is another.
        """
        kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", "coco")
        if kind != "coco":
            raise NotImplementedError(f"dataset {dataset_name} asks for the evaluator {kind!r}, known is 'coco'")
        return COCOEvaluator(
            dataset_name, output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        )
