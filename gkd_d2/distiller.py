"""GKDDistiller: the meta-architecture that trains a student under a frozen teacher."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from gkd_d2.align import AlignConv
from gkd_d2.config import architecture_key, detector_config, teacher_config
from gkd_d2.detector import SplitDetector, feature_gradients, split_detector
from gkd_d2.finite import check_finite
from gkd_d2.imports import import_modules
from gkd_d2.initialize import copy_heads, warn_of_other_heads
from gkd_d2.methods import Level, Method, build_method
from gkd_d2.one_pass import one_pass_losses
from gkd_d2.pairing import check_pair, pair_levels, without_unlabelled_heads
from gkd_d2.registries import build_detector
from gkd_d2.streams import separate_random_stream
from gkd_d2.summary import log_summary
from gkd_d2.teacher import FrozenTeacher, build_teacher
from gkd_d2.trainer_keys import TrainerKeys
from gkd_d2.visualize import Picture, put_picture, take_picture
from gkd_d2.watch import TermReport, measure_terms

_STUDENT = "student."

_NOT_WATCHED = """\
Nothing watches this distillation: a loss without a gradient, or one that swamps the detection losses, goes unnoticed.
With a DefaultTrainer add, before trainer.train():
    from gkd_d2.engine.hooks import add_distillation_hooks
    add_distillation_hooks(trainer)
