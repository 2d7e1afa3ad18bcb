"""RetinaNet with ResNet-50 under one with ResNet-101 on KITTI; as configs/gkd_retinanet_kitti.yaml."""

from pathlib import Path

from gkd_d2.lazy import distil

from .common.kitti import dataloader, lr_multiplier, optimizer, train
from .common.retinanet import model as student

model = distil(
    student,
    teacher=str(Path(__file__).with_name("teachers") / "retinanet_kitti.py"),
    teacher_weights="output/lazy/teachers/retinanet_kitti/model_final.pth",
    init_from_teacher=True,
)
# As Detectron2's RetinaNet at this batch size.
optimizer.lr = 0.01
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/lazy/gkd_retinanet_kitti"
