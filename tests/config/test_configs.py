"""The configs of this project."""

import os

import numpy as np
import pytest
import torch
from config_files import read
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge

from gkd_d2.config import config_differences, detector_config, teacher_config
from gkd_d2.modeling.student import build_student
from gkd_d2.utils.registries import find_unregistered

DETECTORS = {"frcnn": "GeneralizedRCNN", "retinanet": "RetinaNet"}


@pytest.mark.parametrize("name", DETECTORS)
def test_kitti_configs(project, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = read(project / "configs" / f"gkd_{name}_kitti.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "GKDDistiller"
    assert cfg.GKD.STUDENT.INIT_FROM_TEACHER
    student, teacher = detector_config(cfg), teacher_config(cfg)
    baseline = read(project / "configs" / "baselines" / f"{name}_kitti.yaml")
    assert student.MODEL.META_ARCHITECTURE == teacher.MODEL.META_ARCHITECTURE == DETECTORS[name]
    assert (student.MODEL.RESNETS.DEPTH, teacher.MODEL.RESNETS.DEPTH) == (50, 101)
    assert student.MODEL.WEIGHTS.endswith("ImageNetPretrained/MSRA/R-50.pkl")
    assert teacher.MODEL.WEIGHTS == cfg.GKD.TEACHER.WEIGHTS
    assert read(cfg.GKD.TEACHER.CONFIG_FILE).OUTPUT_DIR == os.path.dirname(cfg.GKD.TEACHER.WEIGHTS)
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.WARMUP_ITERS) == (16, 500)
    # Of RetinaNet as in Detectron2's own config, and with the authors' limit on gradients.
    assert solver.BASE_LR == (0.02 if name == "frcnn" else 0.01)
    assert solver.CLIP_GRADIENTS.ENABLED == (name == "retinanet")
    # floor(0.8 * 7481) images.
    epoch = 5984 / 16
    assert solver.MAX_ITER == pytest.approx(12 * epoch, abs=2)
    assert solver.STEPS == pytest.approx((8 * epoch, 11 * epoch), abs=2)
    assert read(cfg.GKD.TEACHER.CONFIG_FILE).SOLVER.MAX_ITER == pytest.approx(24 * epoch, abs=4)
    # Baseline and distilled student differ in nothing but the distillation.
    for key in ("SOLVER", "INPUT", "DATASETS", "SEED"):
        assert baseline[key] == cfg[key]
    model = cfg.MODEL.clone()
    model.META_ARCHITECTURE = baseline.MODEL.META_ARCHITECTURE
    assert model == baseline.MODEL


@pytest.mark.parametrize(
    ("name", "data", "gradient"),
    [
        ("frcnn", "kitti", 0.05),
        ("retinanet", "kitti", 0.05),
        ("frcnn", "coco_traffic", 0.01),
        ("retinanet", "coco_traffic", 0.5),
    ],
)
def test_configs_with_the_settings_of_the_authors(project, name, data, gradient):
    """They differ from the project's own in the losses, and in what of the training is known to differ."""
    ours, theirs = (read(project / "configs" / f"gkd_{name}_{data}{end}.yaml") for end in ("", "_authors"))
    box, attention, relation = (1e-3, 5e-4, 5e-6) if name == "retinanet" else (5e-5, 5e-5, 5e-7)
    assert theirs.GKD.LOSS_WEIGHTS == {
        "GRADIENT": gradient,
        "BOX": box,
        "ATTENTION": attention,
        "IMAGE": 0.0,
        "RELATION": relation,
    }
    assert (ours.GKD.BALANCE, theirs.GKD.BALANCE) == ("calibrate", "fixed")
    assert theirs.GKD.STUDENT.INIT_FROM_TEACHER
    assert (theirs.GKD.WEIGHTING, theirs.GKD.MAP_REGION) == ("attention_gradient", "boxes")
    # With relu a level whose sums are all negative would have no map.
    assert theirs.GKD.RECTIFIER == "abs"
    assert (theirs.SOLVER.BASE_LR, theirs.SOLVER.WARMUP_ITERS) == (0.02, 500)
    clipping = theirs.SOLVER.CLIP_GRADIENTS
    assert (clipping.ENABLED, clipping.CLIP_TYPE, clipping.CLIP_VALUE) == (True, "norm", 35.0)
    for short, long in (
        (theirs.INPUT.MIN_SIZE_TRAIN[0], theirs.INPUT.MAX_SIZE_TRAIN),
        (theirs.INPUT.MIN_SIZE_TEST, theirs.INPUT.MAX_SIZE_TEST),
    ):
        assert (short, long) == (800, 1333)
        if data == "kitti":
            resize = ResizeShortestEdge(short, long).get_transform(np.zeros((375, 1242, 3), dtype=np.uint8))
            assert (resize.new_h, resize.new_w) == (402, 1333)
    changed = {".".join(key.split(".")[:2]) for key in config_differences(ours, theirs)}
    assert changed <= {
        "OUTPUT_DIR",
        "GKD.BALANCE",
        "GKD.LOSS_WEIGHTS",
        "GKD.WEIGHTING",
        "GKD.RECTIFIER",
        "INPUT.MIN_SIZE_TRAIN",
        "INPUT.MAX_SIZE_TRAIN",
        "INPUT.MIN_SIZE_TEST",
        "INPUT.MAX_SIZE_TEST",
        "SOLVER.BASE_LR",
        "SOLVER.WARMUP_ITERS",
        "SOLVER.CLIP_GRADIENTS",
    }


@pytest.mark.parametrize("name", DETECTORS)
def test_coco_traffic_configs(project, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = read(project / "configs" / f"gkd_{name}_coco_traffic.yaml")
    baseline = read(project / "configs" / "baselines" / f"{name}_coco_traffic.yaml")
    assert cfg.GKD.STUDENT.INIT_FROM_TEACHER
    student, teacher = detector_config(cfg), teacher_config(cfg)
    assert student.MODEL.META_ARCHITECTURE == teacher.MODEL.META_ARCHITECTURE == DETECTORS[name]
    assert (student.MODEL.RESNETS.DEPTH, teacher.MODEL.RESNETS.DEPTH) == (50, 101)
    assert read(cfg.GKD.TEACHER.CONFIG_FILE).OUTPUT_DIR == os.path.dirname(cfg.GKD.TEACHER.WEIGHTS)
    for config in (student, teacher):
        head = config.MODEL.ROI_HEADS if name == "frcnn" else config.MODEL.RETINANET
        assert head.NUM_CLASSES == 13 == len(MetadataCatalog.get(config.DATASETS.TRAIN[0]).thing_classes)
        assert config.DATASETS.TEST == ("coco_traffic_val",)
        assert (config.INPUT.MIN_SIZE_TRAIN, config.INPUT.MAX_SIZE_TRAIN) == ((800,), 1333)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02 if name == "frcnn" else 0.01)
    assert read(cfg.GKD.TEACHER.CONFIG_FILE).SOLVER.MAX_ITER == 2 * cfg.SOLVER.MAX_ITER
    for key in ("SOLVER", "INPUT", "DATASETS", "SEED"):
        assert baseline[key] == cfg[key]


@pytest.mark.parametrize("name", DETECTORS)
def test_toy_configs(project, name):
    cfg = read(project / "configs" / "toy" / f"gkd_{name}.yaml")
    baseline = read(project / "configs" / "toy" / "baselines" / f"{name}.yaml")
    teacher = teacher_config(cfg)
    assert teacher.MODEL.META_ARCHITECTURE == detector_config(cfg).MODEL.META_ARCHITECTURE == DETECTORS[name]
    assert cfg.SOLVER == baseline.SOLVER
    assert teacher.SOLVER.MAX_ITER > cfg.SOLVER.MAX_ITER


@pytest.mark.parametrize(("found", "device"), [(True, "cuda"), (False, "cpu")])
def test_toy_configs_take_a_gpu_where_there_is_one(project, found, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    toy = project / "configs" / "toy"
    for path in (*toy.glob("*.yaml"), *toy.glob("*/*.yaml"), *(project / "configs/studies/networks").glob("*.yaml")):
        cfg = read(path)
        assert cfg.MODEL.DEVICE == device, path
        assert read(path, "MODEL.DEVICE", "cpu").MODEL.DEVICE == "cpu"
        assert read(path, "MODEL.DEVICE", "cuda:1").MODEL.DEVICE == "cuda:1"
        if cfg.GKD.TEACHER.CONFIG_FILE:
            cfg.GKD.TEACHER.WEIGHTS = "teacher.pth"
            assert teacher_config(cfg).MODEL.DEVICE == device
    # The others ask for GPUs, and get an error without one.
    assert read(project / "configs" / "gkd_frcnn_kitti.yaml").MODEL.DEVICE == "cuda"
    assert read(project / "configs" / "gkd_frcnn_kitti.yaml", "MODEL.DEVICE", "auto").MODEL.DEVICE == device


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("data", ["kitti", "coco_traffic"])
def test_configs_of_small_students(project, name, data, monkeypatch, tmp_path):
    """They differ from those of ResNet-50 in the backbone and its images alone, and keep the teacher and its heads."""
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    cfg, large = (read(project / "configs" / f"gkd_{name}{kind}_{data}.yaml") for kind in ("_mobilenetv2", ""))
    baseline = read(project / "configs" / "baselines" / f"{name}_mobilenetv2_{data}.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "GKDDistiller"
    assert cfg.GKD == large.GKD
    changed = {"OUTPUT_DIR", "INPUT.FORMAT"}
    changed |= {f"MODEL.{key}" for key in ("WEIGHTS", "BACKBONE.NAME", "PIXEL_MEAN", "PIXEL_STD")}
    assert set(config_differences(large, cfg)) == {*changed, "MODEL.TIMM.NAME", "MODEL.TIMM.PRETRAINED"}
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.NAME, cfg.INPUT.FORMAT) == ("", "mobilenetv2_100", "RGB")
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx([123.675, 116.28, 103.53])
    assert cfg.MODEL.PIXEL_STD == pytest.approx([58.395, 57.12, 57.375])
    teacher = teacher_config(cfg)
    assert (teacher.INPUT.FORMAT, teacher.MODEL.PIXEL_STD) == ("BGR", [1.0, 1.0, 1.0])
    assert teacher.MODEL.FPN.OUT_CHANNELS == cfg.MODEL.FPN.OUT_CHANNELS
    assert not find_unregistered(detector_config(cfg))
    # Baseline and distilled student differ in nothing but the distillation.
    for key in ("SOLVER", "INPUT", "DATASETS", "SEED"):
        assert baseline[key] == cfg[key]
    model = cfg.MODEL.clone()
    model.META_ARCHITECTURE = baseline.MODEL.META_ARCHITECTURE
    assert model == baseline.MODEL
    # Without weights, which would be fetched.
    model = build_student(cfg)
    assert {name: shape.stride for name, shape in model.backbone.output_shape().items()} == (
        {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
        if name == "frcnn"
        else {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    )
