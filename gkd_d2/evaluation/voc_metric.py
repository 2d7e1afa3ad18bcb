"""PASCAL VOC's average precision at IoU 0.5 on KITTI's labels: the metric in which the paper reports KITTI.

The rules are those of VOC's development kit since 2010 (M. Everingham et al., "The PASCAL Visual Object Classes (VOC)
Challenge", IJCV 2010), as ``eval_map`` of MMDetection, on which the authors' code is built, applies them:

* Detections of a class are taken from the highest score to the lowest, equal scores in the order of the images and
  their detections. Each is compared with the object of its class that it overlaps most, found or not. It is a true
  positive if their IoU is **at least** 0.5 and no detection before it found that object, else a false positive.
* Precision at a recall is the highest at this or any higher recall. The average precision is the area below it, without
  a grid of recall points.
* Every object of a class counts. VOC leaves out those marked difficult, but KITTI has no such mark; the difficulties,
  heights and occlusions of KITTI's own metric play no part.

Boxes are measured as in KITTI's kit and MMDetection 2; VOC's own kit adds one pixel to width and height.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gkd_d2.data.datasets.kitti_labels import CLASSES
from gkd_d2.evaluation.kitti_overlaps import Detections, GroundTruth, Overlaps

MIN_OVERLAP = 0.5


def voc_average_precision(
    ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], *, strict: bool = False
) -> dict[str, float]:
    """VOC's average precision of every class at IoU 0.5.

    By default a detection that would be a false positive is left out if its IoU with an object of KITTI's neighbour
    class (Van for Car, Person_sitting for Pedestrian) is at least 0.5, or if one DontCare region covers at least half
    of its own area. True positives are the same in both modes, so strict values are never the higher ones.

    Args:
        ground_truth: one an image.
        detections: of the same images, in the same order.
        strict: count these detections as false positives, as the authors' code does.

    Returns:
        ``{"Car": percent, "Pedestrian": percent, "Cyclist": percent}``. A class without a detection or without ground
        truth has 0.

    Raises:
        ValueError: the lists differ in length, a type is unknown, or a number is not finite.
    """
    overlaps = Overlaps(ground_truth, detections, MIN_OVERLAP)
    result = {}
    for name in CLASSES:
        ranked = np.flatnonzero(overlaps.detections_of(name))
        ranked = ranked[np.argsort(-overlaps.scores[ranked], kind="stable")]
        found = _finds_an_object(overlaps, name, ranked)
        if not strict:
            found = found[found | ~_is_neutral(overlaps, name)[ranked]]
        result[name] = 100 * _area(found, int(overlaps.objects_of(name).sum()))
    return result


def _finds_an_object(overlaps: Overlaps, name: str, ranked: np.ndarray) -> np.ndarray:
    """Which of the detections with the indices ``ranked``, in this order, are true positives: bool."""
    own = overlaps.objects_of(name)[overlaps.pair_gt]
    pair_gt, pair_det, overlap = overlaps.pair_gt[own], overlaps.pair_det[own], overlaps.pair_overlap[own]
    # The largest overlap of each detection comes first; of equal ones, the first object in the label file.
    order = np.lexsort((pair_gt, -overlap, pair_det))
    compared, first = np.unique(pair_det[order], return_index=True)
    target = np.full(len(overlaps.scores), -1)
    target[compared] = pair_gt[order][first]
    objects, first = np.unique(target[ranked], return_index=True)
    found = np.zeros(len(ranked), dtype=bool)
    found[first[objects >= 0]] = True
    return found


def _is_neutral(overlaps: Overlaps, name: str) -> np.ndarray:
    """Which detections overlap a neighbour of the class or lie in a DontCare region: bool, one a detection."""
    neutral = overlaps.dont_care >= MIN_OVERLAP
    neutral[overlaps.pair_det[overlaps.neighbours_of(name)[overlaps.pair_gt]]] = True
    return neutral


def _area(found: np.ndarray, num_objects: int) -> float:
    """Area below the monotonous precision; ``found`` says of each detection, by score, whether it is right."""
    precision = found.cumsum() / np.arange(1, len(found) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    # Recall grows by 1 / num_objects where an object is found.
    return float(precision[found].sum() / max(num_objects, 1))
