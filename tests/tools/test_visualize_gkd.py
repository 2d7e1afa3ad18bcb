"""Pictures through the command line, of toy scenes and tiny detectors."""

import json
import re

import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from tiny import calm

from gkd_d2.config import detector_config
from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.visualize.legend import IMPORTANCES


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Toy scenes, and an image without labels."""
    folder = tmp_path_factory.mktemp("datasets")
    make_toy_kitti(folder / "toy_kitti", 2, 4, 0)
    unlabelled = folder / "kitti" / "testing" / "image_2"
    unlabelled.mkdir(parents=True)
    Image.new("RGB", (96, 64)).save(unlabelled / "000000.png")
    return folder


@pytest.fixture
def visualize(run_here, datasets, monkeypatch, tmp_path):
    """Run tools/visualize_gkd.py in an empty folder; returns what it printed."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    monkeypatch.chdir(tmp_path)

    def run(*arguments, status=0):
        ended, printed = run_here("visualize_gkd.py", *arguments)
        assert ended == status, printed
        return printed

    return run


@pytest.fixture
def write_config(distiller_config, tmp_path):
    """Write the config of a tiny distiller, and a checkpoint of its student; return both paths."""

    def write(kind):
        cfg = distiller_config(kind, channels=8)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_kitti_train",), ("toy_kitti_val",)
        cfg.INPUT.MIN_SIZE_TEST = 100
        cfg.OUTPUT_DIR = "run"
        path = tmp_path / "distiller.yaml"
        path.write_text(cfg.dump())
        torch.save({"model": calm(build_model(detector_config(cfg))).state_dict()}, tmp_path / "student.pth")
        return path, tmp_path / "student.pth"

    return write


@pytest.mark.parametrize(("kind", "rows"), [("faster", 5), ("retinanet", 6)])
def test_page_of_pictures(kind, rows, visualize, write_config, tmp_path):
    config, student = write_config(kind)
    printed = visualize("--config-file", config, "--count", 2, "MODEL.WEIGHTS", student)
    folder = tmp_path / "run" / "visualize"
    assert f"Page: {folder.relative_to(tmp_path) / 'index.html'}" in printed
    page = (folder / "index.html").read_text()
    links = re.findall(r'<img src="([^"]*)"', page)
    assert [link[:3] for link in links] == ["01_", "02_"]
    assert {path.name for path in folder.iterdir()} == {*links, "index.html"}
    assert "toy_kitti_val" in page and str(student) in page and str(config) in page
    for link in links:
        with Image.open(folder / link) as image:
            # 100 x 250 pixels in panels of 1.6 x 4 inches.
            # Versions of matplotlib round a pixel up or down.
            assert image.size == pytest.approx((1746, 90 + 160 * rows + 28 * (rows - 1)), abs=1)

    # An image looks the same whichever were drawn before it, and by whatever name it is called.
    name = links[1].removeprefix("02_")
    for asked in (name, name.removesuffix(".png")):
        visualize("--config-file", config, "--image", asked, "--output", "again", "MODEL.WEIGHTS", student)
        with Image.open(folder / links[1]) as one, Image.open(tmp_path / "again" / f"01_{name}") as other:
            assert one.tobytes() == other.tobytes()
    with Image.open(folder / links[0]) as one, Image.open(folder / links[1]) as other:
        assert one.tobytes() != other.tobytes()


@pytest.mark.parametrize(("kind", "levels"), [("faster", "p2 p3 p4 p5"), ("retinanet", "p3 p4 p5 p6 p7")])
def test_importance_report(kind, levels, visualize, write_config, tmp_path):
    config, student = write_config(kind)
    printed = visualize("--config-file", config, "--importance-report", "--count", 2, "MODEL.WEIGHTS", student)
    folder = tmp_path / "run" / "importance"
    page = (folder / "index.html").read_text()
    links = re.findall(r'<img src="([^"]*)"', page)
    assert {path.name for path in folder.iterdir()} == {*links, "index.html", "importance.md", "importance.json"}
    for link in links:
        with Image.open(folder / link) as image:
            # Five panels of 4 x 1.6 inches.
            size = 95 + 5 * 400 + 4 * 12 + 15, 90 + 160 * 6 + 28 * 5 - (kind == "faster") * 188
            assert image.size == pytest.approx(size, abs=1)

    result = json.loads((folder / "importance.json").read_text())
    assert (result["images"], result["dataset"], result["student"]) == (2, "toy_kitti_val", str(student))
    assert " ".join(result["levels"]) == levels
    table = [line for line in (folder / "importance.md").read_text().splitlines() if line.startswith("|")]
    assert "\n".join(table) in printed
    assert [line.split("|")[1].strip() for line in table[2:]] == ["area of the boxes (chance)", *IMPORTANCES]
    for level in result["levels"].values():
        assert 0 < level["area"] <= 1 and level["importances"].keys() == IMPORTANCES.keys()
    for number in (f"{level['area']:.2f}" for level in result["levels"].values()):
        assert number in table[2] and f">{number}" in page.replace("> ", ">")


