"""What a LazyConfig asks of a run."""

from __future__ import annotations

from detectron2.config import instantiate
from detectron2.data import MetadataCatalog, build_detection_train_loader
from omegaconf import DictConfig, ListConfig, OmegaConf

from gkd_d2.config import DetectorSpec
from gkd_d2.config.lazy_spec import (
    LazySpec,
    dump_lazy,
    is_called,
    missing_arguments,
    plain_model,
    without_lazy_backbone_weights,
)
from gkd_d2.engine.model_ema import EMAOptions
from gkd_d2.engine.run import Run, Teacher
from gkd_d2.lazy.distil import checked_class_names, teacher_of
from gkd_d2.methods import Method, settle_weights
from gkd_d2.modeling.class_map import check_names_of_datasets

_COCO_EVALUATOR = "detectron2.evaluation.coco_evaluation.COCOEvaluator"
_TRAIN_LOADER = f"{build_detection_train_loader.__module__}.{build_detection_train_loader.__qualname__}"


class LazyRun(Run):
    """A run of a LazyConfig.

    Args:
        cfg: from :func:`gkd_d2.lazy.read.read_lazy`.
        eval_only: whether it only evaluates.
    """

    def __init__(self, cfg: DictConfig, *, eval_only: bool = False):
        self.cfg = cfg
        train = cfg.train
        self.output_dir = train.output_dir
        self.device = train.device
        self.weights = train.init_checkpoint
        self.batch_size = self._loader("train.total_batch_size", 0)
        self.accumulate_steps = train.accumulate_steps
        self.reference_world_size = 0
        self.amp_dtype = train.amp.dtype if train.amp.enabled else ""
        ema = train.model_ema
        self.model_ema = EMAOptions(ema.enabled, ema.decay, ema.device, ema.use_ema_weights_for_eval_only)
        self.own_data = self._loader("test.dataset.names" if eval_only else "train.dataset.names") is None
        self.train_sets = _names(self._loader("train.dataset.names"))
        self.test_sets = _names(self._loader("test.dataset.names"))
        self.masks = bool(self._loader("train.mapper.use_instance_mask", False))
        self.keypoints = bool(self._loader("train.mapper.use_keypoint", False))
        self.distilled = is_distilled(cfg)
        self._eval_only = eval_only

    @property
    def student(self) -> DetectorSpec:
        if self.distilled:
            return LazySpec(self.cfg.model.student, "", self.train_sets, self.cfg.model.image_format, "model.student")
        # What takes images in another order than the mapper makes says so by its input_format.
        written = self.cfg.model.get("input_format") or self._loader("train.mapper.image_format")
        return LazySpec(self.cfg.model, "", self.train_sets, written)

    def teacher(self) -> Teacher:
        weights = self.cfg.model.teacher_weights
        if not weights:
            raise ValueError("model.teacher_weights is empty: a teacher needs its checkpoint")
        classes = tuple(self.cfg.model.get("teacher_classes") or ())
        return Teacher(teacher_of(self.cfg.model), weights, "model.teacher_weights", classes)

    def class_names(self) -> list[str]:
        names = checked_class_names(self.cfg.model.get("classes") or ())
        check_names_of_datasets("model.classes", names, self.train_sets, "give the classes of the training sets")
        return names

    def method(self) -> Method:
        if isinstance(named := self.cfg.model.method, str | ListConfig):
            raise ValueError(
                f"model.method is {named!r}, but only distil(method=...) takes names: name it there, or give LazyCall "
                "of a class of gkd_d2.methods"
            )
        method = instantiate(self.cfg.model.method)
        if not isinstance(method, Method):
            raise TypeError(f"model.method makes {method!r}, but must make a Method")
        settle_weights(method, self.cfg.model.get("balance", "fixed"), self.cfg.model.get("ratios", {}))
        return method

    def problems(self) -> list[str]:
        return [*([] if self._eval_only else self._training_problems()), *self._evaluator_problems()]

    def _evaluator_problems(self) -> list[str]:
        """What would be found out only when the training is done."""
        evaluator = self._loader("evaluator")
        if not isinstance(evaluator, DictConfig) or "_target_" not in evaluator:
            return []
        problems = [f"dataloader.evaluator lacks {name}" for name in missing_arguments(evaluator)]
        dataset = evaluator.get("dataset_name")
        if dataset is not None and not isinstance(dataset, str):
            problems.append(
                f"dataloader.evaluator.dataset_name is {dataset}, but an evaluator is of one dataset: name one in "
                "dataloader.test.dataset.names, as text"
            )
        elif is_called(evaluator, _COCO_EVALUATOR) and not evaluator.get("output_dir") and _is_loaded(dataset):
            problems.append(
                f"dataloader.evaluator is Detectron2's COCOEvaluator without output_dir, but {dataset} has no file in "
                "COCO's form, so that one must be written: set output_dir, or use build_evaluator of gkd_d2.evaluation"
            )
        return problems

    def _training_problems(self) -> list[str]:
        problems = []
        loader = self.cfg.dataloader.train
        if not is_called(loader, _TRAIN_LOADER):
            problems.append(
                f"dataloader.train calls {loader.get('_target_')}, but a run that can be resumed exactly needs "
                "Detectron2's build_detection_train_loader: use that, with a dataset, mapper and sampler of your own"
            )
        elif loader.get("mapper") is None:
            problems.append("dataloader.train has no mapper: see Detectron2's configs/common/data/coco.py")
        if "params" not in self.cfg.optimizer:
            problems.append("optimizer has no params: see Detectron2's configs/common/optim.py")
        loads = {"mask": ("use_instance_mask", self.masks), "keypoint": ("use_keypoint", self.keypoints)}
        for head, (key, loaded) in loads.items():
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

    def identity(self) -> str:
        # What a backbone once started with is of no matter to a run that is resumed.
        return dump_lazy(without_lazy_backbone_weights(self.cfg))

    def without_output(self) -> DictConfig:
        return OmegaConf.create({"train": {**self.cfg.train, "output_dir": None}})

    def _loader(self, path: str, default=None):
        return OmegaConf.select(self.cfg, f"dataloader.{path}", default=default)


def is_distilled(cfg: DictConfig) -> bool:
    """Whether the ``model`` of a LazyConfig is that of :func:`gkd_d2.lazy.distil`."""
    return plain_model(cfg.model) is not cfg.model


def _is_loaded(dataset: str | None) -> bool:
    """Whether a registered dataset is known by its records alone, without a file in COCO's form."""
    return dataset in MetadataCatalog.list() and MetadataCatalog.get(dataset).get("json_file") is None


def _names(value) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())
