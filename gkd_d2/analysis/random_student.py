"""A student that does the work of a trained one without its weights."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from gkd_d2.config import architecture_key, detector_architecture
from gkd_d2.modeling.student import build_student


def random_student(cfg: CfgNode, image: Tensor, seed: int) -> nn.Module:
    """Build a student with random weights that detects as much as its config allows.

    Every batch norm gets the mean and variance of its input on ``image``, for the statistics of training, without
    which a deep network overflows. All scores pass the threshold, for random ones say nothing of an object: what is
    left of proposals and detections is cut by non-maximum suppression and the config's limits alone.

    Args:
        cfg: of a distiller or of a plain detector.
        image: C,H,W, on the CPU.
        seed: of the weights.

    Returns:
        The detector on the CPU, in eval mode.

    Raises:
        ValueError: a name in ``cfg`` is not registered, its parts do not fit together, or it detects no objects.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(seed)
    model = build_student(cfg)
    norms = [module for module in model.modules() if getattr(module, "running_var", None) is not None]
    hooks = [norm.register_forward_pre_hook(_measure) for norm in norms]
    with torch.no_grad():
        (found,) = model([{"image": image}])
    for hook in hooks:
        hook.remove()
    if "instances" not in found:
        raise ValueError(
            f"{architecture_key(cfg)} is {detector_architecture(cfg)}, which gives {', '.join(found)}, no instances: "
            "choose a detector of objects, such as GeneralizedRCNN or RetinaNet"
        )
    return model


def _measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    (x,) = inputs
    # One value a channel, as behind a pooling, has no variance.
    if x.numel() > x.shape[1]:
        variance, mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
