"""RetinaNet with ResNet-50 for KITTI's three classes."""

from detectron2 import model_zoo

model = model_zoo.get_config("common/models/retinanet.py").model
model.num_classes = 3
# The layers that Detectron2's own RetinaNet configs freeze.
model.backbone.bottom_up.freeze_at = 2
