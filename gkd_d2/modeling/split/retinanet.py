"""The split of RetinaNet."""

from __future__ import annotations

from detectron2.modeling import RetinaNet
from detectron2.modeling.meta_arch.retinanet import permute_to_N_HWA_K
from detectron2.utils.events import get_event_storage

from gkd_d2.methods.predictions import BoxPredictions
from gkd_d2.modeling.split.base import SplitDetector
from gkd_d2.modeling.split.registry import register_split


@register_split(RetinaNet)
class SplitRetinaNet(SplitDetector):
    """RetinaNet of Detectron2 0.5 and later."""

    running_attributes = ("loss_normalizer",)

    def losses(self, images, features, batched_inputs):
        model, instances = self.model, self.instances(batched_inputs)
        levels = [features[name] for name in model.head_in_features]
        if hasattr(model, "forward_training"):
            return model.forward_training(images, levels, model.head(levels), instances)
        # Detectron2 0.5 has these steps inside its forward only.
        anchors = model.anchor_generator(levels)
        logits, deltas = model.head(levels)
        logits = [permute_to_N_HWA_K(x, model.num_classes) for x in logits]
        deltas = [permute_to_N_HWA_K(x, 4) for x in deltas]
        labels, boxes = model.label_anchors(anchors, instances)
        losses = model.losses(anchors, logits, labels, deltas, boxes)
        if model.vis_period > 0 and get_event_storage().iter % model.vis_period == 0:
            results = model.inference(anchors, logits, deltas, images.image_sizes)
            model.visualize_training(batched_inputs, results)
        return losses

    def head_features(self):
        return set(self.model.head_in_features)

    def head_modules(self):
        return [self.model.head]

    def anchor_generator(self):
        return self.model.anchor_generator, self.model.head_in_features

    def score_maps(self, features):
        """The class probability, the largest of a cell's classes and anchors."""
        levels = self.model.head_in_features
        logits, _ = self.model.head([features[name] for name in levels])
        return {name: level.amax(dim=1).sigmoid() for name, level in zip(levels, logits)}

    def check_predictions(self):
        """All are known."""

    def cell_predictions(self, features, classes=None):
        levels = [features[name] for name in self.model.head_in_features]
        # FCOS predicts more than these two.
        logits, deltas = self.model.head(levels)[:2]
        found = {}
        for name, anchors, scores, offsets in zip(
            self.model.head_in_features, self.model.anchor_generator(levels), logits, deltas
        ):
            predictions = BoxPredictions(
                logits=permute_to_N_HWA_K(scores, self.num_classes).flatten(0, 1),
                deltas=permute_to_N_HWA_K(offsets, 4).flatten(0, 1),
                boxes=anchors.tensor.repeat(len(scores), 1),
                apply_deltas=self.model.box2box_transform.apply_deltas,
            )
            found[name] = predictions if classes is None else predictions.of_classes(classes)
        return found

    def cell_norm(self, images):
        return float(self.model.loss_normalizer)

    @property
    def num_classes(self):
        return self.model.num_classes
