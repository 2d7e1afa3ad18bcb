"""Annotation files of COCO's instances form, read as a stream and checked on the way.

What :class:`CocoFile` requires of a file: an object with the arrays ``images``, ``annotations`` and ``categories``, all
with something in them.

* an image: ``id`` (integer, unique), ``width`` and ``height`` (positive integers), ``file_name`` (text);
* a category: ``id`` (integer, unique), ``name`` (text);
* an annotation: ``id`` (integer, unique), ``image_id`` and ``category_id`` that exist, ``bbox`` (4 finite numbers x, y,
  width, height in pixels, sizes not negative), ``area`` (finite, not negative), ``iscrowd`` (0 or 1) and, optionally,
  ``segmentation`` (polygons, or run lengths of the image's size) and ``keypoints`` (finite numbers).

A box may stick out of its image by up to a tenth of the image's side, which Detectron2 clips, and it may have no area,
which Detectron2 leaves out of training: COCO's own files hold such boxes. What sticks out farther is refused: then the
sizes of image and labels disagree.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import ijson

_BUFFER = 1 << 20
_LARGEST = 1e9  # no coordinate or area of an image is near it; NaN is not below it either
_STICKING_OUT = 0.1
_MAX_DEPTH = 32
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


class CocoFile:
    """A checked annotation file. Its parts are read anew at each call, as a stream.

    Every method raises OSError where the file can't be read, and ValueError where its content is wrong; the message
    begins with the file and names the place in it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Look once through the file, whether its nesting can be read in bounded memory.

        Args:
            path: the file.
        """
        self.path = path
        _check_depth(path)

    def categories(self) -> dict[int, str]:
        """Category names by id, in the file's order."""

        def check(item: dict) -> None:
            _check_id(item, "id")
            _require(isinstance(item.get("name"), str), "name", item, "text")

        return {item["id"]: item["name"] for item in _items(self.path, "categories", check)}

    def images(self) -> Iterator[dict[str, Any]]:
        """The images, one after the other, as they stand in the file."""

        def check(item: dict) -> None:
            _check_id(item, "id")
            for side in ("width", "height"):
                _require(_is_integer(item.get(side)) and item[side] > 0, side, item, "a positive integer")
            _require(isinstance(item.get("file_name"), str) and item["file_name"], "file_name", item, "a name")

        return _items(self.path, "images", check)

    def licenses(self) -> list[Any]:
        """The licences of the images, as they stand in the file; they may be missing."""
        with _json_errors_named(self.path), open(self.path, "rb") as file:
            return list(ijson.items(file, "licenses.item", use_float=True, buf_size=_BUFFER))

    def annotations(
        self, image_sizes: dict[int, tuple[int, int]], categories: dict[int, str]
    ) -> Iterator[dict[str, Any]]:
        """The annotations, one after the other, as they stand in the file.

        Args:
            image_sizes: width and height of every image by id.
            categories: names by id.
        """

        def check(item: dict) -> None:
            _check_id(item, "id")
            for key, known in (("image_id", image_sizes), ("category_id", categories)):
                _check_id(item, key)
                _require(item[key] in known, key, item, "among the file's own ids")
            bbox = item.get("bbox")
            _require(_are_numbers(bbox) and len(bbox) == 4, "bbox", item, "4 finite numbers")
            _require(bbox[2] >= 0 and bbox[3] >= 0, "bbox", item, "x, y, width, height without a negative size")
            size = image_sizes[item["image_id"]]
            if overhang(bbox, size) > _STICKING_OUT:
                raise ValueError(
                    f"bbox is {bbox}, outside its image {item['image_id']} of {size[0]} x {size[1]} pixels"
                )
            _require(_is_number(item.get("area")) and item["area"] >= 0, "area", item, "a number that is not negative")
            _require(_is_integer(item.get("iscrowd")) and item["iscrowd"] in (0, 1), "iscrowd", item, "0 or 1")
            _check_segmentation(item, size)
            _require(_are_numbers(item.get("keypoints", [])), "keypoints", item, "finite numbers")

        return _items(self.path, "annotations", check)


def elements(path: str | os.PathLike, key: str) -> Iterator[Any]:
    """The elements of a top-level array of a JSON file, unchecked, one after the other.

    Args:
        path: the file.
        key: of the array; without such an array there are no elements.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no valid JSON; the message begins with the file.
    """
    with _json_errors_named(path), open(path, "rb") as file:
        yield from ijson.items(file, f"{key}.item", use_float=True, buf_size=_BUFFER)


