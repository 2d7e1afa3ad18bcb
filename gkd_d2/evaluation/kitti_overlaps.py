"""Labels and detections of many images in flat arrays, and the pairs of boxes that overlap.

This is what KITTI's metric and VOC's share. As in KITTI's development kit a box is right - left pixels wide and
bottom - top high; VOC's own kit adds one pixel to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gkd_d2.data.datasets.kitti_labels import CLASSES, IGNORED_TYPES
from gkd_d2.utils.text import counted

# Similar types: a detection of the first that finds the second is neither right nor wrong.
NEIGHBOURS = {"Car": "Van", "Pedestrian": "Person_sitting"}

_TYPES = CLASSES + IGNORED_TYPES
_CODES = {name: code for code, name in enumerate(_TYPES)}
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


class Overlaps:
    """All images in flat arrays of G objects and D detections, and the P pairs of boxes that overlap enough.

    Attributes:
        gt_boxes: float64, G x 4, DontCare included.
        truncation, occlusion: G.
        gt_image: G, the index of the object's image.
        det_boxes: float64, D x 4.
        scores: D.
        pair_gt, pair_det: P, indices of an object, which is no DontCare region, and a detection of the same image. They
            are sorted by object, then by detection.
        pair_overlap: P, intersection over union.
        dont_care: D, the largest share of the detection's area that one DontCare region covers.
    """

    def __init__(
        self, ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], min_overlap: float
    ) -> None:
        """Find the pairs.

        Args:
            ground_truth: one an image.
            detections: of the same images, in the same order.
            min_overlap: pairs with at least this intersection over union are kept.

        Raises:
            ValueError: the lists differ in length, a type is unknown, or a number is not finite.
        """
        if len(ground_truth) != len(detections):
            raise ValueError(f"ground truth of {counted(len(ground_truth), 'image')}, detections of {len(detections)}")
        self._gt_types = _codes(ground_truth)
        self.gt_boxes = _joined([gt.boxes for gt in ground_truth], (0, 4), "a ground truth box")
        self.truncation = _joined([gt.truncation for gt in ground_truth], (0,), "a truncation")
        self.occlusion = _joined([gt.occlusion for gt in ground_truth], (0,), "an occlusion")
        self.gt_image = np.repeat(np.arange(len(ground_truth)), [len(gt.types) for gt in ground_truth])
        self._det_types = _codes(detections)
        self.det_boxes = _joined([det.boxes for det in detections], (0, 4), "a detection's box")
        self.scores = _joined([det.scores for det in detections], (0,), "a score")

        det_start = np.concatenate([[0], np.cumsum([len(det.types) for det in detections])]).astype(np.int64)
        gt_start = np.searchsorted(self.gt_image, np.arange(len(ground_truth) + 1))
        found = [
            self._pairs(first, min(first + _CHUNK, len(ground_truth)), gt_start, det_start, min_overlap)
            for first in range(0, len(ground_truth), _CHUNK)
        ]
        self.pair_gt, self.pair_det, self.pair_overlap = (
            np.concatenate([chunk[part] for chunk in found]) if found else np.zeros(0, dtype=dtype)
            for part, dtype in enumerate((np.int64, np.int64, np.float64))
        )
        self.dont_care = np.zeros(len(self.scores))
        for _, _, _, covered, share in found:
            np.maximum.at(self.dont_care, covered, share)

    def objects_of(self, kind: str) -> np.ndarray:
        """Which objects are of one of KITTI's types: bool, G."""
        return self._gt_types == _CODES[kind]

    def detections_of(self, kind: str) -> np.ndarray:
        """Which detections are of one of KITTI's types: bool, D."""
        return self._det_types == _CODES[kind]

    def neighbours_of(self, kind: str) -> np.ndarray:
        """Which objects are of the type next to one of KITTI's classes, none where it has no neighbour: bool, G."""
        return self.objects_of(NEIGHBOURS[kind]) if kind in NEIGHBOURS else np.zeros(len(self._gt_types), dtype=bool)

    def _pairs(
        self, first: int, last: int, gt_start: np.ndarray, det_start: np.ndarray, min_overlap: float
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
        regions = self._gt_types[pair_gt] == _CODES["DontCare"]
        overlap = shared / (det_area + gt_area - shared)
        near = ~regions & (overlap >= min_overlap)
        return pair_gt[near], pair_det[near], overlap[near], pair_det[regions], (shared / det_area)[regions]


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
