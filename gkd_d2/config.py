"""The config node GKD and what follows from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence

import torch
from detectron2.config import CfgNode, get_cfg

from gkd_d2.utils.config_merge import load_file, merge_loaded, merge_pairs
from gkd_d2.utils.user_modules import import_modules

DISTILLER = "GKDDistiller"
_TEACHER_PATHS = ("CONFIG_FILE", "WEIGHTS")


def add_gkd_config(cfg: CfgNode) -> None:
    """Add the node GKD, and two keys of SOLVER, with their defaults to a Detectron2 config.

    Args:
        cfg: changed in place; the student is described by its MODEL node.
    """
    cfg.GKD = CfgNode()

    # Python modules of your own, imported before the config is used: what they register can be named in it, such as
    # datasets, meta-architectures, backbones and methods. In a teacher's config file: those that the teacher needs.
    cfg.GKD.IMPORTS = []

    cfg.GKD.STUDENT = CfgNode()
    # Meta-architecture of the student: GeneralizedRCNN or RetinaNet. All else about it stands in MODEL.
    cfg.GKD.STUDENT.META_ARCHITECTURE = ""
    # Start the student with the teacher's heads, as the authors' configs do; recommended. A head is copied whole where
    # all its tensors have equal shapes in both networks; a warning names each head that is not. MODEL.WEIGHTS and a
    # resumed checkpoint are loaded later and replace what they hold.
    cfg.GKD.STUDENT.INIT_FROM_TEACHER = False

    cfg.GKD.TEACHER = CfgNode()
    # The teacher's own training config. A relative path is looked for in the working folder, then in the folder of the
    # config file that sets this key, which may be a _BASE_ of --config-file.
    cfg.GKD.TEACHER.CONFIG_FILE = ""
    # The teacher's checkpoint; it must set every parameter of the teacher. A relative path is looked for in the same
    # two folders.
    cfg.GKD.TEACHER.WEIGHTS = ""
    # Names of the teacher's levels, one for each of GKD.FEATURES, where they differ from the student's.
    cfg.GKD.TEACHER.FEATURES = []
    # Proposals an image that a teacher with ROI heads samples for its gradients; 0: as many as its own config says.
    # Fewer are cheaper and make its gradient maps noisier: docs/benchmarks.md.
    cfg.GKD.TEACHER.ROI_BATCH_SIZE = 0

    # Levels to distil. Empty: those that the heads of both networks use, without max-pooled copies of others.
    cfg.GKD.FEATURES = []

    # What the student imitates: gkd (gradient maps and BMFI), fitnet (all cells alike), fgfi (cells near objects), fgd
    # (foreground and background, by the teacher's attention), pkd (correlation of channels), none (nothing: the student
    # is trained alone), or a method of your own, see docs/own_method.md.
    cfg.GKD.METHOD = "gkd"
    # Options of a method of your own: whatever keys it reads.
    cfg.GKD.METHOD_OPTIONS = CfgNode(new_allowed=True)

    # Of gkd: weights of its four losses; at 0.0 a loss is not computed. The defaults, without the attention loss,
    # are those that taught both kinds of detector on toy scenes: docs/results.md. tools/suggest_weights.py measures how
    # hard they pull with yours.
    cfg.GKD.LOSS_WEIGHTS = CfgNode()
    cfg.GKD.LOSS_WEIGHTS.GRADIENT = 0.02
    cfg.GKD.LOSS_WEIGHTS.BOX = 1e-2
    cfg.GKD.LOSS_WEIGHTS.ATTENTION = 0.0
    cfg.GKD.LOSS_WEIGHTS.IMAGE = 1e-3
    # Of gkd: temperature of the attention softmax, > 0.
    cfg.GKD.TEMPERATURE = 0.5
    # Of gkd: what weighs channels and cells in the imitation: gradient, attention or uniform.
    cfg.GKD.WEIGHTING = "gradient"
    # Of gkd: what makes the gradient maps non-negative: abs or relu.
    cfg.GKD.RECTIFIER = "abs"
    # Of gkd: who computes the losses: reference (PyTorch), fused (the extension), auto (fused where it is built).
    cfg.GKD.IMPLEMENTATION = "auto"

    cfg.GKD.FITNET = CfgNode()
    # Of fitnet: weight of its loss. The paper has none for detectors; tools/suggest_weights.py proposes one.
    cfg.GKD.FITNET.WEIGHT = 1.0

    cfg.GKD.FGFI = CfgNode()
    # Of fgfi: weight of its loss, as in the authors' code.
    cfg.GKD.FGFI.WEIGHT = 0.01
    # Of fgfi: a cell is near an object if one of its anchors overlaps it by more than this part of the largest overlap
    # of any anchor; at least 0 and below 1. The paper's psi, and its value.
    cfg.GKD.FGFI.THRESHOLD = 0.5
    # Of fgfi: whether the largest overlap, and the number of cells by which the loss is divided, are those of all
    # levels (together), or those of each level by itself (separate), so that each object is imitated at each level.
    cfg.GKD.FGFI.LEVELS = "together"

    cfg.GKD.FGD = CfgNode()
    # Of fgd: weights of its three losses, alpha, beta and gamma of the paper. The values are those of the public code
    # for Faster R-CNN; for RetinaNet it has 1e-3, 5e-4 and 5e-4.
    cfg.GKD.FGD.FOREGROUND_WEIGHT = 5e-5
    cfg.GKD.FGD.BACKGROUND_WEIGHT = 2.5e-5
    cfg.GKD.FGD.ATTENTION_WEIGHT = 5e-5
    # Of fgd: temperature of the attention softmax, > 0, as in the public code.
    cfg.GKD.FGD.TEMPERATURE = 0.5

    cfg.GKD.PKD = CfgNode()
    # Of pkd: weight of its loss. MMRazor's configs have 6 for Faster R-CNN and 10 for RetinaNet.
    cfg.GKD.PKD.WEIGHT = 6.0

    # Over so many iterations the weights of the method's losses grow linearly to their values; 0: no ramp.
    cfg.GKD.WARMUP_ITERS = 0

    # One backward pass through the student's heads serves both the gradients that the method needs and the training
    # step. It is the gradient of the sum of the detection losses: a trainer that weighs them must set this to False,
    # for a second pass, and gets an error otherwise.
    cfg.GKD.ONE_PASS = True

    # Every so many iterations each loss is measured at each level: its value and its gradient's size in proportion to
    # the detection loss's, as gkd_value/* and gkd_ratio/* in metrics.json and TensorBoard; the ratios are logged too.
    cfg.GKD.WATCH_PERIOD = 20
    # So many iterations in a row in which the gradient of a loss at a level is exactly 0 or not finite stop the run.
    # A gradient of 0 does not count where no image of the batch has a box.
    cfg.GKD.WATCH_PATIENCE = 20
    # A loss whose gradient is more than this many times that of the detection losses is warned of, once in a run, with
    # the weight that would suit; > 0.
    cfg.GKD.WATCH_MAX_RATIO = 10.0

    # Every so many iterations a picture of the first image of the batch goes to TensorBoard: gradient maps, box context
    # mask and detections of both networks; 0: never. It needs a loss weight above 0 and changes nothing else.
    cfg.GKD.VIS_PERIOD = 0

    # Write the detections of datasets of KITTI's form in KITTI's result format too, one file an image, into
    # OUTPUT_DIR/inference/<dataset>/kitti_results. For kitti_test, which has no labels, that is always done.
    cfg.GKD.KITTI_RESULTS = False

    # A batch of SOLVER.IMS_PER_BATCH images is computed in so many parts one after the other, to save memory; their
    # gradients are averaged, as those of so many GPUs would be. An iteration stays one batch and one step.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # Of autocast where SOLVER.AMP.ENABLED is set: float16 (on GPUs, with a gradient scaler) or bfloat16.
    cfg.SOLVER.AMP.DTYPE = "float16"


def read_config(config_file: str, opts: list[str], imports: Sequence[str] = ()) -> CfgNode:
    """The config that a file and KEY VALUE pairs describe, not frozen.

    The modules in GKD.IMPORTS are imported before the keys are looked at. MODEL.DEVICE "auto" becomes "cuda" where
    torch finds a GPU, else "cpu".

    Args:
        config_file: of any detector or distiller.
        opts: override the file's values.
        imports: modules that are added to GKD.IMPORTS, as by --import.

    Raises:
        FileNotFoundError: ``config_file``, or a file that it is based on, does not exist.
        ValueError: ``opts`` are no pairs, a key does not exist, a value does not fit its key, or a module in
            GKD.IMPORTS is not found.
        ImportError: a module in GKD.IMPORTS raises an error.
    """
    cfg = _merged(config_file, opts, imports)
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, which torch does not know: give cuda, cuda:1, cpu or, for the GPU "
            "where there is one, auto"
        ) from error
    return cfg


class _Placed(str):
    """A teacher's path that was looked for beside the file that sets it."""


