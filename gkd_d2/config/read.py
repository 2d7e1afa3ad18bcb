"""Configs from files and arguments."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, get_cfg

from gkd_d2.config.keys import DISTILLER, add_gkd_config
from gkd_d2.utils.config_merge import load_file, merge_loaded, merge_pairs
from gkd_d2.utils.timm_models import set_pixel_norm
from gkd_d2.utils.user_modules import import_modules

_TEACHER_PATHS = ("CONFIG_FILE", "WEIGHTS")


def read_config(config_file: str, opts: list[str], imports: Sequence[str] = ()) -> CfgNode:
    """The config that a file and KEY VALUE pairs describe, not frozen.

    The modules in GKD.IMPORTS are imported before the keys are looked at. MODEL.DEVICE "auto" becomes "cuda" where
    torch finds a GPU, else "cpu".

    Args:
        config_file: of any detector or distiller.
        opts: override the file's values.
        imports: modules that are added to GKD.IMPORTS, as by --import.

    Raises:
        FileNotFoundError: ``config_file``, or a file that it is based on, does not exist.
        ValueError: ``opts`` are no pairs, keys do not exist, values do not fit their keys, or a module in
            GKD.IMPORTS is not found.
        ImportError: a module in GKD.IMPORTS raises an error.
    """
    cfg = merged_config(config_file, opts, imports)
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, which torch does not know: give cuda, cuda:1, cpu or, for the GPU "
            "where there is one, auto"
        ) from error
    return cfg


def read_distiller_config(config_file: str, opts: list[str], imports: Sequence[str] = ()) -> CfgNode:
    """As :func:`read_config`, of a distiller alone.

    Raises:
        ValueError: also where it is the config of a plain detector.
    """
    cfg = read_config(config_file, opts, imports)
    if cfg.MODEL.META_ARCHITECTURE != DISTILLER:
        raise ValueError(
            f"{config_file} is no config of a {DISTILLER}: MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}. "
            "Name one with a teacher, such as configs/gkd_frcnn_kitti.yaml"
        )
    return cfg


class _Placed(str):
    """A teacher's path that was looked for beside the file that sets it."""


def merged_config(config_file: str, opts: list[str], imports: Sequence[str]) -> CfgNode:
    """The keys of Detectron2 and of this project, as a file and pairs KEY VALUE set them.

    For a backbone of timm the images are normalised as timm does it, where PIXEL_MEAN and PIXEL_STD are not set.
    """
    written, files = load_file(config_file, _place_own)
    if "_target_" in _node(written, "model"):
        raise ValueError(
            f"{config_file} was written by tools/lazyconfig_train_net.py: of runs of a LazyConfig this can't be done, "
            "only of those of tools/train_net.py"
        )
    teacher = _node(written, "GKD", "TEACHER")
    teacher.update({key: str(path) for key, path in teacher.items() if isinstance(path, _Placed)})
    modules = [*_listed_modules(config_file, written, opts), *imports]
    import_modules(modules, f"GKD.IMPORTS of {config_file}, or --import,")
    # Made after the imports, for a module may add keys to Detectron2's defaults.
    cfg = get_cfg()
    add_gkd_config(cfg)
    merge_loaded(cfg, written, files, config_file)
    merge_pairs(cfg, opts)
    for key in _TEACHER_PATHS:
        if f"GKD.TEACHER.{key}" in opts[::2]:
            cfg.GKD.TEACHER[key] = _placed(key, cfg.GKD.TEACHER[key], config_file)
    cfg.GKD.IMPORTS = list(dict.fromkeys(modules))
    set_pixel_norm(cfg)
    return cfg


def _listed_modules(config_file: str, written: dict, opts: list[str]) -> list[str]:
    """GKD.IMPORTS, of a file's content and the arguments, before there is a config with all keys."""
    key = "GKD.IMPORTS"
    cfg = CfgNode({"GKD": {"IMPORTS": []}})
    given = [text for pair in zip(opts[::2], opts[1::2]) if pair[0] == key for text in pair]
    try:
        cfg.merge_from_list([key, _node(written, "GKD").get("IMPORTS") or []])
        cfg.merge_from_list(given)
    except ValueError as error:
        raise ValueError(f"{key} of {config_file} must be a list of modules, such as ['my_module']: {error}") from error
    return list(cfg.GKD.IMPORTS)


def _node(loaded: object, *names: str) -> dict:
    """The node at a place of a file's content; empty where there is none."""
    for name in names:
        loaded = loaded.get(name) if isinstance(loaded, dict) else None
    return loaded if isinstance(loaded, dict) else {}


def _place_own(loaded: dict, config_file: str) -> None:
    """Place the teacher's paths that a file sets itself, among the content of its ``_BASE_``, whose are placed."""
    teacher = _node(loaded, "GKD", "TEACHER")
    for key in _TEACHER_PATHS:
        if isinstance(path := teacher.get(key), str) and not isinstance(path, _Placed):
            teacher[key] = _Placed(_placed(key, path, config_file))


def _placed(key: str, path: str, config_file: str) -> str:
    """A path of the teacher; a relative one that is not found in the working folder is that beside a config file.

    A checkpoint that is found in neither folder stays as it is, for it may be trained yet, and so does the name of a
    config of Detectron2's model zoo; another config file then becomes that beside ``config_file``, for the error.
    """
    if not path or os.path.isabs(path) or "://" in path or os.path.exists(path):
        return path
    beside = os.path.join(os.path.dirname(os.path.abspath(config_file)), path)
    if os.path.exists(beside):
        return beside
    return beside if key == "CONFIG_FILE" and file_of_model_zoo(path) is None else path


def file_of_model_zoo(name: str) -> str | None:
    """The file of a config in Detectron2's model zoo, such as new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py."""
    # Not by its own function: in later versions the module needs a part of setuptools that newer ones of these lack.
    (folder,) = importlib.util.find_spec("detectron2.model_zoo").submodule_search_locations
    path = os.path.join(folder, "configs", name)
    return path if os.path.isfile(path) else None


def with_absolute_teacher(cfg: CfgNode) -> CfgNode:
    """A copy in which the teacher's paths do not depend on the working folder, nor on symbolic links."""
    cfg = cfg.clone()
    cfg.defrost()
    for key in _TEACHER_PATHS:
        path = cfg.GKD.TEACHER[key]
        # The name of a config in the model zoo is no path.
        if path and "://" not in path and (key == "WEIGHTS" or os.path.exists(path)):
            cfg.GKD.TEACHER[key] = os.path.realpath(path)
    return cfg
