"""Faster R-CNN with ResNet-50 for KITTI's three classes."""

from detectron2 import model_zoo

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(name)
model.roi_heads.num_classes = 3
# The layers that Detectron2's own Faster R-CNN configs freeze.
model.backbone.bottom_up.freeze_at = 2
