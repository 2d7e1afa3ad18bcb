"""A model of timm as the bottom-up network of a feature pyramid."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from gkd_d2.utils.checkpoint import CheckpointError
from gkd_d2.utils.text import counted, listed
from gkd_d2.utils.timm_models import COLOUR_FORMATS, NORMS, import_timm, name_problem
from gkd_d2.utils.timm_weights import read_timm_weights


class _Stage(NamedTuple):
    """A feature of a model, as its feature_info describes it: its place there, channels and stride in pixels."""

    index: int
    channels: int
    stride: int


class TimmFeatures(Backbone):
    """The features of any model of timm that has ``features_only``, by the names of Detectron2's ResNets.

    The feature of stride 2**n is "resn": "res2" has stride 4, "res5" stride 32.

    Args:
        name: of the model, as timm.create_model takes it, with or without the tag of its weights.
        out_features: names of the features to return, such as "res2".
        out_indices: places of these features among the model's; empty: by their strides.
        pretrained: whether to start with timm's own weights, which are fetched unless they are in its cache.
        weights: a file to start with, with timm's names, with or without a classifier; empty: none.
        norm: what its BatchNorms become: "FrozenBN", "BN" or "SyncBN". Norms of other kinds stay as they are.
        freeze_at: all that makes the feature of stride 2**freeze_at is frozen, its BatchNorms too; 0: nothing.
        image_format: the order of the channels of the images, "RGB" or "BGR"; the model is given RGB, as its weights
            were trained.

    Attributes:
        name: of the model.
        image_format: the order of the channels of the images.
        starts_with_weights: whether it loaded weights of its own.
        unused_parameters: those that make none of the features.

    Raises:
        ValueError: timm has no such model, the model can't be used for a pyramid of these features, ``pretrained`` and
            ``weights`` are both set, the weights can't be fetched, or an option has no such value.
        CheckpointError: the file can't be read, or leaves a part of the model unset.
        ModuleNotFoundError: timm is not installed.
    """

    def __init__(
        self,
        name: str,
        out_features: Sequence[str],
        *,
        out_indices: Sequence[int] = (),
        pretrained: bool = False,
        weights: str = "",
        norm: str = "FrozenBN",
        freeze_at: int = 2,
        image_format: str = "RGB",
    ):
        super().__init__()
        if wrong := name_problem(name):
            raise ValueError(f"MODEL.TIMM.NAME is {name!r}: {wrong}")
        if pretrained and weights:
            raise ValueError("MODEL.TIMM.PRETRAINED and MODEL.TIMM.WEIGHTS are both set: choose one of them")
        if norm not in NORMS:
            raise ValueError(f"MODEL.TIMM.NORM is {norm!r}: set it to {' or '.join(NORMS)}")
        if image_format not in COLOUR_FORMATS:
            raise ValueError(f"INPUT.FORMAT is {image_format!r}: set it to {' or '.join(COLOUR_FORMATS)}")
        _check_any_size(name)
        stages = _stages(name)
        chosen = _choose(name, stages, _strides(out_features), list(out_indices))
        last_frozen = _last_frozen(name, stages, freeze_at)
        self._indices = sorted({stage.index for stage in (*chosen, *([last_frozen] if last_frozen else []))})
        self._names = {self._indices.index(stage.index): feature for feature, stage in zip(out_features, chosen)}
        self.name, self.image_format = name, image_format
        self._out_features = list(out_features)
        self._out_feature_strides = {feature: stage.stride for feature, stage in zip(out_features, chosen)}
        self._out_feature_channels = {feature: stage.channels for feature, stage in zip(out_features, chosen)}
        self.starts_with_weights = bool(pretrained or weights)
        self.network = _make(name, self._indices)
        self._channels_last = str(getattr(self.network, "output_fmt", "")).endswith("NHWC")
        if self.starts_with_weights:
            _load(self.network, name, self._indices, weights)
        self._freeze(name, chosen, last_frozen)
        self._set_norm(norm)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: N,3,H,W, normalised images.

        Returns:
            Name -> N,C,H,W.
        """
        features = self._all_features(x.flip(1) if self.image_format == "BGR" else x)
        return {name: features[place] for place, name in self._names.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }

    def _all_features(self, x: Tensor) -> list[Tensor]:
        features = self.network(x)
        return [feature.permute(0, 3, 1, 2) for feature in features] if self._channels_last else features

    def _freeze(self, name: str, chosen: Sequence[_Stage], last_frozen: _Stage | None) -> None:
        """Freeze what makes the feature ``last_frozen``, and what makes none of those ``chosen``.

        What makes a feature is told by autograd: timm's models differ in how their modules are named and ordered.
        """
        side = 2 * max(stage.stride for stage in (*chosen, *([last_frozen] if last_frozen else [])))
        was_training = self.network.training
        self.network.eval()
        with torch.enable_grad():
            try:
                found = self._all_features(torch.zeros(1, 3, side, side))
            except (AssertionError, RuntimeError) as error:
                raise ValueError(
                    f"MODEL.TIMM.NAME is {name!r}, which can't take an image of {side} x {side} pixels, but a "
                    f"detector's may have any size: {_short(error)}"
                ) from error
            made = dict(zip(self._indices, found))
            for stage in chosen:
                wanted = (1, stage.channels, side // stage.stride, side // stage.stride)
                if tuple(made[stage.index].shape) != wanted:
                    raise ValueError(
                        f"MODEL.TIMM.NAME is {name!r}, whose feature of stride {stage.stride} is "
                        f"{tuple(made[stage.index].shape)} for an image of {side} x {side} pixels, and not {wanted} "
                        "(N,C,H,W): a feature pyramid can't be built on it"
                    )
            used = self._makers([made[stage.index] for stage in chosen])
            early = self._makers([made[last_frozen.index]]) if last_frozen else set()
        self.network.train(was_training)
        parameters = dict(self.network.named_parameters())
        # If they were trained, DistributedDataParallel would wait for their gradients.
        self.unused_parameters = [parameters[name] for name in parameters.keys() - used - early]
        for parameter in (*self.unused_parameters, *(parameters[name] for name in early)):
            parameter.requires_grad = False
        norms = [
            module_name
            for module_name, module in self.network.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{module_name}.weight" in early
        ]
        if norms:
            from timm.utils import freeze

            freeze(self.network, norms)

    def _makers(self, features: list[Tensor]) -> set[str]:
        """Names of the parameters that take part in making some features."""
        names, parameters = zip(*self.network.named_parameters())
        total = sum(feature.sum() for feature in features)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
        return {name for name, gradient in zip(names, gradients) if gradient is not None}

    def _set_norm(self, norm: str) -> None:
        from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

        if norm == "FrozenBN":
            self.network = freeze_batch_norm_2d(self.network)
        elif norm == "SyncBN":
            self.network = convert_sync_batchnorm(self.network)


def _check_any_size(name: str) -> None:
    found = import_timm().models.get_pretrained_cfg(name)
    if found.fixed_input_size:
        height, width = found.input_size[1:]
        raise ValueError(
            f"MODEL.TIMM.NAME is {name!r}, which takes images of {height} x {width} pixels alone: a detector needs a "
            "model for images of any size, such as mobilenetv2_100 or convnext_tiny"
        )


def _make(name: str, indices: Sequence[int] | None = None, **options) -> nn.Module:
    """A model of timm that gives features, by their places among the model's; None: those that it gives by default."""
    places = {} if indices is None else {"out_indices": tuple(indices)}
    return import_timm().create_model(name, features_only=True, **places, **options)


def _stages(name: str) -> list[_Stage]:
    """All features of a model, from the first.

    Raises:
        ValueError: timm gives none.
    """
    try:
        described = _make(name).feature_info
    # timm's models refuse what they can't do by errors of many kinds.
    except Exception as error:
        raise ValueError(
            f"MODEL.TIMM.NAME is {name!r}, of which timm gives no features (features_only): {_short(error)}. Choose "
            "another, such as mobilenetv2_100"
        ) from error
    return [
        _Stage(index, described[index]["num_chs"], described[index]["reduction"]) for index in range(len(described))
    ]


def _strides(features: Sequence[str]) -> list[int]:
    """The strides in pixels of features that are named as those of Detectron2's ResNets."""
    matches = [re.fullmatch(r"res([1-9])", feature) for feature in features]
    if not features or not all(matches):
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {list(features)}, but the features of a timm backbone are named by their "
            "strides: res2 (4), res3 (8), res4 (16), res5 (32)"
        )
    return [2 ** int(match[1]) for match in matches]


