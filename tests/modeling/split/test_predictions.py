"""What a split says that the heads predict is what the heads compute their own losses from, to the bit."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tiny import Scorer, detector_config, training_batch

from gkd_d2.methods import BoxPredictions
from gkd_d2.modeling.split import SplitDetector, split_detector
from gkd_d2.modeling.teacher import set_as_in_evaluation

SIZES = ((90, 120), (96, 100), (64, 64))


def prepared(kind: str, **options):
    """A split in training mode whose norms stay, with the padded images and features of a batch."""
    split = split_detector(build_model(detector_config(kind, **options)))
    set_as_in_evaluation(split)
    batch = training_batch(SIZES)
    with torch.no_grad():
        images, features = split.features(batch)
    return split, batch, images, features


def test_the_losses_of_a_retinanet_follow_from_its_predictions():
    split, batch, images, features = prepared("retinanet")
    model = split.model
    with EventStorage():
        model.loss_normalizer = 100
        expected = split.losses(images, features, batch)
        norm = model.loss_normalizer
        found = split.predictions(features)
        assert list(found) == ["p3", "p4", "p5", "p6", "p7"]
        assert split.cell_norm(len(batch)) == norm
        cells = [found[name].cells for name in found]
        assert all(level.regions is None for level in found.values()) and not any(level.softmax for level in cells)
        count = len(batch)
        anchors = [Boxes(level.boxes[: len(level.boxes) // count]) for level in cells]
        labels, boxes = model.label_anchors(anchors, split.instances(batch))
        model.loss_normalizer = 100
        logits = [level.logits.view(count, -1, model.num_classes) for level in cells]
        losses = model.losses(anchors, logits, labels, [level.deltas.view(count, -1, 4) for level in cells], boxes)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in losses)


def test_the_losses_of_an_rpn_follow_from_its_predictions():
    split, batch, images, features = prepared("faster")
    rpn, count, instances = split.model.proposal_generator, len(batch), split.instances(batch)
    with EventStorage():
        torch.manual_seed(2)
        proposed, expected = rpn(images, features, instances)
        found = split.predictions(features)
        assert list(found) == ["p2", "p3", "p4", "p5", "p6"]
        cells = {name: level.cells for name, level in found.items()}
        anchors = [Boxes(level.boxes[: len(level.boxes) // count]) for level in cells.values()]
        torch.manual_seed(2)
        labels, boxes = rpn.label_and_sample_anchors(anchors, instances)
        losses = rpn.losses(
            anchors,
            [level.logits.view(count, -1) for level in cells.values()],
            labels,
            [level.deltas.view(count, -1, 4) for level in cells.values()],
            boxes,
        )
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    assert split.cell_norm(count) == rpn.batch_size_per_image * count
    best = split.proposals(images, cells, 7)
    assert [len(boxes) for boxes in best] == [7, 7, 7]
    for boxes, all_of_image in zip(best, proposed):
        assert torch.equal(boxes, all_of_image.proposal_boxes.tensor[:7])
        assert (all_of_image.objectness_logits.diff() <= 0).all()
    # More than there are.
    assert [len(boxes) for boxes in split.proposals(images, cells, 1000)] == [len(boxes) for boxes in proposed]
    assert split.proposals(images, cells, 0) == []


@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_the_losses_of_a_box_head_follow_from_its_predictions(kind):
    split, batch, images, features = prepared(kind)
    heads = split.model.roi_heads
    matcher = Matcher([0.5], [0, 1])
    proposals = []
    for image in split.instances(batch):
        boxes = torch.tensor([[5.0, 18, 49, 72], [0, 0, 90, 60], [60, 10, 64, 14], [61, 9, 95, 80], [1, 1, 60, 64]])
        one = Instances(image.image_size, proposal_boxes=Boxes(boxes))
        one.gt_classes = torch.full((len(boxes),), heads.num_classes)
        one.gt_boxes = Boxes(boxes)
        if len(image):
            match, label = matcher(torch.ones(len(image), len(boxes)) * torch.tensor([0.9, 0.1, 0.1, 0.8, 0.2]))
            one.gt_classes[label == 1] = image.gt_classes[match][label == 1]
            one.gt_boxes = Boxes(image.gt_boxes.tensor[match])
        proposals.append(one)
    tensors = [one.proposal_boxes.tensor for one in proposals]
    found = split.region_predictions(features, tensors)
    assert list(found) == ["p2", "p3", "p4", "p5"]
    assert sum(len(level.boxes) for level in found.values()) == 15 and all(level.softmax for level in found.values())
    # Level by level, in the order of the proposals: canonical size 224 at p4, so all of these are pooled from p2 or p3.
    side = torch.cat(tensors)
    side = ((side[:, 2] - side[:, 0]) * (side[:, 3] - side[:, 1])).sqrt()
    assert torch.equal(found["p2"].boxes, torch.cat(tensors)[side < 112])
    order = torch.cat([(side < 112).nonzero(), (side >= 112).nonzero()])[:, 0]
    logits, deltas = torch.empty(15, heads.num_classes + 1), torch.empty(15, 4 * heads.num_classes)
    logits[order] = torch.cat([level.logits for level in found.values()])
    deltas[order] = torch.cat([level.deltas for level in found.values()])
    with EventStorage():
        expected = heads._forward_box(features, proposals)
        losses = heads.box_predictor.losses((logits, deltas), proposals)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_regions_without_proposals_at_a_level_or_at_all():
    split, _, _, features = prepared("faster")
    none = torch.zeros(0, 4)
    found = split.predictions(features, [none, torch.tensor([[0.0, 0.0, 20.0, 20.0]]), none])
    assert [len(found[name].regions.boxes) for name in ("p2", "p3", "p4", "p5")] == [1, 0, 0, 0]
    assert found["p6"].regions is None
    found = split.predictions(features, [none] * 3)
    assert all(len(found[name].regions.logits) == 0 for name in ("p2", "p3", "p4", "p5"))


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_boxes_are_those_of_the_detector(kind):
    """The best cell's box, decoded by hand, is what Detectron2's inference gives."""
    split, batch, images, features = prepared(kind)
    found = split.predictions(features)
    for level in found.values():
        cells = level.cells
        boxes = cells.predicted_boxes(torch.zeros(len(cells.boxes), dtype=torch.int64))
        x0, y0, x1, y1 = cells.boxes.unbind(dim=1)
        dx, dy, dw, dh = cells.deltas.unbind(dim=1)
        width, height = x1 - x0, y1 - y0
        center = torch.stack([x0 + width / 2 + dx * width, y0 + height / 2 + dy * height], dim=1)
        half = torch.stack([dw.exp() * width, dh.exp() * height], dim=1) / 2
        torch.testing.assert_close(boxes, torch.cat([center - half, center + half], dim=1), rtol=1e-4, atol=1e-3)


def test_classes_are_chosen():
    apply = lambda deltas, boxes: boxes + deltas  # noqa: E731
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 2.0, 0.0]])
    deltas = torch.arange(24.0).view(2, 12)
    softmax = BoxPredictions(logits, deltas, torch.zeros(2, 4), apply, softmax=True)
    chosen = softmax.of_classes([2, 0])
    # The rest, class 1 and the background, count as the background.
    probability = logits.softmax(dim=1)
    expected = torch.stack([probability[:, 2], probability[:, 0], probability[:, 1] + probability[:, 3]], dim=1)
    torch.testing.assert_close(chosen.logits.softmax(dim=1), expected)
    assert chosen.deltas.tolist() == [[8, 9, 10, 11, 0, 1, 2, 3], [20, 21, 22, 23, 12, 13, 14, 15]]
    confidence, classes = chosen.confidence()
    torch.testing.assert_close(confidence, expected[:, :2].amax(dim=1))
    assert classes.tolist() == [0, 0]
    assert chosen.predicted_boxes(torch.tensor([0, 1])).tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    sigmoid = BoxPredictions(logits, deltas[:, :4], torch.zeros(2, 4), apply)
    assert sigmoid.of_classes([3, 1]).logits.tolist() == [[4, 2], [0, -1]]
    assert sigmoid.of_classes([3, 1]).deltas is sigmoid.deltas
    confidence, classes = sigmoid.confidence()
    torch.testing.assert_close(confidence, logits.amax(dim=1).sigmoid())
    assert classes.tolist() == [3, 2]
    assert sigmoid.predicted_boxes(classes).tolist() == deltas[:, :4].tolist()


def test_all_classes_in_another_order_leave_the_probabilities():
    split, _, _, features = prepared("retinanet")
    whole, turned = split.predictions(features), split.predictions(features, classes=[2, 0, 1])
    for name, level in whole.items():
        assert torch.equal(level.cells.logits[:, [2, 0, 1]], turned[name].cells.logits)
    split, _, _, features = prepared("faster")
    proposals = [torch.tensor([[0.0, 0.0, 20.0, 20.0], [3, 4, 90, 80]])] * 3
    whole, turned = split.predictions(features, proposals), split.predictions(features, proposals, classes=[2, 0, 1])
    for name, level in whole.items():
        # The RPN knows of no classes.
        assert torch.equal(level.cells.logits, turned[name].cells.logits)
        if level.regions is not None:
            assert torch.equal(level.regions.logits[:, [2, 0, 1, 3]], turned[name].regions.logits)


def test_a_box_head_with_a_sigmoid_for_each_class():
    """As Detectron2 after 0.5 has it: the column of the background means nothing."""
    split, _, _, features = prepared("faster")
    proposals = [torch.tensor([[0.0, 0.0, 20.0, 20.0], [3, 4, 90, 80]])] * 3
    whole, settings = split.region_predictions(features, proposals)["p2"], split.region_settings()
    split.model.roi_heads.box_predictor.use_sigmoid_ce = True
    found = split.region_predictions(features, proposals)["p2"]
    assert whole.softmax and not found.softmax
    assert torch.equal(found.logits, whole.logits[:, :-1])
    confidence, _ = found.confidence()
    torch.testing.assert_close(confidence, whole.logits[:, :-1].sigmoid().amax(dim=1))
    assert settings != split.region_settings()


@pytest.mark.parametrize("kind", ["cascade", "scorer"])
def test_detectors_whose_predictions_are_not_known(kind):
    model = build_model(detector_config(kind))
    if kind == "scorer":

        class Silent(SplitDetector):
            losses = head_features = head_modules = None
            num_classes = 1

        split, message = Silent(model), "the split of Scorer does not implement predictions"
        assert isinstance(model, Scorer)
    else:
        split, message = split_detector(model), "the ROI heads are CascadeROIHeads, which predict otherwise than"
    with pytest.raises(ValueError, match=message):
        split.check_predictions()
