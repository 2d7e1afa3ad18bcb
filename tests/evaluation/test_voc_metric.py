"""VOC's average precision on KITTI's labels: cases worked by hand, and equality with a plain implementation."""

from __future__ import annotations

import numpy as np
import pytest
from kitti_reference import NEIGHBOUR, own_overlap, union_overlap
from kitti_scenes import inputs, obj, random_images

from gkd_d2.data.datasets.kitti_labels import CLASSES
from gkd_d2.evaluation.voc_metric import voc_average_precision

A, B, C, D = ((left, 0.0, left + 100.0, 100.0) for left in (0.0, 200.0, 400.0, 600.0))
NOWHERE = (900.0, 0.0, 1000.0, 100.0)
REGION = obj("DontCare", (2000, 0, 2100, 100), -1.0, -1)


def evaluate(*images, strict=False):
    """``images``: pairs of label objects and (type, box, score) detections."""
    return voc_average_precision(*inputs(images), strict=strict)


def car(objects, found, **options):
    """Of cars in one image: boxes of objects and (box, score) of detections."""
    image = ([obj("Car", box) for box in objects], [("Car", box, score) for box, score in found])
    return evaluate(image, **options)["Car"]


def test_the_area_below_the_interpolated_curve():
    found = [(A, 0.9), (NOWHERE, 0.8), (B, 0.7), (C, 0.6), (NOWHERE, 0.5)]
    # Recall 1/4, 2/4, 3/4 at precision 1, 2/3, 3/4; the highest at this or a higher recall: 1, 3/4, 3/4. D is missed.
    assert car([A, B, C, D], found) == pytest.approx(100 * (1 + 3 / 4 + 3 / 4) / 4)
    # The order of the file plays no part where scores differ.
    assert car([D, C, B, A], found[::-1]) == pytest.approx(62.5)


def test_all_found_and_none():
    assert car([A, B], [(A, 0.1), (B, -3.0)]) == 100
    assert car([A, B], [(NOWHERE, 0.9)]) == 0
    assert car([A, B], []) == 0
    # Detections without an object, neither, and no image at all: 0, not NaN.
    assert car([], [(A, 0.9)]) == car([], []) == 0
    assert evaluate() == dict.fromkeys(CLASSES, 0)


def test_classes_are_apart():
    images = [([obj("Car", A), obj("Cyclist", B)], [("Car", A, 0.9), ("Pedestrian", A, 0.95), ("Pedestrian", B, 0.95)])]
    assert evaluate(*images) == {"Car": 100, "Pedestrian": 0, "Cyclist": 0}


def test_a_second_detection_of_an_object_is_false():
    # True, false, true: precision 1 and 2/3 at recall 1/2 and 1.
    assert car([A, B], [(A, 0.9), (A, 0.8), (B, 0.7)]) == pytest.approx(100 * (1 + 2 / 3) / 2)
    # The first to come finds the object, though the second fits better: recall 1 at precision 1.
    assert car([A], [((0, 0, 100, 80), 0.9), (A, 0.8)]) == 100


def test_only_the_object_of_the_largest_overlap_is_compared():
    low = (0.0, 30.0, 100.0, 130.0)
    # IoU of 0.82 with A, which is found, and of 0.67 with the other: VOC does not turn to that one.
    second = (0.0, 10.0, 100.0, 110.0)
    assert car([A, low], [(A, 0.9), (second, 0.8)]) == 50
    assert car([A, low], [(second, 0.9), (A, 0.8)]) == 50
    assert car([A, low], [(second, 0.9), (low, 0.8)]) == 100


def test_equal_scores_keep_their_order():
    assert car([A], [(A, 0.5), (NOWHERE, 0.5)]) == 100
    assert car([A], [(NOWHERE, 0.5), (A, 0.5)]) == 50
    right, wrong = ([obj("Car", A)], [("Car", A, 0.5)]), ([], [("Car", A, 0.5)])
    assert evaluate(right, wrong)["Car"] == 100
    assert evaluate(wrong, right)["Car"] == 50
    # Far more than a sort of small arrays keeps in order by chance: all right ones, then all wrong ones.
    assert evaluate(*[right] * 200, *[wrong] * 200)["Car"] == 100


@pytest.mark.parametrize(("height", "ap"), [(50.0, 100), (49.9, 0), (49.5, 0)])
def test_an_object_is_found_from_an_iou_of_one_half_on(height, ap):
    # With VOC's own pixel more, 49.5 would be 50.5 of 101 and enough.
    assert car([A], [((0.0, 0.0, 100.0, height), 0.9)]) == ap


@pytest.mark.parametrize("strict", [False, True])
def test_objects_of_every_difficulty_count(strict):
    """Small, hidden and truncated beyond KITTI's "hard": missed, each takes its share, and found gives it back."""
    objects = [obj("Car", A), obj("Car", (500, 0, 506, 3)), obj("Car", B, 0.9), obj("Car", C, 0.0, 3)]
    found = [("Car", one["bbox"], 0.9) for one in objects]
    for number in range(1, 5):
        assert evaluate((objects, found[:number]), strict=strict)["Car"] == 25 * number