def _merged(config_file: str, opts: list[str], imports: Sequence[str]) -> CfgNode:
    """The keys of Detectron2 and of this project, as a file and pairs KEY VALUE set them."""
    written = load_file(config_file, _place_own)
    teacher = _node(written, "GKD", "TEACHER")
    teacher.update({key: str(path) for key, path in teacher.items() if isinstance(path, _Placed)})
    modules = [*_listed_modules(config_file, written, opts), *imports]
    import_modules(modules, f"GKD.IMPORTS of {config_file}, or --import,")
    # Made after the imports, for a module may add keys to Detectron2's defaults.
    cfg = get_cfg()
    add_gkd_config(cfg)
    merge_loaded(cfg, written, config_file)
    merge_pairs(cfg, opts)
    for key in _TEACHER_PATHS:
        if f"GKD.TEACHER.{key}" in opts[::2]:
            cfg.GKD.TEACHER[key] = _placed(key, cfg.GKD.TEACHER[key], config_file)
    cfg.GKD.IMPORTS = list(dict.fromkeys(modules))
    return cfg


def _listed_modules(config_file: str, written: dict, opts: list[str]) -> list[str]:
    """GKD.IMPORTS, of a file's content and the arguments, before there is a config with all keys."""
    key = "GKD.IMPORTS"
    cfg = CfgNode({"GKD": {"IMPORTS": []}})
    given = [text for pair in zip(opts[::2], opts[1::2]) if pair[0] == key for text in pair]
    try:
        cfg.merge_from_list([key, _node(written, "GKD").get("IMPORTS") or []])
        cfg.merge_from_list(given)
    except ValueError as error:
        raise ValueError(f"{key} of {config_file} must be a list of modules, such as ['my_module']: {error}") from error
    return list(cfg.GKD.IMPORTS)