def _choose(name: str, stages: Sequence[_Stage], strides: Sequence[int], out_indices: Sequence[int]) -> list[_Stage]:
    """The feature of each stride."""
    offered = ", ".join(f"{stage.index} ({stage.stride})" for stage in stages)
    offers = f"{name} has the features (and strides) {offered}"
    candidates = stages
    if out_indices:
        outside = [index for index in out_indices if not -len(stages) <= index < len(stages)]
        if outside:
            raise ValueError(f"MODEL.TIMM.OUT_INDICES names {listed(map(str, outside))}, but {offers}")
        candidates = [stages[index] for index in out_indices]
        if sorted(stage.stride for stage in candidates) != sorted(strides):
            raise ValueError(
                f"MODEL.TIMM.OUT_INDICES is {list(out_indices)}, of strides "
                f"{', '.join(str(stage.stride) for stage in candidates)}, but MODEL.FPN.IN_FEATURES names features of "
                f"strides {', '.join(map(str, strides))}: {offers}"
            )
    found = [[stage for stage in candidates if stage.stride == stride] for stride in strides]
    for stride, of_stride in zip(strides, found):
        if not of_stride:
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES names res{stride.bit_length() - 1}, of stride {stride}, but {offers}: choose "
                "another MODEL.TIMM.NAME or other MODEL.FPN.IN_FEATURES"
            )
        if len(of_stride) > 1:
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES names res{stride.bit_length() - 1}, but {offers}: name one of stride {stride} "
                "by MODEL.TIMM.OUT_INDICES"
            )
    return [of_stride[0] for of_stride in found]


