"""What a LazyConfig asks of a run."""

from __future__ import annotations

from detectron2.config import instantiate
from detectron2.data import build_detection_train_loader
from omegaconf import DictConfig, OmegaConf

from gkd_d2.config import DetectorSpec
from gkd_d2.config.lazy_spec import LazySpec, dump_lazy
from gkd_d2.engine.run import Run, Teacher
from gkd_d2.lazy.distil import build_distiller, teacher_of
from gkd_d2.methods import Method


class LazyRun(Run):
    """A run of a LazyConfig.

    Args:
        cfg: from :func:`gkd_d2.lazy.read.read_lazy`.
    """

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        train = cfg.train
        self.output_dir = train.output_dir
        self.device = train.device
        self.weights = train.init_checkpoint
        self.batch_size = self._loader("train.total_batch_size", 0)
        self.accumulate_steps = train.accumulate_steps
        self.reference_world_size = 0
        self.amp_dtype = train.amp.dtype if train.amp.enabled else ""
        self.train_sets = _names(self._loader("train.dataset.names"))
        self.test_sets = _names(self._loader("test.dataset.names"))
        self.masks = bool(self._loader("train.mapper.use_instance_mask", False))
        self.keypoints = bool(self._loader("train.mapper.use_keypoint", False))
        self.distilled = is_called(cfg.model, build_distiller)

    @property
    def student(self) -> DetectorSpec:
        mapper_format = self._loader("train.mapper.image_format")
        if self.distilled:
            return LazySpec(self.cfg.model.student, "", self.train_sets, self.cfg.model.image_format)
        return LazySpec(self.cfg.model, "", self.train_sets, mapper_format)

    def teacher(self) -> Teacher:
        return Teacher(teacher_of(self.cfg.model), self.cfg.model.teacher_weights, "model.teacher_weights")

    def method(self) -> Method:
        method = instantiate(self.cfg.model.method)
        if not isinstance(method, Method):
            raise TypeError(f"model.method makes {method!r}, but must make a Method")
        return method

    def problems(self) -> list[str]:
        problems = []
        if OmegaConf.select(self.cfg, "train.model_ema.enabled"):
            problems.append("train.model_ema.enabled is True, but averaged weights are not supported: set it to False")
        loader = OmegaConf.select(self.cfg, "dataloader.train")
        if loader is not None and not is_called(loader, build_detection_train_loader):
            problems.append(
                f"dataloader.train calls {loader.get('_target_')}, but a run that can be resumed exactly needs "
                "Detectron2's build_detection_train_loader: use that, with a dataset, mapper and sampler of your own"
            )
        for head, loaded, key in (
            ("mask", self.masks, "use_instance_mask"),
            ("keypoint", self.keypoints, "use_keypoint"),
        ):
            if head in self.student.heads and not loaded:
                problems.append(
                    f"the detector has a {head} head, but dataloader.train.mapper.{key} is False: set it to True, or "
                    "leave the head out"
                )
        mapper_format = self._loader("train.mapper.image_format")
        if mapper_format and mapper_format != (wanted := self.student.image_format):
            problems.append(
                f"dataloader.train.mapper.image_format is {mapper_format}, but the detector takes images in {wanted}: "
                "set both to the same, and pixel_mean and pixel_std with them"
            )
        return problems

    def dump(self) -> str:
        return dump_lazy(self.cfg)

    def without_output(self) -> DictConfig:
        return OmegaConf.create({"train": {**self.cfg.train, "output_dir": None}})

    def _loader(self, path: str, default=None):
        return OmegaConf.select(self.cfg, f"dataloader.{path}", default=default)


def plain_config(cfg: DictConfig) -> DictConfig:
    """The same LazyConfig, whose ``model`` is the student alone where it was distilled; changed in place."""
    if is_called(cfg.model, build_distiller):
        cfg.model = cfg.model.student
    return cfg


def is_called(node: DictConfig, target) -> bool:
    """Whether a node of a LazyConfig calls a function or class."""
    return node.get("_target_") in (target, f"{target.__module__}.{target.__qualname__}")


def _names(value) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())
