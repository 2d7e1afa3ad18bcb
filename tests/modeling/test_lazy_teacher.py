"""A student of a config of yacs under a teacher of a LazyConfig."""

import math
import re
from importlib.util import find_spec

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from lazy_configs import write_teacher
from short_runs import checkpoints
from tiny import calm, train, training_batch

from gkd_d2.config import teacher_spec
from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.engine.run import YacsRun
from gkd_d2.engine.trainer import Trainer

HAS_VIT = all(map(find_spec, ("detectron2.modeling.backbone.vit", "timm")))


@pytest.fixture
def under_lazy(distiller_config, tmp_path):
    """A function that makes the config of a student under a ``.py`` teacher."""

    def make(student="retinanet", teacher=None, **options):
        cfg = distiller_config(student, **options)
        path = write_teacher(tmp_path, teacher or student, name="lazy")
        cfg.GKD.TEACHER.CONFIG_FILE, cfg.GKD.TEACHER.WEIGHTS = str(path), str(path.with_suffix(".pth"))
        return cfg

    return make


@pytest.mark.parametrize(("student", "teacher"), [("retinanet", "retinanet"), ("faster", "mask"), ("mask", "mask")])
def test_it_teaches(student, teacher, under_lazy, caplog):
    cfg = under_lazy(student, teacher)
    distiller = build_model(cfg)
    calm(distiller.student)
    saved = torch.load(cfg.GKD.TEACHER.WEIGHTS)["model"]
    assert all(torch.equal(t, saved[n]) for n, t in distiller.teacher.state_dict().items())
    with caplog.at_level("INFO", logger="gkd_d2"):
        history = train(distiller, cfg, training_batch(masks=student == "mask"), 3)
    assert all(math.isfinite(value) for losses in history for value in losses.values())
    assert history[-1]["loss_bmfi_box"] > 0
    assert f"{cfg.GKD.TEACHER.WEIGHTS}, described by {cfg.GKD.TEACHER.CONFIG_FILE}" in caplog.text
    assert ("without its head for masks" in caplog.text) == (student == "faster")
    # The teacher stays.
    assert all(torch.equal(t, saved[n]) for n, t in distiller.teacher.state_dict().items())


@pytest.mark.skipif(not HAS_VIT, reason="this Detectron2 has no ViT, or timm, which it needs, is not installed")
@pytest.mark.parametrize("student", ["faster", "mask"])
def test_a_vit_teaches(student, under_lazy):
    """Trained on RGB, and a head of another kind: all by the two configs."""
    distiller = build_model(under_lazy(student, "vit", channels=8))
    calm(distiller.student)
    assert distiller.student_features == ["p2", "p3", "p4", "p5"]
    batch = training_batch(masks=student == "mask")
    flipped = [{**x, "image": x["image"].flip(0)} for x in batch]
    with EventStorage():
        seen = distiller.observe(batch, student_grad=False, teacher_grad=False)
        losses = distiller.train()(batch)
    assert seen.image_size == (96, 128)
    size = distiller.teacher.preprocess_image(flipped).tensor.shape[-2:]
    padding = (0, 128 - size[1], 0, 96 - size[0])
    images = torch.nn.functional.pad(distiller.teacher.preprocess_image(flipped).tensor, padding)
    torch.testing.assert_close(seen.teacher[0], distiller.teacher.backbone(images)["p2"])
    assert all(math.isfinite(loss) for loss in losses.values()) and losses["loss_bmfi_box"] > 0


def test_its_heads_are_inherited(under_lazy):
    cfg = under_lazy("mask", channels=16)
    cfg.GKD.STUDENT.INIT_FROM_TEACHER = True
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM, cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 32, 1, 7
    distiller = build_model(cfg)
    student, teacher = distiller.student.state_dict(), distiller.teacher.state_dict()
    name = "proposal_generator.rpn_head.conv.weight"
    assert torch.equal(student[name], teacher[name])


def test_options_change_its_config(under_lazy):
    cfg = under_lazy("faster")
    cfg.GKD.TEACHER.OPTS = ["model.roi_heads.batch_size_per_image=5"]
    assert build_model(cfg).teacher.roi_heads.batch_size_per_image == 5
    cfg.GKD.TEACHER.ROI_BATCH_SIZE = 9
    assert build_model(cfg).teacher.roi_heads.batch_size_per_image == 9
    cfg.GKD.TEACHER.OPTS = ["model.roi_heads.box_head.fc_dim=[8]"]
    with pytest.raises(ValueError, match=r"with GKD.TEACHER.OPTS .*: .* did you mean .*box_head.fc_dims"):
        build_model(cfg)


def test_options_change_a_teacher_in_yaml(distiller_config):
    cfg = distiller_config("faster")
    # As YAML reads them, numbers are no text.
    cfg.GKD.TEACHER.OPTS = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 5]
    assert build_model(cfg).teacher.roi_heads.batch_size_per_image == 5
    cfg.GKD.TEACHER.OPTS = ["MODEL.ROI_HEADS.BATCH_SIZE", "5"]
    with pytest.raises(ValueError, match="with GKD.TEACHER.OPTS .*: there is no .*MODEL.ROI_HEADS.BATCH_SIZE'"):
        build_model(cfg)


