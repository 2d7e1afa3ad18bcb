"""What a run needs is looked for before anything is built."""

from __future__ import annotations

import contextlib
import io
import os

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils.file_io import PathManager

from gkd_d2.config import DISTILLER, architecture_key, detector_architecture, detector_config, teacher_config
from gkd_d2.data.build import check_batch
from gkd_d2.engine import from_scratch
from gkd_d2.engine.data_checks import dataset_problems, teacher_class_problems
from gkd_d2.evaluation import evaluator_type
from gkd_d2.methods import build_method
from gkd_d2.utils.checkpoint_files import find_damage
from gkd_d2.utils.files import check_writable
from gkd_d2.utils.last_checkpoint import has_checkpoint
from gkd_d2.utils.registries import architecture_class, find_unregistered


class PreflightError(Exception):
    """A run can't start; the text says for every missing thing what to put where."""


def check_inputs(cfg: CfgNode, *, eval_only: bool, resume: bool, processes: int = 1, writes: bool = False) -> None:
    """Look for the device, the batch, the data, the weights, the method and the teacher that ``cfg`` names.

    Weights at a URL are fetched into Detectron2's cache. Of processes that torchrun starts, the first of each machine
    reads the annotations of the datasets.

    Args:
        cfg: the config of the run.
        eval_only: whether it only evaluates.
        resume: whether it starts from the last checkpoint in OUTPUT_DIR, where there is one.
        processes: that share a batch.
        writes: whether it writes to OUTPUT_DIR, which is then looked at, too.

    Raises:
        PreflightError: something is missing; all of it is listed.
    """
    problems = [
        *_device(cfg),
        *(_output(cfg) if writes else []),
        *([] if eval_only else _batch(cfg, processes)),
        *dataset_problems(cfg, eval_only=eval_only, read=_reads_annotations()),
        *_evaluation(cfg),
        *_detector(cfg),
        *_weights(cfg, eval_only, resume),
    ]
    if cfg.MODEL.META_ARCHITECTURE == DISTILLER:
        problems += [*_method(cfg), *_teacher(cfg)]
    if problems:
        raise PreflightError("This run can't start:\n" + "\n".join(f"- {problem}" for problem in problems))


def _reads_annotations() -> bool:
    """Whether this process is the one of its machine that does; torchrun ends the others if it fails."""
    return "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def _device(cfg: CfgNode) -> list[str]:
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        return [
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but torch {torch.__version__} finds no GPU: to run on "
            "the CPU, put `MODEL.DEVICE cpu` at the end of the command line, after all options"
        ]
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE not in ("float16", "bfloat16"):
        return [f"SOLVER.AMP.DTYPE is {cfg.SOLVER.AMP.DTYPE!r}: set it to float16 or bfloat16"]
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.DTYPE != "bfloat16":
        return ["SOLVER.AMP trains in float16 on GPUs only: on a CPU set SOLVER.AMP.DTYPE to bfloat16"]
    return []


def _output(cfg: CfgNode) -> list[str]:
    if not cfg.OUTPUT_DIR:
        return ["OUTPUT_DIR is empty: name the folder that the run writes to"]
    try:
        check_writable(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    except OSError as error:
        return [str(error)]
    return []


def _batch(cfg: CfgNode, processes: int) -> list[str]:
    try:
        check_batch(cfg, processes)
    except ValueError as error:
        return [str(error)]
    return []


def _detector(cfg: CfgNode) -> list[str]:
    try:
        return find_unregistered(detector_config(cfg), architecture_key(cfg))
    except ValueError as error:
        return [str(error)]


def _evaluation(cfg: CfgNode) -> list[str]:
    """What Detectron2 would find out only when the training is done."""
    problems = []
    for name in cfg.DATASETS.TEST:
        try:
            evaluator_type(name)
        except ValueError as error:
            problems.append(str(error))
    architecture = detector_architecture(cfg)
    if cfg.TEST.AUG.ENABLED and architecture in META_ARCH_REGISTRY:
        kind = architecture_class(architecture)
        reason = ""
        if not (kind and issubclass(kind, GeneralizedRCNN)):
            reason = f"a GeneralizedRCNN, which {architecture} is not"
        elif cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
            reason = "detectors without MODEL.KEYPOINT_ON and MODEL.LOAD_PROPOSALS"
        if reason:
            problems.append(
                f"TEST.AUG.ENABLED is True, but Detectron2 augments at test time only {reason}: set it to False"
            )
    return problems


def _weights(cfg: CfgNode, eval_only: bool, resume: bool) -> list[str]:
    if resume and has_checkpoint(cfg.OUTPUT_DIR):
        return []
    if eval_only and not cfg.MODEL.WEIGHTS:
        return ["MODEL.WEIGHTS is empty: an evaluation needs the checkpoint to evaluate"]
    reason = _unreadable(cfg.MODEL.WEIGHTS)
    if reason:
        advice = "Set MODEL.WEIGHTS to a file that holds these weights, fetched on another machine if need be"
        if not eval_only:
            advice += f"; or, {from_scratch.ADVICE}"
        return [f"MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS}: {reason}. {advice}"]
    return []


def _method(cfg: CfgNode) -> list[str]:
    try:
        build_method(cfg).implementation(torch.device(cfg.MODEL.DEVICE))
    except (RuntimeError, TypeError, ValueError) as error:
        return [str(error)]
    return []


def _teacher(cfg: CfgNode) -> list[str]:
    try:
        teacher = teacher_config(cfg)
    except (OSError, ValueError) as error:
        return [str(error)]
    problems = find_unregistered(teacher, place=f" of {cfg.GKD.TEACHER.CONFIG_FILE}")
    if _reads_annotations():
        problems += teacher_class_problems(cfg, teacher)
    reason = _unreadable(cfg.GKD.TEACHER.WEIGHTS, ", nor in the folder of the config file that sets the key")
    if reason:
        problems.append(
            f"GKD.TEACHER.WEIGHTS is {cfg.GKD.TEACHER.WEIGHTS}: {reason}. Train the teacher first, "
            f"`python tools/train_net.py --config-file {cfg.GKD.TEACHER.CONFIG_FILE}`, or set GKD.TEACHER.WEIGHTS to "
            "the checkpoint of one"
        )
    return problems


def _unreadable(path: str, also: str = "") -> str:
    """Why weights can't be read, or nothing; ``also`` says where they are looked for after the working folder."""
    if not path:
        return ""
    if "://" in path:
        print(f"Fetching {path}, unless Detectron2's cache holds it", flush=True)
    try:
        # The downloader's own report of a failure would stand before the one that says what to do.
        with contextlib.redirect_stderr(io.StringIO()):
            local = PathManager.get_local_path(path)
    except Exception as error:  # every kind of URL has its own
        return f"it can't be fetched ({str(error) or type(error).__name__})"
    if not os.path.isfile(local):
        place = "" if os.path.isabs(path) else f" in the working folder, {os.getcwd()}{also}"
        return f"there is no such file{place}"
    damage = find_damage(local)
    # That of a URL is in Detectron2's cache.
    return damage and (f"its copy {local} {damage}; remove that to fetch it again" if "://" in path else f"it {damage}")
