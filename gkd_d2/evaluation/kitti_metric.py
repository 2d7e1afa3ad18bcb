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
from dataclasses import dataclass

import numpy as np

from gkd_d2.data.datasets.kitti_labels import CLASSES, DIFFICULTIES, IGNORED_TYPES, Difficulty
from gkd_d2.utils.text import counted

MIN_OVERLAP = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
NEIGHBOURS = {"Car": "Van", "Pedestrian": "Person_sitting"}
NUM_RECALLS = 41

_TYPES = CLASSES + IGNORED_TYPES
_CODES = {name: code for code, name in enumerate(_TYPES)}
_VALID, _NEUTRAL, _OTHER = 0, 1, -1
# The kit's mark for "nothing found"; a score has to be above it.
_LOWEST_SCORE = -1e7
# Images whose boxes are compared at once: bounds the memory, 256 images x 50 detections x 20 objects are 2 MB an array.
_CHUNK = 256


@dataclass(frozen=True)
class GroundTruth:
    """The label file of one image, DontCare included.

    Attributes:
        types: KITTI's type of each of the n objects, in the file's order.
        boxes: left, top, right, bottom in pixels, float64, n x 4.
        truncation: n, share of the object outside the image.
        occlusion: n, KITTI's level.
    """

    types: Sequence[str]
    boxes: np.ndarray
    truncation: np.ndarray
    occlusion: np.ndarray

    @classmethod
    def from_objects(cls, objects: Sequence[dict]) -> GroundTruth:
        """From what :func:`gkd_d2.data.datasets.kitti_labels.parse_label_line` returns, one dictionary an object."""
        return cls(
            [obj["type"] for obj in objects],
            np.array([obj["bbox"] for obj in objects], dtype=np.float64).reshape(-1, 4),
            np.array([obj["truncation"] for obj in objects], dtype=np.float64),
            np.array([obj["occlusion"] for obj in objects], dtype=np.int64),
        )


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image.

    Attributes:
        types: KITTI's type of each of the n detections.
        boxes: left, top, right, bottom in pixels, float64, n x 4.
        scores: n, higher is more certain, of any scale.
    """

    types: Sequence[str]
    boxes: np.ndarray
    scores: np.ndarray


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
    flat = _Flat(ground_truth, detections)
    return {
        name: {level: _summary(flat.precisions(name, limits)) for level, limits in DIFFICULTIES.items()}
        for name in CLASSES
    }


def _summary(precisions: np.ndarray) -> dict[str, float]:
    return {"R40": 100 * float(precisions[1:].mean()), "R11": 100 * float(precisions[::4].mean())}


class _Flat:
    """All images in flat arrays, and the pairs of boxes that overlap enough for any class."""

    def __init__(self, ground_truth: Sequence[GroundTruth], detections: Sequence[Detections]) -> None:
        if len(ground_truth) != len(detections):
            raise ValueError(f"ground truth of {counted(len(ground_truth), 'image')}, detections of {len(detections)}")
        self.gt_types = _codes(ground_truth)
        self.gt_boxes = _joined([gt.boxes for gt in ground_truth], (0, 4), "a ground truth box")
        self.truncation = _joined([gt.truncation for gt in ground_truth], (0,), "a truncation")
        self.occlusion = _joined([gt.occlusion for gt in ground_truth], (0,), "an occlusion")
        self.gt_image = np.repeat(np.arange(len(ground_truth)), [len(gt.types) for gt in ground_truth])
        self.det_types = _codes(detections)
        self.det_boxes = _joined([det.boxes for det in detections], (0, 4), "a detection's box")
        self.scores = _joined([det.scores for det in detections], (0,), "a score")
        self.det_height = np.abs(self.det_boxes[:, 1] - self.det_boxes[:, 3])

        det_start = np.concatenate([[0], np.cumsum([len(det.types) for det in detections])]).astype(np.int64)
        gt_start = np.searchsorted(self.gt_image, np.arange(len(ground_truth) + 1))
        found = [
            self._overlaps(first, min(first + _CHUNK, len(ground_truth)), gt_start, det_start)
            for first in range(0, len(ground_truth), _CHUNK)
        ]
        # Pairs are sorted by ground truth, then by detection: the order in which the kit looks at them.
        self.pair_gt, self.pair_det, self.pair_overlap = (
            np.concatenate([chunk[part] for chunk in found]) if found else np.zeros(0, dtype=dtype)
            for part, dtype in enumerate((np.int64, np.int64, np.float64))
        )
        # The largest share of each detection that one DontCare region covers.
        self.dont_care = np.zeros(len(self.scores))
        for _, _, _, covered, share in found:
            np.maximum.at(self.dont_care, covered, share)

    def _overlaps(
        self, first: int, last: int, gt_start: np.ndarray, det_start: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Pairs in images first to last: indices and IoU of ground truth; detections in DontCare and their share."""
        gt = np.arange(gt_start[first], gt_start[last])
        image = self.gt_image[gt]
        count = det_start[image + 1] - det_start[image]
        pair_gt = np.repeat(gt, count)
        position = np.arange(len(pair_gt)) - np.repeat(np.cumsum(count) - count, count)
        pair_det = np.repeat(det_start[image], count) + position
        a, b = self.det_boxes[pair_det], self.gt_boxes[pair_gt]
        width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
        height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
        keep = (width > 0) & (height > 0)
        pair_gt, pair_det, a, b = pair_gt[keep], pair_det[keep], a[keep], b[keep]
        shared = width[keep] * height[keep]
        det_area, gt_area = _areas(a), _areas(b)
        regions = self.gt_types[pair_gt] == _CODES["DontCare"]
        overlap = shared / (det_area + gt_area - shared)
        near = ~regions & (overlap > min(MIN_OVERLAP.values()))
        return pair_gt[near], pair_det[near], overlap[near], pair_det[regions], (shared / det_area)[regions]

    def precisions(self, name: str, limits: Difficulty) -> np.ndarray:
        """Monotonous precision at NUM_RECALLS thresholds for one class and difficulty."""
        gt_role, det_role = self._roles(name, limits)
        matcher = _Matcher(self, gt_role, det_role, MIN_OVERLAP[name])
        thresholds = recall_thresholds(matcher.best_scores(), int((gt_role == _VALID).sum()))
        hits, free = matcher.matches(thresholds)
        counting = (det_role == _VALID) & (self.dont_care <= MIN_OVERLAP[name])
        misses = (free & counting & (self.scores >= thresholds[:, None])).sum(axis=1)
        precision = np.zeros(NUM_RECALLS)
        # All that is left at a threshold may be neutral: the kit divides 0 by 0 there, which is no precision.
        precision[: len(thresholds)] = hits / np.maximum(hits + misses, 1)
        return np.maximum.accumulate(precision[::-1])[::-1]

    def _roles(self, name: str, limits: Difficulty) -> tuple[np.ndarray, np.ndarray]:
        """_VALID, _NEUTRAL or _OTHER for every ground truth and every detection."""
        own = self.gt_types == _CODES[name]
        neighbour = self.gt_types == _CODES.get(NEIGHBOURS.get(name), _OTHER)
        fits = limits.includes(self.gt_boxes[:, 3] - self.gt_boxes[:, 1], self.occlusion, self.truncation)
        gt_role = np.where(own & fits, _VALID, np.where(own | neighbour, _NEUTRAL, _OTHER))
        det_role = np.where(self.det_types == _CODES[name], _VALID, _OTHER)
        det_role[self.det_height < limits.min_height] = _NEUTRAL
        return gt_role, det_role


