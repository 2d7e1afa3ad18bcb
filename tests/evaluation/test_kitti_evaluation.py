"""The Detectron2 evaluator: against folders, with two processes, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from kitti_detections import detect, evaluate, evaluate_part
from kitti_folder import CAR, CYCLIST, DONT_CARE, PEDESTRIAN, VAN, write_kitti
from PIL import Image
from tiny import detector_config

from gkd_d2.data import register_kitti
from gkd_d2.data.datasets.builtin import register_kitti_testing
from gkd_d2.data.datasets.kitti_labels import CLASSES
from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.engine.trainer import Trainer
from gkd_d2.evaluation import KITTIEvaluator
from gkd_d2.evaluation.kitti_report import flat_metrics
from gkd_d2.evaluation.kitti_results import evaluate_folders

PREFIX = "kitti_evaluation_toy"


@pytest.fixture
def registered():
    yield lambda root: register_kitti(PREFIX, root)
    for name in (f"{PREFIX}_train", f"{PREFIX}_val", f"{PREFIX}_test"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.fixture
def root(tmp_path, registered):
    make_toy_kitti(tmp_path / "data", num_train=12, num_val=1)
    registered(tmp_path / "data")
    return tmp_path / "data"


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


LABELS = {"a": "\n".join([CAR, VAN, PEDESTRIAN, CYCLIST, DONT_CARE]), "b": CAR, "c": CAR}
# Of two cars the first is found second, the second fourth; between them come a Van and a DontCare region.
FOUND = {
    "a": [
        ([80, 60, 99, 90], 0, 0.95),
        ([10, 20, 60, 50], 0, 0.9),
        ([160, 10, 190, 40], 0, 0.85),
        ([100, 10, 120, 70], 1, 0.7),
    ],
    "b": [([10, 20, 60, 50], 0, 0.8)],
}


@pytest.mark.parametrize(("strict", "car"), [(False, 100), (True, 50)])
def test_the_metric_of_voc(strict, car, registered, main_of_tool, tmp_path, caplog, capsys):
    """From the config to the numbers; the tool says the same of the files."""
    data = write_kitti(tmp_path / "data", LABELS, {"train": "c\n", "val": "a\nb\n"})
    registered(data)
    cfg = detector_config("retinanet")
    cfg.GKD.KITTI_RESULTS, cfg.GKD.KITTI_VOC_STRICT = True, strict
    evaluator = Trainer.build_evaluator(cfg, f"{PREFIX}_val", str(tmp_path / "out"))
    evaluator.reset()
    for record in DatasetCatalog.get(f"{PREFIX}_val"):
        boxes, categories, scores = zip(*FOUND[record["image_id"]])
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.pred_classes, instances.scores = torch.tensor(categories), torch.tensor(scores)
        evaluator.process([record], [{"instances": instances}])
    caplog.set_level("INFO")
    metrics = evaluator.evaluate()["kitti"]
    # Strict: precision 1/2 at both recalls. The pedestrian is found, the cyclist missed.
    expected = {"Car-AP50_voc": car, "Pedestrian-AP50_voc": 100, "Cyclist-AP50_voc": 0, "mAP50_voc": (car + 100) / 3}
    assert {name: metrics[name] for name in metrics if "voc" in name} == pytest.approx(expected)
    # What Detectron2 prints in its summary: names without a hyphen.
    means = [name for name in metrics if "-" not in name]
    assert means == ["AP_moderate", "AP_easy", "AP_hard", "AP11_moderate", "AP11_easy", "AP11_hard", "mAP50_voc"]
    table = [record.getMessage() for record in caplog.records if "mean" in record.getMessage()]
    assert len(table) == 1 and ("AP50 VOC, strict |" if strict else "AP50 VOC |") in table[0]
    assert table[0].splitlines()[-1].endswith(f" {(car + 100) / 3:.2f} |")

    options = ["--labels", data / "training" / "label_2", "--results", tmp_path / "out" / "kitti_results"]
    options += ["--json", tmp_path / "ap.json", *["--voc-strict"] * strict]
    assert not main_of_tool("evaluate_kitti.py", *options)
    assert capsys.readouterr().out.strip().endswith(table[0])
    assert flat_metrics(json.loads((tmp_path / "ap.json").read_text())) == metrics


def test_without_labels_there_are_files_and_no_metric(registered, tmp_path):
    data = write_kitti(tmp_path / "data", LABELS, {"train": "c\n", "val": "a\nb\n"})
    (data / "testing" / "image_2").mkdir(parents=True)
    Image.new("RGB", (200, 100)).save(data / "testing" / "image_2" / "000000.png")
    registered(data)
    register_kitti_testing(f"{PREFIX}_test", data)
    evaluator = Trainer.build_evaluator(detector_config("retinanet"), f"{PREFIX}_test", str(tmp_path / "out"))
    record = DatasetCatalog.get(f"{PREFIX}_test")[0] | {"kitti_objects": [{"type": "Car", "bbox": [10, 20, 60, 50]}]}
    assert evaluate(evaluator, [record]) == {}
    assert (tmp_path / "out" / "kitti_results" / "000000.txt").read_text().startswith("Car ")


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
