"""Methods that compare predictions, in the distiller, on tiny detectors."""

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.utils.events import EventStorage
from devices import DEVICES
from distributed_steps import nms
from tiny import ARCHITECTURES, detector_config, train, training_batch, watched, with_sure_teacher

from gkd_d2.modeling.responses import TeacherResponses

RESPONSE_METHODS = ("crosskd", "logits")
CLASSES = {"crosskd": "CrossKD", "logits": "Logits"}
SIZES = ((90, 120), (96, 100), (64, 64))


def frozen_norms(cfg):
    cfg.MODEL.RESNETS.NORM = "FrozenBN"


def norms_in_heads(cfg):
    """Norms that keep statistics: of the RetinaNet's head and of the box head."""
    cfg.MODEL.RETINANET.NORM = "BN"
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.CONV_DIM, cfg.MODEL.ROI_BOX_HEAD.NORM = 1, 8, "BN"


@pytest.fixture
def named_classes():
    """A function that gives a dataset the names of its classes."""
    names = []

    def name(dataset, classes):
        MetadataCatalog.get(dataset).thing_classes = classes
        names.append(dataset)

    yield name
    for dataset in names:
        MetadataCatalog.remove(dataset)


def build(cfg, name):
    cfg.GKD.METHOD = name
    distiller = build_model(cfg).train()
    distiller.listeners = []
    return distiller


def method_losses(distiller, batch):
    with EventStorage():
        losses = distiller(batch)
    return {key: losses[key] for key in distiller.method.active()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", RESPONSE_METHODS)
def test_nothing_is_left_to_learn_where_the_student_is_the_teacher(kind, name, distiller_config):
    cfg = with_sure_teacher(distiller_config(kind, teacher_width=8, change=frozen_norms))
    distiller = build(cfg, name)
    distiller.student.load_state_dict(distiller.teacher.state_dict())
    losses = method_losses(distiller, training_batch(SIZES))
    assert len(losses) == 2
    assert all(0 <= loss.item() < 1e-7 for loss in losses.values())
    # And there is something where one weight differs.
    with torch.no_grad():
        distiller.student.backbone.fpn_output4.weight.mul_(1.5)
    assert all(loss.item() > 1e-6 for loss in method_losses(distiller, training_batch(SIZES)).values())


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(("name", "trains_heads"), [("crosskd", False), ("logits", True)])
def test_what_the_losses_train(kind, name, trains_heads, distiller_config):
    distiller = build(with_sure_teacher(distiller_config(kind, channels=8)), name)
    sum(method_losses(distiller, training_batch(SIZES)).values()).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in distiller.teacher.parameters())
    trained = {name for name, parameter in distiller.student.named_parameters() if parameter.grad is not None}
    trained = {name for name in trained if distiller.student.get_parameter(name).grad.any()}
    heads = {name for name, _ in distiller.student.named_parameters() if not name.startswith("backbone")}
    if trains_heads:
        assert heads <= trained
    else:
        assert not heads & trained
    assert "backbone.bottom_up.stem.conv1.weight" in trained
    # Where each network's heads see its own features, these need no common number of channels.
    align = [parameter.grad for parameter in distiller.align.parameters()]
    assert len(align) == (len(distiller.student_features) if name == "crosskd" else 0)
    assert all(gradient.any() for gradient in align)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_losses_of_every_device_are_those_of_the_cpu(kind, device, distiller_config, monkeypatch):
    """In float64, but for the boxes, which Detectron2 decodes in float32."""
    monkeypatch.setattr(proposal_utils, "batched_nms", nms)
    cfg = with_sure_teacher(distiller_config(kind, channels=8))
    cfg.GKD.METHODS = list(RESPONSE_METHODS)
    batch, found = training_batch(SIZES), []
    for place in ("cpu", device):
        cfg.MODEL.DEVICE = place
        torch.manual_seed(3)
        distiller = build(cfg, "gkd").double()
        found.append(method_losses(distiller, batch))
    assert len(found[0]) == 4
    for key, loss in found[0].items():
        assert found[1][key].device.type == device and loss > 0
        assert found[1][key].item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_crosskd_is_what_the_teachers_heads_say(kind, distiller_config):
    """By a call of the teacher's own heads, without the split, at one pair of levels."""
    distiller = build(with_sure_teacher(distiller_config(kind)), "crosskd")
    batch = training_batch(SIZES)
    with EventStorage():
        seen = distiller.observe(batch, student_grad=False, teacher_grad=False)
        features = dict(zip(distiller.student_features, seen.student))
        teacher = distiller.teacher
        if kind == "faster":
            theirs = teacher.backbone(teacher.preprocess_image(batch).tensor)
            logits, _ = teacher.proposal_generator.rpn_head([features.get(n, f) for n, f in theirs.items()])
            expected = logits[0].permute(0, 2, 3, 1).reshape(-1)
        else:
            logits, _ = teacher.head(list(features.values()))
            expected = logits[0].unflatten(1, (-1, 3)).permute(0, 3, 4, 1, 2).reshape(-1)
        levels = distiller.levels(seen)
    assert torch.equal(levels[0].responses.cross.cells.logits.flatten(), expected)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", RESPONSE_METHODS)
