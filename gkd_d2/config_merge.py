"""Config files and KEY VALUE pairs merged into a config, with errors that say what to do."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Iterator, Sequence

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager


def check_no_options(opts: Sequence[str]) -> None:
    """Check that there is no option among KEY VALUE pairs.

    Raises:
        ValueError: there is one.
    """
    late = [argument for argument in opts if argument.startswith("--")]
    if late:
        raise ValueError(
            f"the option {late[0]} comes after KEY VALUE pairs ({' '.join(opts[:2])} ...), where it would be taken for "
            "one of them: put all options before the pairs"
        )


def merge_pairs(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Merge KEY VALUE pairs into a config; ``cfg.merge_from_list`` with errors that say what to do.

    Args:
        cfg: changed in place.
        opts: KEY, VALUE, KEY, VALUE, ...

    Raises:
        ValueError: an option is among them, a key does not exist or has no value, or a value does not fit its key.
    """
    check_no_options(opts)
    keys = config_keys(cfg)
    for key, value in zip(opts[::2], [*opts[1::2], None]):
        if key not in keys:
            raise ValueError(_unknown(key, keys))
        if value is None or value in keys:
            raise ValueError(f"the config key {key} has no value: give pairs KEY VALUE, such as SOLVER.BASE_LR 0.01")
        try:
            cfg.merge_from_list([key, value])
        except ValueError as error:
            raise ValueError(f"{key} is {value!r}, but {_wanted(cfg, key)}") from error


def merge_file(cfg: CfgNode, path: str) -> None:
    """Merge a YAML file into a config; ``cfg.merge_from_file`` with errors that name the file and say what to do.

    Args:
        cfg: changed in place.
        path: of the file, which may name others as its ``_BASE_``.

    Raises:
        FileNotFoundError, ValueError: as of :func:`errors_named`.
    """
    with errors_named(path):
        try:
            cfg.merge_from_file(path)
        except KeyError as error:
            raise ValueError(_unknown(_named_key(error), config_keys(cfg))) from error
        except ValueError as error:
            if not str(error).startswith("Type mismatch"):
                raise
            key = _named_key(error)
            raise ValueError(f"{key} has a value that does not fit: it {_wanted(cfg, key)}") from error


@contextlib.contextmanager
def errors_named(path: str) -> Iterator[None]:
    """While a config file is read: errors that begin with the file.

    Raises:
        FileNotFoundError: the file, or one that it is based on, does not exist.
        ValueError: it is no valid YAML, or it does not hold what a config may.
    """
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"there is no config file {path}")
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: its _BASE_ {error.filename} does not exist") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path}: it must hold config keys and their values in YAML") from error
    except (AssertionError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def config_keys(cfg: CfgNode) -> list[str]:
    """All keys that have a value, and nodes, in their full form such as SOLVER.BASE_LR."""
    keys = []
    for name, value in cfg.items():
        keys.append(name)
        if isinstance(value, CfgNode):
            keys += [f"{name}.{key}" for key in config_keys(value)]
    return keys


def _named_key(error: Exception) -> str:
    """The key that an error of yacs is about, which it puts at the end of its message."""
    return str(error.args[0]).rsplit(": ", 1)[-1]


def _wanted(cfg: CfgNode, key: str) -> str:
    """What a key's value must be."""
    default = functools.reduce(CfgNode.__getitem__, key.split("."), cfg)
    if isinstance(default, CfgNode):
        return "must be a group of keys"
    return f"must be of the type {type(default).__name__}, such as {default!r}"


def _unknown(key: str, keys: Sequence[str]) -> str:
    """Says that there is no such key, and which is nearest."""
    # The end of a key is often remembered without its node.
    matches = [other for other in keys if other.lower().endswith(f".{key.lower()}")]
    if not matches:
        by_lower_case = {other.lower(): other for other in keys}
        matches = [by_lower_case[name] for name in difflib.get_close_matches(key.lower(), by_lower_case, n=1)]
    return f"there is no config key {key!r}" + (f", did you mean {' or '.join(matches)}?" if matches else "")
