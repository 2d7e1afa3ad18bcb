"""Tiny LazyConfigs: their text, and the files of a distilled student and its teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import calm

from gkd_d2.config.lazy_spec import load_lazy_spec

# A ResNet of one block a stage.
_BACKBONE = """\
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock

def resnet(width, out_features):
    stages = [
        L(ResNet.make_stage)(
            block_class=BasicBlock, num_blocks=1, stride_per_block=[1 if number == 0 else 2], norm="BN",
            in_channels=width * 2**number, out_channels=width * 2 ** (number + 1),
        )
        for number in range(4)
    ]
    stem = L(BasicStem)(in_channels=3, out_channels=width, norm="BN")
    return L(ResNet)(stem=stem, stages=stages, out_features=out_features, freeze_at=0)
"""

_RETINANET = """\
from detectron2 import model_zoo
from detectron2.modeling.backbone.fpn import LastLevelP6P7

model = model_zoo.get_config("common/models/retinanet.py").model
model.num_classes = 3
model.backbone.bottom_up = resnet({width}, ["res3", "res4", "res5"])
model.backbone.out_channels = {channels}
model.backbone.top_block.in_channels = 16 * {width}
model.backbone.top_block.in_feature = "res5"
model.head.input_shape = [ShapeSpec(channels={channels})] * len(model.head.input_shape)
model.head.conv_dims = [{channels}]
model.pixel_std = [57.375, 57.12, 58.395]
"""

_RCNN = """\
from detectron2 import model_zoo

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up = resnet({width}, ["res2", "res3", "res4", "res5"])
model.backbone.out_channels = {channels}
model.proposal_generator.head.in_channels = {channels}
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.roi_heads.num_classes = 3
model.roi_heads.batch_size_per_image = 16
model.roi_heads.box_head.input_shape = ShapeSpec(channels={channels}, height=7, width=7)
model.roi_heads.box_head.fc_dims = [32]
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=32)
model.roi_heads.mask_head.input_shape = ShapeSpec(channels={channels}, width=14, height=14)
model.roi_heads.mask_head.conv_dims = [8, 8]
model.pixel_std = [57.375, 57.12, 58.395]
"""

# Mask R-CNN with a ViT, of Detectron2 after 0.5: it takes RGB.
_VIT = """\
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
net = model.backbone.net
net.img_size, net.embed_dim, net.depth, net.num_heads, net.drop_path_rate = 64, {width}, 2, 2, 0.0
net.window_size, net.window_block_indexes = 2, [0]
model.backbone.square_pad = 0
model.backbone.out_channels = {channels}
model.proposal_generator.head.in_channels = {channels}
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.roi_heads.num_classes = 3
model.roi_heads.batch_size_per_image = 16
model.roi_heads.box_head.input_shape = ShapeSpec(channels={channels}, height=7, width=7)
model.roi_heads.box_head.conv_dims = [8]
model.roi_heads.box_head.fc_dims = [32]
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=32)
model.roi_heads.mask_head.input_shape = ShapeSpec(channels={channels}, width=14, height=14)
model.roi_heads.mask_head.conv_dims = [8, 8]
"""

_WITHOUT_MASKS = """\
for name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(name)
"""

_RUN = """\
import detectron2.data.transforms as T
from detectron2.data import (
    DatasetMapper, build_detection_test_loader, build_detection_train_loader, get_detection_dataset_dicts,
)
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from gkd_d2.evaluation import build_evaluator

resize = dict(short_edge_length=64, max_size=160)
dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="toy_kitti_train"),
        mapper=L(DatasetMapper)(
            is_train=True,
            augmentations=[L(T.ResizeShortestEdge)(**resize), L(T.RandomFlip)(horizontal=True)],
            image_format="BGR",
        ),
        total_batch_size=2,
        num_workers=0,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="toy_kitti_val", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(**resize)],
            image_format="${...train.mapper.image_format}",
        ),
        num_workers=0,
    ),
    evaluator=L(build_evaluator)(
        dataset_name="${..test.dataset.names}", folder="${train.output_dir}/inference", kitti_results=False,
        voc_strict=False,
    ),
)
optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = 0.001
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[4], num_updates=6),
    warmup_length=0.5,
    warmup_factor=0.1,
)
train = model_zoo.get_config("common/train.py").train
train.update(
    output_dir="OUTPUT", init_checkpoint="", device="cpu", max_iter=6, eval_period=0, seed=3, watch=dict(period=2)
)
"""

_DISTILLED = """\
from gkd_d2.lazy import distil

model = distil(model, teacher="TEACHER.py", teacher_weights="TEACHER.pth"{options})
"""


def model_text(kind: str, *, width: int = 8, channels: int = 16) -> str:
    """A config that holds a ``model`` alone: "retinanet", "faster", "mask" or "vit"."""
    if kind == "vit":
        return _VIT.format(width=width, channels=channels)
    text = _RETINANET if kind == "retinanet" else _RCNN
    return _BACKBONE + text.format(width=width, channels=channels) + (_WITHOUT_MASKS if kind == "faster" else "")


def write_teacher(folder: Path, kind: str = "retinanet", name: str = "teacher") -> Path:
    """A teacher's config, next to which ``name``.pth holds random weights."""
    path = folder / f"{name}.py"
    run = _RUN.replace('image_format="BGR"', 'image_format="RGB"') if kind == "vit" else _RUN
    path.write_text(model_text(kind, width=16) + run)
    torch.manual_seed(100)
    torch.save({"model": calm(load_lazy_spec(str(path)).build()).state_dict()}, path.with_suffix(".pth"))
    return path


def write_plain(folder: Path, kind: str = "retinanet", name: str = "plain") -> Path:
    """The config of a training of a detector alone."""
    path = folder / f"{name}.py"
    path.write_text(model_text(kind) + _RUN.replace("OUTPUT", str(folder / name)))
    return path


def write_distilled(
    folder: Path, kind: str = "retinanet", *, teacher: str | None = None, options: str = "", name: str = "distilled"
) -> Path:
    """The config of a distilled training, with its teacher; ``options`` are further arguments of ``distil``."""
    source = write_teacher(folder, teacher or kind)
    path = write_plain(folder, kind, name)
    text = _DISTILLED.format(options=options and f", {options}").replace("TEACHER", str(source.with_suffix("")))
    path.write_text(path.read_text() + text)
    return path
