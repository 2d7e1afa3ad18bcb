"""Both networks see each batch padded to one size, where each by itself would pad to another."""

import copy
import logging

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, RetinaNet, build_model
from detectron2.utils.events import EventStorage
from tiny import calm, detector_config, train, training_batch

from gkd_d2 import GKDDistiller
from gkd_d2.methods import FitNet
from gkd_d2.modeling.common_size import CommonSize
from gkd_d2.modeling.pairing import pair_levels
from gkd_d2.modeling.split import SplitRetinaNet, register_split, registry, split_detector
from gkd_d2.modeling.split.padding import pad
from gkd_d2.modeling.teacher import FrozenTeacher

LEVELS = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
# Detectron2's pyramid of a ViT declares its divisor so.
MISSPELLED = {"size_divisiblity": 32, "square_size": 0}


class Stairs(Backbone):
    """Patches of 4 pixels, halved from level to level; a cell of a level sees its neighbours, and little more."""

    def __init__(self, divisor, constraints):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 16, 4, stride=4)
        self.halves, self.outputs = (
            torch.nn.ModuleList(torch.nn.Conv2d(16, 16, 3, stride=stride, padding=1) for _ in LEVELS)
            for stride in (2, 1)
        )
        self.divisor, self.constraints = divisor, constraints

    @property
    def size_divisibility(self):
        return self.divisor

    @property
    def padding_constraints(self):
        return self.constraints

    def output_shape(self):
        return {name: ShapeSpec(channels=16, stride=stride) for name, stride in LEVELS.items()}

    def forward(self, x):
        features, x = {}, self.patches(x)
        for name, half, output in zip(LEVELS, self.halves, self.outputs):
            x = half(x).relu()
            features[name] = output(x)
        return features


class SquareRetinaNet(RetinaNet):
    """Pads to the square that its backbone declares, also with Detectron2 0.5."""

    def preprocess_image(self, batched_inputs):
        square = self.backbone.constraints["square_size"]
        return pad(super().preprocess_image(batched_inputs), (square, square))


def detector(divisor=32, **constraints):
    """A tiny RetinaNet whose backbone declares this of its padding."""
    torch.manual_seed(4)
    model = build_model(detector_config("retinanet"))
    model.backbone = Stairs(divisor, constraints)
    if constraints.get("square_size"):
        model.__class__ = SquareRetinaNet
    return model


def distiller_of(student, teacher):
    frozen = FrozenTeacher(teacher, seed=0)
    ours, theirs = pair_levels(split_detector(student), frozen.split, [], [])
    return GKDDistiller(
        student=student, teacher=frozen, student_features=ours, teacher_features=theirs, method=FitNet()
    ).train()


@pytest.mark.parametrize(
    ("student", "teacher", "size"),
    [
        ({"divisor": 32}, {"divisor": 32}, None),
        ({"divisor": 0}, {"divisor": 0}, None),
        ({"square_size": 160}, {"square_size": 160}, None),
        ({"divisor": 32}, {"divisor": 64}, (128, 128)),
        # The batch is 96 x 120: 96 x 128 and 96 x 144 by themselves.
        ({"divisor": 32}, {"divisor": 48}, (96, 192)),
        ({"divisor": 32}, {"divisor": 0, **MISSPELLED}, (96, 128)),
        # Of a divisor that is declared nowhere, the largest stride: that of p7.
        ({"divisor": 32}, {"divisor": 0}, (128, 128)),
        ({"divisor": 32}, {"divisor": 0, "size_divisibility": 32}, (96, 128)),
        ({"divisor": 32}, {"square_size": 160}, (160, 160)),
        ({"square_size": 150}, {"divisor": 32}, (160, 160)),
    ],
)
def test_the_size_is_the_larger_one_rounded_up_to_what_both_need(student, teacher, size):
    splits = [split_detector(detector(**padding)) for padding in (student, teacher)]
    assert CommonSize(*splits).of(training_batch(((90, 120), (96, 100)))) == size


