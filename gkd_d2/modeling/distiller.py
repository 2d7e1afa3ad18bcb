"""GKDDistiller: the meta-architecture that trains a student under a frozen teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from gkd_d2.methods import Level, Method, Responses
from gkd_d2.modeling.align import AlignConvs, in_one_dtype
from gkd_d2.modeling.build import build_parts
from gkd_d2.modeling.common_size import CommonSize, sized_features
from gkd_d2.modeling.observation import Listener, Observation, boxes_of
from gkd_d2.modeling.one_pass import detection_losses
from gkd_d2.modeling.pairing import check_sizes, check_trained
from gkd_d2.modeling.responses import HeadsObservation, predictions_of_levels
from gkd_d2.modeling.split import SplitDetector, split_detector
from gkd_d2.modeling.state_names import name_as_student
from gkd_d2.modeling.teacher import FrozenTeacher, TeacherObservation
from gkd_d2.modeling.trainer_keys import TrainerKeys
from gkd_d2.utils.finite import check_finite
from gkd_d2.utils.random_streams import separate_random_stream

_NOT_WATCHED = """\
Nothing watches this distillation: a loss without a gradient, or one that swamps the detection losses, goes unnoticed,
and GKD.VIS_PERIOD draws nothing. With a DefaultTrainer add, before trainer.train():
    from gkd_d2.engine.hooks import add_distillation_hooks
    add_distillation_hooks(trainer)
In a loop of your own add listeners by distiller.listen, or set distiller.listeners to [] for none."""
_NOT_CALIBRATED = """\
GKD.BALANCE is calibrate, but nothing calibrates the weights of the losses. With a DefaultTrainer add, before
trainer.resume_or_load():
    from gkd_d2.engine.hooks import add_distillation_hooks
    add_distillation_hooks(trainer)
