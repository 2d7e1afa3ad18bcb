"""Students of both kinds and both backbones, from their training to the file for onnxruntime, by command lines."""

import json
import re

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from tiny import needs_exporter

from gkd_d2.config import read_config
from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.export import read_picture
from gkd_d2.export.onnx import OnnxDetector
from gkd_d2.export.tracing import detect
from gkd_d2.modeling.student import load_student

pytestmark = needs_exporter
SIZE = ("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64)
# All that the heads find. Scores of a student that is not trained lie so close that rounding errors would decide which
# of them are RetinaNet's best 1000.
EVERYTHING = (
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
    *("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 100_000),
)
FORMS = ("checkpoint", "averaged checkpoint", "TorchScript", "ONNX", "ONNX int8")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A datasets folder with a few toy scenes."""
    folder = tmp_path_factory.mktemp("datasets")
    make_toy_kitti(folder / "toy_kitti", 4, 3, 0)
    return folder


@pytest.fixture
def run(project, run_here, datasets, tmp_path, monkeypatch):
    """Run a tool in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))

    def run(name, *arguments, status=0):
        ended, printed = run_here(name, *arguments)
        assert ended == status, printed[-3000:]
        return printed

    return run


@pytest.fixture
def train(project, run):
    """Train a toy detector so many iterations; returns the folder of its run."""

    def train(config, *options, iterations=2):
        short = ("SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", 2)
        path = project / "configs" / "toy" / config
        run("train_net.py", "--num-gpus", 0, "--config-file", path, *short, *SIZE, *options)

    return train


def backbone(kind, name, weights=""):
    builder = "build_timm_fpn_backbone" if kind == "frcnn" else "build_retinanet_timm_fpn_backbone"
    options = {"NAME": name, "NORM": "BN", "FREEZE_AT": 0, "WEIGHTS": weights}
    # That of the toy configs is set, for a ResNet.
    mean_and_std = ("MODEL.PIXEL_MEAN", "[103.53,116.28,123.675]", "MODEL.PIXEL_STD", "[1.0,1.0,1.0]")
    pairs = [part for key, value in options.items() for part in (f"MODEL.TIMM.{key}", value)]
    return ("MODEL.BACKBONE.NAME", builder, *mean_and_std, *pairs)


def table_of(text):
    """Form -> its cells, by heading."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    headings, _, *rows = rows
    return {row[0]: dict(zip(headings, row)) for row in rows}


@pytest.mark.parametrize("kind", ["frcnn", "retinanet"])
def test_from_a_training_to_a_file(kind, train, run, request, tmp_path, datasets):
    """With a backbone of timm, without weights and with those of ImageNet; ResNets are exported below."""
    train(f"teachers/{kind}.yaml", "OUTPUT_DIR", "teacher", iterations=1)
    options = ("GKD.TEACHER.WEIGHTS", "teacher/model_final.pth", "OUTPUT_DIR", "student", "MODEL_EMA.ENABLED", True)
    weights = request.getfixturevalue("timm_weights") / "mobilenetv2_100.pth" if kind == "retinanet" else ""
    name = "mobilenetv2_100" if weights else "mobilenetv3_small_050"
    train(f"gkd_{kind}.yaml", *options, *backbone(kind, name, weights))
    images = datasets / "toy_kitti" / "training" / "image_2"
    export = ("export_student.py", "--weights", "student", "--output", "exported")
    printed = run(*export, "--torchscript", "--onnx", "--int8", images, "--evaluate", "--repeats", 1, *EVERYTHING)

    folder = tmp_path / "exported"
    files = ("model.pth", "model_ema.pth", "model.ts", "model.onnx", "model_int8.onnx")
    table = table_of((folder / "export.md").read_text())
    assert table_of(printed[printed.index("| form") :]) == table
    assert tuple(table) == FORMS
    for form, name in zip(FORMS, files):
        assert table[form]["MB"] == f"{(folder / name).stat().st_size / 1e6:.1f}"
        assert float(table[form]["ms per image"]) > 0
        assert 0 <= float(table[form]["AP"]) <= 100 and "KITTI AP moderate" in table[form]
    assert (folder / "model_int8.onnx").stat().st_size < 0.5 * (folder / "model.onnx").stat().st_size

    # In the evaluation, on pictures that it was not compared on, the file detects what the checkpoint does.
    found = {}
    for form in ("checkpoint", "ONNX"):
        (path,) = (folder / "inference" / form).rglob("coco_instances_results.json")
        entries = json.loads(path.read_text())
        found[form] = {
            number: np.sort([entry["score"] for entry in entries if entry["image_id"] == number])
            for number in {entry["image_id"] for entry in entries}
        }
    assert len(found["ONNX"]) == 3
    for number, scores in found["checkpoint"].items():
        assert len(scores) > 20
        np.testing.assert_allclose(found["ONNX"][number], scores, atol=1e-3)

    said = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
    assert json.loads(said["class_names"]) == ["Car", "Pedestrian", "Cyclist"]
    assert (said["min_size"], said["max_size"]) == ("64", "320")
    # Whoever has gkd_d2 reads the config.
    exported = read_config(str(folder / "config.yaml"), [])
    assert exported.MODEL.TIMM.WEIGHTS == "" and exported.MODEL.WEIGHTS == str(folder / "model.pth")
    image = read_picture(exported, next(iter(sorted(images.iterdir()))))
    again = detect(load_student(exported, folder / "model.pth"), image)
    scores = OnnxDetector((folder / "model.onnx").read_bytes()).detect(image).scores
    torch.testing.assert_close(scores.sort()[0], again.scores.sort()[0], atol=1e-4, rtol=0)


@pytest.fixture
def export(demo, run, monkeypatch, tmp_path):
    """Export the demo's distilled student by the config of its run; return the folder and what was printed."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(demo[0] / "datasets"))
    weights = demo[0] / "student_distilled"

    def export(*arguments, status=0):
        output = tmp_path / "student"
        return output, run("export_student.py", "--weights", weights, "--output", output, *arguments, status=status)

    return export