def test_features_are_those_of_each_network_alone():
    """Of the teacher to the bit, as it pads so by itself; of the student in all cells that do not see new padding."""
    student, teacher = detector(32), detector(64)
    distiller = distiller_of(student, teacher)
    batch = training_batch()
    with EventStorage():
        alone = distiller._teacher.observe(batch, list(LEVELS), with_gradients=False).features
        seen = distiller.observe(batch, student_grad=True, teacher_grad=True)
    assert seen.image_size == (128, 128) and seen.images.image_sizes == [(90, 120), (96, 100)]
    assert not seen.images.tensor[:, :, 96:].any()
    assert all(
        torch.equal(feature, expected) for feature, expected in zip(seen.teacher, (alone[name] for name in LEVELS))
    )
    assert [feature.shape for feature in seen.student] == [feature.shape for feature in seen.teacher]
    images, features = split_detector(student).features(batch)
    assert images.tensor.shape[2:] == (96, 128)
    for name, feature in list(zip(LEVELS, seen.student))[:3]:
        # Below the 96 rows lies new padding, to the right of them none.
        own = features[name]
        height = own.shape[2]
        torch.testing.assert_close(feature[:, :, : height - 1], own[:, :, : height - 1])
        assert not torch.allclose(feature[:, :, height - 1], own[:, :, height - 1])


def test_the_students_losses_are_those_of_a_training_with_that_padding():
    student, batch = detector(32), training_batch()
    twin = copy.deepcopy(student).train()
    twin.backbone.divisor = 64
    distiller = distiller_of(student, detector(64))
    with EventStorage():
        expected, losses = twin(batch), distiller(batch)
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in distiller.parameters())
    assert distiller.teacher_is_finite(batch)


@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_a_detector_with_proposals_trains_with_further_padding(kind, distiller_config):
    cfg = distiller_config(kind, channels=8)
    student = calm(build_model(cfg)).student
    teacher = build_model(detector_config(kind))
    teacher.backbone._size_divisibility = 64
    history = train(distiller_of(student, teacher), cfg, training_batch(masks=kind == "mask"), 2)
    assert all(0 < losses["loss_fitnet"] < float("inf") for losses in history)


def test_what_a_square_costs_is_said_once(caplog):
    common = CommonSize(split_detector(detector(32)), split_detector(detector(square_size=256)))
    with caplog.at_level(logging.INFO, "gkd_d2"):
        for _ in range(2):
            common.of(training_batch())
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "Both networks see a batch padded to one size, the first to 256 x 256: the student computes 5.33 times the "
        "pixels that it would alone, of 96 x 128; the teacher's backbone pads to a square of 256; if it takes other "
        "sizes too, set its square_pad to 0"
    )


def test_an_image_that_does_not_fit_into_the_square_is_refused():
    split = split_detector(detector(square_size=100))
    split.preprocess(training_batch(((90, 100),)))
    with pytest.raises(
        ValueError, match="an image of 90 x 120 pixels does not fit into the square of 100 .*square_pad"
    ):
        split.preprocess(training_batch())


def test_a_split_whose_features_take_no_size_pads_by_itself(monkeypatch):
    class Own(RetinaNet):
        def run(self, batched_inputs):
            images = pad(self.preprocess_image(batched_inputs), (128, 128))
            return images, self.backbone(images.tensor)

    class SplitOwn(SplitRetinaNet):
        def features(self, batched_inputs):
            return self.model.run(batched_inputs)

    monkeypatch.setattr(registry, "_SPLITS", dict(registry._SPLITS))
    register_split(Own)(SplitOwn)
    student, teacher = detector(32), detector(64)
    student.__class__ = Own
    distiller = distiller_of(student, teacher)
    with EventStorage():
        # Both have the same weights.
        assert distiller(training_batch())["loss_fitnet"] == 0
        assert distiller.teacher_score_maps(training_batch())["p3"].shape == (2, 16, 16)
