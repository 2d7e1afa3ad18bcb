"""Detectron2's own programs take an exported student.

They are run where the environment variable DETECTRON2_TOOLS names the folder tools/ of the source of the Detectron2
that is imported. What they are made of is tested everywhere, by test_detectron2_modules.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from PIL import Image
from tiny import calm

from gkd_d2.export import export_student, read_picture
from gkd_d2.modeling.student import load_student

TOOLS = os.environ.get("DETECTRON2_TOOLS", "")
pytestmark = pytest.mark.skipif(not TOOLS, reason="DETECTRON2_TOOLS does not name the folder of Detectron2's programs")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    """A folder with two images as coco_2017_val, which Detectron2 registers itself."""
    folder = tmp_path_factory.mktemp("datasets")
    images = [{"id": number, "file_name": f"{number}.png", "width": 120, "height": 96} for number in (1, 2)]
    (folder / "coco" / "val2017").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for image in images:
        pixels = rng.integers(0, 255, (96, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "coco" / "val2017" / image["file_name"])
    box = {"bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0}
    content = {
        "info": {},
        "images": images,
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, **box}],
        "categories": [{"id": entry["id"], "name": entry["name"]} for entry in COCO_CATEGORIES if entry["isthing"]],
    }
    (folder / "coco" / "annotations").mkdir()
    (folder / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module", params=["faster", "retinanet"])
def run(request, make_distiller_config, tmp_path_factory) -> Path:
    """The folder of a run, as its distiller leaves it, with the exported student in student/."""

    def change(cfg: CfgNode) -> None:
        for head in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
            head.NUM_CLASSES, head.SCORE_THRESH_TEST = 80, 0.0

    folder = tmp_path_factory.mktemp(request.param)
    cfg = make_distiller_config(folder, request.param, change=change)
    cfg.DATASETS.TEST = ("coco_2017_val",)
    cfg.INPUT.MIN_SIZE_TEST = 96
    cfg.DATALOADER.NUM_WORKERS = 0
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": calm(build_model(cfg)).state_dict()}, folder / "model_final.pth")
    export_student(cfg, folder / "model_final.pth", folder / "student")
    return folder


@pytest.fixture
def call(datasets, tmp_path):
    """Run a program in an empty folder; returns what it printed."""
    # Its demo imports its neighbour by the path that it has in Detectron2's own repository.
    (tmp_path / "vision" / "fair").mkdir(parents=True)
    (tmp_path / "vision" / "fair" / "detectron2").symlink_to(Path(TOOLS).resolve().parent)

    def call(program: Path, *arguments) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(program), *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ
            | {
                "DETECTRON2_DATASETS": str(datasets),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([*sys.path, str(tmp_path)]),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout + done.stderr

    return call


def student(run: Path) -> tuple[str, Path]:
    return "--config-file", run / "student" / "config.yaml"


def test_train_net_detects_what_the_distiller_does(run, call, project, tmp_path):
    call(Path(TOOLS, "train_net.py"), "--eval-only", *student(run), "OUTPUT_DIR", tmp_path / "theirs")
    options = ("MODEL.WEIGHTS", run / "model_final.pth", "OUTPUT_DIR", tmp_path / "ours")
    call(project / "tools" / "train_net.py", "--eval-only", "--config-file", run / "config.yaml", *options)
    theirs, ours = (
        [json.loads(path.read_text()) for path in (tmp_path / name).rglob("coco_instances_results.json")]
        for name in ("theirs", "ours")
    )
    assert len(ours) == 1 and len(ours[0]) > 10
    assert theirs == ours


def test_demo_draws_detections(run, call, datasets, tmp_path):
    image = datasets / "coco" / "val2017" / "1.png"
    printed = call(
        *(Path(TOOLS).parent / "demo" / "demo.py", *student(run), "--input", image, "--output", tmp_path / "drawn.png"),
        *("--confidence-threshold", 0),
    )
    assert "detected " in printed and "detected 0 instances" not in printed
    with Image.open(tmp_path / "drawn.png") as drawn, Image.open(image) as plain:
        assert not np.array_equal(np.asarray(drawn.resize(plain.size)), np.asarray(plain))


def test_analyze_model_counts_what_the_model_has(run, call):
    printed = call(Path(TOOLS, "analyze_model.py"), *student(run), "--tasks", "flop", "parameter", "--num-inputs", 1)
    model = torch.load(run / "student" / "model.pth")["model"]
    parameters = sum(value.numel() for name, value in model.items() if "running_" not in name and "num_" not in name)
    assert "Total GFlops: 0." in printed
    assert f"{parameters / 1e6:.3g}M" in printed


@pytest.mark.parametrize("method", ["tracing", "scripting"])
def test_export_model_makes_a_torchscript_of_it(run, method, call, datasets, tmp_path):
    program = Path(TOOLS, "deploy", "export_model.py")
    call(program, *student(run), "--export-method", method, "--output", tmp_path / "exported")
    cfg = get_cfg()
    cfg.merge_from_file(str(run / "student" / "config.yaml"))
    image = read_picture(cfg, datasets / "coco" / "val2017" / "2.png")
    with torch.no_grad():
        expected = load_student(cfg, run / "student" / "model.pth")([{"image": image}])[0]["instances"]
        script = torch.jit.load(tmp_path / "exported" / "model.ts")
        if method == "tracing":
            boxes, classes, scores, _ = script(image)
        else:
            (found,) = script(({"image": image},))
            boxes, classes, scores = found["pred_boxes"], found["pred_classes"], found["scores"]
    assert len(expected) > 0
    # A RetinaNet's boxes are clipped to the image by what follows the part that is scripted.
    boxes = Boxes(boxes)
    boxes.clip(image.shape[1:])
    torch.testing.assert_close(boxes.tensor, expected.pred_boxes.tensor, atol=1e-3, rtol=0)
    torch.testing.assert_close(scores, expected.scores, atol=1e-5, rtol=0)
    assert torch.equal(classes, expected.pred_classes)
