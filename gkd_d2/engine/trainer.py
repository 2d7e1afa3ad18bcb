"""Detectron2's DefaultTrainer with evaluators, image readers that name their file, and a strict checkpointer."""

from __future__ import annotations

import os
import weakref

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from gkd_d2.checkpoint import StudentCheckpointer
from gkd_d2.data.mapper import FileNamingMapper
from gkd_d2.evaluation import KITTIEvaluator


class Trainer(DefaultTrainer):
    """Trains any detector of a Detectron2 config, distilled or alone."""

    def build_hooks(self):
        # DefaultTrainer makes its checkpointer just before its hooks, and offers no method of its own for it.
        self.checkpointer = StudentCheckpointer(self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        return super().build_hooks()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """Detectron2's loader; an image that can't be read is named."""
        return build_detection_train_loader(cfg, mapper=FileNamingMapper(cfg, is_train=True))

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
        coco = COCOEvaluator(dataset_name, output_dir=folder)
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
