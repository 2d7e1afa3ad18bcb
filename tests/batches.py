"""Batches of the training loader, loaded and compared."""

from __future__ import annotations

from itertools import islice

import torch
from detectron2.data import DatasetMapper

from gkd_d2.data.build import build_train_loader
from gkd_d2.data.mapper import FileNamingMapper


def build(cfg):
    return build_train_loader(cfg, FileNamingMapper(DatasetMapper(cfg, is_train=True)))


def load(cfg, count, *, first=0):
    """``count`` batches from the one with number ``first``."""
    loader = build(cfg)
    loader.batch_sampler.first = first
    return list(islice(loader, count))


def numbers(batches):
    return [[sample["image_id"] for sample in batch] for batch in batches]


def equal(batches, others):
    """Whether the images are the same, pixel for pixel, with the same boxes."""
    return numbers(batches) == numbers(others) and all(
        torch.equal(a["image"], b["image"])
        and torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        for batch, other in zip(batches, others)
        for a, b in zip(batch, other)
    )
