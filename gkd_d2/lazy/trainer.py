"""The trainer of a LazyConfig."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable

from detectron2.config import CfgNode, instantiate
from detectron2.data import samplers
from detectron2.engine import hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from gkd_d2.config.lazy_spec import called_with, is_called
from gkd_d2.data.build import check_batch, seeded_loader
from gkd_d2.data.mapper import FileNamingMapper
from gkd_d2.engine.exact_trainer import ExactTrainer
from gkd_d2.engine.hooks import FirstLines, HookOptions, PeriodicSaver, add_distillation_hooks
from gkd_d2.engine.model_ema import ModelEMA, named_ema
from gkd_d2.engine.output import naming_output
from gkd_d2.engine.resume import draw_seed
from gkd_d2.engine.writers import build_writers
from gkd_d2.lazy.methods import places_of_methods
from gkd_d2.lazy.names import lazy_name
from gkd_d2.lazy.run import LazyRun, is_distilled
from gkd_d2.modeling.backbone import check_timm_images
from gkd_d2.modeling.distiller import GKDDistiller

_WARMUP = f"{WarmupParamScheduler.__module__}.{WarmupParamScheduler.__qualname__}"


class LazyTrainer(ExactTrainer):
    """Trains the ``model`` of a LazyConfig, distilled or alone; see :class:`ExactTrainer`.

    Args:
        cfg: from :func:`gkd_d2.lazy.read.read_lazy`, with a seed: see :func:`settle_lazy_seed`.

    Raises:
        ValueError: the batch can't be shared evenly, no image is left to train on, teacher and student do not match, or
            the images are not what the weights of a backbone of timm were trained with.
    """

    def __init__(self, cfg: DictConfig):
        train = cfg.train
        run = LazyRun(cfg)
        check_batch(run.batch_size, comm.get_world_size(), parts=run.accumulate_steps)
        model = instantiate(cfg.model).to(train.device)
        if not run.distilled:
            check_timm_images(model, run.student.image_format)
        logging.getLogger(__name__).info("Model:\n%s", model)
        optimizer = _build_optimizer(cfg, model)
        super().__init__(
            run,
            model,
            _build_train_loader(cfg),
            optimizer,
            LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), train.max_iter),
            max_iter=train.max_iter,
            seed=train.seed,
            ddp=dict(train.ddp),
        )
        self.cfg = cfg
        built = [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            PeriodicSaver(train.checkpointer.period, train.checkpointer.max_to_keep),
            hooks.EvalHook(train.eval_period, lambda: evaluate(cfg, self.model, self.ema)),
        ]
        if comm.is_main_process():
            writers = build_writers(train.output_dir, train.max_iter)
            built.append(hooks.PeriodicWriter(writers, period=train.log_period))
        self.register_hooks([*built, FirstLines()])
        options = HookOptions(
            vis_period=train.vis_period,
            watch_period=train.watch.period,
            watch_patience=train.watch.patience,
            watch_max_ratio=train.watch.max_ratio,
            balance_start=_balance_start(cfg),
            balance_iters=train.balance.iters,
            balance_max=train.balance.max,
            place=functools.partial(lazy_name, places=places_of_methods(cfg.model)),
        )
        add_distillation_hooks(self, options)


def settle_lazy_seed(cfg: DictConfig, *, resume: bool) -> None:
    """Draw a seed where ``train.seed`` is negative; a resumed run keeps the one it had. Changes ``cfg`` in place.

    Raises:
        ResumeError: config.yaml in the output folder is damaged, or no config.
    """
    if cfg.train.seed < 0:
        cfg.train.seed = draw_seed(cfg.train.output_dir, ("train", "seed"), resume=resume)
    if is_distilled(cfg) and "seed" not in cfg.model:
        cfg.model.seed = cfg.train.seed


def evaluate(cfg: DictConfig, model: nn.Module, ema: ModelEMA | None = None) -> dict:
    """Evaluate a model by ``dataloader.test`` and ``dataloader.evaluator``; nothing is done without these.

    Args:
        cfg: from :func:`gkd_d2.lazy.read.read_lazy`.
        model: a meta-architecture.
        ema: of its weights; evaluated after it, with files in folders of its own.

    Returns:
        The results, as Detectron2's evaluators return them; those of the average under outer keys that end in "_EMA".

    Raises:
        OutputError: the files of the evaluation can't be written to the output folder.
    """
    if OmegaConf.select(cfg, "dataloader.evaluator") is None or OmegaConf.select(cfg, "dataloader.test") is None:
        return {}
    results = _evaluate(cfg, model, cfg.dataloader.evaluator)
    if ema is not None:
        logging.getLogger(__name__).info("Running inference with averaged weights (MODEL_EMA) ...")
        evaluator = copy.deepcopy(cfg.dataloader.evaluator)
        # A folder that is named by reference to another would be moved twice.
        OmegaConf.resolve(evaluator)
        _move_to_ema(evaluator, cfg.train.output_dir)
        with ema.applied():
            results.update(named_ema(_evaluate(cfg, model, evaluator)))
    return results


def _evaluate(cfg: DictConfig, model: nn.Module, evaluator: DictConfig | ListConfig) -> dict:
    folder = cfg.train.output_dir
    with naming_output(folder, f"a file of the evaluation in {folder}"):
        loader = instantiate(_with_mapper(cfg.dataloader.test))
        results = inference_on_dataset(model, loader, instantiate(evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results or {}


def _move_to_ema(node: DictConfig | ListConfig, output_dir: str) -> None:
    """Have an evaluator write to folders of the average's own: inference_EMA/x instead of inference/x.

    Args:
        node: without references; changed in place, with the evaluators within it. Their folders are called ``folder``
            or ``output_dir``, as those of this project and of Detectron2 are.
        output_dir: of the run.
    """
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        value = node[key]
        if isinstance(value, (DictConfig, ListConfig)):
            _move_to_ema(value, output_dir)
        elif key in ("folder", "output_dir") and isinstance(value, str) and value:
            first, *others = os.path.relpath(value, output_dir).split(os.sep)
            if first in (os.curdir, os.pardir):
                node[key] = f"{os.path.normpath(value)}_EMA"
            else:
                node[key] = os.path.join(output_dir, f"{first}_EMA", *others)


def _balance_start(cfg: DictConfig) -> int:
    """The first iteration that is measured for the weights of the losses: see train.balance.start."""
    if cfg.train.balance.start >= 0:
        return cfg.train.balance.start
    if cfg.model.get("init_from_teacher"):
        return 0
    schedule = cfg.lr_multiplier
    if not (isinstance(schedule, DictConfig) and is_called(schedule, _WARMUP)):
        return 0
    return round(schedule.warmup_length * cfg.train.max_iter)


def _build_optimizer(cfg: DictConfig, model: nn.Module) -> Optimizer:
    node = cfg.optimizer.copy()
    node._set_flag("allow_objects", True)
    node.params.model = model
    if (factor := node.params.get("lr_factor_func")) and isinstance(model, GKDDistiller):
        node.params.lr_factor_func = _as_of_student(factor)
    optimizer = instantiate(node)
    clipping = {key.upper(): value for key, value in cfg.train.clip_gradients.items()}
    return maybe_add_gradient_clipping(CfgNode({"SOLVER": {"CLIP_GRADIENTS": clipping}}), optimizer)


def _as_of_student(factor: Callable[[str], float]) -> Callable[[str], float]:
    """A factor of the learning rate by names of parameters, which in a distiller stand below ``student``."""
    return lambda name: factor(name.removeprefix("student."))


def _build_train_loader(cfg: DictConfig) -> DataLoader:
    """What ``dataloader.train`` describes, with batches that depend on the seed and the iteration alone."""
    node = _with_mapper(cfg.dataloader.train)
    sampler = node.get("sampler")
    if sampler is not None and "seed" not in sampler and "seed" in (called_with(sampler) or ()):
        # It would draw one.
        sampler.seed = cfg.train.seed
    try:
        dicts = instantiate(node.dataset)
    # Where no image is left, and where a dataset is empty.
    except AssertionError as error:
        raise ValueError(
            f"DATASETS.TRAIN names {', '.join(LazyRun(cfg).train_sets)}, in which no image is left to train on "
            f"({error}): with DATALOADER.FILTER_EMPTY_ANNOTATIONS, images without objects are left out"
        ) from error
    sampler = instantiate(node.get("sampler"))
    if sampler is None:
        sampler = samplers.TrainingSampler(len(dicts), seed=cfg.train.seed)
    collate = instantiate(node.get("collate_fn"))
    return seeded_loader(
        dicts,
        node.mapper,
        sampler,
        seed=cfg.train.seed,
        batch_size=node.total_batch_size,
        group_by_aspect_ratio=node.get("aspect_ratio_grouping", True),
        num_workers=node.get("num_workers", 0),
        **({"collate_fn": collate} if collate is not None else {}),
    )


def _with_mapper(loader: DictConfig) -> DictConfig:
    """A loader's node whose mapper is built, and names the image that it can't read."""
    node = loader.copy()
    node._set_flag("allow_objects", True)
    if node.get("mapper") is not None:
        node.mapper = FileNamingMapper(instantiate(node.mapper))
    return node
