"""Whether a detector's images are what the weights of its timm backbone were trained with."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from gkd_d2.modeling.backbone.timm_features import TimmFeatures
from gkd_d2.utils.timm_models import differs_from_pixel_norm, has_default_pixel_norm


def check_timm_images(detector: nn.Module, image_format: str) -> None:
    """Check the colours and the normalisation of a built detector's images; see :func:`check_pixel_norm`.

    A backbone of a config of yacs is given both by the config. In a LazyConfig each is set by itself.

    Args:
        detector: of any backbone.
        image_format: the order of the channels of its images, such as "BGR".

    Raises:
        ValueError: a backbone starts with weights of timm and takes another order, or as :func:`check_pixel_norm`.
    """
    for features in detector.modules():
        if not isinstance(features, TimmFeatures) or not features.starts_with_weights:
            continue
        if features.image_format != image_format:
            raise ValueError(
                f"the detector's images are {image_format}, but its backbone of timm, {features.name}, takes them for "
                f"{features.image_format}: give TimmFeatures image_format={image_format!r}"
            )
        # A meta-architecture of the user's own may keep them elsewhere.
        if hasattr(detector, "pixel_mean") and hasattr(detector, "pixel_std"):
            mean, std = (
                [round(value, 4) for value in values.flatten().tolist()]
                for values in (detector.pixel_mean, detector.pixel_std)
            )
            check_pixel_norm(features, mean, std)


def check_pixel_norm(features: TimmFeatures, mean: Sequence[float], std: Sequence[float]) -> None:
    """Warn where images are not normalised as for the weights that a backbone starts with.

    Args:
        features: the backbone.
        mean: MODEL.PIXEL_MEAN.
        std: MODEL.PIXEL_STD.

    Raises:
        ValueError: they are Detectron2's defaults, which nobody has chosen for it.
    """
    if not features.starts_with_weights:
        return
    difference = differs_from_pixel_norm(features.name, features.image_format, mean, std)
    if not difference:
        return
    if has_default_pixel_norm(mean, std):
        raise ValueError(
            f"MODEL.PIXEL_MEAN and MODEL.PIXEL_STD are Detectron2's defaults: {difference}. Set them to these, as "
            "gkd_d2.config.read_config does by itself"
        )
    logging.getLogger(__name__).warning(
        "The images are not normalised as for the weights that the backbone starts with: %s. Unless that is meant, set "
        "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD to these values",
        difference,
    )