In a loop of your own set distiller.factors to a factor for each loss, or GKD.BALANCE to fixed."""
_NOT_AVERAGED = (
    "MODEL_EMA.ENABLED is True, but only gkd_d2.engine.trainer.Trainer, as in tools/train_net.py, keeps that average "
    "of the weights"
)


@META_ARCH_REGISTRY.register()
class GKDDistiller(nn.Module):
    """A student detector that learns from its own losses and from the features of a frozen teacher.

    In training it returns the student's loss dictionary with those of a method of distillation added; otherwise it is
    the student. Its state_dict is the student's own, under the student's own names, plus the align convolutions under
    ``align.`` and the method's parameters under ``method.``: a checkpoint of it loads into the plain student, and one
    of the plain student into it.

    Attributes:
        gradient_scale: what the detection losses are multiplied by before their gradients at the features are taken;
            the losses do not depend on it, but in float16 small gradients would underflow without it. A trainer with
            a gradient scaler sets it to the scale.
        factors: name of a loss -> what it is multiplied by, where the method is weighted by ratios; None: nothing has
            calibrated it yet, as :class:`gkd_d2.engine.hooks.Calibration` does.
        listeners: what is told of each training batch, added by :meth:`listen`. None: nobody listens, of which the
            first training forward warns; []: nobody is to.
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
        proposals: int = 0,
        one_pass: bool = True,
        seed: int = 0,
        announce: Callable[[], None] | None = None,
        trainer_keys: TrainerKeys | None = None,
    ):
        """
        Args:
            student: a detector that :func:`gkd_d2.modeling.split.split_detector` knows.
            teacher: built and loaded.
            student_features: names of the student's levels to distil.
            teacher_features: the teacher's names of the same levels.
            method: the losses by which the student imitates the teacher; its parameters are built here.
            warmup_iters: over so many iterations their weights grow linearly to their values.
            proposals: number of the teacher's best proposals an image that box heads are compared on, where the method
                compares predictions of two-stage detectors.
            one_pass: whether one backward pass through the student's heads serves the distillation and the training
                step, which must then give all detection losses one common weight.
            seed: of the random stream that initialises the align convolutions and the method's parameters.
            announce: called once, at the first training step, to say what is distilled.
            trainer_keys: what the config asks of the trainer; checked in each training forward.

        Raises:
            ValueError: an option is out of range, or the student lacks what the method needs.
        """
        super().__init__()
        if warmup_iters < 0:
            raise ValueError(f"GKD.WARMUP_ITERS is {warmup_iters}, but must be >= 0")
        if proposals < 0:
            raise ValueError(f"GKD.TEACHER.PROPOSALS is {proposals}, but must be >= 0")
        self.one_pass = one_pass
        self._announce = announce
        self._checked = False
        self.student = student
        self.student_features = student_features
        self.teacher_features = teacher_features
        self.warmup_iters = warmup_iters
        self._proposals = proposals
        self.gradient_scale = 1.0
        self.factors: dict[str, float] | None = None
        self.listeners: list[Listener] | None = None
        self._trainer_keys = trainer_keys
        self._teacher = teacher
        self._split: SplitDetector = split_detector(student)
        self._common_size = CommonSize(self._split, teacher.split)
        if method.needs_anchors:
            # A level without any is refused here, before the first step.
            self._split.anchors({name: torch.empty(0, 0, 1, 1) for name in student_features})
        # Where no loss would train them, nothing is built.
        channels = self._channels() if method else {}
        with separate_random_stream(torch.device("cpu"), seed):
            self.align = AlignConvs(channels if method.needs_features else {})
            if method:
                method.build_parameters({name: wanted for name, (_, wanted) in channels.items()})
        self.method = method
        name_as_student(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Build the method, the student, then the teacher, and check that they belong together."""
        return build_parts(cfg)

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

    def __getstate__(self) -> dict:
        # Who listens belongs to a run, and not to copies of the model.
        return {**self.__dict__, "listeners": None if self.listeners else self.listeners}

    @property
    def strides(self) -> dict[str, int]:
        """The student's name of each distilled level -> its stride in pixels."""
        shapes = self._split.output_shape()
        return {name: shapes[name].stride for name in self.student_features}

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher, which is no submodule."""
        return self._teacher.model

    def teacher_inputs(self, batched_inputs: list[dict]) -> list[dict]:
        """A batch as :attr:`teacher` takes it: see :meth:`gkd_d2.modeling.teacher.FrozenTeacher.inputs`."""
        return self._teacher.inputs(batched_inputs)

    def in_students_classes(self, detections: Instances) -> Instances:
        """Detections of :attr:`teacher` by the student's numbers of classes, without those of other classes."""
        return self._teacher.in_students_classes(detections)

    def teacher_score_maps(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """The teacher's :meth:`gkd_d2.SplitDetector.score_maps` of a batch: its name of a level -> N,H,W.

        The cells are those of :meth:`observe`.
        """
        return self._teacher.score_maps(batched_inputs, self._common_size.of(batched_inputs))

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
                config, see :class:`gkd_d2.modeling.trainer_keys.TrainerKeys`; or, in the first training forward, as
                :meth:`check_finite`.
        """
        # Without gradients there is nothing to imitate by: a validation loss and PreciseBN are the student's own.
        if not (self.training and torch.is_grad_enabled()):
            return self.student(batched_inputs)
        self._begin()
        if not self.method:
            return self.student(batched_inputs)
        self._check_trainer(batched_inputs)
        listeners = [listener for listener in self.listeners if listener.due()]
        wanted = [self.method, *listeners]
        seen = self.observe(
            batched_inputs,
            student_grad=any(one.needs_student_grad for one in wanted),
            teacher_grad=any(one.needs_teacher_grad for one in wanted),
        )
        self._tell(listeners, seen)
        losses = self.distil(seen)
        taken = seen.losses.keys() & losses.keys()
        if taken:
            raise ValueError(f"GKD.METHOD calls a loss {taken.pop()}, which is the name of one of the student's own")
        return {**seen.losses, **losses}

    def listen(self, listener: Listener) -> None:
        """Tell a listener of the training batches to come; one that listens already is not told twice.

        Raises:
            TypeError: it is no Listener.
        """
        if not isinstance(listener, Listener):
            raise TypeError(f"{listener!r} can't listen: derive its class from gkd_d2.Listener")
        if listener not in (self.listeners or ()):
            self.listeners = [*(self.listeners or ()), listener]

    def unlisten(self, listener: Listener) -> None:
        """Tell a listener no more; where none is left, the next training forward warns again."""
        if listener in (self.listeners or ()):
            self.listeners = [other for other in self.listeners if other is not listener] or None

    def observe(self, batched_inputs: list[dict], *, student_grad: bool, teacher_grad: bool) -> Observation:
        """Run both networks on a training batch, in training mode and within an EventStorage.

        Args:
            batched_inputs: with ground truth.
            student_grad: whether the student's gradients at its features are computed.
            teacher_grad: whether the teacher's are.

        Raises:
            RuntimeError: a level carries no gradient, or the two networks' features differ in size.
        """
        size = self._common_size.of(batched_inputs)
        theirs = self._teacher.observe(
            batched_inputs, self.teacher_features, with_gradients=teacher_grad, scale=self.gradient_scale, size=size
        )
        teacher, teacher_gradients = theirs.at(self.teacher_features)
        images, features = sized_features(self._split, batched_inputs, size)
        check_trained(features, self.student_features)
        losses, student_gradients = detection_losses(
            self._split,
            images,
            features,
            batched_inputs,
            self.student_features,
            with_gradients=student_grad,
            # Gradients that are only looked at now and then must leave no trace in the bits of a training.
            one_pass=self.one_pass and self.method.needs_student_grad,
            scale=self.gradient_scale,
        )
        student = [features[name] for name in self.student_features]
        check_sizes(self.student_features, student, teacher)
        return Observation(
            batched_inputs=batched_inputs,
            images=images,
            losses=losses,
            student=student,
            student_grad=student_gradients,
            teacher=teacher,
            teacher_grad=teacher_gradients,
            boxes=boxes_of(batched_inputs, self.device),
            scale=self.gradient_scale,
            anchors=self._anchors(student) if self.method.needs_anchors else None,
            heads=self._heads(theirs, features) if self.method.needs_predictions else None,
        )

    def distil(self, seen: Observation) -> dict[str, Tensor]:
        """The method's losses of a batch, weighted.

        Args:
            seen: by :meth:`observe`, with the gradients that the method needs.

        Returns:
            Key of a loss -> scalar, for the losses of a weight above 0.

        Raises:
            RuntimeError: the method is weighted by ratios, and nothing calibrates it.
        """
        losses = self.method_losses(self.levels(seen))
        if not self.method.by_ratio:
            return losses
        if self.factors is None:
            raise RuntimeError(_NOT_CALIBRATED)
        return {key: self.factors[self.method.terms[key].name] * loss for key, loss in losses.items()}

    def levels(self, seen: Observation) -> list[Level]:
        """The distilled levels of a batch, as the method sees them.

        Args:
            seen: by :meth:`observe`, with the gradients that the method needs.
        """
        names, teacher, student_grad, teacher_grad = self.student_features, seen.teacher, None, None
        if self.method.needs_student_grad:
            student_grad = self.align.align_gradients(names, seen.student_grad, of_cells=self.method.needs_cell_grads)
        if self.method.needs_teacher_grad:
            teacher_grad = seen.teacher_grad
        aligned, teacher, student_grad, teacher_grad = in_one_dtype(
            self.align.align_features(names, seen.student), teacher, student_grad, teacher_grad
        )
        responses = self._responses(seen, aligned) if self.method.needs_predictions else None
        return [
            Level(
                student=aligned[index],
                teacher=teacher[index],
                boxes=seen.boxes,
                image_size=seen.image_size,
                student_grad=student_grad and student_grad[index],
                teacher_grad=teacher_grad and teacher_grad[index],
                anchors=seen.anchors,
                index=index,
                name=name,
                responses=responses and responses[index],
            )
            for index, name in enumerate(names)
        ]

    def method_losses(self, levels: list[Level]) -> dict[str, Tensor]:
        """The method's losses by its own weights, those of its config or, if they are calibrated, 1.

        Args:
            levels: some of :meth:`levels`, at least one.

        Returns:
            Key of a loss -> scalar, for the losses of a weight above 0.
        """
        losses = self.method(levels, self.warmup_factor())
        # A method may compute a loss of weight 0 along with others: it is neither logged nor drawn.
        return {key: losses[key] for key in self.method.active()}

    def warmup_factor(self) -> float:
        """What the weights are multiplied by at the iteration of the EventStorage; in (0, 1]."""
        return min(1.0, (get_event_storage().iter + 1) / self.warmup_iters) if self.warmup_iters else 1.0

    def check_finite(self) -> None:
        """Refuse networks that hold infinite or NaN values before they are trained.

        Raises:
            ValueError: the teacher, the student, an align convolution or the method does.
        """
        check_finite(self.teacher, "the teacher's", "GKD.TEACHER.WEIGHTS")
        check_finite(self.student, "the student's")
        check_finite(self.align, "the align convolutions'")
        check_finite(self.method, "the method's")

    def teacher_is_finite(self, batched_inputs: list[dict]) -> bool:
        """Whether the teacher's features of a training batch are, and what else of it the method needs."""
        try:
            seen = self._teacher.observe(
                batched_inputs,
                self.teacher_features,
                with_gradients=self.method.needs_teacher_grad,
                scale=self.gradient_scale,
                size=self._common_size.of(batched_inputs),
            )
            predicted = self._teacher.responses(seen, self._proposals) if self.method.needs_predictions else None
        except FloatingPointError:
            return False
        features, gradients = seen.at(self.teacher_features)
        outputs = predicted.outputs() if predicted else ()
        return all(tensor.isfinite().all() for tensor in (*features, *(gradients or ()), *outputs))

    def _begin(self) -> None:
        """In the first training forward, when weights are loaded: look at them, and say what is distilled."""
        if not self._checked:
            self.check_finite()
            self._checked = True
        if self._announce is not None:
            self._announce()
            self._announce = None

    def _check_trainer(self, batched_inputs: list[dict]) -> None:
        if self._trainer_keys is not None:
            self._trainer_keys.check(len(batched_inputs), self.device.type)
        if self.listeners is None:
            self.listeners = []
            if comm.is_main_process():
                logging.getLogger(__name__).warning(_NOT_WATCHED)
                if self._trainer_keys is not None and self._trainer_keys.model_ema:
                    logging.getLogger(__name__).warning(_NOT_AVERAGED)

    def _tell(self, listeners: list[Listener], seen: Observation) -> None:
        """Tell listeners that are due, apart from the graph and the random stream of the training."""
        if not listeners:
            return
        seen = seen.detached()
        with separate_random_stream(self.device, seed=0):
            for listener in listeners:
                listener(self, seen)

    def _channels(self) -> dict[str, tuple[int, int]]:
        """The student's name of each distilled level -> channels of the student and of the teacher."""
        ours, theirs = self._split.output_shape(), self._teacher.split.output_shape()
        pairs = zip(self.student_features, self.teacher_features)
        return {name: (ours[name].channels, theirs[other].channels) for name, other in pairs}

    def _anchors(self, student: list[Tensor]) -> list[Tensor]:
        """The student's own, at the distilled levels."""
        found = self._split.anchors(dict(zip(self.student_features, student)))
        return [found[name] for name in self.student_features]

    def _heads(self, theirs: TeacherObservation, features: dict[str, Tensor]) -> HeadsObservation:
        """To be called once the student's own losses are computed, for the norm that they have."""
        return HeadsObservation(
            teacher=self._teacher.responses(theirs, self._proposals),
            student_features={name: features[name].detach() for name in self._split.head_features()},
            cell_norm=self._split.cell_norm(len(theirs.images)),
        )

    def _responses(self, seen: Observation, aligned: list[Tensor]) -> list[Responses]:
        """What the heads predict from the student's features, beside what the teacher's do from their own."""
        teacher, norm = seen.heads.teacher, seen.heads.cell_norm
        cross = ours = [None] * len(aligned)
        if self.method.needs_cross_predictions:
            cross = self._teacher.cross_predictions(dict(zip(self.teacher_features, aligned)), teacher)
        if self.method.needs_student_predictions:
            given = dict(zip(self.student_features, seen.student))
            ours = predictions_of_levels(self._split, given, seen.heads.student_features, teacher.proposals)
        return [
            Responses(teacher.predictions[name], *sides, cell_norm=norm, region_norm=teacher.region_norm)
            for name, *sides in zip(self.teacher_features, cross, ours)
        ]

    def _apply(self, fn, recurse=True):
        # The teacher is no submodule, but follows the student to its device.
        self._teacher.to(fn)
        return super()._apply(fn, recurse)