def _last_frozen(name: str, stages: Sequence[_Stage], freeze_at: int) -> _Stage | None:
    """The feature of which all that makes it is frozen."""
    if freeze_at == 0:
        return None
    known = {stage.stride.bit_length() - 1: stage for stage in stages if stage.stride.bit_count() == 1}
    if freeze_at not in known:
        raise ValueError(
            f"MODEL.TIMM.FREEZE_AT is {freeze_at}, but {name} has no feature of that stride: set it to 0 (nothing is "
            f"frozen) or {' or '.join(str(level) for level in sorted(known) if level)}"
        )
    return known[freeze_at]


def _load(network: nn.Module, name: str, indices: Sequence[int], weights: str) -> None:
    """Load timm's own weights, or those of a file where one is named, through timm's own loading.

    timm loads into the whole model, by a filter of each of its families, before it takes its features.
    """
    if not weights:
        network.load_state_dict(_fetch(name, indices))
        return
    state = read_timm_weights(weights)
    start = f"MODEL.TIMM.WEIGHTS: {weights} does not fit MODEL.TIMM.NAME {name}"
    # What is not NaN after NaNs are loaded instead is what the file does not set.
    marks = {
        key: torch.full_like(value, torch.nan) if value.is_floating_point() else value for key, value in state.items()
    }
    try:
        marked = _given(name, indices, marks)
        unset = [k for k, value in marked.items() if value.is_floating_point() and not value.isnan().all()]
        if not unset:
            network.load_state_dict(_given(name, indices, state))
    # Of tensors of another shape, or that a family's filter does not find.
    except Exception as error:
        raise CheckpointError(f"{start}: {_short(error)}") from error
    if unset:
        raise CheckpointError(
            f"{start}: it leaves {counted(len(unset), 'tensor')} of the network unset ({listed(unset)}); the file has "
            f"{listed(state)}"
        )


def _given(name: str, indices: Sequence[int], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network that timm has loaded from a state_dict of the whole model."""
    # A copy, for timm takes the classifier out of it.
    with _without_warnings():
        return _make(name, indices, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state)}).state_dict()


def _fetch(name: str, indices: Sequence[int]) -> dict[str, Tensor]:
    try:
        with _without_warnings():
            return _make(name, indices, pretrained=True).state_dict()
    # Each way to the weights has errors of its own.
    except Exception as error:
        raise ValueError(
            f"MODEL.TIMM.PRETRAINED is True, but timm can't get the weights of {name}: {_short(error)}. Set "
            "MODEL.TIMM.WEIGHTS to a file that holds them, fetched on another machine if need be, and "
            "MODEL.TIMM.PRETRAINED to False; or train from scratch without either"
        ) from error


def _short(error: Exception) -> str:
    """What an error says, of a text of many lines, as torch's of tensors that do not fit, the first two."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]).rstrip(".")
    return f"{text} ..." if len(lines) > 2 else text or type(error).__name__


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """timm warns of each tensor behind the features, which the network does without."""
    logger = logging.getLogger("timm.models._builder")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
