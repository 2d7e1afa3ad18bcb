"""The split of two-stage detectors."""

from __future__ import annotations

from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import get_event_storage

from gkd_d2.modeling.split.base import SplitDetector
from gkd_d2.modeling.split.registry import register_split


@register_split(GeneralizedRCNN)
class SplitGeneralizedRCNN(SplitDetector):
    """Faster, Cascade and Mask R-CNN."""

    def losses(self, images, features, batched_inputs):
        model, instances = self.model, self.instances(batched_inputs)
        if model.proposal_generator is not None:
            proposals, proposal_losses = model.proposal_generator(images, features, instances)
        else:
            proposals = [x["proposals"].to(model.device) for x in batched_inputs]
            proposal_losses = {}
        _, detector_losses = model.roi_heads(images, features, proposals, instances)
        if model.vis_period > 0 and get_event_storage().iter % model.vis_period == 0:
            model.visualize_training(batched_inputs, proposals)
        # The order in which the trainer sums them, as in the detector's own forward.
        return {**detector_losses, **proposal_losses}

    def head_features(self):
        heads = [self.model.roi_heads, self.model.proposal_generator]
        names = ("in_features", "box_in_features", "mask_in_features", "keypoint_in_features")
        return {feature for head in heads for name in names for feature in getattr(head, name, None) or ()}

    def head_modules(self):
        return [m for m in (self.model.proposal_generator, self.model.roi_heads) if m is not None]

    def head_of(self, name):
        # Boxes, masks and keypoints have heads of their own, all of them in one module.
        module, _, rest = name.partition(".")
        if module != "roi_heads":
            return module
        return f"{module}.{next((kind for kind in ('mask', 'keypoint') if rest.startswith(kind)), 'box')}"

    def predicts_classes(self, head):
        # An RPN tells objects from background, and keypoints are of one class.
        return head not in ("proposal_generator", "roi_heads.keypoint")

    def anchor_generator(self):
        rpn = self.model.proposal_generator
        return (rpn.anchor_generator, rpn.in_features) if hasattr(rpn, "anchor_generator") else None

    def score_maps(self, features):
        """The RPN's objectness, the largest of a cell's anchors; the ROI heads score regions, not cells."""
        rpn = self.model.proposal_generator
        if not hasattr(rpn, "rpn_head"):
            return {}
        logits, _ = rpn.rpn_head([features[name] for name in rpn.in_features])
        return {name: level.amax(dim=1).sigmoid() for name, level in zip(rpn.in_features, logits)}

    @property
    def num_classes(self):
        return self.model.roi_heads.num_classes
