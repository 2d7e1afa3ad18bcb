"""Names for datasets. Importing registers those of KITTI, the toy scenes and COCO-Traffic."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from gkd_d2.data.datasets import coco_traffic
from gkd_d2.data.datasets.kitti import SPLITS, check_kitti_root, check_kitti_testing, load_kitti, load_kitti_testing
from gkd_d2.data.datasets.kitti_labels import CLASSES
from gkd_d2.utils.registries import not_registered

_DATASETS = "$DETECTRON2_DATASETS"
# The two class sets differ in their class names, so that their datasets need names of their own.
COCO_TRAFFIC_PREFIXES = {"thirteen": "coco_traffic", "nine": "coco_traffic9"}


def resolve_root(root: str | os.PathLike) -> Path:
    """Replace a leading ``$DETECTRON2_DATASETS`` by that variable's value now, ``datasets`` where it is not set."""
    root = os.fspath(root)
    if root == _DATASETS or root.startswith(_DATASETS + "/"):
        root = (os.environ.get(_DATASETS[1:]) or "datasets") + root[len(_DATASETS) :]
    return Path(root).expanduser()


def register_kitti(prefix: str, root: str | os.PathLike | None = None) -> None:
    """Register a folder of KITTI's form as the datasets ``<prefix>_train`` and ``<prefix>_val``.

    ``register_kitti("mine", "/data/mine")`` makes ``mine_train`` and ``mine_val`` usable in a config. Nothing is read
    before the dataset is used. Registering the same folder again does nothing.

    Args:
        prefix: start of both names.
        root: the folder that holds ``training`` and, optionally, ``ImageSets``; ``$DETECTRON2_DATASETS/<prefix>``
            by default, that variable being read when the dataset is.

    Raises:
        ValueError: a name is registered already, for another folder or by someone else.
    """
    root = f"{_DATASETS}/{prefix}" if root is None else os.fspath(root)
    for split in SPLITS:
        name = f"{prefix}_{split}"
        metadata = MetadataCatalog.get(name)
        if name in DatasetCatalog:
            known = metadata.get("kitti_root")
            if known != root:
                raise ValueError(
                    f"dataset {name!r} is registered already, for {known or 'a dataset of another form'}, so it cannot "
                    f"be registered for {root}: choose another prefix"
                )
            continue
        DatasetCatalog.register(name, partial(_load, root, split))
        metadata.set(thing_classes=list(CLASSES), evaluator_type="kitti", kitti_root=root)


def register_kitti_testing(name: str, root: str | os.PathLike) -> None:
    """Register the unlabelled testing images of a folder of KITTI's form, to write detections for its server.

    Args:
        name: of the dataset.
        root: the folder that holds ``testing``.
    """
    if name in DatasetCatalog:
        return
    root = os.fspath(root)
    DatasetCatalog.register(name, partial(_load_testing, root))
    MetadataCatalog.get(name).set(
        thing_classes=list(CLASSES), evaluator_type="kitti", kitti_root=root, kitti_labelled=False
    )


def register_coco_traffic(classes: str) -> None:
    """Register COCO-Traffic, below ``$DETECTRON2_DATASETS``, as coco_traffic_train and _val or coco_traffic9_....

    Args:
        classes: "thirteen" or "nine".
    """
    for split in coco_traffic.SPLITS:
        name = f"{COCO_TRAFFIC_PREFIXES[classes]}_{split}"
        if name in DatasetCatalog:
            continue
        DatasetCatalog.register(name, partial(_load_coco_traffic, name, split, classes))
        names = coco_traffic.class_names(classes)
        MetadataCatalog.get(name).set(
            thing_classes=names,
            thing_dataset_id_to_contiguous_id={index + 1: index for index in range(len(names))},
            evaluator_type="coco",
            coco_traffic=(split, classes),
        )
        _place_coco_traffic(name)


def check_datasets(names: Iterable[str]) -> None:
    """Check, before anything is built, that datasets are registered and that the files of the built-in are in place.

    Args:
        names: dataset names, as in ``cfg.DATASETS.TRAIN`` and ``cfg.DATASETS.TEST``.

    Raises:
        KeyError: a name is not registered.
        FileNotFoundError: the folder of a dataset of KITTI's form is missing or empty, or a file of COCO-Traffic is.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise KeyError(f"dataset {name!r} {not_registered(name, DatasetCatalog)}")
        metadata = MetadataCatalog.get(name)
        root = metadata.get("kitti_root")
        if root is not None:
            check = check_kitti_root if metadata.get("kitti_labelled", True) else check_kitti_testing
            check(resolve_root(root))
        if "coco_traffic" in metadata.as_dict():
            coco_traffic.check_coco_traffic(*_place_coco_traffic(name), metadata.coco_traffic[1])


def _load(root: str, split: str) -> list[dict]:
    return load_kitti(resolve_root(root), split)


def _load_testing(root: str) -> list[dict]:
    return load_kitti_testing(resolve_root(root))


def _load_coco_traffic(name: str, split: str, classes: str) -> list[dict]:
    return coco_traffic.load_coco_traffic(*_place_coco_traffic(name), name, classes)


def _place_coco_traffic(name: str) -> tuple[str, str]:
    """Tell Detectron2's evaluator where the files are by the environment as it is now; return where."""
    metadata = MetadataCatalog.get(name)
    split, classes = metadata.coco_traffic
    places = {
        "json_file": f"{_DATASETS}/{COCO_TRAFFIC_PREFIXES[classes]}/annotations/instances_{split}.json",
        "image_root": f"{_DATASETS}/coco/{split}2017",
    }
    for key, place in places.items():
        # Metadata refuses to be changed, but the environment may have.
        metadata.__dict__.pop(key, None)
        setattr(metadata, key, str(resolve_root(place)))
    return metadata.json_file, metadata.image_root


for _prefix in ("kitti", "toy_kitti"):
    register_kitti(_prefix)
register_kitti_testing("kitti_test", f"{_DATASETS}/kitti")
for _classes in COCO_TRAFFIC_PREFIXES:
    register_coco_traffic(_classes)