def test_norms_of_heads_keep_their_statistics(kind, name, distiller_config):
    """They move as in a training without distillation, once a batch, and the watch leaves no trace."""
    cfg = with_sure_teacher(distiller_config(kind, teacher_width=8, change=norms_in_heads))
    batch, states = training_batch(SIZES), []
    for method, watch in ((name, False), (name, True), ("none", False)):
        torch.manual_seed(4)
        distiller = build(cfg, method)
        if watch:
            watched(distiller)
        torch.manual_seed(9)
        with EventStorage():
            losses = distiller(batch)
        states.append((distiller.student.state_dict(), losses, torch.rand(3)))
    (state, losses, draw), (watched_state, watched_losses, watched_draw), (alone, alone_losses, alone_draw) = states
    moving = [key for key in alone if key.endswith("running_mean") and "backbone" not in key]
    assert len(moving) > 0 and all(alone[key].any() for key in moving)
    for other in (watched_state, alone):
        assert all(torch.equal(value, other[key]) for key, value in state.items())
    assert all(torch.equal(loss, watched_losses[key]) for key, loss in losses.items())
    assert all(torch.equal(losses[key], loss) for key, loss in alone_losses.items())
    assert torch.equal(draw, watched_draw) and torch.equal(draw, alone_draw)


@pytest.mark.parametrize("number", [0, 3, 1000])
def test_the_number_of_proposals(number, distiller_config):
    cfg = distiller_config("faster")
    cfg.GKD.TEACHER.PROPOSALS = number
    distiller = build(cfg, "crosskd")
    with EventStorage():
        seen = distiller.observe(training_batch(SIZES), student_grad=False, teacher_grad=False)
    theirs: TeacherResponses = seen.heads.teacher
    if number == 0:
        assert theirs.proposals == [] and all(level.regions is None for level in theirs.predictions.values())
    else:
        assert [len(boxes) for boxes in theirs.proposals] == [min(number, 50)] * 3
        assert theirs.region_norm == 3 * min(number, 50)
    assert not any(boxes.requires_grad for boxes in theirs.proposals)
    cfg.GKD.TEACHER.PROPOSALS = -1
    with pytest.raises(ValueError, match="GKD.TEACHER.PROPOSALS is -1, but must be >= 0"):
        build_model(cfg)