def _node(loaded: object, *names: str) -> dict:
    """The node at a place of a file's content; empty where there is none."""
    for name in names:
        loaded = loaded.get(name) if isinstance(loaded, dict) else None
    return loaded if isinstance(loaded, dict) else {}


def _place_own(loaded: dict, config_file: str) -> None:
    """Place the teacher's paths that a file sets itself, among the content of its ``_BASE_``, whose are placed."""
    teacher = _node(loaded, "GKD", "TEACHER")
    for key in _TEACHER_PATHS:
        if isinstance(path := teacher.get(key), str) and not isinstance(path, _Placed):
            teacher[key] = _Placed(_placed(key, path, config_file))


def _placed(key: str, path: str, config_file: str) -> str:
    """A path of the teacher; a relative one that is not found in the working folder is that beside a config file.

    A checkpoint that is found in neither folder stays as it is, for it may be trained yet; a config file then becomes
    that beside ``config_file``, for the error.
    """
    if not path or os.path.isabs(path) or "://" in path or os.path.exists(path):
        return path
    beside = os.path.join(os.path.dirname(os.path.abspath(config_file)), path)
    return beside if key == "CONFIG_FILE" or os.path.exists(beside) else path


def with_absolute_teacher(cfg: CfgNode) -> CfgNode:
    """A copy in which the teacher's paths do not depend on the working folder, nor on symbolic links."""
    cfg = cfg.clone()
    cfg.defrost()
    for key in _TEACHER_PATHS:
        path = cfg.GKD.TEACHER[key]
        if path and "://" not in path:
            cfg.GKD.TEACHER[key] = os.path.realpath(path)
    return cfg


def read_distiller_config(config_file: str, opts: list[str], imports: Sequence[str] = ()) -> CfgNode:
    """As :func:`read_config`, of a distiller alone.

    Raises:
        ValueError: also where it is the config of a plain detector.
    """
    cfg = read_config(config_file, opts, imports)
    if cfg.MODEL.META_ARCHITECTURE != DISTILLER:
        raise ValueError(
            f"{config_file} is no config of a {DISTILLER}: MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}. "
            "Name one with a teacher, such as configs/gkd_frcnn_kitti.yaml"
        )
    return cfg


def architecture_key(cfg: CfgNode) -> str:
    """The key that sets the meta-architecture of the detector that ``cfg`` trains: see :func:`detector_config`."""
    return "GKD.STUDENT.META_ARCHITECTURE" if cfg.MODEL.META_ARCHITECTURE == DISTILLER else "MODEL.META_ARCHITECTURE"


