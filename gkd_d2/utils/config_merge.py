"""Config files and KEY VALUE pairs merged into a config, with errors that say what to do."""

from __future__ import annotations

import difflib
import functools
import io
import os
import re
from collections.abc import Callable, Sequence

import detectron2
import yaml
from detectron2.config import CfgNode, downgrade_config, upgrade_config
from detectron2.config.compat import guess_version
from detectron2.utils.file_io import PathManager

# The one expression that is computed. Detectron2's Base-RetinaNet.yaml holds it, and so do many configs made after it:
# anchors of three scales for each of a few sizes.
_SCALES = re.compile(
    r"""!!python/object/apply:eval\s*\[\s*(["'])"""
    r"""\[\[x, x \* 2\*\*\(1\.0/3\), x \* 2\*\*\(2\.0/3\) ?\] for x in \[(\d[\d., ]*)\]\]\1\s*\]"""
)

# Keys that Detectron2's main branch has and its releases, up to 0.6, have not, with the month in which they came.
_KEYS_OF_MAIN_BRANCH = {
    "DATALOADER.REPEAT_SQRT": "2024-03",
    "FLOAT32_PRECISION": "2024-08",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": "2022-04",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": "2022-04",
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": "2022-04",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": "2022-04",
    "SOLVER.BASE_LR_END": "2021-12",
    "SOLVER.NUM_DECAYS": "2022-09",
    "SOLVER.RESCALE_INTERVAL": "2022-08",
}

# What Detectron2 raises for a file that holds something other than config keys.
_WRONG_CONTENT = (AssertionError, AttributeError, RecursionError, TypeError, ValueError)


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
    for key, value in zip(opts[::2], [*opts[1::2], None]):
        # A pair may add some.
        keys = config_keys(cfg)
        group = _open_group(cfg, key)
        if key not in keys and group is None:
            raise ValueError(_unknown(key, keys))
        if value is None or value in keys or _open_group(cfg, value) is not None:
            raise ValueError(f"the config key {key} has no value: give pairs KEY VALUE, such as SOLVER.BASE_LR 0.01")
        if group is not None:
            _set_any(group, key, value)
            continue
        try:
            cfg.merge_from_list([key, value])
        except ValueError as error:
            is_group = isinstance(_value(cfg, key), CfgNode)
            singly = f": set each by itself, as in {key}.NAME VALUE" if is_group else ""
            raise ValueError(f"{key} is {value!r}, but {_wanted(cfg, key)}{singly}") from error


def read_yaml(path: str | os.PathLike) -> object:
    """What a YAML file holds: plain values, and no Python objects, whose making would run code.

    Raises:
        OSError: it can't be read.
        ValueError: it is no valid YAML, or holds Python objects; the message names the file and the line.
    """
    with open(path, encoding="utf-8") as file:
        try:
            return yaml.safe_load(file)
        except (RecursionError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {_fault(error)}") from error


def load_file(path: str, own_paths: Callable[[dict, str], None]) -> tuple[dict, dict[str, str]]:
    """What a YAML file holds, merged into what its ``_BASE_`` holds.

    Args:
        path: of the file, which may name others as its ``_BASE_``.
        own_paths: called with the merged content and the path of each file of the chain, the deepest ``_BASE_`` first.
            It may change the content.

    Returns:
        The content, and the file of each key in it, in its full form such as SOLVER.BASE_LR: of several in the chain
        the deepest.

    Raises:
        FileNotFoundError: the file, or one that it is based on, does not exist.
        OSError: one of them can't be read.
        ValueError: one of them is no valid YAML, holds something other than config keys, such as Python objects,
            whose making would run code, or is based on itself.
    """
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"there is no config file {path}")
    # The chain of files that are being read; after an error it ends with the one at fault.
    chain: list[str] = []
    files: dict[str, str] = {}

    class Reader(CfgNode):
        @classmethod
        def _open_cfg(cls, filename: str) -> io.StringIO:
            with super()._open_cfg(filename) as file:
                text = io.StringIO(_SCALES.sub(_three_scales, file.read()))
            text.name = filename
            return text

        @classmethod
        def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
            if os.path.realpath(filename) in map(os.path.realpath, chain):
                raise ValueError(f"its _BASE_ {filename} is based on it in turn")
            chain.append(filename)
            if filename.endswith(".py"):
                raise ValueError(
                    "it is Python code, as of Detectron2's LazyConfig: name a config in YAML; "
                    "tools/lazyconfig_train_net.py trains LazyConfigs"
                )
            loaded = super().load_yaml_with_base(filename, allow_unsafe=allow_unsafe)
            if not isinstance(loaded, dict):
                raise TypeError
            own_paths(loaded, filename)
            # Those of its _BASE_ are there already.
            files.update({key: filename for key in config_keys(loaded) if key not in files})
            chain.pop()
            return loaded

    try:
        return Reader.load_yaml_with_base(path, allow_unsafe=False), files
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{': its _BASE_ '.join(chain[-2:])} does not exist") from error
    except OSError as error:
        raise OSError(f"{': its _BASE_ '.join(chain[-2:])} can't be read ({error})") from error
    except (*_WRONG_CONTENT, OverflowError, yaml.YAMLError) as error:
        raise ValueError(f"{', the _BASE_ of '.join(chain[:-3:-1])}: {_fault(error)}") from error