class _Matcher:
    """Lets ground truth choose detections.

    The choice is sequential in an image and independent between images, so the k-th object of every image is handled at
    once. A step is a row an object: its candidate detections in order, padded by the index of a detection that does not
    exist and is always taken.
    """

    def __init__(self, flat: _Flat, gt_role: np.ndarray, det_role: np.ndarray, min_overlap: float) -> None:
        self.scores = np.append(flat.scores, -np.inf)
        self.valid = np.append(det_role == _VALID, False)
        keep = flat.pair_overlap > min_overlap
        keep &= (gt_role[flat.pair_gt] != _OTHER) & (det_role[flat.pair_det] != _OTHER)
        keep &= flat.scores[flat.pair_det] > _LOWEST_SCORE
        pair_det, overlap = flat.pair_det[keep], flat.pair_overlap[keep]
        objects, start, count = np.unique(flat.pair_gt[keep], return_index=True, return_counts=True)
        rank = np.arange(len(objects)) - np.searchsorted(flat.gt_image[objects], flat.gt_image[objects])
        # (candidates, overlaps, objects that are valid) a step
        self.steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for step in range(rank.max(initial=-1) + 1):
            rows = np.flatnonzero(rank == step)
            column = np.arange(count[rows].max())
            present = column < count[rows, None]
            index = np.where(present, start[rows, None] + column, 0)
            self.steps.append(
                (
                    np.where(present, pair_det[index], len(flat.scores)),
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


def _codes(images: Sequence[GroundTruth] | Sequence[Detections]) -> np.ndarray:
    types = [name for image in images for name in image.types]
    unknown = sorted(set(types) - _CODES.keys())
    if unknown:
        raise ValueError(f"unknown type {unknown[0]!r}; KITTI's types are {', '.join(_TYPES)}")
    return np.array([_CODES[name] for name in types], dtype=np.int64)


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], what: str) -> np.ndarray:
    joined = np.concatenate([np.zeros(empty), *parts]).astype(np.float64)
    if not np.isfinite(joined).all():
        raise ValueError(f"{what} is not finite: {joined[~np.isfinite(joined)][0]}")
    return joined


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
