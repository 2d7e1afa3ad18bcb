"""How a LazyConfig says that its model is distilled."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from detectron2.config import LazyCall
from omegaconf import DictConfig
from torch import nn

from gkd_d2.config import DetectorSpec, YacsSpec, detector_config, without_backbone_weights
from gkd_d2.config.lazy_spec import LazySpec, is_called, load_lazy_spec, plain_model
from gkd_d2.config.read import file_of_model_zoo, merged_config
from gkd_d2.lazy.methods import method_call, title_of
from gkd_d2.methods import Method, keys_without_effect, settle_weights
from gkd_d2.modeling.backbone import check_timm_images
from gkd_d2.modeling.build import join
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.pairing import channels_swapped


def distil(
    student: DictConfig,
    *,
    teacher: DictConfig | str,
    teacher_weights: str,
    teacher_opts: Sequence[str] = (),
    method: DictConfig | str | Sequence[str] | Mapping[str, DictConfig | str] = "gkd",
    balance: str = "fixed",
    ratios: Mapping[str, float] = MappingProxyType({}),
    features: Sequence[str] = (),
    teacher_features: Sequence[str] = (),
    classes: Sequence[str] = (),
    teacher_classes: Sequence[str] = (),
    init_from_teacher: bool = False,
    roi_batch_size: int = 0,
    warmup_iters: int = 0,
    proposals: int = 128,
    one_pass: bool = True,
) -> DictConfig:
    """The ``model`` of a LazyConfig under a teacher: ``model = distil(model, teacher=..., teacher_weights=...)``.

    What the arguments mean, and their defaults, is as in the node GKD of a config of yacs. All of them stand in the
    result under their names and can be overridden there, as by ``model.features=[p3,p4]`` on the command line; the
    student's own settings are ``model.student.*``, the teacher's ``model.teacher.*``.

    Args:
        student: the ``model`` of a plain detector.
        teacher: the ``model`` of the teacher, or its config file, ``.py`` or ``.yaml``, or the name of one in
            Detectron2's model zoo.
        teacher_weights: its checkpoint.
        teacher_opts: changes to a teacher's file: "key=value" for a ``.py``, KEY, VALUE for a ``.yaml``.
        method: LazyCall of a :class:`gkd_d2.Method`, or the name of one of this project's. Several at once: a list of
            such names, or a mapping from names to LazyCalls; each is then an argument of ``model.method``.
        balance: GKD.BALANCE.
        ratios: GKD.RATIOS, by names of losses such as "box".
        features: GKD.FEATURES.
        teacher_features: GKD.TEACHER.FEATURES.
        classes: names of the student's classes, in its order, for ``teacher_classes``. They must be given: the model of
            a LazyConfig does not know its datasets.
        teacher_classes: GKD.TEACHER.CLASSES.
        init_from_teacher: GKD.STUDENT.INIT_FROM_TEACHER.
        roi_batch_size: GKD.TEACHER.ROI_BATCH_SIZE.
        warmup_iters: GKD.WARMUP_ITERS.
        proposals: GKD.TEACHER.PROPOSALS.
        one_pass: GKD.ONE_PASS.

    Returns:
        LazyCall of :func:`build_distiller`.

    Raises:
        ValueError: an argument describes no detector or method.
        FileNotFoundError: there is no such config file.
    """
    ours = LazySpec(plain_model(student))
    node, theirs, unlabelled = _teacher(teacher, list(teacher_opts), ours.heads, roi_batch_size)
    return LazyCall(build_distiller)(
        # The student comes first: it is built first, and draws what it would draw alone.
        student=ours.model,
        teacher=node,
        teacher_weights=teacher_weights,
        method=method_call(method),
        balance=balance,
        ratios=dict(ratios),
        features=list(features),
        teacher_features=list(teacher_features),
        classes=list(classes),
        teacher_classes=list(teacher_classes),
        init_from_teacher=init_from_teacher,
        warmup_iters=warmup_iters,
        proposals=proposals,
        one_pass=one_pass,
        # By reference, which follows an override.
        image_format="${.student.input_format}" if "input_format" in ours.model else "BGR",
        teacher_image_format=theirs.image_format,
        teacher_file=theirs.file,
        teacher_train_sets=list(theirs.train_sets),
        left_out=unlabelled,
    )


def build_distiller(
    *,
    student: nn.Module,
    teacher: nn.Module,
    teacher_weights: str,
    method: Method,
    balance: str = "fixed",
    ratios: Mapping[str, float] = MappingProxyType({}),
    features: Sequence[str] = (),
    teacher_features: Sequence[str] = (),
    classes: Sequence[str] = (),
    teacher_classes: Sequence[str] = (),
    init_from_teacher: bool = False,
    warmup_iters: int = 0,
    proposals: int = 128,
    one_pass: bool = True,
    seed: int = 0,
    image_format: str | None = None,
    teacher_image_format: str | None = None,
    teacher_file: str = "",
    teacher_train_sets: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> GKDDistiller:
    """Put a student under a teacher; what :func:`distil` describes.

    Args:
        student: a detector.
        teacher: another, with random weights.
        teacher_weights, method, balance, ratios, features, teacher_features, classes, teacher_classes,
            init_from_teacher, warmup_iters, proposals, one_pass: see :func:`distil`. The weights of the method are
            changed as ``balance`` says.
        seed: of all random streams beside the student's, >= 0.
        image_format: order of the channels of the images in a batch, such as "BGR"; default: the student's
            ``input_format``.
        teacher_image_format: that of the images that the teacher was trained on; default: its ``input_format``.
        teacher_file: what describes the teacher, for the log.
        teacher_train_sets: names of the datasets that it was trained on; looked at before a run.
        left_out: heads that it is built without, "mask" or "keypoint".

    Raises:
        ValueError: teacher and student do not match, an option is out of range, a ratio names no loss, or the images
            are not what the weights of a student's backbone of timm were trained with.
        TypeError: an option is not of its type.
        CheckpointError: the teacher's checkpoint can't be read, or leaves a parameter unset.
    """
    for name, value in (("init_from_teacher", init_from_teacher), ("one_pass", one_pass)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, but must be True or False")
    weights = {term.key: term.weight for term in method.terms.values()}
    settle_weights(method, balance, ratios)
    image_format = image_format or _input_format(student)
    check_timm_images(student, image_format)
    parts = join(
        student,
        lambda: teacher,
        teacher_weights,
        method,
        method_name=title_of(method),
        features=features,
        teacher_features=teacher_features,
        classes=checked_class_names(classes) if teacher_classes else (),
        teacher_classes=teacher_classes,
        init_from_teacher=init_from_teacher,
        warmup_iters=warmup_iters,
        proposals=proposals,
        one_pass=one_pass,
        seed=seed,
        swap_channels=channels_swapped(image_format, teacher_image_format or _input_format(teacher)),
        teacher_file=teacher_file,
        weights="the checkpoint that was loaded",
        left_out=left_out,
        unused=keys_without_effect(method, weights, ratios),
    )
    return GKDDistiller(**parts)


def checked_class_names(classes: Sequence[str]) -> list[str]:
    """The student's ``classes`` of :func:`distil`, which ``teacher_classes`` need.

    Raises:
        ValueError: there are none.
    """
    if not classes:
        raise ValueError(
            "model.teacher_classes is set, but model.classes is empty: name the student's classes there, in the order "
            "of its training sets, to be looked up among the teacher's"
        )
    return list(classes)


def _input_format(model: nn.Module) -> str:
    return getattr(model, "input_format", None) or "BGR"


def build_from_yaml(config_file: str, opts: Sequence[str] = ()) -> nn.Module:
    """The detector of a config of yacs, on the CPU, with random weights, for its checkpoint to set.

    Args:
        config_file: of a plain detector.
        opts: KEY, VALUE, ...
    """
    return _yacs_spec(config_file, opts).build()


def teacher_of(model: DictConfig) -> DetectorSpec:
    """What the teacher of a distilled model is.

    Args:
        model: from :func:`distil`.
    """
    node = model.teacher
    if is_called(node, f"{__name__}.{build_from_yaml.__name__}"):
        return _yacs_spec(node.config_file, node.opts)
    place = "model" if model.teacher_file else "model.teacher"
    return LazySpec(node, model.teacher_file, model.teacher_train_sets, model.teacher_image_format, place)


def _yacs_spec(config_file: str, opts: Sequence[str]) -> YacsSpec:
    cfg = detector_config(merged_config(config_file, [*map(str, opts), "MODEL.DEVICE", "cpu"], ()))
    return YacsSpec(without_backbone_weights(cfg), file=config_file)


def _teacher(
    teacher: DictConfig | str, opts: list[str], heads: set[str], proposals: int
) -> tuple[DictConfig, DetectorSpec, list[str]]:
    """The teacher as a part of a LazyConfig, what it is, and the heads that it is without.

    Masks and keypoints are loaded only for a student that detects them: ``heads`` are the student's.
    """
    path = _file(teacher) if isinstance(teacher, str) else ""
    if not path.endswith(".yaml"):
        if opts and not path:
            raise ValueError("teacher_opts are for a teacher's file: change the model that is given itself")
        spec = load_lazy_spec(path, opts) if path else LazySpec(plain_model(teacher))
        unlabelled = spec.heads_beyond(heads)
        spec = spec.without(unlabelled).with_proposals(proposals).without_backbone_weights()
        return spec.model, spec, unlabelled
    spec = _yacs_spec(path, opts).with_proposals(proposals)
    unlabelled = spec.heads_beyond(heads)
    opts += [text for head in unlabelled for text in (f"MODEL.{head.upper()}_ON", "False")]
    if proposals:
        opts += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", str(proposals)]
    return LazyCall(build_from_yaml)(config_file=path, opts=opts), _yacs_spec(path, opts), unlabelled


def _file(name: str) -> str:
    path = name if os.path.isfile(name) else file_of_model_zoo(name)
    if path is None or not path.endswith((".py", ".yaml")):
        raise FileNotFoundError(
            f"the teacher's config {name} is no .py or .yaml file, seen from the working folder {os.getcwd()}, nor one "
            "of Detectron2's model zoo"
        )
    return os.path.abspath(path)