def merge_loaded(cfg: CfgNode, loaded: dict, files: dict[str, str], path: str) -> None:
    """Merge the content of a file into a config, as ``cfg.merge_from_file`` does, with errors that say what to do.

    Args:
        cfg: changed in place.
        loaded: the content; see :func:`load_file`.
        files: that of each key, for messages.
        path: of the file, for messages.

    Raises:
        ValueError: keys do not exist or have values that do not fit, all of which are named; or the content is of an
            unknown VERSION.
    """
    problems = []
    try:
        node = CfgNode(loaded)
        version = node["VERSION"] if "VERSION" in node else guess_version(node, path)
        if version not in range(1, cfg.VERSION + 1):
            raise ValueError(f"VERSION is {version!r}, but Detectron2's configs have versions up to {cfg.VERSION}")
        target = cfg if version == cfg.VERSION else downgrade_config(cfg, to_version=version)
        # A merge ends at the first mistake, so it is taken out and the next is looked for.
        while mistake := _merge(target, node):
            key, problem = mistake
            problems.append(f"{files.get(key, path)}: {problem}")
            _remove(node, key)
        if target is not cfg:
            cfg.update(upgrade_config(target))
    except (*_WRONG_CONTENT, KeyError) as error:
        problems.append(f"{path}: {_fault(error)}")
    if problems:
        raise ValueError("\n  ".join(problems))


def _open_group(cfg: CfgNode, key: str) -> CfgNode | None:
    """The node of a key, where it may hold any key, such as GKD.METHOD_OPTIONS; else None."""
    *path, name = key.split(".")
    node = cfg
    for part in path:
        node = node.get(part) if isinstance(node, CfgNode) else None
    return node if name and isinstance(node, CfgNode) and node.is_new_allowed() else None


def _set_any(group: CfgNode, key: str, value: str) -> None:
    """Set a key of a group that may hold any; no default says of which type its value must be."""
    name = key.rpartition(".")[2]
    try:
        group[name] = CfgNode({name: CfgNode._decode_cfg_value(value)})[name]
    except AssertionError as error:
        raise ValueError(
            f"{key} is {value!r}, but must be a number, a text, True, False, None, or a list or group of these"
        ) from error


def _merge(cfg: CfgNode, node: CfgNode) -> tuple[str, str] | None:
    """Merge a node; the first key that can't be merged, and why."""
    try:
        cfg.merge_from_other_cfg(node)
    except KeyError as error:
        if not str(error.args[0]).startswith("Non-existent config key"):
            # Of a key that was renamed, the text says so.
            raise ValueError(error.args[0]) from error
        key = _named_key(error)
        return key, _unknown(key, config_keys(cfg))
    except ValueError as error:
        if not str(error).startswith("Type mismatch"):
            raise
        key = _named_key(error)
        return key, f"{key} is {_value(node, key)!r}, but {_wanted(cfg, key)}"
    return None


def _remove(node: CfgNode, key: str) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        if parent not in node:
            # A key that is written with dots, as on a command line.
            del node[key]
            return
        node = node[parent]
    del node[name]


def _three_scales(match: re.Match) -> str:
    """The value of the expression of Base-RetinaNet.yaml, in YAML."""
    sizes = yaml.safe_load(f"[{match[2]}]")
    return str([[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in sizes])


def config_keys(cfg: dict) -> list[str]:
    """All keys that have a value, and nodes, in their full form such as SOLVER.BASE_LR."""
    keys = []
    for name, value in cfg.items():
        keys.append(name)
        if isinstance(value, dict):
            keys += [f"{name}.{key}" for key in config_keys(value)]
    return keys


def _fault(error: Exception) -> str:
    """What is wrong with a file, by the error of what reads it."""
    if isinstance(error, (AttributeError, TypeError)):
        return "it must hold config keys and their values in YAML"
    if isinstance(error, RecursionError):
        return "it holds values within values without end, or too deep"
    tag = re.search(r"constructor for the tag '(.*)'", str(error)) if isinstance(error, yaml.MarkedYAMLError) else None
    if tag:
        name = tag[1].replace("tag:yaml.org,2002:", "!!")
        return (
            f"line {error.problem_mark.line + 1}: the tag {name} is not read, as such tags may run code: write the "
            "value itself, a tuple as a list. Of a file that you trust, merge_from_file and dump of Detectron2's "
            "CfgNode make one without tags"
        )
    return str(error)


def _named_key(error: Exception) -> str:
    """The key that an error of yacs is about, which it puts at the end of its message."""
    return str(error.args[0]).rsplit(": ", 1)[-1]


def _value(tree: dict, key: str) -> object:
    return functools.reduce(dict.__getitem__, key.split("."), tree)


def _wanted(cfg: CfgNode, key: str) -> str:
    """What a key's value must be."""
    default = _value(cfg, key)
    if isinstance(default, CfgNode):
        return "must be a group of keys"
    example = default or ["a", "b"] if isinstance(default, list) else default
    return f"must be of the type {type(default).__name__}, such as {example!r}"


def _unknown(key: str, keys: Sequence[str]) -> str:
    """Says that there is no such key, and which is nearest."""
    if key in _KEYS_OF_MAIN_BRANCH:
        return (
            f"there is no config key {key!r} in Detectron2 {detectron2.__version__}, which is imported here: remove "
            f"it, or install Detectron2's main branch, which has it since {_KEYS_OF_MAIN_BRANCH[key]}"
        )
    if key in keys:
        return (
            f"{key!r} is written as on a command line: in a file, {key.partition('.')[0]}: is followed by the rest, in "
            "the next line and indented"
        )
    # The end of a key is often remembered without its node.
    matches = [other for other in keys if other.lower().endswith(f".{key.lower()}")]
    if not matches:
        by_lower_case = {other.lower(): other for other in keys}
        matches = [by_lower_case[name] for name in difflib.get_close_matches(key.lower(), by_lower_case, n=1)]
    return f"there is no config key {key!r}" + (f", did you mean {' or '.join(matches)}?" if matches else "")