def sections(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """The keys of a JSON file's object and their values, unchecked, one after the other, in one pass.

    Args:
        path: the file; without an object at its top there are none.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no valid JSON; the message begins with the file.
    """
    with _json_errors_named(path), open(path, "rb") as file:
        yield from ijson.kvitems(file, "", use_float=True, buf_size=_BUFFER)


def category_names(path: str | os.PathLike) -> list[str]:
    """Names of a file's categories in the order of their ids, which is the order of Detectron2's contiguous ids.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no valid JSON, or a category has no id or no name; the message begins with the file.
    """
    names = {}
    for index, category in enumerate(elements(path, "categories")):
        if not (isinstance(category, dict) and category.keys() >= {"id", "name"}):
            raise ValueError(
                f"{path}: categories[{index}] is {_shown(category)}; it must be an object with id and name"
            )
        names[category["id"]] = str(category["name"])
    return list(in_order_of_ids(names, path).values())


def in_order_of_ids(names: dict[Any, str], path: str | os.PathLike) -> dict[Any, str]:
    """Names of categories by id, in the order of the ids, which is that of Detectron2's contiguous ids.

    Args:
        names: the same in any order.
        path: of the file, for the error.

    Raises:
        ValueError: the ids have no order; the message begins with the file.
    """
    try:
        return {number: names[number] for number in sorted(names)}
    except TypeError:
        raise ValueError(f"{path}: the ids of its categories are of several types: {_shown(list(names))}") from None


def overhang(bbox: list[float], size: tuple[int, int]) -> float:
    """How far a box x, y, width, height sticks out of an image width, height, as a share of the image's side."""
    (x, y, width, height), (image_width, image_height) = bbox, size
    return max(-x / image_width, (x + width) / image_width - 1, -y / image_height, (y + height) / image_height - 1, 0.0)


@contextlib.contextmanager
def _json_errors_named(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the JSON reader as ValueError that begins with the file."""
    try:
        yield
    # Beside JSONError its readers pass on what decoding, nesting and long numbers raise in them.
    except (ijson.JSONError, UnicodeError, RecursionError, OverflowError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: no valid JSON: {text}") from error


def _check_depth(path: str | os.PathLike) -> None:
    """Refuse nesting beyond COCO's: the reader's memory grows with its square."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(f"{path}: no valid JSON: the file is empty")
        depth = 0
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            for match in _STRING_OR_BRACKET.finditer(text):
                first = text[match.start()]
                depth += (first in b"[{") - (first in b"]}")
                if depth > _MAX_DEPTH:
                    raise ValueError(f"{path}: nested more than {_MAX_DEPTH} deep at byte {match.start()}")


def _items(path: str | os.PathLike, key: str, check: Callable[[dict], None]) -> Iterator[dict[str, Any]]:
    """Yield the checked elements of a top-level array, whose ids are unique."""
    seen: set[int] = set()
    for index, item in enumerate(elements(path, key)):
        where = f"{path}: {key}[{index}]"
        if not isinstance(item, dict):
            raise ValueError(f"{where} is {_shown(item)}, not an object")
        try:
            check(item)
        except ValueError as error:
            number = f" (id {item['id']})" if _is_integer(item.get("id")) else ""
            raise ValueError(f"{where}{number}: {error}") from None
        if item["id"] in seen:
            raise ValueError(f"{where}: id {item['id']} stands twice among the {key}")
        seen.add(item["id"])
        yield item
    if not seen:
        raise ValueError(f"{path}: it has no array {key!r} at its top with something in it")


def _check_id(item: dict, key: str) -> None:
    _require(_is_integer(item.get(key)), key, item, "an integer")


def _check_segmentation(item: dict, size: tuple[int, int]) -> None:
    shape = item.get("segmentation")
    if shape is None:
        return
    if isinstance(shape, dict):
        wanted = [size[1], size[0]]
        _require(shape.get("size") == wanted, "segmentation's size", {"segmentation's size": shape.get("size")}, wanted)
        counts = shape.get("counts")
        valid = isinstance(counts, str) or (
            isinstance(counts, list)
            and all(_is_integer(n) and n >= 0 for n in counts)
            and sum(counts) == size[0] * size[1]
        )
        _require(valid, "segmentation's counts", {"segmentation's counts": counts}, "run lengths of the whole image")
        return
    valid = isinstance(shape, list) and all(_are_numbers(polygon) for polygon in shape)
    _require(valid, "segmentation", item, "polygons of finite numbers")


def _require(condition: object, key: str, item: dict, wanted: object) -> None:
    if not condition:
        found = f"{key} is {_shown(item[key])}" if key in item else f"{key} is missing"
        raise ValueError(f"{found}; it has to be {wanted}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(_is_number(number) for number in value)