def test_nothing_is_reported_of_images_without_objects(visualize, write_config, datasets, tmp_path):
    config, _ = write_config("retinanet")
    name = (datasets / "toy_kitti" / "ImageSets" / "val.txt").read_text().split()[0]
    labels = datasets / "toy_kitti" / "training" / "label_2" / f"{name}.txt"
    text = labels.read_text()
    labels.write_text("")
    try:
        printed = visualize("--config-file", config, "--importance-report", "--image", name, status=1)
    finally:
        labels.write_text(text)
    assert "none of the images of --image has an object, so there is nothing to report of them" in printed
    assert not (tmp_path / "run").exists()


def test_the_students_checkpoint_is_what_is_drawn(visualize, write_config, tmp_path):
    config, student = write_config("retinanet")
    scenes = ("--config-file", config, "--count", 1, "--output")
    visualize(*scenes, "trained", "MODEL.WEIGHTS", student)
    visualize(*scenes, "random")
    ((one, trained), (other, drawn)) = (
        (path.name, path.read_bytes()) for folder in ("trained", "random") for path in (tmp_path / folder).glob("*.png")
    )
    assert one == other and trained != drawn
    assert "MODEL.WEIGHTS is empty" in (tmp_path / "random" / "index.html").read_text()


def test_a_student_that_is_partly_random_is_named(visualize, write_config, tmp_path):
    config, student = write_config("retinanet")
    state = torch.load(student)["model"]
    heads = [name for name in state if name.startswith("head.")]
    torch.save({"model": {name: tensor for name, tensor in state.items() if name not in heads}}, student)
    # What the method trains is no part of the student.
    options = ("MODEL.WEIGHTS", student, "GKD.LOSS_WEIGHTS.RELATION", 1e-6)
    printed = visualize("--config-file", config, "--count", 1, "--output", "out", *options)
    text = f"{student}, which leaves {len(heads)} tensors of the student random, such as {sorted(heads)[0]}"
    assert text in printed and text in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nobody"], r"dataset toy_kitti_val has no image 'nobody' among its 4: name one by its id \(\d+, "),
        (["--dataset", "kitti_test"], "dataset kitti_test has images without ground truth"),
        (["--dataset", "unheard_of"], "DATASETS names unheard_of: dataset 'unheard_of' is not registered"),
        (["DATASETS.TEST", "()"], "DATASETS.TEST is empty: name the dataset to draw by --dataset"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "no config of a GKDDistiller: MODEL.META_ARCHITECTURE is RetinaNet"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS is nowhere.pth: there is no such file"),
        (["GKD.TEACHER.WEIGHTS", "nowhere.pth"], "GKD.TEACHER.WEIGHTS is nowhere.pth: there is no such file"),
        (
            ["GKD.TEACHER.WEIGHTS", "student.pth"],
            "GKD.TEACHER.WEIGHTS: student.pth does not fit the detector",
        ),
    ],
)
def test_bad_input_is_named_before_anything_is_written(arguments, message, visualize, write_config, tmp_path):
    config, _ = write_config("retinanet")
    assert re.search(message, visualize("--config-file", config, *arguments, status=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "nowhere.yaml"], "--config-file nowhere.yaml is no file"),
        (["--config-file", "x.yaml", "--count", "0"], "--count is 0, but must be at least 1"),
        (["--config-file", "x.yaml", "--count", "2", "--image", "1"], "not allowed with"),
    ],
)
def test_bad_command_lines(arguments, message, visualize):
    assert message in visualize(*arguments, status=2)
