"""Detectron2's DefaultTrainer with an evaluator and a checkpointer that refuses what does not fit."""

from __future__ import annotations

import os
import weakref

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm

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
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        _convert_to_coco(dataset_name, folder)
        return COCOEvaluator(dataset_name, output_dir=folder)


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
