"""KITTI's official 2D average precision, in NumPy.

The rules are those of ``evaluate_object.cpp`` in the benchmark's development kit (A. Geiger, P. Lenz, R. Urtasun, "Are
we ready for Autonomous Driving?", CVPR 2012). They differ from COCO's in more than the thresholds:

* Ground truth is *valid*, *neutral* (a detection of it is neither right nor wrong) or of no concern. Neutral are the
  neighbour class and what lies outside the difficulty.
* Detections lower than the difficulty's height are neutral too, **of whatever class**: a low pedestrian may take a car
  away from the detection that would have found it.
* Ground truth chooses its detection, in the order of the label file. A first pass, over all detections, lets each
  choose the highest score; the scores of valid matches are thinned to at most 41 thresholds, evenly spaced in recall.
  A second pass, at every threshold, lets each choose the largest overlap among those left, and a detection that is
  high enough before one that is not.
* Precision at a threshold is made monotonous from the right. R40 is its mean over thresholds 1 to 40, R11 over
  0, 4, ..., 40; thresholds that are never reached count as 0. So fewer than 41 objects can't reach an R40 of 100.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gkd_d2.data.datasets.kitti_labels import CLASSES, DIFFICULTIES, Difficulty
from gkd_d2.evaluation.kitti_overlaps import Detections, GroundTruth, Overlaps

MIN_OVERLAP = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
NUM_RECALLS = 41

_VALID, _NEUTRAL, _OTHER = 0, 1, -1
# The kit's mark for "nothing found"; a score has to be above it.
_LOWEST_SCORE = -1e7


def average_precision(
    ground_truth: Sequence[GroundTruth], detections: Sequence[Detections]
) -> dict[str, dict[str, dict[str, float]]]:
    """KITTI's average precision of every class and difficulty.

    Args:
        ground_truth: one an image.
        detections: of the same images, in the same order.

    Returns:
        ``{"Car": {"easy": {"R40": percent, "R11": percent}, "moderate": ..., "hard": ...}, "Pedestrian": ...,
        "Cyclist": ...}``. A class without a detection or without valid ground truth has 0.

    Raises:
        ValueError: the lists differ in length, a type is unknown, or a number is not finite.
    """
    overlaps = Overlaps(ground_truth, detections, min(MIN_OVERLAP.values()))
    return {
        name: {level: _summary(_precisions(overlaps, name, limits)) for level, limits in DIFFICULTIES.items()}
        for name in CLASSES
    }


def _summary(precisions: np.ndarray) -> dict[str, float]:
    return {"R40": 100 * float(precisions[1:].mean()), "R11": 100 * float(precisions[::4].mean())}


def _precisions(overlaps: Overlaps, name: str, limits: Difficulty) -> np.ndarray:
    """Monotonous precision at NUM_RECALLS thresholds for one class and difficulty."""
    gt_role, det_role = _roles(overlaps, name, limits)
    matcher = _Matcher(overlaps, gt_role, det_role, MIN_OVERLAP[name])
    thresholds = recall_thresholds(matcher.best_scores(), int((gt_role == _VALID).sum()))
    hits, free = matcher.matches(thresholds)
    counting = (det_role == _VALID) & (overlaps.dont_care <= MIN_OVERLAP[name])
    misses = (free & counting & (overlaps.scores >= thresholds[:, None])).sum(axis=1)
    precision = np.zeros(NUM_RECALLS)
    # All that is left at a threshold may be neutral: the kit divides 0 by 0 there, which is no precision.
    precision[: len(thresholds)] = hits / np.maximum(hits + misses, 1)
    return np.maximum.accumulate(precision[::-1])[::-1]


def _roles(overlaps: Overlaps, name: str, limits: Difficulty) -> tuple[np.ndarray, np.ndarray]:
    """_VALID, _NEUTRAL or _OTHER for every ground truth and every detection."""
    own, boxes = overlaps.objects_of(name), overlaps.gt_boxes
    fits = limits.includes(boxes[:, 3] - boxes[:, 1], overlaps.occlusion, overlaps.truncation)
    gt_role = np.where(own & fits, _VALID, np.where(own | overlaps.neighbours_of(name), _NEUTRAL, _OTHER))
    det_role = np.where(overlaps.detections_of(name), _VALID, _OTHER)
    det_role[np.abs(overlaps.det_boxes[:, 1] - overlaps.det_boxes[:, 3]) < limits.min_height] = _NEUTRAL
    return gt_role, det_role


class _Matcher:
    """Lets ground truth choose detections.

    The choice is sequential in an image and independent between images, so the k-th object of every image is handled at
    once. A step is a row an object: its candidate detections in order, padded by the index of a detection that does not
    exist and is always taken.
    """

    def __init__(self, overlaps: Overlaps, gt_role: np.ndarray, det_role: np.ndarray, min_overlap: float) -> None:
        self.scores = np.append(overlaps.scores, -np.inf)
        self.valid = np.append(det_role == _VALID, False)
        keep = overlaps.pair_overlap > min_overlap
        keep &= (gt_role[overlaps.pair_gt] != _OTHER) & (det_role[overlaps.pair_det] != _OTHER)
        keep &= overlaps.scores[overlaps.pair_det] > _LOWEST_SCORE
        pair_det, overlap = overlaps.pair_det[keep], overlaps.pair_overlap[keep]
        objects, start, count = np.unique(overlaps.pair_gt[keep], return_index=True, return_counts=True)
        rank = np.arange(len(objects)) - np.searchsorted(overlaps.gt_image[objects], overlaps.gt_image[objects])
        # (candidates, overlaps, objects that are valid) a step
        self.steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for step in range(rank.max(initial=-1) + 1):
            rows = np.flatnonzero(rank == step)
            column = np.arange(count[rows].max())
            present = column < count[rows, None]
            index = np.where(present, start[rows, None] + column, 0)
            self.steps.append(
                (
                    np.where(present, pair_det[index], len(overlaps.scores)),
                    overlap[index],
                    gt_role[objects[rows]] == _VALID,
                )
            )

    def best_scores(self) -> np.ndarray:
        """First pass: scores of the valid matches, each object choosing the highest score."""
        taken = np.zeros(len(self.scores), dtype=bool)
        taken[-1] = True
        found = []
        for candidates, _, wanted in self.steps:
            score = np.where(taken[candidates], -np.inf, self.scores[candidates])
            choice = np.take_along_axis(candidates, score.argmax(axis=1)[:, None], axis=1)[:, 0]
            matched = ~taken[candidates].all(axis=1)
            found.append(self.scores[choice[matched & wanted & self.valid[choice]]])
            taken[choice[matched]] = True
        return np.concatenate(found) if found else np.zeros(0)

    def matches(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Second pass: at each of T thresholds, the number of valid matches, and which detections stay free, T x D."""
        taken = np.zeros((len(thresholds), len(self.scores)), dtype=bool)
        taken[:, -1] = True
        hits = np.zeros(len(thresholds), dtype=np.int64)
        level = np.arange(len(thresholds))[:, None]
        for candidates, overlap, wanted in self.steps:
            left = ~taken[:, candidates] & (self.scores[candidates] >= thresholds[:, None, None])
            # Any valid detection comes before a neutral one; of the neutral ones the first is chosen.
            valid = self.valid[candidates]
            rank = np.where(left, np.where(valid, overlap, 0.0), -1.0)
            choice = candidates[np.arange(len(candidates)), rank.argmax(axis=2)]
            matched = left.any(axis=2)
            hits += (matched & wanted & self.valid[choice]).sum(axis=1)
            rows, columns = np.nonzero(matched)
            taken[level[rows, 0], choice[rows, columns]] = True
        return hits, ~taken[:, :-1]


def recall_thresholds(scores: np.ndarray, num_objects: int) -> np.ndarray:
    """The scores at which recall is nearest to 0, 1/40, 2/40, ..., in falling order.

    Args:
        scores: n, of the valid matches of the first pass.
        num_objects: valid ground truth, found or not.

    Returns:
        At most 41 of the scores; the lowest is always among them.
    """
    ordered = np.sort(scores)[::-1]
    chosen = []
    recall = 0.0
    for number, score in enumerate(ordered.tolist(), start=1):
        here = number / num_objects
        if number < len(ordered) and (number + 1) / num_objects - recall < recall - here:
            continue
        chosen.append(score)
        # Summed as the kit sums it: a multiple of 1 / 40 would round differently where two recalls are equally near.
        recall += 1.0 / (NUM_RECALLS - 1.0)
    return np.array(chosen)
