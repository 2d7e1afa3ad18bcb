"""KITTI's official metric: cases worked by hand, and equality with a plain implementation on random scenes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from kitti_reference import reference_average_precision
from kitti_scenes import inputs, obj, random_images

from gkd_d2.data.datasets.kitti import load_kitti
from gkd_d2.data.datasets.kitti_labels import CLASSES, DIFFICULTIES
from gkd_d2.evaluation.kitti_metric import average_precision, recall_thresholds
from gkd_d2.evaluation.kitti_overlaps import Detections, GroundTruth

# Below 41 objects not even perfect detections reach every recall point.
NUM = 41


def evaluate(images):
    """``images``: pairs of label objects and (type, box, score) detections."""
    return average_precision(*inputs(images))


BOX = (10.0, 10.0, 110.0, 60.0)  # 100 x 50 pixels
FAR = (300.0, 10.0, 400.0, 60.0)
LOW = (10.0, 10.0, 110.0, 30.0)  # 20 pixels high


def cars(num=NUM, extra_objects=(), extra_detections=(), score=lambda i: 0.9):
    """So many images with a car found perfectly; the extras are put into the first."""
    images = [([obj("Car", BOX)], [("Car", BOX, score(i))]) for i in range(num)]
    images[0][0].extend(extra_objects)
    images[0][1].extend(extra_detections)
    return images


def car(images, level="moderate"):
    result = evaluate(images)["Car"][level]
    return result["R40"], result["R11"]


@pytest.mark.parametrize("level", DIFFICULTIES)
@pytest.mark.parametrize("kind", CLASSES)
def test_perfect_detections_give_100(kind, level):
    images = [([obj(kind, BOX)], [(kind, BOX, 0.5 + i / 1000)]) for i in range(NUM)]
    result = evaluate(images)
    assert result[kind][level] == {"R40": 100, "R11": 100}
    others = [name for name in CLASSES if name != kind]
    # No ground truth and no detection of a class: 0, not NaN.
    assert [result[name][level] for name in others] == [{"R40": 0, "R11": 0}] * 2


def test_fewer_than_41_objects_fill_as_many_points():
    assert car(cars(1)) == (0, pytest.approx(100 / 11))  # point 0 alone
    assert car(cars(5)) == (pytest.approx(100 * 4 / 40), pytest.approx(100 * 2 / 11))  # points 0 to 4
    assert car(cars(40)) == (pytest.approx(97.5), pytest.approx(100 * 10 / 11))  # all but point 40


def test_one_missed():
    images = cars(82)
    del images[0][1][0]
    # 81 of 82 found: every recall point is next to a found one, the last (recall 1) to recall 81/82.
    assert car(images) == (100, 100)
    # Half of 82 found: the thresholds end at recall 1/2, points 0 to 20 of 40.
    for objects_and_found in images[:41]:
        objects_and_found[1].clear()
    assert car(images) == (pytest.approx(100 * 20 / 40), pytest.approx(100 * 6 / 11))


def test_one_false_detection_above_all():
    images = cars(41, extra_detections=[("Car", FAR, 0.99)], score=lambda i: 0.9 - i / 1000)
    # At the k-th threshold k of k + 1 are right; made monotonous from the right each point has the last one's 41/42.
    assert car(images) == pytest.approx((100 * 41 / 42,) * 2)


def test_one_false_detection_below_all():
    images = cars(41, extra_detections=[("Car", FAR, 0.1)])
    assert car(images) == (100, 100)  # no threshold is so low


def test_a_second_detection_of_an_object_is_false():
    images = cars(41, extra_detections=[("Car", BOX, 0.99)], score=lambda i: 0.9)
    # At the first threshold, 0.99, it is the one that finds its car; from 0.9 on one of 42 is too many.
    assert car(images) == pytest.approx((100 * 41 / 42, 100 * (1 + 10 * 41 / 42) / 11))


@pytest.mark.parametrize(
    ("width", "false"),
    [(100, False), (142, False), (143, True), (400, True)],
)
def test_dont_care_hides_by_the_detections_own_area(width, false):
    region = obj("DontCare", (300, 0, 400, 300), truncation=-1.0, occlusion=-1)
    box = (300.0, 10.0, 300.0 + width, 60.0)  # 100 / width of it lies in the region: more than 0.7 up to 142
    images = cars(extra_objects=[region], extra_detections=[("Car", box, 0.99)])
    assert car(images) == pytest.approx((100 * 41 / 42 if false else 100,) * 2)


def test_dont_care_has_the_classs_overlap():
    region = obj("DontCare", (300, 0, 400, 300), truncation=-1.0, occlusion=-1)
    box = (300.0, 10.0, 460.0, 60.0)  # 0.625 of it: over a pedestrian's 0.5, under a car's 0.7
    images = [([obj("Pedestrian", BOX)], [("Pedestrian", BOX, 0.9)]) for _ in range(NUM)]
    images[0][0].append(region)
    images[0][1].append(("Pedestrian", box, 0.99))
    assert evaluate(images)["Pedestrian"]["easy"]["R40"] == 100


@pytest.mark.parametrize(
    ("kind", "detected", "false"),
    [
        ("Van", "Car", False),
        ("Person_sitting", "Pedestrian", False),
        ("Van", "Pedestrian", True),
        ("Truck", "Car", True),
        ("Person_sitting", "Cyclist", True),
        ("Misc", "Cyclist", True),
    ],
)
def test_neighbour_classes_are_neutral(kind, detected, false):
    images = [([obj(detected, BOX)], [(detected, BOX, 0.9)]) for _ in range(NUM)]
    # Even truncated and occluded beyond the difficulty.
    images[0][0].append(obj(kind, FAR, truncation=0.9, occlusion=3))
    images[0][1].append((detected, FAR, 0.99))
    assert evaluate(images)[detected]["moderate"]["R40"] == pytest.approx(100 * 41 / 42 if false else 100)


def test_a_missed_neighbour_is_no_miss():
    assert car(cars(extra_objects=[obj("Van", FAR)])) == (100, 100)


@pytest.mark.parametrize(
    ("height", "truncation", "occlusion", "levels"),
    [
        (40, 0.15, 0, {"easy", "moderate", "hard"}),
        (39.99, 0.0, 0, {"moderate", "hard"}),
        (50, 0.16, 0, {"moderate", "hard"}),
        (50, 0.0, 1, {"moderate", "hard"}),
        (25, 0.30, 1, {"moderate", "hard"}),
        (24.99, 0.0, 0, set()),
        (50, 0.31, 0, {"hard"}),
        (50, 0.0, 2, {"hard"}),
        (25, 0.50, 2, {"hard"}),
        (50, 0.51, 0, set()),
        (50, 0.0, 3, set()),
    ],
)
def test_ground_truth_outside_the_difficulty_is_neutral(height, truncation, occlusion, levels):
    box = (300.0, 10.0, 400.0, 10.0 + height)
    other = obj("Car", box, truncation, occlusion)
    found, missed = [], []
    for _ in range(NUM):
        found.append(([other], [("Car", box, 0.9)]))
        missed.append(([obj("Car", BOX)], [("Car", BOX, 0.9)]))
    counts = {level for level, result in evaluate(found)["Car"].items() if result["R40"] == 100}
    assert counts == levels
    # Missed, it counts there and nowhere else: half of the objects are found then.
    both = [(a[0] + b[0], b[1]) for a, b in zip(found, missed)]
    halved = {level for level, result in evaluate(both)["Car"].items() if result["R40"] < 60}
    assert halved == levels


def test_a_low_detection_is_neutral():
    # 20 pixels high, nowhere near an object: no false positive.
    assert car(cars(extra_detections=[("Car", (300.0, 10.0, 400.0, 30.0), 0.99)])) == (100, 100)
    # A low detection of another class takes a low object's place just the same; there it hides nothing.
    assert car(cars(extra_objects=[obj("Car", LOW)], extra_detections=[("Cyclist", LOW, 0.99)])) == (100, 100)


def test_a_low_detection_of_another_class_takes_an_object_in_the_first_pass():
    """The kit's own quirk: 24.9 x 100 against 26 x 100, overlap 0.96, so the car's own score gives no threshold."""
    box, low = (10.0, 10.0, 110.0, 36.0), (10.0, 10.0, 110.0, 34.9)
    images = [([obj("Car", box)], [("Pedestrian", low, 0.95), ("Car", box, 0.9)]) for _ in range(NUM)]
    assert car(images) == (0, 0)
    # With a lower score it takes nothing, and in the second pass a valid detection comes first.
    images = [(objects, [("Pedestrian", low, 0.85), own]) for objects, (_, own) in images]
    assert car(images) == (100, 100)


def test_the_largest_overlap_wins_the_second_pass():
    """Two detections of one car, the worse one with the higher score: the first pass takes the score, the second the
    overlap, so the other is false at the lower threshold and there is just one threshold a car."""
    worse = (10.0, 10.0, 100.0, 60.0)
    images = [([obj("Car", BOX)], [("Car", worse, 0.9), ("Car", BOX, 0.8)]) for _ in range(NUM)]
    assert car(images) == (100, 100)  # all thresholds are 0.9: the second detections are below
    images = [([obj("Car", BOX)], [("Car", worse, 0.9), ("Car", BOX, 0.9)]) for _ in range(NUM)]
    assert car(images) == (50, 50)


def test_a_tie_of_scores():
    """All scores equal: every threshold is that score, so precision is the same everywhere."""
    images = cars(41, score=lambda i: 0.5)
    for image in images[:20]:
        image[1].append(("Car", FAR, 0.5))
    assert car(images) == pytest.approx((100 * 41 / 61,) * 2)


def test_no_ground_truth_of_a_class_and_no_image():
    images = [([obj("Car", BOX)], [("Cyclist", BOX, 0.9)])]
    assert all(value == 0 for level in evaluate(images)["Cyclist"].values() for value in level.values())
    assert all(value == 0 for kind in evaluate([]).values() for level in kind.values() for value in level.values())


def test_all_detections_neutral_at_a_threshold():
    """A Van takes d2 in the second pass only; d1 lies in DontCare; the car stays without: 0 of 0."""
    van, car_box = (0.0, 0.0, 100.0, 100.0), (0.0, 10.0, 100.0, 117.0)
    d1, d2 = (0.0, -20.0, 100.0, 96.0), (0.0, 4.0, 100.0, 108.0)
    objects = [obj("Van", van), obj("Car", car_box), obj("DontCare", (0, -50, 100, 200), -1.0, -1)]
    images = [(objects, [("Car", d1, 0.9), ("Car", d2, 0.8)])]
    assert evaluate(images) == reference_average_precision(images)
    assert car(images) == (0, 0)


def test_recall_thresholds():
    scores = np.linspace(0.9, 0.1, 9)
    assert recall_thresholds(scores, 9).tolist() == scores.tolist()  # fewer than 41: all
    many = np.linspace(1, 0.001, 1000)
    chosen = recall_thresholds(many, 1000)
    # The first, then the ones nearest to each fortieth of recall, down to the last.
    assert len(chosen) == 41
    assert chosen[[0, 1, 40]] == pytest.approx([many[0], many[24], many[-1]])
    assert recall_thresholds(np.zeros(0), 5).shape == (0,)


def test_equals_the_plain_implementation_on_random_scenes():
    reached = 0
    for seed in range(300):
        images = random_images(seed)
        fast, plain = evaluate(images), reference_average_precision(images)
        for name in CLASSES:
            for level in DIFFICULTIES:
                assert fast[name][level] == pytest.approx(plain[name][level], abs=1e-9), (seed, name, level)
                reached += 0 < plain[name][level]["R40"] < 100
    assert reached > 200  # the comparison is not one of zeros


def test_equals_the_plain_implementation_on_real_labels(kitti_sample):
    rng = random.Random(0)
    images = []
    for record in load_kitti(kitti_sample, "train"):
        objects = record["kitti_objects"]
        found = []
        for source in objects:
            for _ in range(rng.choice([0, 1, 1, 2])):
                x0, y0, x1, y1 = source["bbox"]
                dx, dy = (x1 - x0) * rng.gauss(0, 0.06), (y1 - y0) * rng.gauss(0, 0.06)
                kind = {"Van": "Car", "Truck": "Car", "DontCare": "Car"}.get(source["type"], source["type"])
                found.append((kind, [x0 + dx, y0 + dy, x1 + dx, y1 - dy], rng.random()))
        images.append((objects, found))
    fast, plain = evaluate(images), reference_average_precision(images)
    for name in CLASSES:
        for level in DIFFICULTIES:
            assert fast[name][level] == pytest.approx(plain[name][level], abs=1e-9)
    assert fast["Car"]["moderate"]["R40"] > 20


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="unknown type 'Lorry'"):
        evaluate([([obj("Lorry", BOX)], [])])
    with pytest.raises(ValueError, match="a score is not finite: nan"):
        evaluate([([], [("Car", BOX, float("nan"))])])
    with pytest.raises(ValueError, match="2 images, detections of 1"):
        average_precision([GroundTruth.from_objects([])] * 2, [Detections([], np.zeros((0, 4)), np.zeros(0))])
