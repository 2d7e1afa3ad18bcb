"""What a config says of a plain detector, whatever form the config has, before the detector is built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from torch import nn

from gkd_d2.utils.registries import architecture_class, build_detector, find_unregistered

# Head that learns from more than boxes -> its ground truth.
EXTRA_HEADS = {"mask": "masks", "keypoint": "keypoints"}
# Meta-architecture -> the node of MODEL that holds its NUM_CLASSES, and that of what derives from it.
_CLASS_NODES = {GeneralizedRCNN: "ROI_HEADS", RetinaNet: "RETINANET"}


class DetectorSpec(ABC):
    """A plain detector that a config describes.

    Attributes:
        file: the config file; empty where the detector is the one that a run trains.
        train_sets: names of the datasets that it is or was trained on, as far as the config names them.
        image_format: order of the channels of the images that it is given, such as "BGR".
    """

    file: str
    train_sets: tuple[str, ...]
    image_format: str

    @property
    @abstractmethod
    def classes(self) -> tuple[str, int] | None:
        """The setting that holds the number of classes, and the number; None where only the built detector tells."""

    @property
    @abstractmethod
    def heads(self) -> set[str]:
        """Those of EXTRA_HEADS that it has."""

    def heads_beyond(self, heads: set[str]) -> list[str]:
        """Those of EXTRA_HEADS that it has and ``heads`` does not hold."""
        return [head for head in EXTRA_HEADS if head in self.heads - heads]

    @property
    def _of_file(self) -> str:
        """Where it is described, as the end of a sentence's subject; empty for the detector that a run trains."""
        return f" of {self.file}" if self.file else ""

    @abstractmethod
    def without(self, heads: Sequence[str]) -> DetectorSpec:
        """The same detector without some of EXTRA_HEADS."""

    @abstractmethod
    def problems(self) -> list[str]:
        """A sentence for each name in the config that stands for nothing."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Build it, with random weights.

        Raises:
            ValueError: the config describes nothing that can be built.
        """

    @abstractmethod
    def dump(self) -> str:
        """The config as YAML of plain values, in which two descriptions can be compared."""


class YacsSpec(DetectorSpec):
    """A detector of a config of yacs, Detectron2's ``.yaml``.

    Args:
        cfg: of a plain detector, from :func:`gkd_d2.config.detector_config`.
        architecture_key: the key that the user sets its meta-architecture by.
        file: see :class:`DetectorSpec`.
    """

    def __init__(self, cfg: CfgNode, architecture_key: str = "MODEL.META_ARCHITECTURE", file: str = ""):
        self.cfg = cfg
        self.file = file
        self.train_sets = tuple(cfg.DATASETS.TRAIN)
        self.image_format = cfg.INPUT.FORMAT
        self._architecture_key = architecture_key

    @property
    def classes(self):
        kind = architecture_class(self.cfg.MODEL.META_ARCHITECTURE)
        node = next((node for base, node in _CLASS_NODES.items() if kind and issubclass(kind, base)), None)
        if node is None:
            return None
        return f"MODEL.{node}.NUM_CLASSES{self._of_file}", self.cfg.MODEL[node].NUM_CLASSES

    @property
    def heads(self):
        return {head for head in EXTRA_HEADS if self.cfg.MODEL[f"{head.upper()}_ON"]}

    def without(self, heads):
        cfg = self.cfg.clone()
        cfg.defrost()
        for head in heads:
            cfg.MODEL[f"{head.upper()}_ON"] = False
        cfg.freeze()
        return YacsSpec(cfg, self._architecture_key, self.file)

    def with_proposals(self, number: int) -> YacsSpec:
        """The same detector, whose ROI heads sample so many proposals an image in training; 0: as many as they did.

        Raises:
            ValueError: ``number`` is negative, or there are no ROI heads.
        """
        if number < 0:
            raise ValueError(f"GKD.TEACHER.ROI_BATCH_SIZE is {number}, but must be >= 0")
        if number and self.cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
            raise ValueError(
                f"GKD.TEACHER.ROI_BATCH_SIZE is {number}, but {self.file} describes a RetinaNet, which samples no "
                "proposals: leave it at 0"
            )
        if not number:
            return self
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = number
        cfg.freeze()
        return YacsSpec(cfg, self._architecture_key, self.file)

    def problems(self):
        return find_unregistered(self.cfg, self._architecture_key, self._of_file)

    def build(self):
        return build_detector(self.cfg, self._architecture_key, self._of_file)

    def dump(self):
        return self.cfg.dump()
