"""Real short trainings through the command line, on toy scenes and on real KITTI images."""

import functools
import json

import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from tiny import calm

from gkd_d2.config import read_config, teacher_config
from gkd_d2.data.datasets import coco_traffic
from gkd_d2.data.prepare.coco_traffic import prepare_coco_traffic
from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.evaluation.kitti_report import flat_metrics
from gkd_d2.evaluation.kitti_results import evaluate_folders

NAMES = ("loss_gkd_gradient", "loss_bmfi_box", "loss_bmfi_attention", "loss_bmfi_image")
# The one that the defaults leave out.
ATTENTION = ("GKD.LOSS_WEIGHTS.ATTENTION", "1e-4")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A datasets folder with a few toy scenes."""
    folder = tmp_path_factory.mktemp("datasets")
    make_toy_kitti(folder / "toy_kitti", 8, 4, 0)
    return folder


@pytest.fixture
def train_net(project, run_here, tmp_path, monkeypatch):
    """Run tools/train_net.py in an empty folder and return its output."""
    monkeypatch.chdir(tmp_path)

    def run(config, datasets, *arguments, fails=False, small=False):
        monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
        options = ("--num-gpus", 0, "--config-file", project / "configs" / config)
        size = ("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64) if small else ()
        status, printed = run_here("train_net.py", *options, *arguments, *size)
        assert (status != 0) == fails, printed[-3000:]
        return printed

    return run


def metrics(folder):
    """The rows of metrics.json, one dictionary with the last value of every scalar."""
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {name: value for row in rows for name, value in row.items()}


def short(output, iterations, *, images=2):
    return f"SOLVER.MAX_ITER {iterations} SOLVER.STEPS () SOLVER.IMS_PER_BATCH {images} OUTPUT_DIR {output}".split()


@pytest.mark.parametrize("name", ["frcnn", "retinanet"])
def test_teacher_student_resume_and_evaluation(name, train_net, datasets, tmp_path):
    train_net = functools.partial(train_net, small=True)
    train_net(f"toy/teachers/{name}.yaml", datasets, *short("teacher", 2))
    weights = tmp_path / "teacher" / "model_final.pth"
    student = [f"toy/gkd_{name}.yaml", datasets]
    output = train_net(*student, *short("student", 4), *ATTENTION, "GKD.TEACHER.WEIGHTS", weights)
    scalars = metrics(tmp_path / "student")
    assert all(scalars[loss] > 0 for loss in NAMES)
    # The official metric of KITTI's form, with COCO's beside it.
    assert {"kitti/AP_moderate", "kitti/Car-easy-R11", "kitti/mAP50_voc", "bbox/AP", "bbox/AP50"} <= scalars.keys()
    assert "copypaste: AP_moderate,AP_easy,AP_hard,AP11_moderate,AP11_easy,AP11_hard,mAP50_voc" in output
    assert any(key.startswith("teacher/") for key in scalars)
    checkpoint = torch.load(tmp_path / "student" / "model_final.pth")
    assert not any("teacher" in key for key in checkpoint["model"])

    train_net(*student, "--resume", *short("student", 6), *ATTENTION, "GKD.TEACHER.WEIGHTS", weights)
    assert torch.load(tmp_path / "student" / "model_final.pth")["iteration"] == 5

    if name == "retinanet":
        options = [*short("student", 8), *ATTENTION, "GKD.TEACHER.WEIGHTS", weights, "MODEL.BACKBONE.FREEZE_AT", 3]
        output = train_net(*student, "--resume", *options, fails=True)
        assert "MODEL.BACKBONE.FREEZE_AT was 0 and is 3" in output.splitlines()[-1]
        assert "Traceback" not in output

    # The student is evaluated as what it is: no teacher is needed any more.
    weights.unlink()
    final = tmp_path / "student" / "model_final.pth"
    evaluation = ["--eval-only", "MODEL.WEIGHTS", final, "OUTPUT_DIR", "evaluation"]
    augmented = name == "frcnn"
    if augmented:
        evaluation += ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.MAX_SIZE", "208"]
    output = train_net(*student, *evaluation)
    assert "copypaste: AP,AP50" in output
    assert (tmp_path / "evaluation" / "inference_TTA").exists() == augmented
    # A plain Detectron2 config of the same detector loads the same checkpoint whole.
    again = train_net(f"toy/baselines/{name}.yaml", datasets, "--eval-only", "MODEL.WEIGHTS", final)
    lines = [
        [line.split("copypaste: ")[1] for line in o.splitlines() if "copypaste: " in line] for o in (output, again)
    ]
    assert lines[0][: len(lines[1])] == lines[1]
    assert len(lines[0]) == (1 + augmented) * len(lines[1])


def copypastes(output):
    return [line.partition("copypaste: ")[2] for line in output.splitlines() if "copypaste: " in line]


def test_averaged_weights_are_evaluated_beside_the_raw_or_alone(train_net, datasets, tmp_path):
    config = ("toy/teachers/retinanet.yaml", datasets)
    train_net = functools.partial(train_net, small=True)
    thresholds = ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL_EMA.ENABLED", "True", "MODEL_EMA.DECAY", 0.5)
    train_net(*config, *short("run", 2), *thresholds)
    assert {"bbox/AP", "bbox_EMA/AP", "kitti/AP_moderate", "kitti_EMA/AP_moderate"} <= metrics(tmp_path / "run").keys()
    alone = ("MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY", "True")
    evaluation = ("--eval-only", "MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth")
    both = train_net(*config, *evaluation, "OUTPUT_DIR", "both", *thresholds)
    assert both.count("Running inference with averaged weights") == 1
    only = train_net(*config, *evaluation, "OUTPUT_DIR", "only", *thresholds, *alone)
    assert "Running inference with averaged weights" not in only and "evaluated in place of the raw ones" in only
    # The average, at its own place beside the raw weights and at theirs alone, as at the end of the training.
    found = [
        (tmp_path / folder / "toy_kitti_val" / "coco_instances_results.json").read_text()
        for folder in ("run/inference_EMA", "both/inference_EMA", "only/inference", "both/inference", "run/inference")
    ]
    assert found[0] == found[1] == found[2] != found[3] == found[4]
    assert copypastes(both)[len(copypastes(only)) :] == copypastes(only)

    output = train_net(*config, *evaluation, *thresholds[:2], *alone, fails=True)
    assert "MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY is True, but MODEL_EMA.ENABLED is False" in output


def test_evaluation_refuses_weights_that_are_not_the_whole_detector(train_net, datasets, tmp_path):
    torch.save({"model": {"backbone.bottom_up.stem.conv1.weight": torch.zeros(64, 3, 7, 7)}}, tmp_path / "part.pth")
    output = train_net(
        "toy/gkd_retinanet.yaml", datasets, "--eval-only", "MODEL.WEIGHTS", tmp_path / "part.pth", fails=True
    )
    assert "of the model's parameters unset: backbone.bottom_up" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("GKD.STUDENT.INIT_FROM_TEACHER", True), "no head of the teacher fits the student"),
        (("GKD.FEATURES", "('p2',)"), "GKD.FEATURES names p2, but the heads use"),
        (("GKD.WATCH_PERIOD", 0), "GKD.WATCH_PERIOD is 0, but must be >= 1"),
    ],
)
def test_what_is_refused_when_it_is_built_is_a_sentence(
    options, message, distiller_config, run_here, datasets, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    cfg = distiller_config("retinanet", channels=8)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_kitti_train",), ("toy_kitti_val",)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 2
    (tmp_path / "student.yaml").write_text(cfg.dump())
    status, said = run_here("train_net.py", "--config-file", "student.yaml", *options)
    assert status == 1 and message in said and "Traceback" not in said


def test_missing_things_come_first(train_net, tmp_path):
    output = train_net("gkd_frcnn_kitti.yaml", tmp_path, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "none.pkl", fails=True)
    lines = [line for line in output.splitlines() if line.strip()]
    assert lines[0] == "This run can't start:"
    assert str(tmp_path / "kitti") in output
    assert "MODEL.WEIGHTS is none.pkl: there is no such file" in output
    assert "GKD.TEACHER.WEIGHTS is output/teachers/frcnn_kitti/model_final.pth: there is no such file" in output
    assert "teachers/frcnn_kitti.yaml" in output
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("name", ["frcnn", "retinanet"])
def test_kitti_configs_train_on_real_images(name, train_net, project, kitti_sample, tmp_path):
    """R101 teacher, R50 student, 312 pixels wide, from weights of the right shape and scale."""
    config = f"gkd_{name}_kitti.yaml"
    cfg = read_config(str(project / "configs" / config), ["MODEL.DEVICE", "cpu"])
    # As in the ImageNet weights, the first convolution holds the standard deviation of the pixels.
    teacher = calm(build_model(teacher_config(cfg)))
    teacher.backbone.bottom_up.stem.conv1.weight.data /= 57
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    backbone = teacher_config(cfg).clone()
    backbone.defrost()
    backbone.MODEL.RESNETS.DEPTH = 50
    bottom_up = calm(build_model(backbone)).backbone.bottom_up
    bottom_up.stem.conv1.weight.data /= 57
    state = {f"backbone.bottom_up.{key}": value for key, value in bottom_up.state_dict().items()}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    datasets = tmp_path / "datasets"
    datasets.mkdir()
    (datasets / "kitti").symlink_to(kitti_sample)
    options = f"""
        MODEL.DEVICE cpu MODEL.WEIGHTS {tmp_path}/backbone.pth GKD.TEACHER.WEIGHTS {tmp_path}/teacher.pth
        INPUT.MIN_SIZE_TRAIN (96,) INPUT.MAX_SIZE_TRAIN 312 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 208
        DATALOADER.NUM_WORKERS 0 SOLVER.CHECKPOINT_PERIOD 100 TEST.EVAL_PERIOD 0 GKD.KITTI_RESULTS True
    """.split()
    # Calibrated, from the first iteration on.
    train_net(config, datasets, *options, "GKD.RATIOS.ATTENTION", 0.1, *short("student", 2))
    scalars = metrics(tmp_path / "student")
    assert scalars["iteration"] == 2  # the row of the evaluation
    assert all(0 < scalars[loss] < float("inf") for loss in NAMES)
    # The result files give what metrics.json holds.
    result, num_images = evaluate_folders(
        kitti_sample / "training" / "label_2", tmp_path / "student" / "inference" / "kitti_val" / "kitti_results"
    )
    assert num_images == 16
    assert flat_metrics(result) == {key: scalars[f"kitti/{key}"] for key in flat_metrics(result)}


TOY_TRAFFIC = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 96, "height": 64} for i in (1, 2, 3)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [60, 10, 20, 40], "area": 800, "iscrowd": 0},
        {"id": 3, "image_id": 2, "category_id": 13, "bbox": [30, 10, 30, 30], "area": 900, "iscrowd": 0},
        {"id": 4, "image_id": 3, "category_id": 1, "bbox": [30, 10, 30, 30], "area": 900, "iscrowd": 0},
    ],
    "categories": [{"id": i, "name": name} for i, name in coco_traffic.NAMES.items()],
}


@pytest.fixture(params=["toy", "sample"])
def coco(request, tmp_path):
    """A datasets folder with COCO-Traffic made of toy pictures or real ones."""
    for split in ("train", "val"):
        images = tmp_path / "datasets" / "coco" / f"{split}2017"
        source = tmp_path / f"{split}.json"
        if request.param == "sample":
            sample = request.getfixturevalue("coco_sample")
            images.parent.mkdir(parents=True, exist_ok=True)
            images.symlink_to(sample / "images")
            source = sample / "annotations" / f"instances_{split}.json"
        else:
            images.mkdir(parents=True)
            for number in (1, 2):
                Image.effect_noise((96, 64), 50).convert("RGB").save(images / f"{number}.jpg")
            source.write_text(json.dumps(TOY_TRAFFIC))
        target = tmp_path / "datasets" / "coco_traffic" / "annotations" / f"instances_{split}.json"
        prepare_coco_traffic(source, target)
    return tmp_path / "datasets"


def test_coco_traffic_trains_and_evaluates(coco, train_net, tmp_path):
    options = """
        MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64
        MODEL.RESNETS.NORM BN MODEL.BACKBONE.FREEZE_AT 0 MODEL.RETINANET.SCORE_THRESH_TEST 0.0
        INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64
        DATALOADER.NUM_WORKERS 0 TEST.EVAL_PERIOD 0
    """.replace("''", '""').split()
    output = train_net("baselines/retinanet_coco_traffic.yaml", coco, *options, *short("alone", 2))
    scalars = metrics(tmp_path / "alone")
    assert scalars["iteration"] == 2 and 0 < scalars["loss_cls"] < float("inf")
    assert {"bbox/AP", "bbox/AP50", "bbox/AP-car", "bbox/AP-traffic light"} <= scalars.keys()
    assert "copypaste: AP,AP50" in output
