"""Tiny detectors from scratch and batches for them."""

from __future__ import annotations

from collections.abc import Container

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, ImageList, Instances, PolygonMasks
from detectron2.utils.events import EventStorage, get_event_storage
from torch.nn import functional as F

from gkd_d2 import GKDDistiller, SplitDetector, add_gkd_config
from gkd_d2.losses import box_context_mask
from gkd_d2.modeling.measure import Measurement

ARCHITECTURES = ("faster", "retinanet")
# In the training set of short real trainings.
TOY_SCENES = 6
# The last layers of the heads.
PREDICTORS = ("cls_score", "bbox_pred", "objectness_logits", "anchor_deltas")
META_ARCHITECTURES = {"retinanet": "RetinaNet", "scorer": "Scorer"}

try:
    import detectron2.export  # noqa: F401

    HAS_EXPORTER = True
except ImportError:
    HAS_EXPORTER = False
needs_exporter = pytest.mark.skipif(not HAS_EXPORTER, reason="this Detectron2's exporter can't be imported")


def detector_config(kind: str, *, channels: int = 16, width: int = 8) -> CfgNode:
    """A tiny detector from scratch, for images of about 100 pixels.

    Args:
        kind: "faster", "cascade", "mask", "retinanet" or "scorer".
        channels: of the feature pyramid.
        width: of the ResNet's bottlenecks.
    """
    cfg = get_cfg()
    add_gkd_config(cfg)
    cfg.SEED = 7
    # All four losses of gkd, of which the defaults leave one out.
    cfg.GKD.LOSS_WEIGHTS.GRADIENT = 2e-3
    cfg.GKD.LOSS_WEIGHTS.BOX = cfg.GKD.LOSS_WEIGHTS.IMAGE = 1e-3
    cfg.GKD.LOSS_WEIGHTS.ATTENTION = 1e-4
    model = cfg.MODEL
    model.DEVICE = "cpu"
    model.WEIGHTS = ""
    model.META_ARCHITECTURE = META_ARCHITECTURES.get(kind, "GeneralizedRCNN")
    model.BACKBONE.FREEZE_AT = 0
    model.PIXEL_STD = [57.375, 57.12, 58.395]
    model.RESNETS.NORM = "BN"
    model.RESNETS.STEM_OUT_CHANNELS = width
    model.RESNETS.WIDTH_PER_GROUP = width
    model.RESNETS.RES2_OUT_CHANNELS = 2 * width
    model.FPN.OUT_CHANNELS = channels
    if kind == "retinanet":
        model.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        model.ANCHOR_GENERATOR.SIZES = [[size] for size in (16, 32, 64, 128, 256)]
        model.RETINANET.NUM_CLASSES = 3
        model.RETINANET.NUM_CONVS = 1
        return cfg
    model.BACKBONE.NAME = "build_resnet_fpn_backbone"
    model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    model.ANCHOR_GENERATOR.SIZES = [[size] for size in (8, 16, 32, 64, 128)]
    model.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TRAIN = 50
    model.RPN.PRE_NMS_TOPK_TEST = model.RPN.POST_NMS_TOPK_TEST = 20
    model.ROI_HEADS.NAME = "CascadeROIHeads" if kind == "cascade" else "StandardROIHeads"
    model.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    model.ROI_HEADS.NUM_CLASSES = 3
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    model.ROI_BOX_HEAD.NUM_FC = 1
    model.ROI_BOX_HEAD.FC_DIM = 32
    model.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    model.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = kind == "cascade"
    model.MASK_ON = kind == "mask"
    model.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    model.ROI_MASK_HEAD.CONV_DIM = 8
    model.ROI_MASK_HEAD.NUM_CONV = 1
    return cfg


def calm(model: torch.nn.Module) -> torch.nn.Module:
    """Start a random ResNet with identity blocks, so that its features stay moderate without running statistics."""
    for name, parameter in model.state_dict().items():
        if name.endswith("conv3.norm.weight"):
            parameter.zero_()
    return model


def with_sure_teacher(cfg: CfgNode, factor: float = 30.0) -> CfgNode:
    """A distiller's config after its teacher's last layers are scaled: random ones predict much the same everywhere."""
    state = torch.load(cfg.GKD.TEACHER.WEIGHTS)["model"]
    for name, tensor in state.items():
        if name.endswith(tuple(f"{predictor}.weight" for predictor in PREDICTORS)):
            tensor *= factor
    torch.save({"model": state}, cfg.GKD.TEACHER.WEIGHTS)
    return cfg


