"""How a detector is split at its feature pyramid: features from images, losses from given features.

Each split computes exactly what the detector's own training forward computes, in the same order and with the same
random draws. This is the one place that knows where the supported versions of Detectron2 differ. Splits of other
meta-architectures are added by :func:`register_split`: docs/own_detector.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.meta_arch.retinanet import permute_to_N_HWA_K
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn


class SplitDetector(ABC):
    """A detector as two calls, with what distillation must know about it. It owns no state.

    Attributes:
        model: the Detectron2 meta-architecture.
        running_attributes: names of numbers that ``model`` holds outside its state_dict and its losses update.
    """

    running_attributes: tuple[str, ...] = ()

    def __init__(self, model: nn.Module):
        self.model = model

    def features(self, batched_inputs: list[dict]) -> tuple[ImageList, dict[str, Tensor]]:
        """Normalise and pad the images, and run the backbone.

        Args:
            batched_inputs: as for Detectron2's meta-architectures.

        Returns:
            The padded batch and the backbone's features, level name -> N,C,H,W.
        """
        images = self.model.preprocess_image(batched_inputs)
        return images, self.model.backbone(images.tensor)

    @abstractmethod
    def losses(self, images: ImageList, features: dict[str, Tensor], batched_inputs: list[dict]) -> dict[str, Tensor]:
        """The detection losses of given features.

        Args:
            images: from :meth:`features`.
            features: level name -> N,C,H,W.
            batched_inputs: with ground truth in "instances".

        Returns:
            The meta-architecture's own loss dictionary.
        """

    @abstractmethod
    def head_features(self) -> set[str]:
        """Names of the levels that the heads use."""

    @abstractmethod
    def head_modules(self) -> list[nn.Module]:
        """The modules behind the features; they return losses only in training mode."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of object classes."""

    def head_of(self, name: str) -> str:
        """The head that a tensor of the model belongs to. A student inherits heads whole or not at all.

        Args:
            name: of a tensor in the model's state_dict, outside the backbone.

        Returns:
            By default the first part of the name.
        """
        return name.partition(".")[0]

    def anchor_generator(self) -> tuple[nn.Module, list[str]] | None:
        """What makes the anchors, and the names of the levels it is called with; None where there are no anchors."""
        return None

    def anchors(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The detector's own anchors at some levels.

        Args:
            features: level name -> N,C,H,W.

        Returns:
            Level name -> H*W*A,4, xyxy in pixels of the padded batch: cell by cell and row by row, A in each cell.

        Raises:
            ValueError: a level has no anchors.
        """
        generator, levels = self.anchor_generator() or (None, [])
        absent = [name for name in features if name not in levels]
        if absent:
            raise ValueError(
                f"GKD.METHOD asks for anchors, but {type(self.model).__name__} has none at {', '.join(absent)}: choose "
                "another method, or other GKD.FEATURES; a split of your own names its anchors by anchor_generator, see "
                "docs/own_detector.md"
            )
        # The generator wants all its levels; of those that are not asked for a single cell will do.
        single = next(iter(features.values())).new_empty((0, 0, 1, 1))
        found = generator([features.get(name, single) for name in levels])
        return {name: boxes.tensor for name, boxes in zip(levels, found) if name in features}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level."""
        return self.model.backbone.output_shape()

    def pooled_features(self) -> set[str]:
        """Names of the levels that are max-pooled copies of another level, as p6 of a Faster R-CNN."""
        backbone = self.model.backbone
        if not (isinstance(backbone, FPN) and isinstance(backbone.top_block, LastLevelMaxPool)):
            return set()
        by_stride = sorted(self.output_shape().items(), key=lambda item: item[1].stride)
        return {name for name, _ in by_stride[-backbone.top_block.num_levels :]}

    def instances(self, batched_inputs: list[dict]) -> list[Instances]:
        """The ground truth of a training batch, on the model's device.

        Raises:
            ValueError: an image has none.
        """
        if any("instances" not in x for x in batched_inputs):
            raise ValueError("a training batch holds an image without 'instances': distillation needs ground truth")
        return [x["instances"].to(self.model.device) for x in batched_inputs]


_SPLITS: dict[type[nn.Module], type[SplitDetector]] = {}


def register_split(meta_architecture: type[nn.Module]) -> Callable[[type[SplitDetector]], type[SplitDetector]]:
    """Class decorator: the decorated split is that of a meta-architecture.

    It also serves classes derived from ``meta_architecture`` that have no split of their own.

    Args:
        meta_architecture: the class of the detectors, as it stands in Detectron2's META_ARCH_REGISTRY.

    Raises:
        TypeError: ``meta_architecture`` is no module class, or the decorated class is no SplitDetector.
        ValueError: ``meta_architecture`` has a split already.
    """
    if not (isinstance(meta_architecture, type) and issubclass(meta_architecture, nn.Module)):
        raise TypeError(
            f"register_split is given {meta_architecture!r}, but must be given the detector's class, as in "
            "`@register_split(RetinaNet)`"
        )

    def register(split: type[SplitDetector]) -> type[SplitDetector]:
        if not (isinstance(split, type) and issubclass(split, SplitDetector)):
            raise TypeError(
                f"the split of {meta_architecture.__name__} is {split!r}, but must derive from SplitDetector"
            )
        if meta_architecture in _SPLITS:
            raise ValueError(f"{meta_architecture.__name__} has a split already: {_SPLITS[meta_architecture].__name__}")
        _SPLITS[meta_architecture] = split
        return split

    return register


@register_split(GeneralizedRCNN)
class SplitGeneralizedRCNN(SplitDetector):
    """Faster, Cascade and Mask R-CNN."""

    def losses(self, images, features, batched_inputs):
        model, instances = self.model, self.instances(batched_inputs)
        if model.proposal_generator is not None:
            proposals, proposal_losses = model.proposal_generator(images, features, instances)
        else:
            proposals = [x["proposals"].to(model.device) for x in batched_inputs]
            proposal_losses = {}
        _, detector_losses = model.roi_heads(images, features, proposals, instances)
        if model.vis_period > 0 and get_event_storage().iter % model.vis_period == 0:
            model.visualize_training(batched_inputs, proposals)
        # The order in which the trainer sums them, as in the detector's own forward.
        return {**detector_losses, **proposal_losses}

    def head_features(self):
        heads = [self.model.roi_heads, self.model.proposal_generator]
        names = ("in_features", "box_in_features", "mask_in_features", "keypoint_in_features")
        return {feature for head in heads for name in names for feature in getattr(head, name, None) or ()}

    def head_modules(self):
        return [m for m in (self.model.proposal_generator, self.model.roi_heads) if m is not None]

    def head_of(self, name):
        # Boxes, masks and keypoints have heads of their own, all of them in one module.
        module, _, rest = name.partition(".")
        if module != "roi_heads":
            return module
        return f"{module}.{next((kind for kind in ('mask', 'keypoint') if rest.startswith(kind)), 'box')}"

    def anchor_generator(self):
        rpn = self.model.proposal_generator
        return (rpn.anchor_generator, rpn.in_features) if hasattr(rpn, "anchor_generator") else None

    @property
    def num_classes(self):
        return self.model.roi_heads.num_classes


@register_split(RetinaNet)
class SplitRetinaNet(SplitDetector):
    """RetinaNet of Detectron2 0.5 and later."""

    running_attributes = ("loss_normalizer",)

    def losses(self, images, features, batched_inputs):
        model, instances = self.model, self.instances(batched_inputs)
        levels = [features[name] for name in model.head_in_features]
        if hasattr(model, "forward_training"):
            return model.forward_training(images, levels, model.head(levels), instances)
        # Detectron2 0.5 has these steps inside its forward only.
        anchors = model.anchor_generator(levels)
        logits, deltas = model.head(levels)
        logits = [permute_to_N_HWA_K(x, model.num_classes) for x in logits]
        deltas = [permute_to_N_HWA_K(x, 4) for x in deltas]
        labels, boxes = model.label_anchors(anchors, instances)
        losses = model.losses(anchors, logits, labels, deltas, boxes)
        if model.vis_period > 0 and get_event_storage().iter % model.vis_period == 0:
            results = model.inference(anchors, logits, deltas, images.image_sizes)
            model.visualize_training(batched_inputs, results)
        return losses

    def head_features(self):
        return set(self.model.head_in_features)

    def head_modules(self):
        return [self.model.head]

    def anchor_generator(self):
        return self.model.anchor_generator, self.model.head_in_features

    @property
    def num_classes(self):
        return self.model.num_classes


def split_detector(model: nn.Module) -> SplitDetector:
    """The split of a built Detectron2 model: that of its class, else of the nearest class it is derived from.

    Args:
        model: a GeneralizedRCNN, a RetinaNet, or what :func:`register_split` was told of.

    Raises:
        ValueError: there is no split for it, or it is derived from a class with a split, but has a forward of its own.
    """
    kind, name = _class_with_split(model), type(model).__name__
    if kind is None:
        raise ValueError(
            f"{name} can't be distilled: known meta-architectures are "
            f"{', '.join(known.__name__ for known in _SPLITS)} and what is derived from them; "
            "gkd_d2.register_split adds one, see docs/own_detector.md"
        )
    if type(model).forward is not kind.forward:
        raise ValueError(
            f"{name} can't be distilled as a {kind.__name__}: it has a forward of its own, whose losses the split of "
            f"{kind.__name__} may not compute; register one for {name} by gkd_d2.register_split, see "
            "docs/own_detector.md"
        )
    return _SPLITS[kind](model)


def _class_with_split(model: nn.Module) -> type[nn.Module] | None:
    """The class of ``model``, or else the nearest one it is derived from, that has a split."""
    return next((kind for kind in type(model).__mro__ if kind in _SPLITS), None)


def running_state(model: nn.Module) -> dict[str, float]:
    """The moving averages that a detector keeps outside its state_dict; nothing for one that is not known."""
    kind = _class_with_split(model)
    names = _SPLITS[kind].running_attributes if kind else ()
    return {name: float(getattr(model, name)) for name in names if hasattr(model, name)}


def load_running_state(model: nn.Module, state: dict[str, float]) -> None:
    """Set what :func:`running_state` returned."""
    for name, value in state.items():
        setattr(model, name, value)


def feature_gradients(
    losses: dict[str, Tensor],
    features: dict[str, Tensor],
    levels: list[str],
    *,
    retain_graph: bool,
    scale: float = 1.0,
) -> list[Tensor]:
    """The gradient of the sum of a detector's losses with respect to the features its heads were given.

    Args:
        losses: a detector's own loss dictionary.
        features: level name -> N,C,H,W, the very tensors that entered :meth:`SplitDetector.losses`.
        levels: names of the levels asked for.
        retain_graph: whether a backward pass through the same graph follows.
        scale: what the sum is multiplied by, so that gradients of half precision do not underflow.

    Returns:
        One tensor N,C,H,W a level, ``scale`` times the gradient.

    Raises:
        RuntimeError: there is no loss, or a level has no part in any.
    """
    gradients = sum_gradients(losses, [features[name] for name in levels], retain_graph=retain_graph, scale=scale)
    check_levels_used(losses, dict(zip(levels, gradients)))
    return list(gradients)


def sum_gradients(
    losses: dict[str, Tensor], inputs: list[Tensor], *, retain_graph: bool, scale: float
) -> tuple[Tensor | None, ...]:
    """``scale`` times the gradient of the sum of a detector's losses with respect to any tensors; None where unused.

    Raises:
        RuntimeError: there is no loss.
    """
    if not losses:
        raise RuntimeError("the detector returned no loss: are its heads in training mode?")
    return torch.autograd.grad(scale * sum(losses.values()), inputs, retain_graph=retain_graph, allow_unused=True)


def check_levels_used(losses: dict[str, Tensor], gradients: dict[str, Tensor | None]) -> None:
    """Refuse levels that have no gradient.

    Args:
        losses: a detector's own loss dictionary.
        gradients: level name -> of their sum.

    Raises:
        RuntimeError: one is None.
    """
    unused = [name for name, gradient in gradients.items() if gradient is None]
    if unused:
        raise RuntimeError(
            f"levels {', '.join(unused)} have no part in the losses {', '.join(losses)}: take them out of GKD.FEATURES"
        )
