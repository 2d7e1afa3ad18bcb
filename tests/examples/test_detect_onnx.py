"""The example detects with onnxruntime alone what Detectron2's own predictor does."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image
from tiny import calm, detector_config, needs_exporter

from gkd_d2.export import Forms, export_student, sample_pictures

pytest.importorskip("onnxruntime")
pytestmark = needs_exporter

# Runs the file that is its first argument where none of these can be imported.
WITHOUT = """
import runpy
import sys

class Refuse:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "detectron2", "gkd_d2", "fvcore"}:
            raise ModuleNotFoundError(f"{name} is refused")

sys.meta_path.insert(0, Refuse)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NAMES = ["Car", "Pedestrian", "Cyclist"]
# Integers, so that a picture can hold them.
MEAN = [100, 110, 125]


def run(program, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT, program, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.fixture
def picture(tmp_path):
    """A file of noise in blocks, 300 x 200 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels.repeat(10, 0).repeat(10, 1)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def export(tmp_path, picture):
    """A function that exports a tiny student; returns the folder."""

    def export(kind: str, image_format: str = "BGR", size=None, least: int = 100):
        cfg = detector_config(kind)
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN = image_format, MEAN
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = least, 140
        for head in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
            head.SCORE_THRESH_TEST = 0.0
        # No limit parts detections of nearly equal scores.
        cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = cfg.TEST.DETECTIONS_PER_IMAGE = 5000
        cfg.DATASETS.TEST = ("named_for_the_example",)
        state = calm(build_model(cfg)).state_dict()
        for name, weight in state.items():
            # So that what is detected depends on the picture.
            if name.endswith(("cls_score.weight", "bbox_pred.weight", "anchor_deltas.weight")):
                weight *= 30
        torch.save({"model": state}, tmp_path / "model_final.pth")
        pictures = sample_pictures(cfg, [picture])
        forms = Forms(onnx=True, size=size)
        export_student(cfg, tmp_path / "model_final.pth", tmp_path / "student", forms, pictures=pictures)
        return tmp_path / "student"

    MetadataCatalog.get("named_for_the_example").thing_classes = NAMES
    yield export
    MetadataCatalog.remove("named_for_the_example")


def predict(folder, picture, least: int = 0) -> np.ndarray:
    """What Detectron2's predictor detects by an export: a row a detection of box, class and score."""
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "config.yaml"))
    cfg.INPUT.MIN_SIZE_TEST = least or cfg.INPUT.MIN_SIZE_TEST
    found = DefaultPredictor(cfg)(read_image(str(picture), format="BGR"))["instances"]
    columns = [found.pred_boxes.tensor, found.pred_classes[:, None], found.scores[:, None]]
    return torch.cat(columns, dim=1).numpy()


def detect(project, folder, picture, *threshold) -> np.ndarray:
    """The same by the example, which also draws beside the picture."""
    files = (folder / "model.onnx", picture, picture.with_name("drawn.png"))
    done = run(project / "examples" / "detect_onnx.py", *files, *threshold)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return np.array([[*map(float, box), NAMES.index(name), float(score)] for name, score, _, *box in rows])


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Within half a pixel, the same classes, and scores within 0.001, in any order."""
    assert len(found) == len(expected) > 20
    near = np.abs(found[:, None] - expected) <= [0.5, 0.5, 0.5, 0.5, 0, 1e-3]
    alike = near.all(axis=2)
    assert alike.any(axis=0).all() and alike.any(axis=1).all()


def test_what_is_refused_can_not_be_imported(tmp_path):
    for name in ("torch", "torchvision.ops", "detectron2.config", "gkd_d2"):
        (tmp_path / "program.py").write_text(f"import numpy, PIL, onnxruntime\nprint('so far')\nimport {name}")
        done = run(tmp_path / "program.py")
        assert done.stdout == "so far\n" and f"{name.partition('.')[0]} is refused" in done.stderr


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_it_detects_what_detectron2_does(kind, image_format, export, picture, project):
    folder = export(kind, image_format)
    found = detect(project, folder, picture, 0)
    assert_same(found, predict(folder, picture))
    threshold = np.sort(found[:, 5])[-10] - 0.0005
    assert len(detect(project, folder, picture, threshold)) == (found[:, 5] >= threshold).sum()
    with Image.open(picture) as plain, Image.open(picture.with_name("drawn.png")) as drawn:
        changed = (np.asarray(plain) != np.asarray(drawn)).any(axis=2)
    assert plain.size == drawn.size and 100 < changed.sum() < changed.size


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_a_file_of_fixed_size(kind, export, picture, project, tmp_path):
    """300 x 200 pixels become 96 x 64 of 96 x 72, the rest is the mean."""
    folder = export(kind, size=(72, 96))
    canvas = Image.new("RGB", (96, 72), tuple(reversed(MEAN)))
    with Image.open(picture) as opened:
        canvas.paste(opened.resize((96, 64), Image.BILINEAR))
    canvas.save(tmp_path / "canvas.png")
    expected = predict(folder, tmp_path / "canvas.png", least=72)
    expected[:, :4] = (expected[:, :4] * (300 / 96)).clip(0, (300, 200, 300, 200))
    in_picture = expected[:, 1] < expected[:, 3]
    assert kind == "faster" or not in_picture.all()
    assert_same(detect(project, folder, picture, 0), expected[in_picture])


def test_a_turned_photograph_that_is_not_resized(export, picture, project):
    folder = export("faster", least=0)
    exif = Image.Exif()
    # Orientation: a quarter turn.
    exif[0x0112] = 6
    with Image.open(picture) as opened:
        opened.save(picture, exif=exif)
    assert_same(detect(project, folder, picture, 0), predict(folder, picture))
    with Image.open(picture.with_name("drawn.png")) as drawn:
        assert drawn.size == (200, 300)


def test_classes_without_names_are_numbered(export, picture, project):
    MetadataCatalog.get("named_for_the_example").__dict__.pop("thing_classes")
    folder = export("faster")
    done = run(project / "examples" / "detect_onnx.py", folder / "model.onnx", picture, folder / "drawn.png", 0)
    assert {line[:7] for line in done.stdout.splitlines()} == {"class 0", "class 1", "class 2"}


def test_help_shows_the_command(project):
    program = project / "examples" / "detect_onnx.py"
    assert "Example: python examples/detect_onnx.py " in run(program, "--help").stdout
