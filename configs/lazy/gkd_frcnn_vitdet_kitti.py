"""Faster R-CNN with ResNet-50 under one with ViTDet-B on KITTI; Detectron2 0.5 has no ViT.

The heads differ, so that none are inherited.
"""

from pathlib import Path

from gkd_d2.lazy import distil

from .common.frcnn import model as student
from .common.kitti import dataloader, lr_multiplier, optimizer, train

model = distil(
    student,
    teacher=str(Path(__file__).with_name("teachers") / "vitdet_kitti.py"),
    teacher_weights="output/lazy/teachers/vitdet_kitti/model_final.pth",
    # On squares of 1248 pixels the student would compute 3.25 times the pixels.
    teacher_opts=["model.backbone.square_pad=0"],
)
optimizer.lr = 0.02
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.clip_gradients.enabled = False
train.output_dir = "output/lazy/gkd_frcnn_vitdet_kitti"