In a loop of your own set distiller.watch, to False if you don't want to measure."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """What both networks make of one training batch: N images, L distilled levels.

    Attributes:
        images: the padded batch.
        losses: the student's own loss dictionary.
        student: its features, L tensors N,C,H,W, before alignment.
        student_grad: the gradient of the sum of ``losses`` with respect to them, times ``scale``; or None.
        teacher: the teacher's features, L tensors N,C,H,W.
        teacher_grad: the gradient of the teacher's own losses with respect to them, times ``scale``; or None.
        boxes: N tensors K,4 of ground truth, xyxy, pixels of the padded batch.
        scale: of the gradients.
        anchors: the student's own, L tensors H,W,A,4, xyxy, pixels of the padded batch; None where the method does not
            need them.
    """

    images: ImageList
    losses: dict[str, Tensor]
    student: list[Tensor]
    student_grad: list[Tensor] | None
    teacher: list[Tensor]
    teacher_grad: list[Tensor] | None
    boxes: list[Tensor]
    scale: float
    anchors: list[Tensor] | None


@META_ARCH_REGISTRY.register()
class GKDDistiller(nn.Module):
    """A student detector that learns from its own losses and from the features of a frozen teacher.

    In training it returns the student's loss dictionary with those of a method of distillation added; otherwise it is
    the student. Its state_dict is the student's own, under the student's own names, plus the align convolutions under
    ``align.``: a checkpoint of it loads into the plain student, and one of the plain student into it.

    Attributes:
        gradient_scale: what the detection losses are multiplied by before their gradients at the features are taken;
            the losses do not depend on it, but in float16 small gradients would underflow without it. A trainer with
            a gradient scaler sets it to the scale.
        watch: whether the next training forward measures each loss at each level. None: nobody has set it, which the
            first training forward warns of.
        watched: what was measured last, or None.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: FrozenTeacher,
        student_features: list[str],
        teacher_features: list[str],
        method: Method,
        warmup_iters: int = 0,
        one_pass: bool = True,
        vis_period: int = 0,
        seed: int = 0,
        announce: Callable[[], None] | None = None,
        trainer_keys: TrainerKeys | None = None,
    ):
        """
        Args:
            student: a detector that :func:`gkd_d2.detector.split_detector` knows.
            teacher: built and loaded.
            student_features: names of the student's levels to distil.
            teacher_features: the teacher's names of the same levels.
            method: the losses by which the student imitates the teacher.
            warmup_iters: over so many iterations their weights grow linearly to their values.
            one_pass: whether one backward pass through the student's heads serves the distillation and the training
                step, which must then give all detection losses one common weight.
            vis_period: every so many iterations a picture of the first image goes to TensorBoard; 0: never.
            seed: of the random stream that initialises the align convolutions.
            announce: called once, at the first training step, to say what is distilled.
            trainer_keys: what the config asks of the trainer; checked in each training forward.

        Raises:
            ValueError: an option is out of range, or the student lacks what the method needs.
        """
        super().__init__()
        if warmup_iters < 0:
            raise ValueError(f"GKD.WARMUP_ITERS is {warmup_iters}, but must be >= 0")
        if vis_period < 0:
            raise ValueError(f"GKD.VIS_PERIOD is {vis_period}, but must be >= 0")
        self.one_pass = one_pass
        self.vis_period = vis_period
        self._pictured = -1
        self._announce = announce
        self._checked = False
        self.student = student
        self.student_features = student_features
        self.teacher_features = teacher_features
        self.method = method
        self.warmup_iters = warmup_iters
        self.gradient_scale = 1.0
        self.watch: bool | None = None
        self.watched: TermReport | None = None
        self._trainer_keys = trainer_keys
        self._teacher = teacher
        self._split: SplitDetector = split_detector(student)
        if method.needs_anchors:
            # A level without any is refused here, before the first step.
            self._split.anchors({name: torch.empty(0, 0, 1, 1) for name in student_features})
        with separate_random_stream(torch.device("cpu"), seed):
            self.align = self._build_align()
        self._register_state_dict_hook(_drop_student_prefix)
        self._register_load_state_dict_pre_hook(_add_student_prefix)
        self.register_load_state_dict_post_hook(_name_missing_as_saved)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Build the method, the student, then the teacher, and check that they belong together."""
        # In a script of the user's own, whose config read_config has not read.
        import_modules(cfg.GKD.IMPORTS, "GKD.IMPORTS")
        method = build_method(cfg)
        student_cfg = detector_config(cfg)
        teacher_cfg, left_out = without_unlabelled_heads(teacher_config(cfg), student_cfg)
        student = build_detector(student_cfg, architecture_key(cfg))
        split = split_detector(student)
        seed = max(cfg.SEED, 0)
        teacher = build_teacher(teacher_cfg, seed)
        check_pair(split, teacher.split, student_cfg, teacher_cfg)
        student_features, teacher_features = pair_levels(
            split, teacher.split, cfg.GKD.FEATURES, cfg.GKD.TEACHER.FEATURES
        )
        inherited = copy_heads(teacher.split, split) if cfg.GKD.STUDENT.INIT_FROM_TEACHER else []
        if inherited:
            warn_of_other_heads(student_cfg, teacher_cfg)
        pairs = list(zip(student_features, teacher_features))
        return {
            "student": student,
            "teacher": teacher,
            "student_features": student_features,
            "teacher_features": teacher_features,
            "method": method,
            "warmup_iters": cfg.GKD.WARMUP_ITERS,
            "one_pass": cfg.GKD.ONE_PASS,
            "vis_period": cfg.GKD.VIS_PERIOD,
            "seed": seed,
            "announce": functools.partial(
                log_summary, cfg, method, split, teacher.split, pairs, inherited=inherited, left_out=left_out
            ),
            "trainer_keys": TrainerKeys.from_config(cfg),
        }

    @property
    def device(self) -> torch.device:
        """The student's device."""
        return self.student.device

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            # By the names of a checkpoint, the student's, fvcore looks up the modules of tensors that do not fit.
            student = self.__dict__.get("_modules", {}).get("student")
            if student is None or name not in student._modules:
                raise
            return student._modules[name]

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher, which is no submodule."""
        return self._teacher.model

    def forward(self, batched_inputs: list[dict]):
        """
        Args:
            batched_inputs: as for Detectron2's meta-architectures.

        Returns:
            In training a dictionary of scalar losses: the student's own, and those of the method, already weighted.
            Otherwise the student's detections. Without a weight above 0, or where gradients are disabled, the student's
            own training forward, untouched.

        Raises:
            RuntimeError: a level carries no gradient, or the two networks' features differ in size.
            ValueError: a loss of the method has the name of one of the student's, or the trainer ignores a key of the
                config, see :class:`gkd_d2.trainer_keys.TrainerKeys`; or, in the first training forward, as
                :meth:`check_finite`.
        """
        # Without gradients there is nothing to imitate by: a validation loss and PreciseBN are the student's own.
        if not (self.training and torch.is_grad_enabled()):
            return self.student(batched_inputs)
        if not self._checked:
            self.check_finite()
            self._checked = True
        if self._announce is not None:
            self._announce()
            self._announce = None
        if not self.method:
            return self.student(batched_inputs)
        self._check_trainer(batched_inputs)
        picture_due = self._picture_due()
        seen = self.observe(
            batched_inputs,
            student_grad=picture_due or self.watch or self.method.needs_student_grad,
            teacher_grad=picture_due or self.method.needs_teacher_grad,
        )
        if picture_due:
            put_picture(self.picture(batched_inputs, seen))
            self._pictured = get_event_storage().iter
        if self.watch:
            self.watched = self._measure(seen)
        losses = self._distil(seen, seen.student, range(len(seen.student)))
        taken = seen.losses.keys() & losses.keys()
        if taken:
            raise ValueError(f"GKD.METHOD calls a loss {taken.pop()}, which is the name of one of the student's own")
        return {**seen.losses, **losses}

    def check_finite(self) -> None:
        """Refuse networks that hold infinite or NaN values before they are trained.

        Raises:
            ValueError: the teacher, the student or an align convolution does.
        """
        check_finite(self.teacher, "the teacher's", "GKD.TEACHER.WEIGHTS")
        check_finite(self.student, "the student's")
        check_finite(self.align, "the align convolutions'")

    def teacher_is_finite(self, batched_inputs: list[dict]) -> bool:
        """Whether the teacher's features of a training batch are, and their gradients where the method needs them."""
        try:
            features, gradients = self._teacher.features(
                batched_inputs,
                self.teacher_features,
                with_gradients=self.method.needs_teacher_grad,
                scale=self.gradient_scale,
            )
        except FloatingPointError:
            return False
        return all(tensor.isfinite().all() for tensor in (*features, *(gradients or ())))

    def observe(self, batched_inputs: list[dict], *, student_grad: bool, teacher_grad: bool) -> Observation:
        """Run both networks on a training batch, in training mode and within an EventStorage.

        Args:
            batched_inputs: with ground truth.
            student_grad: whether the student's gradients at its features are computed.
            teacher_grad: whether the teacher's are.

        Raises:
            RuntimeError: a level carries no gradient, or the two networks' features differ in size.
        """
        teacher, teacher_gradients = self._teacher.features(
            batched_inputs, self.teacher_features, with_gradients=teacher_grad, scale=self.gradient_scale
        )
        images, features = self._split.features(batched_inputs)
        self._check_trained(features)
        losses, student_gradients = self._detect(images, features, batched_inputs, student_grad)
        student = [features[name] for name in self.student_features]
        self._check_sizes(student, teacher)
        anchors = None
        if self.method.needs_anchors:
            found = self._split.anchors(dict(zip(self.student_features, student)))
            anchors = [found[name] for name in self.student_features]
        return Observation(
            images=images,
            losses=losses,
            student=student,
            student_grad=student_gradients,
            teacher=teacher,
            teacher_grad=teacher_gradients,
            boxes=_in_one_copy([x["instances"].gt_boxes.tensor for x in batched_inputs], self.device),
            scale=self.gradient_scale,
            anchors=anchors,
        )

    def picture(self, batched_inputs: list[dict], seen: Observation) -> Picture:
        """The first image of a batch as both networks see it. Nothing of the distiller changes, nor a random stream.

        Args:
            batched_inputs: the batch, with ground truth.
            seen: of it, by :meth:`observe` with the gradients of both networks.
        """
        shapes = self._split.output_shape()
        return take_picture(
            batched_inputs[0],
            tuple(seen.images.tensor.shape[-2:]),
            {name: shapes[name].stride for name in self.student_features},
            (seen.student, seen.student_grad),
            (seen.teacher, seen.teacher_grad),
            student=self.student,
            teacher=self._teacher.model,
            rectifier=self.method.rectifier,
        )

    def _detect(
        self, images: ImageList, features: dict[str, Tensor], batched_inputs: list[dict], with_gradients: bool
    ) -> tuple[dict[str, Tensor], list[Tensor] | None]:
        """The student's own losses, and the gradients of their sum at the distilled levels.

        The gradients are those of the heads alone, as the teacher's are, and not also of levels that the pyramid
        derives from others: so the heads are given aliases of the features.
        """
        scale = self.gradient_scale
        if with_gradients and self._one_pass_serves(features):
            return one_pass_losses(
                lambda aliases: self._split.losses(images, aliases, batched_inputs),
                features,
                self.student_features,
                self.student.parameters(),
                scale=scale,
            )
        aliases = {name: feature.view_as(feature) for name, feature in features.items()}
        losses = self._split.losses(images, aliases, batched_inputs)
        if not with_gradients:
            return losses, None
        return losses, feature_gradients(losses, aliases, self.student_features, scale=scale, retain_graph=True)

    def _one_pass_serves(self, features: dict[str, Tensor]) -> bool:
        """Whether gradients that are stored before the backward pass are what that pass would give."""
        # A gradient scaler that the distiller was not told of would come too late for what has underflowed.
        unscaled = self.gradient_scale == 1.0 and any(f.dtype == torch.float16 for f in features.values())
        # A hook would change a gradient when it is stored, and again when it is used.
        hooked = any(parameter._backward_hooks for parameter in self.student.parameters())
        # Gradients that are only looked at now and then must leave no trace in the bits of a training.
        return self.one_pass and self.method.needs_student_grad and not (unscaled or hooked)

    def _picture_due(self) -> bool:
        """An iteration may consist of several forwards, of which the first is drawn."""
        if self.vis_period == 0:
            return False
        iteration = get_event_storage().iter
        return iteration % self.vis_period == 0 and iteration != self._pictured

    def _distil(self, seen: Observation, student: list[Tensor], levels: Sequence[int]) -> dict[str, Tensor]:
        """The method's losses of some levels, whose features before alignment are ``student``."""
        names = [self.student_features[level] for level in levels]
        teacher = [seen.teacher[level] for level in levels]
        student_grad = teacher_grad = None
        if self.method.needs_student_grad:
            student_grad = self._align_gradients(names, [seen.student_grad[level] for level in levels])
        if self.method.needs_teacher_grad:
            teacher_grad = [seen.teacher_grad[level] for level in levels]
        student, teacher, student_grad, teacher_grad = _in_one_dtype(
            self._align(names, student), teacher, student_grad, teacher_grad
        )
        parts = [
            Level(
                student=student[index],
                teacher=teacher[index],
                boxes=seen.boxes,
                image_size=tuple(seen.images.tensor.shape[-2:]),
                student_grad=student_grad and student_grad[index],
                teacher_grad=teacher_grad and teacher_grad[index],
                anchors=seen.anchors,
                index=level,
            )
            for index, level in enumerate(levels)
        ]
        losses = self.method(parts, self._ramp())
        # A method may compute a loss of weight 0 along with others: it is neither logged nor drawn.
        return {key: losses[key] for key in self.method.active()}

    def _check_trainer(self, batched_inputs: list[dict]) -> None:
        if self._trainer_keys is not None:
            self._trainer_keys.check(len(batched_inputs), self.device.type)
        if self.watch is None:
            self.watch = False
            if comm.is_main_process():
                logging.getLogger(__name__).warning(_NOT_WATCHED)

    def _measure(self, seen: Observation) -> TermReport:
        """Each loss and its gradient at the student's features, level by level."""
        return measure_terms(
            lambda level, feature: self._distil(seen, [feature], [level]),
            dict(zip(self.student_features, seen.student)),
            seen.student_grad,
            terms=self.method.active(),
            scale=seen.scale,
            boxes=sum(len(boxes) for boxes in seen.boxes),
            factor=self._ramp(),
        )

    def _ramp(self) -> float:
        """The factor of the weights at this iteration."""
        return min(1.0, (get_event_storage().iter + 1) / self.warmup_iters) if self.warmup_iters else 1.0

    def _build_align(self) -> nn.ModuleDict:
        """One convolution for every level whose channels differ; none where no loss would train it."""
        if not self.method:
            return nn.ModuleDict()
        ours, theirs = self._split.output_shape(), self._teacher.split.output_shape()
        pairs = zip(self.student_features, self.teacher_features)
        channels = {name: (ours[name].channels, theirs[other].channels) for name, other in pairs}
        return nn.ModuleDict({name: AlignConv(*pair) for name, pair in channels.items() if pair[0] != pair[1]})

    def _align(self, names: list[str], features: list[Tensor]) -> list[Tensor]:
        """Features, brought to the teacher's number of channels where it differs."""
        return [self.align[name](f) if name in self.align else f for name, f in zip(names, features)]

    def _align_gradients(self, names: list[str], gradients: list[Tensor]) -> list[Tensor]:
        """The gradients at the aligned features."""
        return [self.align[name].align_gradient(g) if name in self.align else g for name, g in zip(names, gradients)]

    def _check_trained(self, features: dict[str, Tensor]) -> None:
        for name in self.student_features:
            if not features[name].requires_grad:
                raise RuntimeError(
                    f"the student's {name} carries no gradient, so the distillation losses would teach nothing: "
                    "is the student's whole backbone frozen?"
                )

    def _check_sizes(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        for name, ours, theirs in zip(self.student_features, student, teacher):
            if ours.shape[2:] != theirs.shape[2:]:
                raise RuntimeError(
                    f"the student's {name} is {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)} (N,C,H,W) for "
                    "one batch: the two networks pad or downsample differently and can't be paired"
                )

    def _apply(self, fn, recurse=True):
        # The teacher is no submodule, but follows the student to its device.
        self._teacher.to(fn)
        return super()._apply(fn, recurse)


def _in_one_copy(boxes: list[Tensor], device: torch.device) -> list[Tensor]:
    """Boxes of several images on a device; a copy for each image would be a wait for it each."""
    return list(torch.cat(boxes).to(device, non_blocking=True).split([len(box) for box in boxes]))


def _in_one_dtype(*lists: list[Tensor] | None) -> list[list[Tensor] | None]:
    """Under autocast two networks may give features of two dtypes, as where only one has normalised its own."""
    dtypes = {tensor.dtype for tensors in lists for tensor in tensors or ()}
    if len(dtypes) == 1:
        return list(lists)
    widest = functools.reduce(torch.promote_types, dtypes)
    return [tensors and [tensor.to(widest) for tensor in tensors] for tensors in lists]


def _drop_student_prefix(module, state_dict, prefix, local_metadata) -> None:
    """State-dict hook: ``student.x`` is saved as ``x``, the modules' versions included."""
    start = prefix + _STUDENT
    for names in (state_dict, state_dict._metadata):
        for key in [k for k in names if k.startswith(start)]:
            names[prefix + key[len(start) :]] = names.pop(key)


def _add_student_prefix(state_dict, prefix, *args) -> None:
    """Load hook: ``x`` is the student's unless it is an align convolution's."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        name = key[len(prefix) :]
        if not name.startswith(("align.", _STUDENT)):
            state_dict[prefix + _STUDENT + name] = state_dict.pop(key)


def _name_missing_as_saved(module, incompatible) -> None:
    """Load hook: what is missing or unexpected is reported under the name it has in a checkpoint."""
    for keys in incompatible:
        keys[:] = [key.replace(_STUDENT, "", 1) if key.startswith(_STUDENT) else key for key in keys]
