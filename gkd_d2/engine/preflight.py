"""What a run needs is looked for before anything is built."""

from __future__ import annotations

import contextlib
import io
import os

import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from gkd_d2.config import YacsSpec, without_backbone_weights
from gkd_d2.data.build import check_batch
from gkd_d2.engine import from_scratch
from gkd_d2.engine.data_checks import dataset_problems, teacher_class_problems
from gkd_d2.engine.devices import fault_of_device
from gkd_d2.engine.run import Run
from gkd_d2.evaluation import evaluator_type
from gkd_d2.modeling.backbone import build_timm_features
from gkd_d2.utils.checkpoint import file_of_weights
from gkd_d2.utils.checkpoint_files import find_damage
from gkd_d2.utils.files import check_writable
from gkd_d2.utils.last_checkpoint import has_checkpoint
from gkd_d2.utils.random_streams import separate_random_stream
from gkd_d2.utils.timm_models import config_problems, has_timm_backbone


class PreflightError(Exception):
    """A run can't start; the text says for every missing thing what to put where."""


def check_inputs(run: Run, *, eval_only: bool, resume: bool, processes: int = 1, writes: bool = False) -> None:
    """Look for the device, the batch, the data, the weights, the method and the teacher that a run needs.

    Weights at a URL are fetched into Detectron2's cache. Of processes that torchrun starts, the first of each machine
    reads the annotations of the datasets.

    Args:
        run: as its config describes it.
        eval_only: whether it only evaluates.
        resume: whether it starts from the last checkpoint in its output folder, where there is one.
        processes: that share a batch.
        writes: whether it writes to its output folder, which is then looked at, too.

    Raises:
        PreflightError: something is missing; all of it is listed.
    """
    problems = [
        *_device(run),
        *(_output(run) if writes else []),
        *([] if eval_only else _batch(run, processes)),
        *run.model_ema.problems(eval_only=eval_only),
        *dataset_problems(run, eval_only=eval_only, read=_reads_annotations()),
        *_evaluators(run),
        *run.problems(),
        *_detector(run),
        *_weights(run, eval_only, resume),
        *_backbone(run, eval_only, resume),
    ]
    if run.distilled:
        problems += [*_method(run), *_teacher(run)]
    if problems:
        raise PreflightError("This run can't start:\n" + "\n".join(f"- {problem}" for problem in problems))


def _reads_annotations() -> bool:
    """Whether this process is the one of its machine that does; torchrun ends the others if it fails."""
    return "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def _device(run: Run) -> list[str]:
    if fault := fault_of_device(run.device):
        return [
            f"MODEL.DEVICE is {run.device}, {fault}: to run on the CPU, put `MODEL.DEVICE cpu` at the end of the "
            "command line, after all options"
        ]
    if run.amp_dtype not in ("", "float16", "bfloat16"):
        return [f"SOLVER.AMP.DTYPE is {run.amp_dtype!r}: set it to float16 or bfloat16"]
    if run.amp_dtype == "float16" and run.device == "cpu":
        return ["SOLVER.AMP trains in float16 on GPUs only: on a CPU set SOLVER.AMP.DTYPE to bfloat16"]
    return []


def _output(run: Run) -> list[str]:
    if not run.output_dir:
        return ["OUTPUT_DIR is empty: name the folder that the run writes to"]
    try:
        check_writable(run.output_dir, "OUTPUT_DIR")
    except OSError as error:
        return [str(error)]
    return []


def _batch(run: Run, processes: int) -> list[str]:
    try:
        check_batch(run.batch_size, processes, parts=run.accumulate_steps, reference=run.reference_world_size)
    except ValueError as error:
        return [str(error)]
    return []


def _detector(run: Run) -> list[str]:
    try:
        return run.student.problems()
    except ValueError as error:
        return [str(error)]


def _evaluators(run: Run) -> list[str]:
    """What Detectron2 would find out only when the training is done."""
    problems = []
    for name in run.test_sets:
        try:
            evaluator_type(name)
        except ValueError as error:
            problems.append(str(error))
    return problems


