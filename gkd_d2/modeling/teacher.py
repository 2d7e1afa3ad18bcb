"""The teacher: a detector that is asked for features and their gradients, and never changes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from detectron2.structures import ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from gkd_d2.methods import Predictions
from gkd_d2.modeling.common_size import sized_features
from gkd_d2.modeling.feature_gradients import feature_gradients
from gkd_d2.modeling.responses import TeacherResponses, norms_and_plain_layers, predictions_of_levels
from gkd_d2.modeling.split import SplitDetector, split_detector
from gkd_d2.utils.checkpoint import CompleteCheckpointer
from gkd_d2.utils.finite import check_finite
from gkd_d2.utils.random_streams import separate_random_stream


def build_teacher(
    make: Callable[[], nn.Module],
    weights: str,
    seed: int,
    *,
    swap_channels: bool = False,
    classes: Sequence[int | None] | None = None,
) -> FrozenTeacher:
    """Build a teacher and load its weights, drawing nothing from the global random stream.

    Args:
        make: makes the detector, with random weights.
        weights: its checkpoint, GKD.TEACHER.WEIGHTS.
        seed: of the teacher's random stream, >= 0.
        swap_channels, classes: see :class:`FrozenTeacher`.

    Raises:
        CheckpointError: the checkpoint can't be read, or leaves a parameter unset.
        ValueError: the detector can't be built, has no split, or a tensor holds infinite or NaN values.
    """
    with separate_random_stream(torch.device("cpu"), seed):
        model = make()
    CompleteCheckpointer(model).load_weights(
        weights, "GKD.TEACHER.WEIGHTS", "the detector that GKD.TEACHER.CONFIG_FILE describes"
    )
    check_finite(model, "the teacher's", "GKD.TEACHER.WEIGHTS")
    return FrozenTeacher(model, seed, swap_channels=swap_channels, classes=classes)


def set_as_in_evaluation(split: SplitDetector) -> None:
    """Have a detector see images as in evaluation, and return its losses: running statistics stay and are used.

    Its heads return losses in training mode only. Within these, norms and layers without weights, such as dropout and
    stochastic depth of any library, are in evaluation mode, as all of the backbone is.
    """
    split.model.eval()
    heads = split.head_modules()
    for head in heads:
        head.train()
    for module in itertools.chain(*norms_and_plain_layers(heads)):
        module.eval()


@dataclasses.dataclass(frozen=True)
class TeacherObservation:
    """What a teacher makes of one batch.

    Attributes:
        images: the batch, padded.
        features: name of a level -> N,C,H,W, of all levels of its pyramid.
        gradients: name of a level -> the gradient of its own losses with respect to the feature there, times a scale,
            for the levels that were asked for; None where none were.
    """

    images: ImageList
    features: dict[str, Tensor]
    gradients: dict[str, Tensor] | None

    def at(self, levels: Sequence[str]) -> tuple[list[Tensor], list[Tensor] | None]:
        """The features, and the gradients if there are any, of some levels."""
        gradients = None if self.gradients is None else [self.gradients[name] for name in levels]
        return [self.features[name] for name in levels], gradients


class FrozenTeacher:
    """A detector whose parameters, buffers, running statistics and moving averages stay as they are.

    It is no ``nn.Module`` on purpose: so it is no part of the distiller's state_dict, optimizer or
    DistributedDataParallel.

    Args:
        model: a detector that :func:`gkd_d2.modeling.split.split_detector` knows; frozen in place.
        seed: of its random stream; each iteration and process draws from its own part of it, so that a resumed run
            draws what an uninterrupted one would.
        swap_channels: whether the images of a batch have their three colours in the opposite order of what the teacher
            was trained with, RGB or BGR; see :func:`gkd_d2.modeling.pairing.channels_swapped`.
        classes: the teacher's number of each of the student's classes, None for those that it does not know; see
            :func:`gkd_d2.modeling.class_map.map_classes`. By default both have the same classes.

    Attributes:
        model: the detector.
        split: of it.
        classes: as above, a list; None: both have the same classes, and nothing is renumbered.
    """

    def __init__(
        self,
        model: nn.Module,
        seed: int,
        *,
        swap_channels: bool = False,
        classes: Sequence[int | None] | None = None,
    ):
        self.model = model
        self.classes = None if classes is None else list(classes)
        self._swap_channels = swap_channels
        self.split: SplitDetector = split_detector(model)
        self._seed = seed
        model.requires_grad_(False)
        set_as_in_evaluation(self.split)

    def to(self, apply) -> None:
        """Apply ``apply`` to every tensor, as :meth:`nn.Module._apply` does for ``.to``, ``.cuda`` and the like."""
        self.model._apply(apply)

    def inputs(self, batched_inputs: list[dict]) -> list[dict]:
        """A batch of the student as the teacher takes it.

        Its colours are in the teacher's order, and the ground truth has the teacher's numbers of classes, without the
        objects of classes that the teacher does not know.

        Args:
            batched_inputs: left as they are.
        """
        if self._swap_channels:
            batched_inputs = [{**x, "image": x["image"].flip(0)} for x in batched_inputs]
        if self.classes is not None:
            batched_inputs = [
                {**x, "instances": self._renumbered(x["instances"])} if "instances" in x else x for x in batched_inputs
            ]
        return batched_inputs

    def in_students_classes(self, detections: Instances) -> Instances:
        """The teacher's detections by the student's numbers of classes, without those of other classes.

        Args:
            detections: with ``pred_classes``; left as they are.
        """
        if self.classes is None:
            return detections
        numbers = {number: ours for ours, number in enumerate(self.classes) if number is not None}
        table = [numbers.get(number, -1) for number in range(self.split.num_classes)]
        return _with_classes(detections, "pred_classes", table)

    def _renumbered(self, truth: Instances) -> Instances:
        return _with_classes(truth, "gt_classes", [-1 if number is None else number for number in self.classes])

    def observe(
        self,
        batched_inputs: list[dict],
        levels: list[str],
        *,
        with_gradients: bool,
        scale: float = 1.0,
        size: tuple[int, int] | None = None,
    ) -> TeacherObservation:
        """The teacher's features and the gradient of its own detection loss with respect to them.

        Args:
            batched_inputs: the student's augmented batch with its ground truth.
            levels: names of the teacher's levels whose gradients are asked for.
            with_gradients: whether the losses and gradients are computed at all.
            scale: of the gradients; see :func:`gkd_d2.modeling.feature_gradients.feature_gradients`.
            size: from :meth:`gkd_d2.modeling.common_size.CommonSize.of`.

        Raises:
            RuntimeError: a level has no part in the losses.
            FloatingPointError: its region proposals are infinite or NaN.
        """
        batched_inputs = self.inputs(batched_inputs)
        with torch.no_grad():
            images, features = sized_features(self.split, batched_inputs, size)
        if not with_gradients:
            return TeacherObservation(images, features, None)
        leaves = {name: feature.detach().requires_grad_(name in levels) for name, feature in features.items()}
        with self._own_streams(), _naming_teacher("own losses"):
            losses = self.split.losses(images, leaves, batched_inputs)
        gradients = feature_gradients(losses, leaves, levels, scale=scale, retain_graph=False)
        return TeacherObservation(images, features, dict(zip(levels, gradients)))

    @torch.no_grad()
    def responses(self, seen: TeacherObservation, proposals: int) -> TeacherResponses:
        """What its heads predict from its own features.

        Args:
            seen: of a batch.
            proposals: number of its best ones, an image, that the box head of a two-stage teacher predicts for.

        Raises:
            FloatingPointError: its region proposals are infinite or NaN.
        """
        cells = self.split.cell_predictions(seen.features, self.classes)
        with _naming_teacher("proposals"):
            boxes = self.split.proposals(seen.images, cells, proposals)
        predictions = self.split.predictions(seen.features, boxes, self.classes, cells=cells)
        features = {name: seen.features[name] for name in self.split.head_features()}
        return TeacherResponses(predictions, features, boxes)

    def cross_predictions(self, given: dict[str, Tensor], responses: TeacherResponses) -> list[Predictions]:
        """What its heads predict from the student's features.

        Args:
            given: the teacher's name of a level -> the student's feature there, N,C,H,W, with the teacher's channels.
            responses: of the same batch.

        Returns:
            One for each given level.
        """
        return predictions_of_levels(self.split, given, responses.features, responses.proposals, self.classes)

    @torch.no_grad()
    def score_maps(self, batched_inputs: list[dict], size: tuple[int, int] | None) -> dict[str, Tensor]:
        """Name of a level -> N,H,W, as :meth:`gkd_d2.SplitDetector.score_maps`.

        Args:
            batched_inputs, size: as for :meth:`observe`.
        """
        _, features = sized_features(self.split, self.inputs(batched_inputs), size)
        return self.split.score_maps(features)

    @contextlib.contextmanager
    def _own_streams(self):
        """The teacher's own random draws, names of scalars and moving averages, none of which outlives the call."""
        storage = get_event_storage()
        attributes = vars(self.model)
        averages = {k: attributes[k] for k in self.split.running_attributes if k in attributes}
        seed = self._seed + storage.iter * comm.get_world_size() + comm.get_rank()
        with separate_random_stream(self.model.device, seed), storage.name_scope("teacher"):
            yield
        for name in self.split.running_attributes:
            attributes.pop(name, None)
        attributes.update(averages)


@contextlib.contextmanager
def _naming_teacher(what: str):
    """Say that infinite proposals are the teacher's; Detectron2's text would blame the training."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"The teacher's {what} can't be computed: its predicted boxes or scores are infinite or NaN."
        ) from error


def _with_classes(instances: Instances, field: str, table: list[int]) -> Instances:
    """Instances with other numbers of classes.

    Args:
        instances: left as they are.
        field: that holds the numbers.
        table: the new number of each old one; -1: what is of this class is left out.
    """
    old = instances.get(field)
    new = torch.tensor(table, dtype=old.dtype, device=old.device)[old]
    kept = instances[new >= 0]
    kept.set(field, new[new >= 0])
    return kept
