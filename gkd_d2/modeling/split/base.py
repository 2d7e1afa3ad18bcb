"""A detector as two calls: features from images, losses from given features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from gkd_d2.methods.predictions import BoxPredictions, Predictions
from gkd_d2.modeling.split.padding import Padding, pad, padding_of, square_of


class SplitDetector(ABC):
    """A detector as two calls, with what distillation must know about it. It owns no state.

    Attributes:
        model: the Detectron2 meta-architecture.
        running_attributes: names of numbers that ``model`` holds outside its state_dict and its losses update.
        two_stage: whether a box head predicts for regions that the cells propose.
    """

    running_attributes: tuple[str, ...] = ()
    two_stage: bool = False

    def __init__(self, model: nn.Module):
        self.model = model

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise and pad the images as the detector itself does.

        Args:
            batched_inputs: as for Detectron2's meta-architectures.

        Raises:
            ValueError: an image does not fit into the square to which the backbone has its batches padded.
        """
        square = square_of(self.model.backbone)
        for image in batched_inputs if square else ():
            height, width = image["image"].shape[-2:]
            if max(height, width) > square:
                raise ValueError(
                    f"an image of {height} x {width} pixels does not fit into the square of {square} to which the "
                    f"backbone of {type(self.model).__name__} has its batches padded: resize or crop the images to at "
                    f"most {square} (INPUT.MAX_SIZE_TRAIN in a yacs config), or set the backbone's square_pad to 0"
                )
        return self.model.preprocess_image(batched_inputs)

    def features(
        self, batched_inputs: list[dict], size: tuple[int, int] | None = None
    ) -> tuple[ImageList, dict[str, Tensor]]:
        """Normalise and pad the images, and run the backbone.

        Args:
            batched_inputs: as for Detectron2's meta-architectures.
            size: (height, width) in pixels to which the batch is padded beyond what the detector itself pads to, for
                another network to see as many cells; None: as the detector pads.

        Returns:
            The padded batch and the backbone's features, level name -> N,C,H,W.
        """
        images = self.preprocess(batched_inputs)
        if size is not None:
            images = pad(images, size)
        return images, self.model.backbone(images.tensor)

    def padding(self) -> Padding:
        """How the backbone wants its batches padded."""
        return padding_of(self.model.backbone, self.output_shape())

    @abstractmethod
    def losses(self, images: ImageList, features: dict[str, Tensor], batched_inputs: list[dict]) -> dict[str, Tensor]:
        """The detection losses of given features.

        Args:
            images: from :meth:`features`.
            features: level name -> N,C,H,W.
            batched_inputs: with ground truth in "instances".

        Returns:
            The meta-architecture's own loss dictionary.
        """

    @abstractmethod
    def head_features(self) -> set[str]:
        """Names of the levels that the heads use."""

    @abstractmethod
    def head_modules(self) -> list[nn.Module]:
        """The modules behind the features; they return losses only in training mode."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of object classes."""

    def head_of(self, name: str) -> str:
        """The head that a tensor of the model belongs to. A student inherits heads whole or not at all.

        Args:
            name: of a tensor in the model's state_dict, outside the backbone.

        Returns:
            By default the first part of the name.
        """
        return name.partition(".")[0]

    def predicts_classes(self, head: str) -> bool:
        """Whether what a head predicts depends on the classes and on their order.

        Args:
            head: as :meth:`head_of` calls it.

        Returns:
            By default True, with which no head is inherited from a teacher of other classes.
        """
        return True

    def anchor_generator(self) -> tuple[nn.Module, list[str]] | None:
        """What makes the anchors, and the names of the levels it is called with; None where there are no anchors."""
        return None

    def anchors(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The detector's own anchors at some levels.

        Args:
            features: level name -> N,C,H,W.

        Returns:
            Level name -> H,W,A,4, xyxy in pixels of the padded batch: A anchors in each cell.

        Raises:
            ValueError: a level has no anchors.
        """
        generator, levels = self.anchor_generator() or (None, [])
        absent = [name for name in features if name not in levels]
        if absent:
            raise ValueError(
                f"GKD.METHOD asks for anchors, but {type(self.model).__name__} has none at {', '.join(absent)}: choose "
                "another method, or other GKD.FEATURES; a split of your own names its anchors by anchor_generator, see "
                "docs/own_detector.md"
            )
        # The generator wants all its levels; of those that are not asked for a single cell will do.
        single = next(iter(features.values())).new_empty((0, 0, 1, 1))
        found = generator([features.get(name, single) for name in levels])
        return {
            name: boxes.tensor.view(*features[name].shape[2:], -1, 4)
            for name, boxes in zip(levels, found)
            if name in features
        }

    def score_maps(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """How sure the heads are, cell by cell, that there is an object.

        Args:
            features: level name -> N,C,H,W, of all levels that the heads use.

        Returns:
            Level name -> N,H,W, probabilities, for the levels whose cells the heads score. By default there are none.
        """
        return {}

    def check_predictions(self) -> None:
        """Refuse a detector whose predictions can't be compared with another's. By default all are refused.

        Raises:
            ValueError: :meth:`cell_predictions` and the methods below are not implemented for it.
        """
        raise ValueError(f"the split of {type(self.model).__name__} does not implement predictions")

    def cell_predictions(
        self, features: Mapping[str, Tensor], classes: Sequence[int] | None = None
    ) -> dict[str, BoxPredictions]:
        """What the heads predict for the anchors at all cells.

        Args:
            features: level name -> N,C,H,W, of all levels that the heads use.
            classes: numbers of the classes to keep, in this order; None: all.

        Returns:
            Level name -> as :attr:`gkd_d2.methods.Predictions.cells`.
        """
        raise NotImplementedError

    def proposals(self, images: ImageList, cells: Mapping[str, BoxPredictions], number: int) -> list[Tensor]:
        """The best region proposals of each image, of a two-stage detector.

        Args:
            images: from :meth:`features`.
            cells: from :meth:`cell_predictions`.
            number: the most that an image has.

        Returns:
            N tensors K,4, xyxy in pixels of the padded batch, the best first; none where there is one stage alone.
        """
        return []

    def region_predictions(
        self,
        features: Mapping[str, Tensor],
        proposals: Sequence[Tensor],
        classes: Sequence[int] | None = None,
    ) -> dict[str, BoxPredictions]:
        """What the box head of a two-stage detector predicts for given proposals.

        Args:
            features: level name -> N,C,H,W, of all levels that the heads use.
            proposals: N tensors K,4, xyxy in pixels of the padded batch.
            classes: numbers of the classes to keep, in this order; None: all.

        Returns:
            Level name -> as :attr:`gkd_d2.methods.Predictions.regions`; empty where there is one stage alone.
        """
        return {}

    def region_settings(self) -> dict[str, object]:
        """What two detectors must share for their :meth:`region_predictions` to be compared one by one, by its name."""
        return {}

    def predictions(
        self,
        features: Mapping[str, Tensor],
        proposals: Sequence[Tensor] = (),
        classes: Sequence[int] | None = None,
        *,
        cells: Mapping[str, BoxPredictions] | None = None,
    ) -> dict[str, Predictions]:
        """What the heads predict for the anchors at all cells and, in a two-stage detector, for given proposals.

        Args:
            features: level name -> N,C,H,W, of all levels that the heads use.
            proposals: N tensors K,4, xyxy in pixels of the padded batch; empty: the cells' alone.
            classes: numbers of the classes to keep, in this order; None: all.
            cells: from :meth:`cell_predictions` with the same arguments, where they are known.

        Returns:
            Level name -> predictions, for all levels whose cells the heads predict for.
        """
        cells = self.cell_predictions(features, classes) if cells is None else cells
        regions = self.region_predictions(features, proposals, classes) if proposals else {}
        return {name: Predictions(cell, regions.get(name)) for name, cell in cells.items()}

    def cell_norm(self, images: int) -> float:
        """What the detector's own losses divide a sum over all cells of a batch by, in its last training forward.

        Args:
            images: number of the batch.
        """
        raise NotImplementedError

    @property
    def input_format(self) -> str:
        """Of the images, such as "RGB"; where the detector does not hold it, "BGR", which is Detectron2's default."""
        return getattr(self.model, "input_format", None) or "BGR"

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level."""
        return self.model.backbone.output_shape()

    def pooled_features(self) -> set[str]:
        """Names of the levels that are max-pooled copies of another level, as p6 of a Faster R-CNN."""
        # Pyramids of any class, FPN's and that of a ViT, call it so.
        top_block = getattr(self.model.backbone, "top_block", None)
        if not isinstance(top_block, LastLevelMaxPool):
            return set()
        by_stride = sorted(self.output_shape().items(), key=lambda item: item[1].stride)
        return {name for name, _ in by_stride[-top_block.num_levels :]}

    def instances(self, batched_inputs: list[dict]) -> list[Instances]:
        """The ground truth of a training batch, on the model's device.

        Raises:
            ValueError: an image has none.
        """
        if any("instances" not in x for x in batched_inputs):
            raise ValueError("a training batch holds an image without 'instances': distillation needs ground truth")
        return [x["instances"].to(self.model.device) for x in batched_inputs]
