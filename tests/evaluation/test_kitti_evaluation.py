"""The Detectron2 evaluator: against folders, with two processes, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from kitti_detections import detect, evaluate, evaluate_part

from gkd_d2.data import register_kitti
from gkd_d2.data.datasets.kitti_labels import CLASSES
from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.evaluation import KITTIEvaluator
from gkd_d2.evaluation.kitti_evaluation import flat_metrics
from gkd_d2.evaluation.kitti_results import evaluate_folders

PREFIX = "kitti_evaluation_toy"


@pytest.fixture
def root(tmp_path):
    make_toy_kitti(tmp_path / "data", num_train=12, num_val=1)
    register_kitti(PREFIX, tmp_path / "data")
    yield tmp_path / "data"
    for name in (f"{PREFIX}_train", f"{PREFIX}_val", f"{PREFIX}_test"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_equals_the_evaluation_of_the_files_it_writes(root, tmp_path):
    records = DatasetCatalog.get(f"{PREFIX}_train")
    evaluator = KITTIEvaluator(f"{PREFIX}_train", tmp_path / "out", write_results=True)
    metrics = evaluate(evaluator, records)["kitti"]
    folder = tmp_path / "out" / "kitti_results"
    assert len(list(folder.iterdir())) == 12
    result, num_images = evaluate_folders(root / "training" / "label_2", folder)
    assert num_images == 12
    assert metrics == flat_metrics(result)
    assert list(metrics)[0] == "AP_moderate"
    mean = sum(metrics[f"{name}-moderate-R40"] for name in CLASSES) / 3
    assert metrics["AP_moderate"] == pytest.approx(mean) and mean > 0
    assert all(math.isfinite(value) for value in metrics.values())
    # Only what was processed counts.
    half = evaluate(KITTIEvaluator(f"{PREFIX}_train"), records[:6])["kitti"]
    assert half["AP11_hard"] < metrics["AP11_hard"]


def test_two_processes_equal_one(root, tmp_path):
    expected = evaluate(KITTIEvaluator(f"{PREFIX}_train"), DatasetCatalog.get(f"{PREFIX}_train"))
    mp.spawn(evaluate_part, args=(PREFIX, root, tmp_path), nprocs=2)
    assert dict(torch.load(tmp_path / "0.pth", weights_only=False)) == dict(expected)
    assert torch.load(tmp_path / "1.pth", weights_only=False) == {}
    assert len(list((tmp_path / "kitti_results").iterdir())) == 12


def test_nothing_to_evaluate(root, caplog):
    assert KITTIEvaluator(f"{PREFIX}_train").evaluate() == {}
    assert "did not receive any image" in caplog.text


def test_what_is_refused(root):
    evaluator = KITTIEvaluator(f"{PREFIX}_val")
    record = DatasetCatalog.get(f"{PREFIX}_val")[0]
    evaluator.process([record], [detect(record)])
    with pytest.raises(ValueError, match="image 500000 was evaluated already"):
        evaluator.process([record], [detect(record)])
    with pytest.raises(ValueError, match="write_results needs an output_dir"):
        KITTIEvaluator(f"{PREFIX}_val", write_results=True)
    DatasetCatalog.register("kitti_evaluation_other", lambda: [{"file_name": "a.jpg", "image_id": 1}])
    try:
        metadata = MetadataCatalog.get("kitti_evaluation_other")
        with pytest.raises(ValueError, match="has the classes none"):
            KITTIEvaluator("kitti_evaluation_other")
        metadata.thing_classes = ["Car"]
        with pytest.raises(ValueError, match="the record of a.jpg has no kitti_objects"):
            KITTIEvaluator("kitti_evaluation_other")
    finally:
        DatasetCatalog.remove("kitti_evaluation_other")
        MetadataCatalog.remove("kitti_evaluation_other")
