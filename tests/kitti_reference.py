"""KITTI's official metric once more: image by image, box by box, in plain Python, to compare the fast one with."""

from __future__ import annotations

LIMITS = {"easy": (40, 0, 0.15), "moderate": (25, 1, 0.3), "hard": (25, 2, 0.5)}
LEAST_OVERLAP = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
NEIGHBOUR = {"Car": "Van", "Pedestrian": "Person_sitting", "Cyclist": None}


def intersection(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def union_overlap(a, b):
    shared = intersection(a, b)
    return shared / (area(a) + area(b) - shared) if shared else 0.0


def own_overlap(detection, region):
    shared = intersection(detection, region)
    return shared / area(detection) if shared else 0.0


def roles(name, level, objects, detections):
    """Per ground truth "valid", "neutral" or "other", and the same per detection."""
    height, occlusion, truncation = LIMITS[level]
    truth = []
    for obj in objects:
        x0, y0, x1, y1 = obj["bbox"]
        hard = obj["occlusion"] > occlusion or obj["truncation"] > truncation or y1 - y0 < height
        if obj["type"] == name:
            truth.append("neutral" if hard else "valid")
        else:
            truth.append("neutral" if obj["type"] == NEIGHBOUR[name] else "other")
    found = []
    for kind, box, _ in detections:
        if int(abs(box[1] - box[3])) < height:
            found.append("neutral")
        else:
            found.append("valid" if kind == name else "other")
    return truth, found


def first_pass(name, objects, detections, truth, found):
    used = set()
    scores = []
    for obj, role in zip(objects, truth):
        if role == "other":
            continue
        best = None
        for j, (_, box, score) in enumerate(detections):
            if found[j] == "other" or j in used or union_overlap(box, obj["bbox"]) <= LEAST_OVERLAP[name]:
                continue
            if score > (-1e7 if best is None else detections[best][2]):
                best = j
        if best is None:
            continue
        used.add(best)
        if role == "valid" and found[best] == "valid":
            scores.append(detections[best][2])
    return scores


def second_pass(name, objects, detections, truth, found, threshold):
    used = set()
    hits = 0
    for obj, role in zip(objects, truth):
        if role == "other":
            continue
        best, best_overlap, best_is_neutral = None, 0.0, False
        for j, (_, box, score) in enumerate(detections):
            if found[j] == "other" or j in used or score < threshold:
                continue
            overlap = union_overlap(box, obj["bbox"])
            if overlap <= LEAST_OVERLAP[name]:
                continue
            if found[j] == "valid" and (overlap > best_overlap or best_is_neutral):
                best, best_overlap, best_is_neutral = j, overlap, False
            elif found[j] == "neutral" and best is None:
                best, best_is_neutral = j, True
        if best is None:
            continue
        used.add(best)
        hits += role == "valid" and found[best] == "valid"
    wrong = {
        j for j, (_, _, score) in enumerate(detections) if j not in used and found[j] == "valid" and score >= threshold
    }
    for obj in objects:
        if obj["type"] == "DontCare":
            wrong -= {j for j in wrong if own_overlap(detections[j][1], obj["bbox"]) > LEAST_OVERLAP[name]}
    return hits, len(wrong)


def pick_thresholds(scores, num_objects):
    scores = sorted(scores, reverse=True)
    picked = []
    current = 0.0
    for i, score in enumerate(scores):
        last = i == len(scores) - 1
        left = (i + 1) / num_objects
        right = left if last else (i + 2) / num_objects
        if right - current < current - left and not last:
            continue
        picked.append(score)
        current += 1 / 40
    return picked


def class_precision(name, level, images):
    """41 precisions. ``images`` are pairs of label objects and (type, box, score) detections."""
    prepared = [(objects, detections, *roles(name, level, objects, detections)) for objects, detections in images]
    num_objects = sum(truth.count("valid") for _, _, truth, _ in prepared)
    scores = [score for image in prepared for score in first_pass(name, *image)]
    curve = [0.0] * 41
    for i, threshold in enumerate(pick_thresholds(scores, num_objects)):
        counts = [second_pass(name, *image, threshold) for image in prepared]
        hits, wrong = (sum(column) for column in zip(*counts))
        curve[i] = hits / (hits + wrong) if hits + wrong else 0.0
    return [max(curve[i:]) for i in range(41)]


def reference_average_precision(images):
    result = {}
    for name in LEAST_OVERLAP:
        result[name] = {}
        for level in LIMITS:
            curve = class_precision(name, level, images)
            result[name][level] = {"R40": 100 * sum(curve[1:]) / 40, "R11": 100 * sum(curve[::4]) / 11}
    return result
