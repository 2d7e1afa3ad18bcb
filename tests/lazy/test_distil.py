"""What distil() makes of two detectors' configs."""

import math

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage
from lazy_configs import model_text, write_distilled, write_plain, write_teacher
from omegaconf import OmegaConf
from tiny import calm, detector_config, training_batch

from gkd_d2 import GKDDistiller, add_gkd_config
from gkd_d2.config.lazy_spec import load_lazy
from gkd_d2.lazy import distil
from gkd_d2.lazy.distil import teacher_of
from gkd_d2.methods import FitNet
from gkd_d2.utils.checkpoint import CheckpointError


def model_of(path):
    return load_lazy(str(path)).model


def step(distiller, *, masks=False):
    calm(distiller.student)
    with EventStorage():
        return {name: loss.item() for name, loss in distiller.train()(training_batch(masks=masks)).items()}


@pytest.mark.parametrize("kind", ["retinanet", "faster", "mask"])
def test_it_builds_a_distiller(kind, tmp_path):
    distiller = instantiate(model_of(write_distilled(tmp_path, kind)))
    assert isinstance(distiller, GKDDistiller)
    levels = "p3 p4 p5 p6 p7" if kind == "retinanet" else "p2 p3 p4 p5"
    assert distiller.student_features == levels.split()
    saved = torch.load(tmp_path / "teacher.pth")["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in distiller.teacher.state_dict().items())
    losses = step(distiller, masks=kind == "mask")
    assert {"loss_gkd_gradient", "loss_bmfi_box", "loss_bmfi_image"} < losses.keys()
    assert all(math.isfinite(value) and value > 0 for value in losses.values())


def test_the_student_starts_as_it_would_alone(tmp_path):
    path = write_distilled(tmp_path)
    torch.manual_seed(5)
    distilled = instantiate(model_of(path)).student.state_dict()
    torch.manual_seed(5)
    alone = instantiate(model_of(write_plain(tmp_path))).state_dict()
    assert distilled.keys() == alone.keys() and all(torch.equal(distilled[name], alone[name]) for name in alone)


def test_a_teacher_of_masks_teaches_boxes(tmp_path):
    model = model_of(write_distilled(tmp_path, "faster", teacher="mask"))
    assert model.left_out == ["mask"] and "mask_head" not in model.teacher.roi_heads
    assert step(instantiate(model))["loss_bmfi_box"] > 0


def test_a_teacher_in_yaml(tmp_path, make_distiller_config):
    cfg = make_distiller_config(tmp_path, "mask", teacher_options=("MODEL.MASK_ON", True))
    (tmp_path / "student.py").write_text(model_text("faster"))
    student = model_of(tmp_path / "student.py")
    teacher = {"teacher": str(tmp_path / "teacher.yaml"), "teacher_weights": cfg.GKD.TEACHER.WEIGHTS}
    model = distil(student, **teacher, roi_batch_size=7)
    spec = teacher_of(model)
    assert spec.classes == (f"MODEL.ROI_HEADS.NUM_CLASSES of {tmp_path}/teacher.yaml", 3)
    distiller = instantiate(model)
    assert not distiller.teacher.roi_heads.mask_on and distiller.teacher.roi_heads.batch_size_per_image == 7
    assert step(distiller)["loss_bmfi_box"] > 0


def test_a_teacher_of_the_model_zoo(tmp_path):
    (tmp_path / "student.py").write_text(model_text("faster"))
    model = distil(
        model_of(tmp_path / "student.py"),
        teacher="new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py",
        teacher_weights="teacher.pth",
        teacher_opts=["model.roi_heads.num_classes=3"],
        roi_batch_size=64,
    )
    spec = teacher_of(model)
    assert spec.train_sets == ("coco_2017_train",) and spec.classes[1] == 3 and spec.image_format == "BGR"
    assert "mask_head" not in model.teacher.roi_heads and model.teacher.roi_heads.batch_size_per_image == 64


def test_options_reach_the_distiller(tmp_path):
    options = 'method="fitnet", features=["p3", "p5"], init_from_teacher=True, warmup_iters=7, one_pass=False'
    model = model_of(write_distilled(tmp_path, options=options))
    LazyConfig.apply_overrides(model, ["method.weight=0.25", "teacher_weights=" + model.teacher_weights])
    distiller = instantiate(model)
    assert isinstance(distiller.method, FitNet) and distiller.method.terms["loss_fitnet"].weight == 0.25
    assert distiller.student_features == ["p3", "p5"]
    assert (distiller.warmup_iters, distiller.one_pass) == (7, False)
    theirs = distiller.teacher.state_dict()
    heads = [name for name in theirs if name.startswith("head.")]
    assert heads and all(torch.equal(distiller.student.state_dict()[name], theirs[name]) for name in heads)


def test_the_defaults_are_those_of_yacs(tmp_path):
    cfg = detector_config("retinanet")
    add_gkd_config(cfg)
    model = model_of(write_distilled(tmp_path))
    keys = cfg.GKD
    assert dict(model.method.weights) == {
        name: keys.LOSS_WEIGHTS[name.upper()] for name in ("gradient", "box", "attention", "image")
    }
    assert (model.warmup_iters, model.one_pass) == (keys.WARMUP_ITERS, keys.ONE_PASS)
    assert model.init_from_teacher == keys.STUDENT.INIT_FROM_TEACHER
    assert model.features == keys.FEATURES and model.teacher_features == keys.TEACHER.FEATURES


def test_one_weight_is_changed_and_the_others_stay(tmp_path):
    model = model_of(write_distilled(tmp_path))
    LazyConfig.apply_overrides(model, ["method.weights.box=0.5"])
    method = instantiate(model.method)
    assert (method.weights.box, method.weights.image) == (0.5, 1e-3)


def swaps(model):
    return instantiate(model)._teacher._swap_channels


def test_the_order_of_channels_is_that_of_the_mappers(tmp_path):
    """Those of a teacher's file, and of the student's own config, which is compared with its mapper before a run."""
    path = write_distilled(tmp_path)
    assert not swaps(model_of(path))
    teacher = tmp_path / "teacher.py"
    teacher.write_text(teacher.read_text().replace('image_format="BGR"', 'image_format="RGB"'))
    with pytest.raises(ValueError, match="teacher.py: .*image_format is RGB, but the model's input_format is BGR"):
        model_of(path)
    # As a config that leaves the model's to the default.
    teacher.write_text(f"{teacher.read_text()}del model.input_format\n")
    assert swaps(model_of(path))
    model = model_of(path)
    # After distil(), as by an override.
    model.student.input_format = "RGB"
    assert not swaps(model)
    model.teacher_image_format = "BGR"
    assert swaps(model)
    # As a config that leaves it to the default.
    model = model_of(path)
    del model.student.input_format
    model.image_format = "BGR"
    assert swaps(model)


def test_a_teacher_that_takes_rgb(tmp_path):
    model = model_of(write_distilled(tmp_path))
    model.teacher_image_format = "RGB"
    distiller = instantiate(model)
    torch.manual_seed(0)
    batch = training_batch()
    flipped = [{**x, "image": x["image"].flip(0)} for x in batch]
    seen = distiller._teacher.observe(batch, ["p3"], with_gradients=False)
    expected = distiller.teacher.backbone(distiller.teacher.preprocess_image(flipped).tensor)["p3"]
    torch.testing.assert_close(seen.features["p3"], expected, rtol=0, atol=0)


def test_a_distilled_config_can_be_a_teacher(tmp_path):
    """Its student is."""
    (tmp_path / "student.py").write_text(model_text("retinanet"))
    middle = write_distilled(tmp_path, name="middle")
    student = model_of(tmp_path / "student.py")
    torch.save({"model": instantiate(model_of(tmp_path / "student.py")).state_dict()}, tmp_path / "middle.pth")
    for teacher in (str(middle), model_of(middle)):
        distiller = instantiate(distil(student, teacher=teacher, teacher_weights=str(tmp_path / "middle.pth")))
        assert type(distiller.teacher).__name__ == "RetinaNet"


def test_weights_must_be_there(tmp_path):
    model = model_of(write_distilled(tmp_path))
    model.teacher_weights = ""
    with pytest.raises(ValueError, match="GKD.TEACHER.WEIGHTS is empty"):
        instantiate(model)
    model.teacher_weights = str(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="absent.pth not found"):
        instantiate(model)


WRONG = {
    "method": ({"method": "gdk"}, ValueError, "method is 'gdk', .*did you mean gkd"),
    "no such file": ({"teacher": "nothing.py"}, FileNotFoundError, "config nothing.py is no .py or .yaml file"),
    "options of a model": (
        {"teacher": OmegaConf.create({"_target_": "x"}), "teacher_opts": ["a=1"]},
        ValueError,
        "teacher_opts are for a teacher's file",
    ),
    "an option that is none": (
        {"teacher_opts": ["model.num_clases=3"]},
        ValueError,
        "sets model.num_clases, which the config does not have: did you mean model.num_classes",
    ),
    "an option without a value": ({"teacher_opts": ["model.num_classes"]}, ValueError, "is no override"),
    "less than no proposals": ({"roi_batch_size": -5}, ValueError, "ROI_BATCH_SIZE is -5, but must be >= 0"),
    "a choice that is none": (
        {"init_from_teacher": "yes"},
        TypeError,
        "init_from_teacher is 'yes', but must be",
    ),
    "proposals of a RetinaNet": ({"roi_batch_size": 5}, ValueError, "ROI_BATCH_SIZE is 5, but .* samples no proposals"),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_can_not_be(arguments, kind, message, tmp_path):
    (tmp_path / "student.py").write_text(model_text("retinanet"))
    student = model_of(tmp_path / "student.py")
    given = {"teacher": str(write_teacher(tmp_path)), "teacher_weights": str(tmp_path / "teacher.pth"), **arguments}
    with pytest.raises(kind, match=message):
        instantiate(distil(student, **given))


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    model = model_of(write_distilled(tmp_path))
    model.student.num_classes = 4
    with pytest.raises(ValueError, match="student detects 4 classes, the teacher 3"):
        instantiate(model)


def test_a_map_of_names_to_a_teachers_classes(tmp_path):
    path = write_distilled(tmp_path, options='classes=["Bus", "Car"], teacher_classes=["car", "cat", "bus"]')
    model = model_of(path)
    model.student.num_classes = 2
    distiller = instantiate(model)
    assert distiller._teacher.classes == [2, 0]
    batch = training_batch()
    for one in batch:
        one["instances"].gt_classes = one["instances"].gt_classes.clamp(max=1)
    calm(distiller.student)
    with EventStorage():
        losses = distiller.train()(batch)
    assert all(math.isfinite(loss.item()) and loss > 0 for loss in losses.values())
    model.classes = []
    with pytest.raises(ValueError, match="model.teacher_classes is set, but model.classes is empty: name the stud"):
        instantiate(model)