def test_the_heads_of_the_student_alone_are_of_another_width(distiller_config):
    """As logits is for; those of crosskd may be so too."""
    cfg = distiller_config("faster", channels=8)
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM, cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = 16, True
    for name in RESPONSE_METHODS:
        history = train(build(cfg, name), cfg, training_batch(), 3)
        assert all(value == value and value >= 0 for losses in history for value in losses.values())


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", RESPONSE_METHODS)
def test_the_columns_of_a_teacher_with_more_classes(kind, name, distiller_config, named_classes):
    """Its losses are those of a teacher that was cut to the student's classes by hand."""
    named_classes("responses_student", ["car", "person", "bus"])
    number = ("MODEL.ROI_HEADS.NUM_CLASSES", 5, "MODEL.RETINANET.NUM_CLASSES", 5)
    cfg = with_sure_teacher(distiller_config(kind, teacher_options=number))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("responses_student",), ()
    cfg.GKD.TEACHER.CLASSES = ["bus", "dog", "person", "tram", "Car"]
    torch.manual_seed(1)
    mapped = build(cfg, name)
    state = torch.load(cfg.GKD.TEACHER.WEIGHTS)["model"]
    kept = torch.tensor([4, 2, 0])
    for key, tensor in state.items():
        if "box_predictor.cls_score" in key:
            # The softmax of the rest is not a layer's, but where the rest is as good as impossible.
            tensor[[1, 3]] = -1e4 * torch.ones_like(tensor[[1, 3]]) if tensor.dim() == 1 else 0.0
            state[key] = tensor[[4, 2, 0, 5]]
        elif "box_predictor.bbox_pred" in key:
            state[key] = tensor.unflatten(0, (5, 4))[kept].flatten(0, 1)
        elif "head.cls_score" in key:
            state[key] = tensor.unflatten(0, (3, 5))[:, kept].flatten(0, 1)
    with torch.no_grad():
        for key, parameter in mapped.teacher.named_parameters():
            if "box_predictor.cls_score" in key:
                parameter[[1, 3]] = -1e4 if parameter.dim() == 1 else 0.0
    cfg.GKD.TEACHER.CLASSES = []
    cfg.GKD.TEACHER.OPTS = ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.RETINANET.NUM_CLASSES", "3"]
    torch.save({"model": state}, cfg.GKD.TEACHER.WEIGHTS)
    torch.manual_seed(1)
    cut, batch, found = build(cfg, name), training_batch(SIZES), []
    for distiller in (mapped, cut):
        torch.manual_seed(2)
        found.append(method_losses(distiller, batch))
    for key, loss in found[0].items():
        assert loss > 0
        torch.testing.assert_close(loss, found[1][key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", RESPONSE_METHODS)
def test_a_class_that_the_teacher_does_not_know_is_refused(name, distiller_config, named_classes):
    named_classes("responses_student", ["car", "person", "bus"])
    cfg = distiller_config("retinanet")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("responses_student",), ()
    cfg.GKD.TEACHER.CLASSES = ["bus", "dog", "car"]
    message = "but GKD.TEACHER.CLASSES does not name the student's classes 1, counted from 0: correct the names"
    with pytest.raises(ValueError, match=message):
        build(cfg, name)


@pytest.mark.parametrize("name", RESPONSE_METHODS)
def test_other_anchors_are_refused(name, distiller_config):
    cfg = distiller_config("retinanet")
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[24], [32], [64], [128], [256]]
    message = (
        f"{CLASSES[name]} compares what the heads predict, but at p3 the student has 3 anchors a cell, of 33.94 x "
        "16.97, 24 x 24, 16.97 x 33.94 pixels, each 8 pixels from .* on, the teacher at p3 has 3 anchors a cell, of "
        "22.63 x 11.31, .*: give both the same anchors"
    )
    with pytest.raises(ValueError, match=message):
        build(cfg, name)
    cfg.GKD.METHOD = "fitnet"
    build_model(cfg)
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 20], [32, 40], [64, 80], [128, 160], [256, 300]]
    with pytest.raises(ValueError, match="the student has 6 anchors a cell"):
        build(cfg, name)


def test_box_heads_that_can_not_be_compared_are_refused(distiller_config):
    """By logits alone: crosskd has the teacher's box head twice."""
    cfg = distiller_config("faster")
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p3", "p4", "p5"]
    message = (
        r"predict of the same proposals, but the strides of the levels that regions are pooled from "
        r"\(MODEL.ROI_HEADS.IN_FEATURES\) of the student is \[8, 16, 32\], of the teacher \[4, 8, 16, 32\]: give"
    )
    with pytest.raises(ValueError, match=message):
        build(cfg, "logits")
    assert all(loss > 0 for loss in method_losses(build(cfg, "crosskd"), training_batch(SIZES)).values())


