"""Pictures that exported students are checked, measured and calibrated on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, detection_utils, transforms
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from gkd_d2.export.errors import ExportError

# An export is compared with the model on at least so many pictures.
SAMPLES = 3
_SHRINK = 0.8
# Below this no level of a pyramid has cells enough to tell anything.
_LEAST_SIDE = 32


def read_picture(cfg: CfgNode, path: Path) -> Tensor:
    """Read a picture as Detectron2's DefaultPredictor does.

    Args:
        cfg: its INPUT node says the channel order and the size.
        path: of the file.

    Returns:
        float32, C,H,W, in [0, 255].

    Raises:
        ExportError: the file is no picture.
        OSError: it can't be read, or ends too early.
    """
    try:
        pixels = detection_utils.read_image(str(path), format=cfg.INPUT.FORMAT)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ExportError(f"{path} is no picture that can be read: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # Pillow's, which names no file.
        raise OSError(f"{path} can't be read: {error}") from error
    resize = transforms.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    pixels = resize.get_transform(pixels).apply_image(pixels)
    return torch.as_tensor(pixels.astype("float32").transpose(2, 0, 1))


def pictures_in(folder: Path, limit: int) -> list[Path]:
    """The first pictures of a folder, by name; other files, hidden ones and folders are left out.

    Args:
        folder: holds pictures.
        limit: the most that are given.

    Raises:
        ExportError: there is none, or no such folder.
    """
    if not folder.is_dir():
        raise ExportError(f"--int8: {folder} is no folder")
    candidates = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    pictures = list(itertools.islice(filter(_is_picture, candidates), limit))
    if not pictures:
        raise ExportError(f"--int8: {folder} holds no picture that can be read")
    return pictures


def _is_picture(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except (OSError, Image.DecompressionBombError):
        return False


def sample_pictures(cfg: CfgNode, paths: Sequence[Path] = ()) -> list[Tensor]:
    """At least :data:`SAMPLES` pictures in as many sizes: files are taken again, and made smaller, to that end.

    Args:
        cfg: see :func:`read_picture`.
        paths: of picture files; by default the first ones of the first dataset in DATASETS.TEST.

    Returns:
        As from :func:`read_picture`.

    Raises:
        ExportError: there is neither a path nor a dataset, the dataset has no image, or a file is no picture.
    """
    paths = list(paths) or _first_of_dataset(cfg)
    read = [read_picture(cfg, path) for path in paths]
    pictures: list[Tensor] = []
    for picture in itertools.islice(itertools.cycle(read), max(SAMPLES, len(read))):
        # Pictures beyond these keep their size, in which their objects are found.
        while len(pictures) < SAMPLES and any(picture.shape == other.shape for other in pictures):
            if min(picture.shape[1:]) * _SHRINK < _LEAST_SIDE:
                raise ExportError(
                    f"the pictures are too small to be compared on in {SAMPLES} sizes: one has "
                    f"{picture.shape[1]} x {picture.shape[2]} pixels; name larger ones by --image, or raise "
                    "INPUT.MIN_SIZE_TEST"
                )
            picture = F.interpolate(picture[None], scale_factor=_SHRINK, mode="bilinear")[0]
        pictures.append(picture)
    return pictures


def _first_of_dataset(cfg: CfgNode) -> list[Path]:
    name = next(iter(cfg.DATASETS.TEST), None)
    if name is None:
        raise ExportError("DATASETS.TEST names no dataset to take sample pictures from: name pictures by --image")
    try:
        entries = load_dataset(name)
    except ExportError as error:
        raise ExportError(f"{error}. Without it, name pictures by --image") from error
    return [Path(entry["file_name"]) for entry in entries[:SAMPLES]]


def load_dataset(name: str) -> list[dict]:
    """The entries of a dataset in DATASETS.TEST.

    Args:
        name: of the dataset.

    Raises:
        ExportError: it is not registered, can't be loaded, or holds no image.
    """
    if name not in DatasetCatalog:
        raise ExportError(f"DATASETS.TEST names {name}, which is no registered dataset")
    try:
        entries = DatasetCatalog.get(name)
    # A loader of the user's own may raise anything.
    except Exception as error:
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ExportError(f"DATASETS.TEST names {name}, which can't be loaded: {kind}{error}") from error
    if not entries or "file_name" not in entries[0]:
        raise ExportError(f"DATASETS.TEST names {name}, which holds no image")
    return entries


def fit(picture: Tensor, size: tuple[int, int], padding: Sequence[float]) -> tuple[Tensor, tuple[float, float]]:
    """A picture in an image of a given size: made smaller where it is larger, and padded below and to the right.

    Args:
        picture: C,H,W.
        size: height and width of the result.
        padding: a number for each channel. The mean that a detector subtracts makes it what Detectron2 pads with.

    Returns:
        The image, C,H,W, and what its x and y are multiplied by to be those of the picture.
    """
    height, width = picture.shape[1:]
    scale = min(1.0, size[0] / height, size[1] / width)
    if scale < 1:
        shape = [max(1, min(limit, round(scale * side))) for limit, side in zip(size, (height, width))]
        picture = F.interpolate(picture[None], size=shape, mode="bilinear")[0]
    padded = picture.new_tensor(list(padding))[:, None, None].repeat(1, *size)
    padded[:, : picture.shape[1], : picture.shape[2]] = picture
    return padded, (width / picture.shape[2], height / picture.shape[1])
