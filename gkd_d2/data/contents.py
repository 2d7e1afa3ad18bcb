"""What a registered dataset holds, looked at before a run, and whether the run can use it."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from gkd_d2.data.classes import class_names
from gkd_d2.data.datasets.coco import elements
from gkd_d2.data.datasets.coco_check import check_coco_file
from gkd_d2.utils.text import counted, listed


class DatasetContents(NamedTuple):
    """What :func:`read_contents` finds.

    Attributes:
        class_names: in the order of the contiguous ids; None where they are known nowhere.
        largest_category: the largest ``category_id`` of the records where the names are not known; None without
            annotations.
        images: the paths of the first and of the last image; none of a dataset that was not looked into.
    """

    class_names: list[str] | None
    largest_category: int | None = None
    images: tuple[str, ...] = ()


def read_contents(dataset: str, *, evaluate: bool, masks: bool = False, keypoints: bool = False) -> DatasetContents:
    """Check that a dataset can be loaded for training, or for evaluation, and say what it holds.

    A dataset of ``register_coco_instances`` is not loaded: its annotation file is checked in one pass. Those of
    gkd_d2.data check themselves when they are loaded, which is done here for evaluation alone. Those of Detectron2's
    other forms, such as LVIS and Cityscapes, are not checked. All others are loaded.

    Args:
        dataset: a registered name.
        evaluate: whether it is a test set.
        masks: whether the model predicts masks, MODEL.MASK_ON.
        keypoints: whether it predicts keypoints, MODEL.KEYPOINT_ON.

    Raises:
        OSError: a file can't be read.
        ValueError: the dataset can't be used; where a file is wrong the message names the place in it.
    """
    metadata = MetadataCatalog.get(dataset)
    if _loaded_by_detectron2(dataset):
        path = PathManager.get_local_path(os.fspath(metadata.json_file))
        categories, file_names = check_coco_file(path, load=True, evaluate=evaluate, masks=masks, keypoints=keypoints)
        _check_metadata(metadata, path, categories)
        return DatasetContents(list(categories.values()), images=_in_folder(metadata.image_root, file_names))
    kind = metadata.get("evaluator_type", "coco")
    if kind not in ("coco", "kitti"):
        return DatasetContents(class_names(dataset))
    if not evaluate and _checks_itself(dataset):
        file_names = []
        # KITTI's form has no list of files: its images are those of the folder.
        if metadata.get("coco_traffic"):
            images = elements(metadata.json_file, "images")
            file_names = [image["file_name"] for image in images if isinstance(image, dict) and "file_name" in image]
        return DatasetContents(
            class_names(dataset), images=_in_folder(metadata.get("image_root"), file_names[:1] + file_names[-1:])
        )
    contents = _load(dataset)
    # Of a loader of the user's own; COCOEvaluator reads the file.
    if evaluate and kind == "coco" and metadata.get("json_file"):
        path = PathManager.get_local_path(os.fspath(metadata.json_file))
        categories, _ = check_coco_file(path, load=False, evaluate=True, masks=masks, keypoints=keypoints)
        if len(categories) != len(contents.class_names):
            raise ValueError(
                f"it has {counted(len(contents.class_names), 'class', 'classes')} in its metadata, but {path} has "
                f"{counted(len(categories), 'category', 'categories')}: make them equal, or leave json_file out of "
                "the metadata to have the loaded records evaluated instead"
            )
    return contents


def _checks_itself(dataset: str) -> bool:
    """Whether gkd_d2.data registered it."""
    return not {"kitti_root", "coco_traffic"}.isdisjoint(MetadataCatalog.get(dataset).as_dict())


def _load(dataset: str) -> DatasetContents:
    # A loader of the user's own may raise anything.
    try:
        records = DatasetCatalog.get(dataset)
    except OSError:
        raise
    except Exception as error:
        # Those of gkd_d2.data name the file and the place in it.
        reason = "" if _checks_itself(dataset) else f"loading it fails with {type(error).__name__}: "
        raise ValueError(f"{reason}{error}") from error
    if len(records) == 0:
        raise ValueError("it has no images")
    metadata = MetadataCatalog.get(dataset)
    known = metadata.get("thing_classes") is not None or metadata.get("json_file")
    names = class_names(dataset) if known else None
    images = tuple(os.fspath(records[i]["file_name"]) for i in (0, -1) if records[i].get("file_name"))
    return DatasetContents(names, None if known else _largest_category(records), images)


def _largest_category(records: list[dict[str, Any]]) -> int | None:
    try:
        return max((a["category_id"] for record in records for a in record.get("annotations", ())), default=None)
    except KeyError as error:
        raise ValueError(f"an annotation of its records has no {error.args[0]}") from error


def _loaded_by_detectron2(dataset: str) -> bool:
    """Whether it was registered by register_coco_instances, whose loader is load_coco_json."""
    module = getattr(DatasetCatalog[dataset], "__module__", None)
    return module == load_coco_json.__module__ and bool(MetadataCatalog.get(dataset).get("json_file"))


def _check_metadata(metadata, path: str, categories: dict[Any, str]) -> None:
    """Loading sets both of these, and Detectron2 refuses to change what is set."""
    names, numbers = list(categories.values()), {number: index for index, number in enumerate(categories)}
    given = metadata.get("thing_classes")
    if given is not None and list(given) != names:
        raise ValueError(
            f"its metadata have the thing_classes {listed(given)}, but the categories of {path} are {listed(names)}, "
            "in the order of their ids: make them equal, or leave thing_classes out of the metadata"
        )
    given = metadata.get("thing_dataset_id_to_contiguous_id")
    if given is not None and given != numbers:
        raise ValueError(
            f"the thing_dataset_id_to_contiguous_id of its metadata is not that of the categories of {path}, whose ids "
            f"are {listed(map(str, numbers))}: make them equal, or leave it out of the metadata"
        )


def _in_folder(folder: str | os.PathLike, file_names: list[str]) -> tuple[str, ...]:
    return tuple(os.path.join(folder, name) for name in file_names)
