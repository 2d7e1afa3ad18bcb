"""Detectors of Detectron2's LazyConfig, its ``.py`` configs."""

from __future__ import annotations

import functools
import inspect
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence

import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gkd_d2.config.spec import EXTRA_HEADS, DetectorSpec
from gkd_d2.utils.text import did_you_mean

# Where a detector keeps its number of classes.
_CLASS_PATHS = ("roi_heads.num_classes", "num_classes")
# What makes a distilled model, which stands above this folder; its ``student`` is a plain detector.
_DISTILLER = "gkd_d2.lazy.distil.build_distiller"
# As a class, and where a config imports it from.
_TIMM_FEATURES = ("gkd_d2.modeling.backbone.timm_features.TimmFeatures", "gkd_d2.modeling.backbone.TimmFeatures")


class LazySpec(DetectorSpec):
    """A detector of a LazyConfig.

    Args:
        model: describes the detector by ``_target_`` and its arguments, as the ``model`` of a config does.
        file: see :class:`DetectorSpec`.
        train_sets: see :class:`DetectorSpec`.
        image_format: of the images that its mapper gives it; default: the model's ``input_format``.
        place: of ``model`` in its config.
    """

    def __init__(
        self,
        model: DictConfig,
        file: str = "",
        train_sets: Sequence[str] = (),
        image_format: str | None = None,
        place: str = "model",
    ):
        self.model = model
        self.file = file
        self.train_sets = tuple(train_sets)
        self.image_format = image_format or model.get("input_format") or "BGR"
        self._place = place

    @property
    def classes(self):
        for path in _CLASS_PATHS:
            if isinstance(number := OmegaConf.select(self.model, path), int):
                return f"{self._place}.{path}{self._of_file}", number
        return None

    @property
    def heads(self):
        roi_heads = self.model.get("roi_heads") or {}
        return {head for head in EXTRA_HEADS if roi_heads.get(f"{head}_in_features")}

    def without(self, heads):
        model = self.model.copy()
        for head in heads:
            for part in ("in_features", "pooler", "head"):
                model.roi_heads.pop(f"{head}_{part}", None)
        return self._with(model)

    def with_proposals(self, number: int) -> LazySpec:
        """The same detector, whose ROI heads sample so many proposals an image in training; 0: as many as they did.

        Raises:
            ValueError: ``number`` is negative, or there are no ROI heads.
        """
        if number < 0 or (number and "roi_heads" not in self.model):
            kind = "must be >= 0" if number < 0 else "the detector samples no proposals: leave it at 0"
            raise ValueError(f"GKD.TEACHER.ROI_BATCH_SIZE is {number}, but {kind}")
        if not number:
            return self
        model = self.model.copy()
        model.roi_heads.batch_size_per_image = number
        return self._with(model)

    def without_backbone_weights(self) -> LazySpec:
        """See :func:`without_lazy_backbone_weights`."""
        return self._with(without_lazy_backbone_weights(self.model))

    def _with(self, model: DictConfig) -> LazySpec:
        return LazySpec(model, self.file, self.train_sets, self.image_format, self._place)

    def problems(self):
        return [f"{sentence}{self._of_file}" for sentence in _unknown_arguments(self.model, self._place)]

    def build(self):
        try:
            return instantiate(self.model)
        except (AssertionError, ImportError, KeyError, TypeError) as error:
            raise ValueError(f"the model of {self.file} can't be built: {type(error).__name__}: {error}") from error

    def dump(self):
        return dump_lazy({"model": self.model})


def load_lazy_spec(path: str, overrides: Sequence[str] = ()) -> LazySpec:
    """The detector of a ``.py`` file.

    Args:
        path: of a LazyConfig.
        overrides: "key=value", as on the command line of Detectron2's lazyconfig_train_net.py.

    Raises:
        ValueError: the file is no LazyConfig with a ``model``, its model and its mapper have two orders of channels, or
            an override can't be applied.
    """
    cfg = load_lazy(path, overrides)
    names = OmegaConf.select(cfg, "dataloader.train.dataset.names") or ()
    model, image_format = plain_model(cfg.model), OmegaConf.select(cfg, "dataloader.train.mapper.image_format")
    if image_format and model.get("input_format", image_format) != image_format:
        raise ValueError(
            f"{path}: dataloader.train.mapper.image_format is {image_format}, but the model's input_format is "
            f"{model.input_format}: set both to the order of channels that it was trained on, for instance by "
            "GKD.TEACHER.OPTS"
        )
    return LazySpec(model, path, (names,) if isinstance(names, str) else tuple(names), image_format)


def plain_model(model: DictConfig) -> DictConfig:
    """A detector's config; of a distilled one its student's."""
    return model.student if is_called(model, _DISTILLER) else model


def without_lazy_backbone_weights(node: DictConfig) -> DictConfig:
    """A copy whose backbones of timm start with no weights of their own, for detectors that checkpoints set whole.

    Args:
        node: a LazyConfig, or a part of one.
    """
    node = node.copy()
    _clear_backbone_weights(node)
    return node


