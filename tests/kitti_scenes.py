"""Labels and detections of images for the metrics: by hand, and at random."""

from __future__ import annotations

import random

import numpy as np

from gkd_d2.data.datasets.kitti_labels import CLASSES, IGNORED_TYPES
from gkd_d2.evaluation.kitti_overlaps import Detections, GroundTruth


def obj(kind, box, truncation=0.0, occlusion=0):
    return {"type": kind, "bbox": list(map(float, box)), "truncation": truncation, "occlusion": occlusion}


def inputs(images):
    """Ground truth and detections of ``images``: pairs of label objects and (type, box, score) detections."""
    ground_truth = [GroundTruth.from_objects(objects) for objects, _ in images]
    detections = [
        Detections(
            [kind for kind, _, _ in found],
            np.array([box for _, box, _ in found], dtype=np.float64).reshape(-1, 4),
            np.array([score for _, _, score in found], dtype=np.float64),
        )
        for _, found in images
    ]
    return ground_truth, detections


def random_images(seed):
    """Scenes whose detections lie about the objects; coarse grids make ties of scores, overlaps and heights."""
    rng = random.Random(seed)
    grid = rng.choice([1.0, 5.0, 0.01])
    digits = rng.choice([1, 2, 6])
    kinds = rng.choice([CLASSES + IGNORED_TYPES, ("Car", "Van", "DontCare"), ("Pedestrian", "Person_sitting")])

    def rounded(value):
        return round(value / grid) * grid

    def box():
        x, y = rng.uniform(0, 200), rng.uniform(0, 80)
        return [rounded(v) for v in (x, y, x + rng.uniform(15, 90), y + rng.uniform(15, 60))]

    def near(other):
        while True:
            moved = [rounded(v + rng.gauss(0, 4)) for v in other]
            if moved[2] > moved[0] and moved[3] > moved[1]:
                return moved

    images = []
    for _ in range(rng.choice([1, 3, 12, 40])):
        objects = []
        for _ in range(rng.choice([0, 1, 2, 5, 9])):
            kind = rng.choice(kinds)
            if kind == "DontCare":
                objects.append(obj(kind, box(), -1.0, -1))
            else:
                corners = near(rng.choice(objects)["bbox"]) if objects and rng.random() < 0.4 else box()
                objects.append(obj(kind, corners, rng.choice([0, 0, 0.15, 0.2, 0.3, 0.5, 1]), rng.randrange(4)))
        found = []
        for _ in range(rng.choice([0, 1, 4, 15])):
            source = rng.choice(objects) if objects and rng.random() < 0.85 else None
            corners = near(source["bbox"]) if source else box()
            kind = source["type"] if source and rng.random() < 0.8 else rng.choice(kinds)
            kind = {"Van": "Car", "Person_sitting": "Pedestrian"}.get(kind, kind)
            found.append((kind, corners, round(rng.uniform(-1, 1), digits)))
        images.append((objects, found))
    return images
