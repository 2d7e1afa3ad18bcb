"""Exported students are plain Detectron2 models, in a process that knows nothing of this project."""

import subprocess
import sys

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import HAS_EXPORTER, META_ARCHITECTURES, calm, needs_exporter, training_batch

from gkd_d2.export import read_picture
from gkd_d2.modeling.student import load_student

STOCK = """
import sys
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

torch.set_num_threads(1)
folder = sys.argv[1]
cfg = get_cfg()
cfg.merge_from_file(f"{folder}/config.yaml")
model = build_model(cfg).eval()
DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
with torch.no_grad():
    found = [output["instances"].get_fields() for output in model(torch.load(f"{folder}/inputs.pth"))]
assert not any(name.startswith("gkd_d2") for name in sys.modules)
torch.save([fields | {"pred_boxes": fields["pred_boxes"].tensor} for fields in found], f"{folder}/found.pth")
"""


@pytest.fixture
def distilled(distiller_config, tmp_path):
    """Train a tiny distiller one step and leave what a run leaves; return its folder and the distiller."""

    def make(kind):
        cfg = distiller_config(kind, channels=8)
        cfg.GKD.LOSS_WEIGHTS.RELATION = 1e-5
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
        distiller = calm(build_model(cfg))
        optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-6, momentum=0.9)
        with EventStorage():
            sum(distiller(training_batch()).values()).backward()
        optimizer.step()
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.yaml").write_text(cfg.dump())
        DetectionCheckpointer(distiller, str(folder), optimizer=optimizer).save("model_final", iteration=0)
        return folder, distiller.eval()

    return make


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_stock_detectron2_detects_the_same_bit_for_bit(kind, distilled, run_here, tmp_path):
    folder, distiller = distilled(kind)
    checkpoint = torch.load(folder / "model_final.pth")
    assert {"align", "method"} < {name.partition(".")[0] for name in checkpoint["model"]}
    output = tmp_path / "student"
    status, printed = run_here("export_student.py", "--weights", folder, "--output", output)
    assert status == 0 and f"checkpoint: {output / 'model.pth'}" in printed

    exported = torch.load(output / "model.pth")
    assert exported.keys() == {"model"}
    assert exported["model"].keys() == distiller.student.state_dict().keys()
    config = (output / "config.yaml").read_text()
    assert "GKD" not in config
    assert f"META_ARCHITECTURE: {META_ARCHITECTURES.get(kind, 'GeneralizedRCNN')}\n" in config

    inputs = [{"image": x["image"], "height": 200, "width": 300} for x in training_batch()]
    torch.save(inputs, output / "inputs.pth")
    command = [sys.executable, "-W", "ignore", "-c", STOCK, str(output)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = [x["instances"] for x in distiller(inputs)]
    for theirs, ours in zip(torch.load(output / "found.pth"), expected):
        assert len(ours) > 0
        assert torch.equal(theirs["pred_boxes"], ours.pred_boxes.tensor)
        assert torch.equal(theirs["scores"], ours.scores)
        assert torch.equal(theirs["pred_classes"], ours.pred_classes)


@pytest.fixture
def export(demo, run_here, tmp_path, monkeypatch):
    """Export the demo's distilled student by the config of its run; return the folder and what was printed."""

    monkeypatch.setenv("DETECTRON2_DATASETS", str(demo[0] / "datasets"))

    def run(*arguments, status=0):
        output = tmp_path / "student"
        weights = demo[0] / "student_distilled" / "model_final.pth"
        ended, printed = run_here("export_student.py", "--weights", weights, "--output", output, *arguments)
        assert ended == status, printed
        return output, printed

    return run


def test_half_precision_halves_the_file(demo, export):
    output, printed = export("--fp16")
    parameters = sum(value.numel() for value in torch.load(output / "model.pth")["model"].values())
    size = (output / "model.pth").stat().st_size
    assert 2 * parameters < size < 2.02 * parameters
    assert f"model.pth, {size / 1e6:.1f} MB" in printed


@needs_exporter
def test_torchscript_detects_what_the_model_does(demo, export):
    """It was traced on the first validation image; here it sees the last, larger."""
    output, printed = export("--torchscript", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    assert "Compared with the student on 3 pictures: TorchScript." in printed
    cfg = get_cfg()
    cfg.merge_from_file(str(output / "config.yaml"))
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 192, 480
    images = sorted((demo[0] / "datasets" / "toy_kitti" / "training" / "image_2").iterdir())
    image = read_picture(cfg, images[-1])
    assert image.shape == (3, 192, 480)
    boxes, classes, scores, size = torch.jit.load(output / "model.ts")(image)
    assert size.tolist() == [192, 480]
    with torch.no_grad():
        expected = load_student(cfg, output / "model.pth")([{"image": image}])[0]["instances"]
    assert len(expected) > 0
    torch.testing.assert_close(boxes, expected.pred_boxes.tensor, atol=1e-3, rtol=0)
    torch.testing.assert_close(scores, expected.scores, atol=1e-5, rtol=0)
    assert torch.equal(classes, expected.pred_classes)


@pytest.mark.skipif(HAS_EXPORTER, reason="this Detectron2's exporter can be imported")
def test_torchscript_without_an_exporter_says_how_to_get_one(export):
    output, printed = export("--torchscript", status=1)
    assert (
        "the exporter of the Detectron2 0.5 that is installed can't be imported (No module named 'caffe2')" in printed
    )
    assert "tools/install_detectron2.py" in printed
    assert not output.exists()
