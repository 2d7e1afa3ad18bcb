"""What a run asks for, whichever kind of config it is read from: what is checked before it and what it trains by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from omegaconf import DictConfig

from gkd_d2.config import (
    DISTILLER,
    DetectorSpec,
    YacsSpec,
    architecture_key,
    detector_architecture,
    detector_config,
    teacher_spec,
    with_absolute_teacher,
)
from gkd_d2.engine.model_ema import EMAOptions
from gkd_d2.methods import Method, build_method
from gkd_d2.modeling.balance import Balance
from gkd_d2.modeling.class_map import student_class_names
from gkd_d2.utils.registries import architecture_class


class Teacher(NamedTuple):
    """The teacher of a run.

    Attributes:
        spec: describes it.
        weights: its checkpoint.
        key: that sets the checkpoint.
        classes: names of all its classes, where they are not the student's; see GKD.TEACHER.CLASSES.
    """

    spec: DetectorSpec
    weights: str
    key: str
    classes: tuple[str, ...]


class Run(ABC):
    """One training or evaluation, as its config asks for it.

    Attributes:
        output_dir: the folder that it writes to.
        device: of the model, such as "cuda".
        weights: that the model starts from; may be empty.
        batch_size: images of all processes in an iteration.
        accumulate_steps: parts that each process computes its share in.
        reference_world_size: number of processes that ``batch_size`` is for; 0: of however many there are.
        amp_dtype: of autocast, "float16" or "bfloat16"; empty: there is none.
        model_ema: of the average of the weights.
        train_sets: names of the datasets for training.
        test_sets: names of the datasets for evaluation.
        own_data: whether it reads data that no name in its config stands for, and that are not looked at before it.
        masks: whether its batches hold masks.
        keypoints: whether they hold keypoints.
        distilled: whether there is a teacher.
    """

    output_dir: str
    device: str
    weights: str
    batch_size: int
    accumulate_steps: int
    reference_world_size: int
    amp_dtype: str
    model_ema: EMAOptions
    train_sets: tuple[str, ...]
    test_sets: tuple[str, ...]
    own_data: bool
    masks: bool
    keypoints: bool
    distilled: bool

    @property
    @abstractmethod
    def student(self) -> DetectorSpec:
        """The detector that is trained or evaluated.

        Raises:
            ValueError: the config names none.
        """

    @abstractmethod
    def teacher(self) -> Teacher:
        """The teacher of a distilled run.

        Raises:
            OSError, ValueError: its config can't be read.
        """

    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the student's classes, to be looked up among those of a teacher of other classes.

        Raises:
            ValueError: they are not known, or the training sets differ in them.
        """

    @abstractmethod
    def method(self) -> Method:
        """The method of a distilled run.

        Raises:
            TypeError, ValueError: there is no such method, or an option is out of range.
        """

    @abstractmethod
    def problems(self) -> list[str]:
        """A sentence for each setting of this kind of config that can't be met."""

    @abstractmethod
    def dump(self) -> str:
        """The whole config as YAML of plain values."""

    def identity(self) -> str:
        """As :meth:`dump`, of paths that do not depend on the working folder."""
        return self.dump()

    @abstractmethod
    def without_output(self) -> CfgNode | DictConfig:
        """The config for Detectron2's ``default_setup``, which is not to write files."""


class YacsRun(Run):
    """A run of a config of yacs, as tools/train_net.py trains it.

    Args:
        cfg: of a distiller or of a plain detector.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg
        self.output_dir = cfg.OUTPUT_DIR
        self.device = cfg.MODEL.DEVICE
        self.weights = cfg.MODEL.WEIGHTS
        self.batch_size = cfg.SOLVER.IMS_PER_BATCH
        self.accumulate_steps = cfg.SOLVER.ACCUMULATE_STEPS
        self.reference_world_size = cfg.SOLVER.REFERENCE_WORLD_SIZE
        self.amp_dtype = cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else ""
        ema = cfg.MODEL_EMA
        self.model_ema = EMAOptions(ema.ENABLED, ema.DECAY, ema.DEVICE, ema.USE_EMA_WEIGHTS_FOR_EVAL_ONLY)
        self.train_sets, self.test_sets = tuple(cfg.DATASETS.TRAIN), tuple(cfg.DATASETS.TEST)
        self.own_data = False
        self.masks, self.keypoints = cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON
        self.distilled = cfg.MODEL.META_ARCHITECTURE == DISTILLER

    @property
    def student(self):
        return YacsSpec(detector_config(self.cfg), architecture_key(self.cfg))

    def teacher(self):
        node = self.cfg.GKD.TEACHER
        return Teacher(teacher_spec(self.cfg), node.WEIGHTS, "GKD.TEACHER.WEIGHTS", tuple(node.CLASSES))

    def class_names(self):
        return student_class_names(self.train_sets)

    def method(self):
        return build_method(self.cfg)

    def problems(self):
        return [*self._calibration_problems(), *self._augmentation_problems()]

    def _calibration_problems(self) -> list[str]:
        if not self.distilled:
            return []
        try:
            Balance({}, self.cfg.GKD.BALANCE_ITERS, self.cfg.GKD.BALANCE_MAX)
        except ValueError as error:
            return [str(error)]
        return []

    def _augmentation_problems(self) -> list[str]:
        cfg, architecture = self.cfg, detector_architecture(self.cfg)
        if not (cfg.TEST.AUG.ENABLED and architecture in META_ARCH_REGISTRY):
            return []
        kind = architecture_class(architecture)
        reason = ""
        if not (kind and issubclass(kind, GeneralizedRCNN)):
            reason = f"a GeneralizedRCNN, which {architecture} is not"
        elif cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
            reason = "detectors without MODEL.KEYPOINT_ON and MODEL.LOAD_PROPOSALS"
        if not reason:
            return []
        return [f"TEST.AUG.ENABLED is True, but Detectron2 augments at test time only {reason}: set it to False"]

    def dump(self):
        return self.cfg.dump()

    def identity(self):
        return with_absolute_teacher(self.cfg).dump()

    def without_output(self):
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = None
        return cfg
