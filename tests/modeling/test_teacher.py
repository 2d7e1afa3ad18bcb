"""A teacher gives features and gradients, and nothing of it changes."""

import copy

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import ARCHITECTURES, detector_config, training_batch
from torchvision.ops import StochasticDepth

from gkd_d2.config import teacher_spec
from gkd_d2.engine.hooks.pictures import take_picture
from gkd_d2.modeling.split import split_detector
from gkd_d2.modeling.teacher import FrozenTeacher, build_teacher


def plain_state(model):
    """Every tensor and every plain number that the model holds."""
    numbers = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float))
    }
    return copy.deepcopy(dict(model.state_dict())), numbers


@pytest.mark.parametrize("kind", ["faster", "cascade", "mask", "retinanet"])
def test_nothing_changes(kind):
    teacher = FrozenTeacher(build_model(detector_config(kind)), seed=0)
    before, numbers = plain_state(teacher.model)
    level = "p4"
    with EventStorage():
        for _ in range(3):
            features, gradients = teacher.observe(
                training_batch(masks=kind == "mask"), [level], with_gradients=True
            ).at([level])
    after, numbers_after = plain_state(teacher.model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert numbers == numbers_after
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert not features[0].requires_grad
    assert not gradients[0].requires_grad
    assert gradients[0].abs().sum() > 0


def test_norm_and_dropout_of_the_heads_stay_in_evaluation():
    model = build_model(detector_config("retinanet"))
    added = torch.nn.BatchNorm2d(16), torch.nn.Dropout(), StochasticDepth(0.5, "row")
    model.head.cls_subnet.append(torch.nn.Sequential(*added))
    teacher = FrozenTeacher(model, seed=0)
    assert teacher.model.head.training and teacher.model.head.cls_score.training
    assert not any(module.training for module in (*added, teacher.model.backbone))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_equal_an_independent_computation(kind):
    model = build_model(detector_config(kind))
    teacher = FrozenTeacher(copy.deepcopy(model), seed=5)
    batch = training_batch()
    levels = ["p3", "p5"]
    with EventStorage():
        features, gradients = teacher.observe(batch, levels, with_gradients=True).at(levels)
        split = split_detector(model.eval())
        for head in split.head_modules():
            head.train()
        images, own = split.features(batch)
        own = {name: f.detach().requires_grad_() for name, f in own.items()}
        torch.manual_seed(5)
        sum(split.losses(images, own, batch).values()).backward()
    for level, feature, gradient in zip(levels, features, gradients):
        assert torch.equal(feature, own[level])
        assert torch.equal(gradient, own[level].grad)


def test_own_random_stream_and_names(distiller_config):
    cfg = distiller_config("faster")
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    teacher = build_teacher(teacher_spec(cfg).build, cfg.GKD.TEACHER.WEIGHTS, seed=0)
    batch = training_batch()
    torch.manual_seed(11)
    with EventStorage() as storage:
        first = teacher.observe(batch, ["p2"], with_gradients=True).at(["p2"])[1]
        again = teacher.observe(batch, ["p2"], with_gradients=True).at(["p2"])[1]
        storage.step()
        later = teacher.observe(batch, ["p2"], with_gradients=True).at(["p2"])[1]
        assert storage.histories()
        assert all(name.startswith("teacher/") for name in storage.histories())
    assert torch.equal(expected, torch.rand(3))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], later[0])


def test_colours_in_the_other_order(distiller_config):
    """A teacher of RGB sees in a student's batch of BGR what it sees in a batch of RGB."""
    cfg = distiller_config("retinanet", teacher_options=("INPUT.FORMAT", "RGB", "MODEL.PIXEL_STD", [50.0, 60.0, 70.0]))
    distiller = build_model(cfg).train()
    batch = training_batch()
    images = [x["image"].clone() for x in batch]
    flipped = [{**x, "image": x["image"][[2, 1, 0]]} for x in batch]
    plain = FrozenTeacher(copy.deepcopy(distiller.teacher), seed=cfg.SEED)
    with EventStorage():
        seen = distiller.observe(batch, student_grad=True, teacher_grad=True)
        expected = plain.observe(flipped, distiller.teacher_features, with_gradients=True).at(
            distiller.teacher_features
        )
        alone = split_detector(distiller.student).features(batch)[1]
        taken = take_picture(distiller, seen.detached())
        scores = distiller.teacher_score_maps(batch)["p3"]
    assert all(torch.equal(x["image"], image) for x, image in zip(batch, images))
    for found, wanted in zip((seen.teacher, seen.teacher_grad), expected):
        assert all(torch.equal(one, other) for one, other in zip(found, wanted))
    assert not torch.equal(seen.teacher[0], plain.observe(batch, ["p3"], with_gradients=False).at(["p3"])[0][0])
    assert torch.equal(scores, plain.score_maps(flipped, None)["p3"])
    # The student's features and the picture are those of the batch as it is.
    assert torch.equal(seen.student[0], alone["p3"])
    assert np.array_equal(taken.image, batch[0]["image"].flip(0).permute(1, 2, 0).byte().numpy())
    with torch.no_grad():
        (detections,) = plain.model.eval()(flipped[:1])
    assert torch.equal(taken.teacher.scores, detections["instances"].scores)


def test_no_losses_without_need():
    teacher = FrozenTeacher(build_model(detector_config("faster")), seed=0)
    features, gradients = teacher.observe(training_batch(), ["p2"], with_gradients=False).at(["p2"])
    assert gradients is None
    assert features[0].shape[:2] == (2, 16)


def test_number_of_proposals(distiller_config):
    """The student goes on with its own."""
    cfg = distiller_config("faster")
    cfg.GKD.TEACHER.ROI_BATCH_SIZE = 8
    distiller = build_model(cfg).train()
    with EventStorage() as storage:
        distiller(training_batch())
    for prefix, count in (("teacher/", 8), ("", 32)):
        sampled = [storage.history(f"{prefix}roi_head/num_{kind}_samples").latest() for kind in ("fg", "bg")]
        assert sum(sampled) == count


def test_unset_parameters_are_listed(distiller_config, tmp_path):
    cfg = distiller_config("faster")
    state = torch.load(tmp_path / "teacher.pth")
    del state["model"]["roi_heads.box_predictor.cls_score.bias"]
    state["model"]["backbone.fpn_output3.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match="leaves 2 of the model's parameters unset") as error:
        build_teacher(teacher_spec(cfg).build, cfg.GKD.TEACHER.WEIGHTS, seed=0)
    for part in (
        "GKD.TEACHER.WEIGHTS",
        "roi_heads.box_predictor.cls_score.bias",
        "backbone.fpn_output3.weight: (2, 2) in the checkpoint, (16, 16, 3, 3) in the model",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("part", ["weights", "config"])
def test_a_teacher_that_is_not_finite_is_refused(part, distiller_config, tmp_path):
    """Numbers that float32 can't hold become infinite as they are loaded."""
    cfg = distiller_config("faster")
    if part == "weights":
        state = torch.load(tmp_path / "teacher.pth")
        name = "roi_heads.box_predictor.bbox_pred.weight"
        state["model"][name] = state["model"][name].double().fill_(1e300)
        torch.save(state, tmp_path / "teacher.pth")
    else:
        path, name = tmp_path / "teacher.yaml", "pixel_std"
        path.write_text(path.read_text().replace("57.375", ".nan"))
    with pytest.raises(ValueError, match=f"infinite or NaN values in the teacher's {name}: GKD.TEACHER.WEIGHTS must"):
        build_teacher(teacher_spec(cfg).build, cfg.GKD.TEACHER.WEIGHTS, seed=0)
