"""FCOS with ResNet-50 for KITTI's three classes; Detectron2 0.5 has no FCOS."""

from detectron2 import model_zoo

model = model_zoo.get_config("common/models/fcos.py").model
model.num_classes = 3
model.backbone.bottom_up.freeze_at = 2
