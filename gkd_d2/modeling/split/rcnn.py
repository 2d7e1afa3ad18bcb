"""The split of two-stage detectors."""

from __future__ import annotations

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage

from gkd_d2.methods.predictions import BoxPredictions
from gkd_d2.modeling.split.base import SplitDetector
from gkd_d2.modeling.split.registry import register_split


@register_split(GeneralizedRCNN)
class SplitGeneralizedRCNN(SplitDetector):
    """Faster, Cascade and Mask R-CNN."""

    two_stage = True

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

    def check_predictions(self):
        rpn, heads = self.model.proposal_generator, self.model.roi_heads
        if not isinstance(rpn, RPN) or rpn.anchor_generator.box_dim != 4:
            raise ValueError(f"the proposal generator is {type(rpn).__name__}, which is no RPN of upright boxes")
        # Those of a cascade depend on the boxes of the stage before.
        own = getattr(type(heads), "_forward_box", None)
        if own is not StandardROIHeads._forward_box:
            raise ValueError(f"the ROI heads are {type(heads).__name__}, which predict otherwise than StandardROIHeads")

    def cell_predictions(self, features, classes=None):
        """The RPN's, whose one class is any object."""
        rpn = self.model.proposal_generator
        levels = [features[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(levels)
        return {
            name: BoxPredictions(
                logits=scores.permute(0, 2, 3, 1).reshape(-1, 1),
                deltas=offsets.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(-1, 4),
                boxes=anchors.tensor.repeat(len(scores), 1),
                apply_deltas=rpn.box2box_transform.apply_deltas,
            )
            for name, anchors, scores, offsets in zip(rpn.in_features, rpn.anchor_generator(levels), logits, deltas)
        }

    @torch.no_grad()
    def proposals(self, images, cells, number):
        if not number:
            return []
        rpn, count = self.model.proposal_generator, len(images)
        levels = [cells[name] for name in rpn.in_features]
        found = rpn.predict_proposals(
            [Boxes(level.boxes[: len(level.boxes) // count]) for level in levels],
            [level.logits.view(count, -1) for level in levels],
            [level.deltas.view(count, -1, 4) for level in levels],
            images.image_sizes,
        )
        return [proposals.proposal_boxes.tensor[:number] for proposals in found]

    def region_predictions(self, features, proposals, classes=None):
        heads = self.model.roi_heads
        boxes = [Boxes(tensor) for tensor in proposals]
        pooled = heads.box_pooler([features[name] for name in heads.box_in_features], boxes)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        softmax = self._has_softmax()
        whole = BoxPredictions(
            # Sigmoids have no use for the last column, the background.
            logits=logits if softmax else logits[:, :-1],
            deltas=deltas,
            boxes=torch.cat(list(proposals)),
            apply_deltas=heads.box_predictor.box2box_transform.apply_deltas,
            softmax=softmax,
        )
        if classes is not None:
            whole = whole.of_classes(classes)
        pooler = heads.box_pooler
        places = assign_boxes_to_levels(
            boxes, pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
        )
        return {name: whole.rows(places == index) for index, name in enumerate(heads.box_in_features)}

    def region_settings(self):
        heads, strides = self.model.roi_heads, self.output_shape()
        return {
            "the strides of the levels that regions are pooled from (MODEL.ROI_HEADS.IN_FEATURES)": [
                strides[name].stride for name in heads.box_in_features
            ],
            "the size of a region that is pooled from the level of a number": (
                heads.box_pooler.canonical_box_size,
                heads.box_pooler.canonical_level,
            ),
            "the probability of a class": "a softmax" if self._has_softmax() else "a sigmoid (USE_SIGMOID_CE)",
        }

    def _has_softmax(self) -> bool:
        """Whether the classes of the box head share a softmax; Detectron2 after 0.5 may give each a sigmoid."""
        return not getattr(self.model.roi_heads.box_predictor, "use_sigmoid_ce", False)

    def cell_norm(self, images):
        return float(self.model.proposal_generator.batch_size_per_image * images)

    @property
    def num_classes(self):
        return self.model.roi_heads.num_classes
