"""How a detector is split at its feature pyramid: features from images, losses from given features.

Each split computes exactly what the detector's own training forward computes, in the same order and with the same
random draws. This is the one place that knows where the supported versions of Detectron2 differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

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
        running_attributes: names of plain attributes of ``model`` that its losses update, outside its state_dict.
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

    def _instances(self, batched_inputs: list[dict]) -> list[Instances]:
        if any("instances" not in x for x in batched_inputs):
            raise ValueError("a training batch holds an image without 'instances': distillation needs ground truth")
        return [x["instances"].to(self.model.device) for x in batched_inputs]


class SplitGeneralizedRCNN(SplitDetector):
    """Faster, Cascade and Mask R-CNN."""

    def losses(self, images, features, batched_inputs):
        model, instances = self.model, self._instances(batched_inputs)
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

    @property
    def num_classes(self):
        return self.model.roi_heads.num_classes


class SplitRetinaNet(SplitDetector):
    """RetinaNet of Detectron2 0.5 and later."""

    running_attributes = ("loss_normalizer",)

    def losses(self, images, features, batched_inputs):
        model, instances = self.model, self._instances(batched_inputs)
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

    @property
    def num_classes(self):
        return self.model.num_classes


_SPLITS = {GeneralizedRCNN: SplitGeneralizedRCNN, RetinaNet: SplitRetinaNet}


def split_detector(model: nn.Module) -> SplitDetector:
    """The split of a built Detectron2 model.

    Args:
        model: a GeneralizedRCNN or a RetinaNet, or of a class derived from one.

    Raises:
        ValueError: it is of another meta-architecture.
    """
    for kind, split in _SPLITS.items():
        if isinstance(model, kind):
            return split(model)
    raise ValueError(
        f"{type(model).__name__} can't be distilled: known meta-architectures are "
        f"{', '.join(kind.__name__ for kind in _SPLITS)} and what is derived from them"
    )


def running_state(model: nn.Module) -> dict[str, float]:
    """The moving averages that a detector keeps outside its state_dict; nothing for one that is not known."""
    names = next((split.running_attributes for kind, split in _SPLITS.items() if isinstance(model, kind)), ())
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
    if not losses:
        raise RuntimeError("the detector returned no loss: are its heads in training mode?")
    inputs = [features[name] for name in levels]
    gradients = torch.autograd.grad(scale * sum(losses.values()), inputs, retain_graph=retain_graph, allow_unused=True)
    unused = [name for name, gradient in zip(levels, gradients) if gradient is None]
    if unused:
        raise RuntimeError(
            f"levels {', '.join(unused)} have no part in the losses {', '.join(losses)}: take them out of GKD.FEATURES"
        )
    return list(gradients)