def test_names_of_the_model_zoo(distiller_config, tmp_path, monkeypatch):
    cfg = distiller_config("faster")
    cfg.GKD.TEACHER.CONFIG_FILE = "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"
    spec = teacher_spec(cfg)
    assert spec.file.endswith("model_zoo/configs/new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    assert spec.train_sets == ("coco_2017_train",) and spec.heads == {"mask"} and spec.image_format == "BGR"
    setting, number = spec.classes
    assert setting.startswith("model.roi_heads.num_classes of /") and number == 80
    assert spec.without(["mask"]).heads == set()
    assert type(spec.without(["mask"]).build()).__name__ == "GeneralizedRCNN"
    cfg.GKD.TEACHER.CONFIG_FILE = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    assert teacher_spec(cfg).classes[1] == 80
    cfg.GKD.TEACHER.CONFIG_FILE = "COCO-Detection/nothing.py"
    with pytest.raises(FileNotFoundError, match="and then in Detectron2's model zoo"):
        teacher_spec(cfg)


def problems(cfg):
    with pytest.raises(PreflightError) as error:
        check_inputs(YacsRun(cfg), eval_only=False, resume=False)
    return str(error.value)


def test_what_is_said_before_a_run(under_lazy, toy_scenes, tmp_path):
    cfg = under_lazy()
    cfg.DATASETS.TRAIN = ("toy_kitti_train",)
    cfg.SOLVER.IMS_PER_BATCH = 2
    check_inputs(YacsRun(cfg), eval_only=False, resume=False)
    cfg.GKD.TEACHER.OPTS = ["model.num_classes=7"]
    assert re.search(r"model.num_classes of .*lazy.py is 7, but dataset toy_kitti_train has 3 classes", problems(cfg))
    cfg.GKD.TEACHER.OPTS = []
    cfg.GKD.TEACHER.WEIGHTS = str(tmp_path / "absent.pth")
    assert f"`python tools/lazyconfig_train_net.py --config-file {tmp_path}/lazy.py`" in problems(cfg)
    (tmp_path / "lazy.py").write_text("model = 3")
    assert "lazy.py is no LazyConfig of a detector" in problems(cfg)


def test_the_tools_accept_it(under_lazy, toy_scenes, tmp_path, run_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = under_lazy()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_kitti_train",), ("toy_kitti_val",)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.DATALOADER.NUM_WORKERS = 2, 1, 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.OUTPUT_DIR = (64,), 64, "run"
    (tmp_path / "student.yaml").write_text(cfg.dump())
    tools = (
        ("train_net.py", "--config-file", "student.yaml"),
        ("suggest_weights.py", "--config-file", "student.yaml", "--batches", 1),
        ("visualize_gkd.py", "--config-file", "student.yaml", "--count", 1, "MODEL.WEIGHTS", "run/model_final.pth"),
        ("compare_runs.py", "run", "--no-speed", "--output", "report"),
    )
    for tool in tools:
        status, printed = run_here(*tool)
        assert status == 0, printed[-2000:]
    assert "| student distilled |" in (tmp_path / "report" / "report.md").read_text()
    assert len(list((tmp_path / "run" / "visualize").glob("*.png"))) == 1
    # What a run of a LazyConfig leaves is refused in a sentence.
    (tmp_path / "lazy_run").mkdir()
    (tmp_path / "lazy_run" / "config.yaml").write_text("model: {_target_: some.detector}\n")
    status, printed = run_here("compare_runs.py", "lazy_run", "--output", "other")
    assert status == 1 and "lazy_run/config.yaml was written by tools/lazyconfig_train_net.py" in printed


def test_its_training_sets_must_have_the_students_classes(under_lazy, toy_scenes):
    cfg = under_lazy()
    cfg.DATASETS.TRAIN = ("toy_kitti_train",)
    MetadataCatalog.get("lazy_pets").thing_classes = ["cat", "dog", "fish"]
    cfg.GKD.TEACHER.OPTS = ["dataloader.train.dataset.names=lazy_pets"]
    with pytest.raises(ValueError, match="toy_kitti_train has the classes Car, .* lazy_pets has cat, dog, fish"):
        build_model(cfg)


def test_a_checkpoint_knows_its_teacher(under_lazy, toy_scenes, tmp_path, caplog):
    cfg = under_lazy()
    cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR = ("toy_kitti_train",), str(tmp_path / "run")
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.DATALOADER.NUM_WORKERS = 2, 1, 0
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    (tmp_path / "run").mkdir()
    Trainer(cfg).train()
    assert checkpoints(tmp_path / "run") == {"model_final.pth"}
    Trainer(cfg).resume_or_load(resume=True)
    assert "the resumed run differs" not in caplog.text
    cfg.GKD.TEACHER.OPTS = ["model.focal_loss_gamma=1.0", "train.max_iter=5"]
    Trainer(cfg).resume_or_load(resume=True)
    assert caplog.records[-1].message == (
        "From iteration 1 the resumed run differs from the one before: the teacher's model.focal_loss_gamma was 2.0 "
        "and is 1.0"
    )