def _weights(run: Run, eval_only: bool, resume: bool) -> list[str]:
    if resume and has_checkpoint(run.output_dir):
        return []
    if eval_only and not run.weights:
        return ["MODEL.WEIGHTS is empty: an evaluation needs the checkpoint to evaluate"]
    reason = _unreadable(run.weights)
    if reason:
        advice = "Set MODEL.WEIGHTS to a file that holds these weights, fetched on another machine if need be"
        if not eval_only:
            advice += f"; or, {_without_weights(run)}"
        return [f"MODEL.WEIGHTS is {run.weights}: {reason}. {advice}"]
    return []


def _without_weights(run: Run) -> str:
    cfg = _timm_config(run)
    if cfg is not None and (cfg.MODEL.TIMM.PRETRAINED or cfg.MODEL.TIMM.WEIGHTS):
        key = "WEIGHTS" if cfg.MODEL.TIMM.WEIGHTS else "PRETRAINED"
        return f"to start with the backbone's weights alone, those of MODEL.TIMM.{key}, set MODEL.WEIGHTS to ''"
    return from_scratch.advice(of_timm=cfg is not None, without_weights=False)


def _timm_config(run: Run) -> CfgNode | None:
    """The config of the student where its backbone is timm's."""
    try:
        spec = run.student
    except ValueError:
        return None
    return spec.cfg if isinstance(spec, YacsSpec) and has_timm_backbone(spec.cfg) else None


def _backbone(run: Run, eval_only: bool, resume: bool) -> list[str]:
    """What only timm can tell of a backbone: whether it suits, and whether the weights it starts with can be had."""
    cfg = _timm_config(run)
    # What is wrong with the config itself is among the problems of the detector.
    if cfg is None or config_problems(cfg):
        return []
    if eval_only or (resume and has_checkpoint(run.output_dir)):
        cfg = without_backbone_weights(cfg)
    elif cfg.MODEL.TIMM.PRETRAINED:
        print(f"Fetching timm's weights of {cfg.MODEL.TIMM.NAME}, unless its cache holds them", flush=True)
    try:
        with separate_random_stream(torch.device("cpu"), seed=0):
            build_timm_features(cfg)
    except ValueError as error:
        return [str(error)]
    return []


def _method(run: Run) -> list[str]:
    try:
        run.method().implementation(torch.device(run.device))
    except (RuntimeError, TypeError, ValueError) as error:
        return [str(error)]
    return []


def _teacher(run: Run) -> list[str]:
    try:
        teacher = run.teacher()
    except (OSError, ValueError) as error:
        return [str(error)]
    problems = teacher.spec.problems()
    if _reads_annotations():
        problems += teacher_class_problems(run, teacher)
    # Of a config of yacs.
    also = ", nor in the folder of the config file that sets the key" if teacher.key.startswith("GKD.") else ""
    reason = _unreadable(teacher.weights, also)
    if reason:
        tool = "lazyconfig_train_net.py" if teacher.spec.file.endswith(".py") else "train_net.py"
        train = f", `python tools/{tool} --config-file {teacher.spec.file}`" if teacher.spec.file else ""
        problems.append(
            f"{teacher.key} is {teacher.weights}: {reason}. Train the teacher first{train}, or set {teacher.key} to "
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
            local = PathManager.get_local_path(file_of_weights(path))
    except Exception as error:  # every kind of URL has its own
        return f"it can't be fetched ({str(error) or type(error).__name__})"
    if not os.path.isfile(local):
        place = "" if os.path.isabs(path) else f" in the working folder, {os.getcwd()}{also}"
        return f"there is no such file{place}"
    damage = find_damage(local)
    # That of a URL is in Detectron2's cache.
    return damage and (f"its copy {local} {damage}; remove that to fetch it again" if "://" in path else f"it {damage}")
