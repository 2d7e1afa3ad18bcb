"""Reads a study from its YAML file, and from the file that it is based on."""

from __future__ import annotations

import dataclasses
import functools
import os
import typing
from collections.abc import Mapping
from pathlib import Path

from gkd_d2.analysis.study.check import StudyError, check_study
from gkd_d2.analysis.study.plan import Study
from gkd_d2.utils.config_merge import read_yaml

# The key that names another file, whose keys apply where this one does not set them.
BASE = "base"


def read_study(path: Path, output: Path) -> Study:
    """Read a study.

    Args:
        path: of the YAML file. Its keys are the attributes of :class:`Study`, and ``base``: the path, relative to the
            file, of another one. What the file sets takes precedence over its base; groups of keys are merged at every
            depth, as with Detectron2's ``_BASE_``, but ``settings`` are replaced as a whole.
        output: folder of all its runs.

    Raises:
        OSError: there is no such file.
        ValueError: what is wrong in it or its base, and where.
    """
    files = _read_files(path)
    try:
        study = _build(Study, (), functools.reduce(_merge_files, reversed(files.values())), output=output)
        check_study(study)
    except StudyError as error:
        raise ValueError(f"{_at_fault(files, error.place)}: {error}") from None
    except RecursionError:
        raise ValueError(f"{_all(files)}: there are values within values without end") from None
    return study


def _read_files(path: Path) -> dict[Path, dict]:
    """Path -> content: of a study's file, its base, the base of that, and so on."""
    files = {path: _read_file(path)}
    while BASE in files[path]:
        base = files[path].pop(BASE)
        if not isinstance(base, str):
            raise ValueError(f"{path}: {BASE} is {base!r}, but must be text")
        below = path.parent / base
        if os.path.realpath(below) in map(os.path.realpath, files):
            raise ValueError(f"{path}: its {BASE} {below} is based on it in turn")
        try:
            files[below] = _read_file(below)
        except OSError as error:
            raise ValueError(f"{path}: its {BASE} {below} can't be read ({error.strerror})") from error
        path = below
    return files


def _read_file(path: Path) -> dict:
    content = read_yaml(path)
    try:
        return _mapping((), content)
    except StudyError as error:
        raise ValueError(f"{path}: {error}") from None


def _merge_files(base: Mapping, content: Mapping) -> dict:
    """What a file and its base say together."""
    # The order of settings counts, and the first is the baseline: all of them are to be seen in one file.
    inherited = {name: value for name, value in base.items() if name != "settings" or name not in content}
    return _merge(inherited, content)


def _merge(base: Mapping, content: Mapping) -> dict:
    merged = dict(base)
    for name, value in content.items():
        below = merged.get(name)
        # In YAML a group without keys is None.
        both = isinstance(below, Mapping) and isinstance(value, Mapping | None)
        merged[name] = _merge(below, value or {}) if both else value
    return merged


def _at_fault(files: Mapping[Path, dict], place: tuple) -> str:
    """The file that says what stands at a place of the merged study; all of them for no place."""

    def depth(path: Path) -> int:
        content: object = files[path]
        for number, name in enumerate(place):
            if not isinstance(content, Mapping) or name not in content:
                return number
            content = content[name]
        return len(place)

    # The first of equals is the one that wins in the merging, too.
    return str(max(files, key=depth)) if place else _all(files)


def _all(files: Mapping[Path, dict]) -> str:
    return ", based on ".join(map(str, files))


def _build(kind: type, place: tuple, data: object, **given):
    """A dataclass of what stands at a place of the study; what is ``given`` does not stand there."""
    fields = _mapping(place, data)
    known = {field.name: field for field in dataclasses.fields(kind) if field.init and field.name not in given}
    for name in fields:
        if name not in known:
            there = [*known, BASE] if kind is Study else known
            raise StudyError(f"{_in(place)}unknown key {name}; there are {', '.join(there)}", *place, name)
    for name, field in known.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in fields:
            raise StudyError(f"{_in(place)}the key {name} is missing", *place)
    hints = typing.get_type_hints(kind)
    values = {name: _value(hints[name], (*place, name), value) for name, value in fields.items()}
    return kind(**values, **given)


def _value(hint, place: tuple, value: object):
    """What stands at a place of the study, as the attribute whose type is ``hint``.

    Lists become tuples.
    """
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, place, value)
    if kind is Mapping:
        return {name: _value(inner[1], (*place, name), item) for name, item in _mapping(place, value).items()}
    if kind is tuple:
        if not isinstance(value, list):
            raise StudyError(f"{_name(place)} is {value!r}, but must be a list", *place)
        return tuple(_value(inner[0], (*place, number), item) for number, item in enumerate(value))
    # Python takes True for the number 1.
    fits = isinstance(value, bool) == (hint is bool) and isinstance(value, int | float if hint is float else hint)
    if hint is not object and not fits:
        wanted = {str: "text", int: "a whole number", float: "a number such as 1.0e-3", bool: "true or false"}.get(
            hint, "text or a number"
        )
        raise StudyError(f"{_name(place)} is {value!r}, but must be {wanted}", *place)
    return value


def _mapping(place: tuple, data: object) -> dict:
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise StudyError(f"{_in(place)}there must be keys and values, but there is {data!r}", *place)
    for name in data:
        if not isinstance(name, str):
            raise StudyError(f"{_in(place)}the key {name!r} is no text for YAML: put it in quotes", *place, name)
    return data


def _name(place: tuple) -> str:
    """A place as a message names it, such as tuning.scales[0]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _in(place: tuple) -> str:
    return f"{_name(place)}: " if place else ""
