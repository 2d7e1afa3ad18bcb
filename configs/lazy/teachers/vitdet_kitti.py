"""Faster R-CNN with ViTDet-B on KITTI: the teacher of gkd_frcnn_vitdet_kitti.py; Detectron2 0.5 has no ViT."""

from functools import partial

from detectron2 import model_zoo
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate

from ..common.kitti import dataloader, teacher_max_iter, train
from ..common.kitti import teacher_lr_multiplier as lr_multiplier

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
for name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(name)
model.roi_heads.num_classes = 3
# It trains on squares that hold KITTI's 375 x 1242. A student need not: gkd_frcnn_vitdet_kitti.py sets this to 0.
model.backbone.square_pad = 1248
dataloader.train.mapper.image_format = "RGB"

# As Detectron2's ViTDet-B.
optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.7)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
train.init_checkpoint = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
train.clip_gradients.enabled = False
train.max_iter = teacher_max_iter
train.output_dir = "output/lazy/teachers/vitdet_kitti"
