"""FCOS with ResNet-50 under one with ResNet-101 on KITTI; Detectron2 0.5 has no FCOS."""

from pathlib import Path

from gkd_d2.lazy import distil

from .common.fcos import model as student
from .common.kitti import dataloader, lr_multiplier, optimizer, train

model = distil(
    student,
    teacher=str(Path(__file__).with_name("teachers") / "fcos_kitti.py"),
    teacher_weights="output/lazy/teachers/fcos_kitti/model_final.pth",
    init_from_teacher=True,
)
# As Detectron2's FCOS at this batch size.
optimizer.lr = 0.01
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/lazy/gkd_fcos_kitti"