@pytest.mark.parametrize(
    ("kind", "detected", "neutral"),
    [
        ("Van", "Car", True),
        ("Person_sitting", "Pedestrian", True),
        ("Van", "Pedestrian", False),
        ("Truck", "Car", False),
        ("Tram", "Car", False),
        ("Person_sitting", "Cyclist", False),
        ("Misc", "Cyclist", False),
    ],
)
def test_neighbours_are_ignored_unless_strict(kind, detected, neutral):
    image = ([obj(detected, A), obj(kind, B)], [(detected, B, 0.99), (detected, A, 0.9)])
    # A false one before the only true one halves its precision.
    assert evaluate(image)[detected] == (100 if neutral else 50)
    assert evaluate(image, strict=True)[detected] == 50
    # Never found, they are no miss.
    assert evaluate((image[0], image[1][1:]), strict=True)[detected] == 100


@pytest.mark.parametrize(("height", "ap"), [(50.0, 100), (49.0, 50)])
def test_a_neighbour_too_is_found_from_an_iou_of_one_half_on(height, ap):
    image = ([obj("Car", A), obj("Van", B)], [("Car", (200.0, 0.0, 300.0, height), 0.99), ("Car", A, 0.9)])
    assert evaluate(image)["Car"] == ap


@pytest.mark.parametrize("strict", [False, True])
def test_a_true_positive_stays_one(strict):
    # On a Van with IoU 1 and in a DontCare region, but on a Car too, with IoU 0.67.
    objects = [obj("Car", (0, 20, 100, 120)), obj("Van", A), obj("DontCare", (0, 0, 300, 300), -1.0, -1)]
    assert evaluate((objects, [("Car", A, 0.9)]), strict=strict)["Car"] == 100


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("width", "ap"), [(50, 100), (200, 100), (201, 50)])
def test_dont_care_is_ignored_by_the_detections_own_area_unless_strict(kind, width, ap):
    # The region is 100 wide: up to a width of 200 it covers half of the detection.
    image = ([obj(kind, A), REGION], [(kind, (2000.0, 0.0, 2000.0 + width, 100.0), 0.99), (kind, A, 0.9)])
    assert evaluate(image)[kind] == ap
    assert evaluate(image, strict=True)[kind] == 50


def test_a_second_detection_in_an_ignored_region_is_ignored():
    image = ([obj("Car", A), obj("Car", B), obj("Van", A)], [("Car", A, 0.9), ("Car", A, 0.8), ("Car", B, 0.7)])
    assert evaluate(image)["Car"] == 100
    assert evaluate(image, strict=True)["Car"] == pytest.approx(100 * (1 + 2 / 3) / 2)


def plain_average_precision(images, name, strict):
    """Detection by detection, and the area as the definition has it: the best precision at each object's recall."""
    objects = [[one["bbox"] for one in labels if one["type"] == name] for labels, _ in images]
    ranked = [
        (score, image, box) for image, (_, found) in enumerate(images) for kind, box, score in found if kind == name
    ]
    used, curve = set(), []
    right = wrong = 0
    for _, image, box in sorted(ranked, key=lambda detection: -detection[0]):
        labels = images[image][0]
        overlaps = [union_overlap(box, other) for other in objects[image]]
        best = max(range(len(overlaps)), key=overlaps.__getitem__, default=None)
        if best is not None and overlaps[best] >= 0.5 and (image, best) not in used:
            used.add((image, best))
            right += 1
        elif not strict and any(
            (one["type"] == NEIGHBOUR[name] and union_overlap(box, one["bbox"]) >= 0.5)
            or (one["type"] == "DontCare" and own_overlap(box, one["bbox"]) >= 0.5)
            for one in labels
        ):
            continue
        else:
            wrong += 1
        curve.append((right, right / (right + wrong)))
    total = sum(map(len, objects))
    best = [max((precision for at, precision in curve if at >= k), default=0) for k in range(1, total + 1)]
    return 100 * sum(best) / total if total else 0


def test_equals_the_plain_implementation_on_random_scenes():
    reached = differing = 0
    for seed in range(300):
        images = random_images(seed)
        lenient, strict = (evaluate(*images, strict=strict) for strict in (False, True))
        for name in CLASSES:
            assert lenient[name] == pytest.approx(plain_average_precision(images, name, False), abs=1e-9), (seed, name)
            assert strict[name] == pytest.approx(plain_average_precision(images, name, True), abs=1e-9), (seed, name)
            assert strict[name] <= lenient[name] + 1e-9
            reached += 0 < strict[name] < 100
            differing += strict[name] < lenient[name] - 1
    # The comparison is not one of zeros, and not one of equals.
    assert reached > 200 and differing > 50


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="a score is not finite: nan"):
        car([A], [(A, np.nan)])
