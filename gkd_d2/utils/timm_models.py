"""What timm says of a model before it is built: whether it exists, and how its images are normalised."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from types import ModuleType

from detectron2.config import CfgNode, get_cfg

from gkd_d2.utils.text import did_you_mean

# MODEL.BACKBONE.NAME of backbones of timm: of R-CNNs and of RetinaNet.
TIMM_BACKBONES = ("build_timm_fpn_backbone", "build_retinanet_timm_fpn_backbone")
NORMS = ("FrozenBN", "BN", "SyncBN")
COLOUR_FORMATS = ("RGB", "BGR")


def has_timm_backbone(cfg: CfgNode) -> bool:
    """Whether MODEL.BACKBONE.NAME of a config is one of timm's."""
    return cfg.MODEL.BACKBONE.NAME in TIMM_BACKBONES


def import_timm() -> ModuleType:
    """Import timm, which takes seconds, and which only its own backbones need.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how it is.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ModuleNotFoundError(
            "backbones of timm need the package timm, which is not installed here: in gkd_d2's source folder run "
            "`pip install -e .[timm]`, or `pip install timm`",
            name="timm",
        ) from None
    return timm


def name_problem(name: str) -> str:
    """Why a name is not that of a model of timm, as the end of a sentence; empty where it is one.

    Args:
        name: with or without a tag, as "mobilenetv2_100" or "mobilenetv2_100.ra_in1k".
    """
    timm = import_timm()
    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture):
        tags = timm.models.get_arch_pretrained_cfgs(architecture)
        if not tag or name in tags:
            return ""
        known = sorted(other for other in tags if "." in other)
        return f"{architecture} has no weights of this tag: choose {' or '.join([architecture, *known])}"
    advice = did_you_mean(architecture, timm.list_models()) or "; timm.list_models() lists its models"
    return f"timm {timm.__version__} has no such model{advice}"


def config_problems(cfg: CfgNode, place: str = "") -> list[str]:
    """A sentence for each setting of a backbone of timm that can't be met, as far as the config alone shows.

    Args:
        cfg: of a plain detector whose backbone is timm's.
        place: where the keys are set, as " of teacher.yaml".
    """
    options = cfg.MODEL.get("TIMM")
    builder = cfg.MODEL.BACKBONE.NAME
    if options is None:
        return [f"MODEL.BACKBONE.NAME{place} is {builder}, but there is no MODEL.TIMM: call gkd_d2.add_gkd_config(cfg)"]
    try:
        wrong = name_problem(options.NAME)
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        return [f"MODEL.BACKBONE.NAME{place} is {builder}: {error}"]
    problems = []
    if not options.NAME:
        problems.append(f"MODEL.TIMM.NAME{place} is empty: name a model of timm, such as mobilenetv2_100")
    elif wrong:
        problems.append(f"MODEL.TIMM.NAME{place} is {options.NAME!r}: {wrong}")
    if options.PRETRAINED and options.WEIGHTS:
        problems.append(
            f"MODEL.TIMM.PRETRAINED{place} is True and MODEL.TIMM.WEIGHTS is {options.WEIGHTS}: the network can start "
            "with one of them only"
        )
    features = list(cfg.MODEL.FPN.IN_FEATURES)
    # What is named otherwise, or missing, is said where it is built.
    levels = [int(feature[3:]) for feature in features if re.fullmatch("res[1-9]", feature)]
    if levels and levels != [*range(levels[0], levels[0] + len(levels))]:
        problems.append(
            f"MODEL.FPN.IN_FEATURES{place} is {features}, but in a pyramid each stride is twice the one before: name "
            "neighbours from the finest to the coarsest, such as res3, res4, res5"
        )
    if options.NORM not in NORMS:
        problems.append(f"MODEL.TIMM.NORM{place} is {options.NORM!r}: set it to {' or '.join(NORMS)}")
    if cfg.INPUT.FORMAT not in COLOUR_FORMATS or len(cfg.MODEL.PIXEL_MEAN) != 3:
        problems.append(
            f"INPUT.FORMAT{place} is {cfg.INPUT.FORMAT!r}, with {len(cfg.MODEL.PIXEL_MEAN)} values in "
            f"MODEL.PIXEL_MEAN, but models of timm take three colours: set it to {' or '.join(COLOUR_FORMATS)}"
        )
    return problems


def pixel_norm(name: str, image_format: str) -> tuple[list[float], list[float]]:
    """The mean and the standard deviation by which timm normalises a model's images, on the scale of 0 to 255.

    Args:
        name: of the model; with a tag, those of its weights.
        image_format: the order of the channels, "RGB" or "BGR".
    """
    found = import_timm().models.get_pretrained_cfg(name)
    values = ([round(255 * value, 4) for value in of_channels] for of_channels in (found.mean, found.std))
    mean, std = (of_channels[::-1] if image_format == "BGR" else of_channels for of_channels in values)
    return mean, std


def has_default_pixel_norm(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether PIXEL_MEAN and PIXEL_STD are Detectron2's defaults, which fit no model of timm."""
    defaults = get_cfg().MODEL
    return _close(mean, defaults.PIXEL_MEAN) and _close(std, defaults.PIXEL_STD)


def set_pixel_norm(cfg: CfgNode) -> None:
    """Have images normalised as timm does for the config's backbone, where nothing else was asked for.

    Args:
        cfg: changed in place, where its backbone is timm's and PIXEL_MEAN and PIXEL_STD are Detectron2's defaults. One
            with :func:`config_problems` is left as it is.
    """
    if not has_timm_backbone(cfg) or not has_default_pixel_norm(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD):
        return
    if config_problems(cfg):
        return
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = pixel_norm(cfg.MODEL.TIMM.NAME, cfg.INPUT.FORMAT)


def differs_from_pixel_norm(name: str, image_format: str, mean: Sequence[float], std: Sequence[float]) -> str:
    """How images are normalised, and how timm does it, where the two differ; else an empty text.

    Args:
        name, image_format: as for :func:`pixel_norm`.
        mean: PIXEL_MEAN.
        std: PIXEL_STD.
    """
    wanted = pixel_norm(name, image_format)
    if _close(mean, wanted[0]) and _close(std, wanted[1]):
        return ""
    return (
        f"the config has MODEL.PIXEL_MEAN {list(mean)} and MODEL.PIXEL_STD {list(std)}, but timm's weights of {name} "
        f"were trained with {wanted[0]} and {wanted[1]} ({image_format})"
    )


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(math.isclose(a, b, abs_tol=0.01) for a, b in zip(one, other))
