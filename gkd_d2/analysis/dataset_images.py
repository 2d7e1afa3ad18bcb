"""What teacher and student see in images of a dataset: which images to look at, and what is observed of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.detection_utils import build_augmentation
from detectron2.utils.events import EventStorage

from gkd_d2.data.mapper import FileNamingMapper
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.observation import Observation
from gkd_d2.modeling.split import split_detector
from gkd_d2.modeling.teacher import set_as_in_evaluation
from gkd_d2.utils.random_streams import separate_random_stream
from gkd_d2.utils.text import counted


def choose_images(dataset: str, names: list[str] | None, count: int) -> list[dict]:
    """Records of the images asked for, or of the first with objects.

    Args:
        dataset: registered in Detectron2's catalog.
        names: ids of images, or names of their files with the extension or without it; empty or None: choose.
        count: how many to choose.

    Raises:
        ValueError: an image of the dataset has no ground truth, there is no image of a name, or none with objects.
    """
    records = DatasetCatalog.get(dataset)
    if any("annotations" not in record for record in records):
        raise ValueError(
            f"dataset {dataset} has images without ground truth, which the gradients of the losses need: name another "
            "by --dataset"
        )
    if not names:
        chosen = list(filter(has_objects, records))[:count]
        if not chosen:
            raise ValueError(
                f"no object in the {counted(len(records), 'image')} of dataset {dataset}: name an image by --image"
            )
        return chosen
    by_name: dict[str, dict] = {}
    for record in records:
        path = Path(record["file_name"])
        for name in (str(record["image_id"]), path.stem, path.name):
            by_name.setdefault(name, record)
    for name in names:
        if name not in by_name:
            some = ", ".join(str(record["image_id"]) for record in records[:3])
            raise ValueError(
                f"dataset {dataset} has no image {name!r} among its {len(records)}: name one by its id ({some}, ...) "
                "or its file name"
            )
    return [by_name[name] for name in names]


def has_objects(record: dict) -> bool:
    """Whether a record of Detectron2's form has an annotation that is no crowd."""
    return any(not annotation.get("iscrowd", 0) for annotation in record["annotations"])


def observe_images(distiller: GKDDistiller, cfg: CfgNode, records: Iterable[dict], seed: int) -> Iterator[Observation]:
    """What both networks make of images by themselves, each the same whatever was observed before it.

    Args:
        distiller: left in training mode, its student as :func:`gkd_d2.modeling.teacher.set_as_in_evaluation` sets it.
        cfg: its config, which says how images are read and resized: as in evaluation.
        records: of the images, with ground truth.
        seed: of the random draws.

    Raises:
        OSError: an image can't be read.
    """
    set_as_in_evaluation(split_detector(distiller.train().student))
    mapper = FileNamingMapper(DatasetMapper(cfg, is_train=True, augmentations=build_augmentation(cfg, is_train=False)))
    for record in records:
        batch = [mapper(record)]
        with EventStorage(), separate_random_stream(distiller.device, seed):
            seen = distiller.observe(batch, student_grad=True, teacher_grad=True)
        yield seen.detached()
