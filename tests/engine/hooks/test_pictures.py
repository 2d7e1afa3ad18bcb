"""Pictures of a run: what they hold, and that taking them leaves no trace in a training."""

import random

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage, TensorboardXWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import ARCHITECTURES, training_batch

from gkd_d2.engine.hooks import PeriodicPicture
from gkd_d2.engine.hooks.pictures import take_picture
from gkd_d2.losses import box_context_mask, gradient_map

TAG = "gkd/maps_and_detections"


def train(cfg, batch, steps, folder, period=0):
    """A short training; returns all that a picture could change, and the pictures."""
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    distiller = build_model(cfg).train()
    if period:
        PeriodicPicture(distiller, period).before_train()
    optimizer = build_optimizer(cfg, distiller)
    history = []
    with EventStorage() as storage:
        writer = TensorboardXWriter(str(folder))
        for _ in range(steps):
            losses = distiller(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append({name: value.item() for name, value in losses.items()})
            writer.write()
            storage.step()
        writer.close()
    networks = (distiller, distiller._teacher.model)
    left = {
        "losses": history,
        "modes": [module.training for network in networks for module in network.modules()],
        "normalizers": [getattr(model, "loss_normalizer", None) for model in (distiller.student, networks[1])],
        "draws": (random.random(), np.random.rand(), torch.rand(1).item()),
    }
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    images = events.Images(TAG) if TAG in events.Tags()["images"] else []
    return left, [network.state_dict() for network in networks], images


# Where the gradient maps have no part in the losses, gradients are computed for the picture alone.
@pytest.mark.parametrize(("kind", "gradient_weight"), [("faster", 0.5), ("retinanet", 0.5), ("retinanet", 0.0)])
def test_pictures_change_nothing_in_a_training(kind, gradient_weight, distiller_config, tmp_path):
    cfg = distiller_config(kind, channels=8)
    cfg.GKD.LOSS_WEIGHTS.GRADIENT = gradient_weight
    if not gradient_weight:
        cfg.GKD.WEIGHTING = "uniform"
    batch = training_batch()
    without, weights_without, images = train(cfg, batch, 3, tmp_path / "without")
    assert images == []
    with_pictures, weights, images = train(cfg, batch, 3, tmp_path / "with", period=2)
    assert with_pictures == without
    for network, reference in zip(weights, weights_without):
        assert all(torch.equal(value, reference[name]) for name, value in network.items())
    assert [image.step for image in images] == [0, 2]
    rows = 1 + (4 if kind == "faster" else 5)
    # A panel of a 90 x 120 image is 3 x 4 inches.
    # Versions of matplotlib round a pixel up or down.
    assert (images[0].width, images[0].height) == pytest.approx((1746, 90 + 300 * rows + 28 * (rows - 1)), abs=1)


def test_an_iteration_in_parts_gives_one_picture(distiller_config):
    distiller = build_model(distiller_config("retinanet")).train()
    PeriodicPicture(distiller, 1).before_train()
    with EventStorage() as storage:
        for _ in range(2):
            for part in training_batch():
                distiller([part])
            storage.step()
        assert [(name, step) for name, _, step in storage._vis_data] == [(TAG, 0), (TAG, 1)]


def test_a_negative_period_is_refused(distiller_config):
    with pytest.raises(ValueError, match="GKD.VIS_PERIOD is -1"):
        PeriodicPicture(build_model(distiller_config("retinanet")), -1)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("half", [False, True])
def test_a_picture_holds_what_both_networks_make_of_the_first_image(kind, half, distiller_config):
    distiller = build_model(distiller_config(kind)).train()
    batch = training_batch(((90, 120), (96, 130)))
    # As in a training with resized images: detections must stay in pixels of the image that was seen.
    batch[0].update(height=900, width=1200)
    with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        seen = distiller.observe(batch, student_grad=True, teacher_grad=True)
        taken = take_picture(distiller, seen)
    assert seen.student[0].dtype == (torch.bfloat16 if half else torch.float32)

    assert taken.image.shape == (90, 120, 3)
    blue = batch[0]["image"][0].numpy()
    assert np.array_equal(taken.image[:, :, 2], blue)
    assert taken.padded_size == (96, 160)
    assert [level.name for level in taken.levels] == distiller.student_features
    assert [level.stride for level in taken.levels] == [4, 8, 16, 32, 64, 128][kind == "retinanet" :][
        : len(taken.levels)
    ]
    for index, level in enumerate(taken.levels):
        for ours, feature, gradient in (
            (level.student, seen.student, seen.student_grad),
            (level.teacher, seen.teacher, seen.teacher_grad),
        ):
            assert torch.equal(ours, gradient_map(feature[index].detach(), gradient[index])[0])
        mask = box_context_mask(seen.boxes, (96, 160), tuple(level.teacher.shape))[0]
        assert torch.equal(level.mask, mask)
        assert mask.max() > 0
    assert torch.equal(taken.truth.gt_boxes.tensor, batch[0]["instances"].gt_boxes.tensor)

    for network, found in ((distiller.student, taken.student), (distiller._teacher.model, taken.teacher)):
        with torch.no_grad():
            (expected,) = network.eval()([{**batch[0], "height": 90, "width": 120}])
        assert torch.equal(found.pred_boxes.tensor, expected["instances"].pred_boxes.tensor)
        assert torch.equal(found.scores, expected["instances"].scores)
        assert len(found) == 0 or found.pred_boxes.tensor.max() <= 120


@pytest.mark.parametrize("importance", ["channel", "element"])
def test_differences_add_up_to_the_loss_of_an_aligned_student(importance, distiller_config):
    cfg = distiller_config("retinanet", channels=8)
    cfg.GKD.LOSS_WEIGHTS.GRADIENT = 0.5
    cfg.GKD.MAP_REGION, cfg.GKD.IMPORTANCE = "image", importance
    distiller = build_model(cfg).train()
    batch = training_batch(((96, 128),))
    with EventStorage():
        taken = take_picture(distiller, distiller.observe(batch, student_grad=True, teacher_grad=True))
        loss = distiller(batch)["loss_gkd_gradient"]
    total = sum((level.teacher - level.student).abs().mean() for level in taken.levels)
    assert 0.5 * total.item() == pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("importance", "weighting", "weighs"),
    [
        ("element", "gradient", None),
        ("norm", "gradient", "teacher_grad"),
        ("student", "attention_gradient", "student_grad"),
        ("norm", "uniform", None),
    ],
)
@pytest.mark.parametrize("methods", [["gkd"], ["fitnet", "gkd"]])
def test_a_picture_shows_what_the_config_makes_of_the_gradients(
    importance, weighting, weighs, methods, distiller_config
):
    cfg = distiller_config("retinanet")
    cfg.GKD.METHODS = methods
    cfg.GKD.IMPORTANCE, cfg.GKD.WEIGHTING, cfg.GKD.RECTIFIER = importance, weighting, "relu"
    distiller = build_model(cfg).train()
    with EventStorage():
        seen = distiller.observe(training_batch(), student_grad=True, teacher_grad=True)
        taken = take_picture(distiller, seen)
    for index, level in enumerate(taken.levels):
        for ours, feature, gradient in (
            (level.student, seen.student, seen.student_grad),
            (level.teacher, seen.teacher, seen.teacher_grad),
        ):
            rectified = (feature[index][0] * gradient[index][0]).sum(dim=0).relu().detach()
            low, high = rectified.min(), rectified.max()
            # p7 has one cell, of which there is no map.
            expected = (rectified - low) / (high - low) if high > low else torch.zeros(1, 1)
            torch.testing.assert_close(ours, expected)
        if weighs is None:
            assert level.importance is None
        else:
            norm = getattr(seen, weighs)[index][0].norm(dim=0)
            torch.testing.assert_close(level.importance / level.importance.max(), norm / norm.max())
