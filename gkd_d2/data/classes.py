"""The classes of a dataset, whatever way it was registered."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from gkd_d2.data.datasets.coco import category_names


def class_names(dataset: str) -> list[str] | None:
    """Names of a dataset's classes in the order of the contiguous ids.

    They are looked for where they are cheapest to find: in the metadata; for a dataset with a ``json_file``, such as
    those of ``register_coco_instances``, in the file's categories; otherwise in the metadata after loading the dataset.

    Args:
        dataset: a name, registered or not.

    Returns:
        The names; None where they are known nowhere.

    Raises:
        OSError: the annotation file can't be read.
        ValueError: it is no valid JSON, or one of its categories has no name.
        Exception: whatever the dataset's own loader raises.
    """
    # MetadataCatalog.get would add the name.
    if dataset not in DatasetCatalog and dataset not in MetadataCatalog.list():
        return None
    metadata = MetadataCatalog.get(dataset)
    names = metadata.get("thing_classes")
    if names is None and metadata.get("json_file"):
        path = PathManager.get_local_path(os.fspath(metadata.json_file))
        status = os.stat(path)
        names = _category_names(path, status.st_mtime_ns, status.st_size)
    elif names is None and dataset in DatasetCatalog:
        names = _names_after_loading(dataset, DatasetCatalog[dataset])
    return None if names is None else [str(name) for name in names]


def known_class_names(dataset: str) -> list[str] | None:
    """As :func:`class_names`; None too where the dataset's files can't be read, as of a teacher from elsewhere."""
    try:
        return class_names(dataset)
    # A loader of the user's own may raise anything.
    except Exception:
        return None


# Several checks ask, and loading may take long.
@functools.lru_cache(maxsize=64)
def _names_after_loading(dataset: str, load: Callable[[], list[dict]]) -> tuple[str, ...] | None:
    load()
    names = MetadataCatalog.get(dataset).get("thing_classes")
    return None if names is None else tuple(names)


@functools.lru_cache(maxsize=64)
def _category_names(path: str, modified: int, size: int) -> tuple[str, ...]:
    """Read anew only where the file has changed."""
    return tuple(category_names(path))