def train(
    model: torch.nn.Module, cfg: CfgNode, batch: list[dict], steps: int, learned: Container[str] | None = None
) -> list[dict[str, float]]:
    """Plain training, of all losses or of those ``learned``; returns the loss dictionaries as numbers."""
    model.train()
    optimizer = build_optimizer(cfg, model)
    history = []
    with EventStorage() as storage:
        for _ in range(steps):
            losses = model(batch)
            optimizer.zero_grad()
            sum(value for name, value in losses.items() if learned is None or name in learned).backward()
            optimizer.step()
            storage.step()
            history.append({name: value.item() for name, value in losses.items()})
    return history


class EveryBatch(Measurement):
    """Measures every training batch by itself, as long as it is ``wanted``, unasked."""

    wanted = True

    def due(self):
        self.ask(get_event_storage().iter)
        return self.wanted

    def __call__(self, distiller, seen):
        self._reports.clear()
        super().__call__(distiller, seen)


def watched(distiller: GKDDistiller) -> EveryBatch:
    """Has every training batch measured from now on; the last report is in what is returned."""
    measurement = EveryBatch()
    distiller.listen(measurement)
    return measurement


def training_batch(sizes=((90, 120), (96, 100)), *, masks: bool = False) -> list[dict]:
    """Random images with two boxes each, the last image with none where there are more than two."""
    batch = []
    for index, (height, width) in enumerate(sizes):
        corners = [[8, 20, 50, 70], [60, 10, 95, 80]] if index < 2 else []
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
        instances.gt_classes = torch.tensor([0, 2][: len(corners)], dtype=torch.int64)
        if masks:
            instances.gt_masks = PolygonMasks([[[x0, y0, x1, y0, x1, y1]] for x0, y0, x1, y1 in corners])
        image = torch.randint(0, 255, (3, height, width)).float()
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def make_fcos(channels: int = 16) -> torch.nn.Module:
    """A tiny FCOS on the backbone of the tiny RetinaNet, of Detectron2 after 0.5."""
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

    cfg = detector_config("retinanet", channels=channels)
    backbone = build_backbone(cfg)
    head = FCOSHead(input_shape=list(backbone.output_shape().values()), num_classes=3, conv_dims=[channels])
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    return calm(FCOS(backbone=backbone, head=head, num_classes=3, pixel_mean=mean, pixel_std=std))


@META_ARCH_REGISTRY.register()
class Scorer(torch.nn.Module):
    """A meta-architecture that gkd_d2 has no split for: it scores whether a cell lies near an object.

    Half of the cells, drawn at random, enter its loss, divided by a moving average.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.levels = ["p3", "p4"]
        self.head = torch.nn.Conv2d(cfg.MODEL.FPN.OUT_CHANNELS, 1, kernel_size=1)
        self.average = 100.0

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        images = [x["image"].to(self.device) / 255 for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor]:
        images = self.preprocess_image(batched_inputs)
        instances = [x["instances"].to(self.device) for x in batched_inputs]
        return self.losses(images, self.backbone(images.tensor), instances)

    def losses(self, images, features, instances) -> dict[str, torch.Tensor]:
        losses = {}
        for level in self.levels:
            scores = self.head(features[level])[:, 0]
            size = tuple(images.tensor.shape[2:])
            mask = box_context_mask([x.gt_boxes.tensor for x in instances], size, tuple(scores.shape[1:]))
            drawn = torch.rand_like(scores) < 0.5
            self.average = 0.9 * self.average + 0.1 * drawn.sum().item()
            loss = F.binary_cross_entropy_with_logits(scores, (mask > 0).to(scores), reduction="none")
            losses[f"loss_{level}"] = loss[drawn].sum() / self.average
        return losses


class SplitScorer(SplitDetector):
    """The split of :class:`Scorer`, which a test registers."""

    running_attributes = ("average",)

    def losses(self, images, features, batched_inputs):
        return self.model.losses(images, features, self.instances(batched_inputs))

    def head_features(self):
        return set(self.model.levels)

    def head_modules(self):
        return [self.model.head]

    @property
    def num_classes(self):
        return 1