def _clear_backbone_weights(node: object) -> None:
    if not OmegaConf.is_config(node):
        return
    if isinstance(node, DictConfig) and any(is_called(node, name) for name in _TIMM_FEATURES):
        node.pretrained, node.weights = False, ""
    for key in range(len(node)) if OmegaConf.is_list(node) else list(node):
        if not OmegaConf.is_interpolation(node, key):
            _clear_backbone_weights(node[key])


def is_called(node: DictConfig, name: str) -> bool:
    """Whether a node of a LazyConfig calls the function or class of a dotted name."""
    target = node.get("_target_")
    if target is None:
        return False
    return name == (target if isinstance(target, str) else f"{target.__module__}.{target.__qualname__}")


def load_lazy(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The content of a ``.py`` file that describes a detector in ``model``.

    Raises:
        ValueError: it is none, or an override can't be applied.
    """
    try:
        cfg = LazyConfig.load(path)
    # The file is Python, which may raise anything.
    except (Exception, SystemExit) as error:
        # The line of a file that is a part of the config.
        folder = os.path.dirname(os.path.abspath(path))
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith((folder, path))]
        line = f", line {frames[-1].lineno} of {frames[-1].filename}" if frames else ""
        kind = type(error).__name__
        raise ValueError(f"{path} can't be read as a LazyConfig: {kind}: {error}{line}") from error
    if not isinstance(cfg, DictConfig) or "_target_" not in (cfg.get("model") or {}):
        raise ValueError(
            f"{path} is no LazyConfig of a detector: it has no `model` that is made by LazyCall, as those of "
            "Detectron2's new_baselines have"
        )
    return override_lazy(cfg, overrides)


def override_lazy(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Apply overrides, "key=value", to a LazyConfig, in place; returns it.

    A key must exist, or be an argument of what is called by ``_target_``, which need not be written in a config; with
    "+key=value" it may be new.

    Raises:
        ValueError: an override is none, or its key does not exist.
    """
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or override.startswith("-"):
            raise ValueError(
                f"{override!r} is no override of a LazyConfig: write key=value without spaces, such as "
                "train.max_iter=1000"
            )
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        known = _keys(node)
        if not key.startswith("+") and known is not None and name not in known:
            near = did_you_mean(name, known, f"{parent}." if parent else "")
            raise ValueError(f"{override!r} sets {key}, which the config does not have{near}")
        try:
            LazyConfig.apply_overrides(cfg, [override])
        # The parser of overrides has errors of its own.
        except Exception as error:
            raise ValueError(f"the override {override!r} can't be applied: {error}") from error
    return cfg


def _keys(node: object) -> list[str] | None:
    """What a node of a config has, or its call takes; None where that is anything."""
    if OmegaConf.is_list(node):
        return [str(number) for number in range(len(node))]
    if not isinstance(node, DictConfig):
        return []
    keys = [str(key) for key in node]
    if "_target_" not in node:
        return keys
    parameters = called_with(node)
    return None if parameters is None else [*keys, *(name for name in parameters if name not in keys)]


def _unknown_arguments(node: object, place: str) -> Iterator[str]:
    """A sentence for each key beside a ``_target_`` that is none of its arguments."""
    if OmegaConf.is_list(node):
        for number in range(len(node)):
            yield from _unknown_arguments(node[number], f"{place}.{number}")
    if not isinstance(node, DictConfig):
        return
    known = called_with(node) if "_target_" in node else None
    for name in node:
        if known is not None and name not in (*known, "_target_"):
            yield f"{place} has {name!r}, which is no argument of what it calls{did_you_mean(name, known)}"
        else:
            yield from _unknown_arguments(node[name], f"{place}.{name}")


def called_with(node: DictConfig) -> list[str] | None:
    """The names of the arguments that a node's call takes; None where that is anything, or not known."""
    parameters = _parameters(node)
    if parameters is None or any(one.kind == inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return None
    return list(parameters)


def missing_arguments(node: DictConfig) -> list[str]:
    """The names of the arguments that a node's call needs, and the node does not have."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name
        for name, one in (_parameters(node) or {}).items()
        if one.default is inspect.Parameter.empty and one.kind not in variadic and name not in node
    ]


def _parameters(node: DictConfig) -> Mapping[str, inspect.Parameter] | None:
    target = locate(node._target_) if isinstance(node._target_, str) else node._target_
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None


def dump_lazy(cfg: DictConfig | Mapping) -> str:
    """A LazyConfig as YAML of plain values: what is called stands there by its name, other objects as text."""
    return yaml.safe_dump(_plain(cfg), sort_keys=False, allow_unicode=True, width=120)


def _plain(value: object) -> object:
    if OmegaConf.is_config(value):
        try:
            value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException:
            # As of a part that stands there once more by itself, where its references mean nothing.
            value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, functools.partial):
        return {"partial": _plain(value.func), "args": _plain(value.args), "keywords": _plain(value.keywords)}
    if isinstance(value, type | Callable) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{type(value).__module__}.{type(value).__qualname__}"