def detector_architecture(cfg: CfgNode) -> str:
    """The meta-architecture of the detector that ``cfg`` trains, as :func:`architecture_key` sets it; may be empty."""
    return (
        cfg.GKD.STUDENT.META_ARCHITECTURE if cfg.MODEL.META_ARCHITECTURE == DISTILLER else cfg.MODEL.META_ARCHITECTURE
    )


def detector_config(cfg: CfgNode) -> CfgNode:
    """The config of the plain detector that ``cfg`` trains: of the student where ``cfg`` is a distiller's.

    Returns:
        A frozen copy whose MODEL.META_ARCHITECTURE is the detector's own.

    Raises:
        ValueError: GKD.STUDENT.META_ARCHITECTURE is not set.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == DISTILLER:
        if cfg.GKD.STUDENT.META_ARCHITECTURE in ("", DISTILLER):
            raise ValueError(
                f"GKD.STUDENT.META_ARCHITECTURE is {cfg.GKD.STUDENT.META_ARCHITECTURE!r}: set it to the student's "
                "meta-architecture, GeneralizedRCNN or RetinaNet"
            )
        cfg.MODEL.META_ARCHITECTURE = cfg.GKD.STUDENT.META_ARCHITECTURE
    cfg.freeze()
    return cfg


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's config, read from GKD.TEACHER.CONFIG_FILE; the modules in its GKD.IMPORTS are imported.

    Args:
        cfg: the distiller's config.

    Returns:
        A frozen config of a plain detector on the student's device, with GKD.TEACHER.WEIGHTS as its weights.

    Raises:
        ValueError: GKD.TEACHER.CONFIG_FILE or GKD.TEACHER.WEIGHTS is not set, the file is not a config, or
            GKD.TEACHER.ROI_BATCH_SIZE is negative or for a teacher without ROI heads.
        FileNotFoundError: the config file does not exist.
        ImportError: a module in its GKD.IMPORTS raises an error.
    """
    for key in ("CONFIG_FILE", "WEIGHTS"):
        if not cfg.GKD.TEACHER[key]:
            raise ValueError(f"GKD.TEACHER.{key} is empty: a teacher needs its config file and its checkpoint")
    path = cfg.GKD.TEACHER.CONFIG_FILE
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"GKD.TEACHER.CONFIG_FILE is {path!r}, which is no file. A relative path is looked for in the working "
            f"folder, {os.getcwd()}, and then, where gkd_d2.config.read_config reads the config, in the folder of the "
            "file that sets the key: give the config the teacher was trained with"
        )
    teacher = detector_config(_merged(path, [], ()))
    teacher.defrost()
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher.MODEL.WEIGHTS = cfg.GKD.TEACHER.WEIGHTS
    if proposals := cfg.GKD.TEACHER.ROI_BATCH_SIZE:
        if proposals < 0:
            raise ValueError(f"GKD.TEACHER.ROI_BATCH_SIZE is {proposals}, but must be >= 0")
        if teacher.MODEL.META_ARCHITECTURE == "RetinaNet":
            raise ValueError(
                f"GKD.TEACHER.ROI_BATCH_SIZE is {proposals}, but {path} describes a RetinaNet, which samples no "
                "proposals: leave it at 0"
            )
        teacher.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = proposals
    # Its pictures would overwrite the student's.
    teacher.VIS_PERIOD = 0
    teacher.freeze()
    return teacher


def config_differences(one: CfgNode, other: CfgNode, ignored: Sequence[str] = ()) -> dict[str, tuple]:
    """Key -> value in two configs, where they differ; None where one of them does not have the key.

    Numbers that differ by rounding are the same, and so are a list and a tuple.

    Args:
        one: a config.
        other: another one.
        ignored: dotted names of nodes and keys that are left out.
    """
    ours, theirs = dict(_flat(one)), dict(_flat(other))
    keys = [key for key in {**ours, **theirs} if not any(key == name or key.startswith(f"{name}.") for name in ignored)]
    return {k: (ours.get(k), theirs.get(k)) for k in keys if not _same(ours.get(k), theirs.get(k))}


def _same(one: object, other: object) -> bool:
    # A weight that a study scaled, 0.2 * 0.1, against the one that is written, 0.02.
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    # As JSON, for a tuple within a tuple is read back from a file as a list.
    return json.dumps(one) == json.dumps(other)


def _flat(cfg: CfgNode, start: str = "") -> Iterator[tuple[str, object]]:
    """Pairs of dotted key and value."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _flat(value, f"{start}{key}.")
        else:
            yield start + key, value