@pytest.mark.parametrize("name", RESPONSE_METHODS)
def test_levels_without_cells_are_refused(name, distiller_config):
    cfg = distiller_config("faster")
    cfg.MODEL.RPN.IN_FEATURES = ["p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128]]
    message = "the student's GeneralizedRCNN predicts nothing for the cells of p2, only for those of p3, p4, p5, p6 "
    with pytest.raises(ValueError, match=message):
        build(cfg, name)
    cfg.GKD.FEATURES = ["p3", "p4", "p5"]
    build(cfg, name)
    # Without a loss nothing is compared.
    cfg.GKD.FEATURES, cfg.MODEL.RPN.IN_FEATURES = [], ["p3", "p4", "p5", "p6"]
    cfg.GKD[name.upper()].CLASS_WEIGHT = cfg.GKD[name.upper()].BOX_WEIGHT = 0.0
    build(cfg, name)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_dropout_of_heads_draws_nothing_more(kind, distiller_config):
    draws = []
    for name in ("none", *RESPONSE_METHODS):
        torch.manual_seed(3)
        distiller = build(distiller_config(kind), name)
        head = distiller.student.roi_heads.box_head if kind == "faster" else distiller.student.head.cls_subnet
        head.add_module("dropout", torch.nn.Dropout(0.5))
        torch.manual_seed(4)
        with EventStorage():
            distiller(training_batch(SIZES))
        assert head.dropout.training
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", RESPONSE_METHODS)
def test_a_measured_batch_runs_the_heads_once(kind, name, distiller_config):
    """And not once a level."""
    distiller = build(distiller_config(kind), name)
    calls = []
    for model in (distiller.student, distiller.teacher):
        part = model.proposal_generator.rpn_head if kind == "faster" else model.head
        part.register_forward_hook(lambda module, *_: calls.append(module))
    for watch in (False, True):
        if watch:
            watched(distiller)
        calls.clear()
        with EventStorage():
            distiller(training_batch(SIZES))
        # The student's own losses, the teacher's predictions and what is compared with them; that once more.
        assert len(calls) == (4 if watch else 3)


@pytest.mark.parametrize("name", RESPONSE_METHODS)
def test_predictions_of_the_teacher_that_are_not_finite_are_seen(name, distiller_config):
    cfg = distiller_config("retinanet")
    distiller, batch = build(cfg, name), training_batch(SIZES)
    with EventStorage():
        assert distiller.teacher_is_finite(batch)
        with torch.no_grad():
            distiller.teacher.head.bbox_pred.weight.mul_(float("inf"))
        assert not distiller.teacher_is_finite(batch)


def test_two_kinds_and_cascades_are_refused(distiller_config, tmp_path):
    cfg = distiller_config("retinanet")
    faster = detector_config("faster")
    (tmp_path / "teacher.yaml").write_text(faster.dump())
    torch.save({"model": build_model(faster).state_dict()}, tmp_path / "teacher.pth")
    with pytest.raises(
        ValueError,
        match="the student is a one-stage detector, RetinaNet, and the teacher a two-stage one, Generali.*gkd",
    ):
        build(cfg, "logits")
    # Of several, those that compare predictions are named, and ahead of the heads, which do not fit either.
    cfg.GKD.METHODS, cfg.GKD.STUDENT.INIT_FROM_TEACHER = ["gkd", "logits", "crosskd"], True
    with pytest.raises(
        ValueError, match="^Logits and CrossKD compare what the heads predict, but the student is a one"
    ):
        build_model(cfg)
    cfg = distiller_config("cascade")
    with pytest.raises(ValueError, match="but of the student the ROI heads are CascadeROIHeads, which predict "):
        build(cfg, "crosskd")