def test_averaged_weights_are_exported_where_asked_for(train, run, tmp_path):
    train("baselines/frcnn.yaml", "OUTPUT_DIR", "run", "MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.5)
    saved = torch.load("run/model_final.pth")
    run("export_student.py", "--weights", "run", "--output", "raw")
    run("export_student.py", "--weights", "run", "--output", "averaged", "--ema", "--onnx", "--repeats", 1, *EVERYTHING)
    for folder in ("raw", "averaged"):
        raw, averaged = (torch.load(f"{folder}/{name}.pth")["model"] for name in ("model", "model_ema"))
        assert all(torch.equal(value, saved["model"][name]) for name, value in raw.items())
        assert all(torch.equal(value, saved["ema_state"][name]) for name, value in averaged.items())
    name = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(raw[name], averaged[name])
    cfg = read_config("averaged/config.yaml", [*map(str, EVERYTHING)])
    assert read_config("raw/config.yaml", []).MODEL.WEIGHTS == str(tmp_path / "raw" / "model.pth")
    assert cfg.MODEL.WEIGHTS == str(tmp_path / "averaged" / "model_ema.pth")
    image = 255 * torch.rand(3, 64, 160)
    scores = OnnxDetector((tmp_path / "averaged" / "model.onnx").read_bytes()).detect(image).scores
    found = {
        name: detect(load_student(cfg, tmp_path / "raw" / name), image).scores
        for name in ("model.pth", "model_ema.pth")
    }
    torch.testing.assert_close(scores, found["model_ema.pth"], atol=1e-5, rtol=0)
    assert not torch.allclose(scores, found["model.pth"], atol=1e-5)


def test_a_run_without_averages_has_none_to_export(export):
    output, printed = export("--ema", status=1)
    assert "holds no averaged weights" in printed and "MODEL_EMA.ENABLED" in printed
    assert not output.exists()


def test_a_fixed_size_is_that_of_the_input(export):
    output, _ = export("--onnx", "--size", 96, 256, "--repeats", 1, *EVERYTHING)
    (entry,) = onnx.load(output / "model.onnx").graph.input
    assert [axis.dim_value for axis in entry.type.tensor_type.shape.dim] == [1, 3, 96, 256]


def test_named_pictures_are_compared_on(export, tmp_path):
    for number, size in enumerate([(200, 90), (90, 120), (300, 100), (100, 100)]):
        pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    images = [part for number in range(4) for part in ("--image", tmp_path / f"{number}.png")]
    _, printed = export("--onnx", *images, "--repeats", 1, *EVERYTHING)
    assert "Compared with the student on 4 pictures: ONNX." in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--int8", "FOLDER"), "--size and --int8 require --onnx"),
        (("--size", 10, 10), "--size and --int8 require --onnx"),
        (("--onnx", "--size", 0, 10), "--size is 0 10, but must be two numbers of pixels above 0"),
        (("--onnx", "--repeats", 0), "--repeats .*0.*1"),
        (("--onnx", "--int8", "FOLDER/none"), "error: --int8: .*none is no folder"),
        (("--onnx", "--int8", "FOLDER/pictures"), "error: --int8: .*pictures holds no picture"),
        (("--onnx", "--image", "FOLDER/none.png"), "error: .*none.png"),
        (("--image", "x.png"), "--image and --repeats require --onnx, --torchscript or --evaluate"),
        (("--evaluate", "DATASETS.TEST", "('kitti_test',)"), "DATASETS.TEST names kitti_test, which can't be loaded"),
        (("--evaluate", "DATASETS.TEST", "()"), "error: --evaluate needs a dataset, but DATASETS.TEST names none"),
        (("--evaluate", "DATASETS.TEST", "('x',)"), "DATASETS.TEST names x, which is no registered dataset"),
    ],
)
def test_mistakes_end_in_a_sentence_before_any_work(arguments, said, export, tmp_path):
    (tmp_path / "pictures").mkdir()
    arguments = [str(argument).replace("FOLDER", str(tmp_path)) for argument in arguments]
    output, printed = export(*arguments, status=2 if said.startswith("--") else 1)
    assert re.search(said, printed)
    assert "Traceback" not in printed
    assert not output.exists()
