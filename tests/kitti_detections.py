"""Detections about the objects of KITTI records, and their evaluation in one process of two."""

from __future__ import annotations

import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from gkd_d2.data import register_kitti
from gkd_d2.data.datasets.kitti_labels import CLASSES
from gkd_d2.evaluation import KITTIEvaluator


def detect(record):
    """Detections about the objects of a record, decided by its id."""
    generator = torch.Generator().manual_seed(int(record["image_id"]))
    objects = [obj for obj in record["kitti_objects"] if obj["type"] in CLASSES]
    instances = Instances((record["height"], record["width"]))
    boxes = torch.tensor([obj["bbox"] for obj in objects], dtype=torch.float32).reshape(-1, 4)
    instances.pred_boxes = Boxes(boxes + torch.rand(boxes.shape, generator=generator))
    instances.pred_classes = torch.tensor([CLASSES.index(obj["type"]) for obj in objects], dtype=torch.int64)
    instances.scores = torch.rand(len(objects), generator=generator)
    return {"instances": instances}


def evaluate(evaluator, records):
    evaluator.reset()
    for record in records:
        evaluator.process([{key: record[key] for key in ("file_name", "image_id")}], [detect(record)])
    return evaluator.evaluate()


def evaluate_part(rank, prefix, root, folder):
    """One of two processes; spawned, so that it has to lie in a module of its own."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    register_kitti(prefix, root)
    comm.synchronize()
    records = DatasetCatalog.get(f"{prefix}_train")
    evaluator = KITTIEvaluator(f"{prefix}_train", folder, write_results=True)
    # Not the halves that a loader would make: their sizes differ.
    results = evaluate(evaluator, records[:3] if rank else records[3:])
    torch.save(results, f"{folder}/{rank}.pth")
    # The second process has less to do; gloo aborts one that leaves while the other still talks to it.
    comm.synchronize()
    dist.destroy_process_group()
