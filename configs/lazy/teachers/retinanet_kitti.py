"""RetinaNet with ResNet-101 on KITTI: the teacher of gkd_retinanet_kitti.py."""

from ..common.kitti import dataloader, optimizer, teacher_max_iter, train
from ..common.kitti import teacher_lr_multiplier as lr_multiplier
from ..common.retinanet import model

model.backbone.bottom_up.stages.depth = 101
# As Detectron2's RetinaNet at this batch size.
optimizer.lr = 0.01
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.max_iter = teacher_max_iter
train.output_dir = "output/lazy/teachers/retinanet_kitti"
