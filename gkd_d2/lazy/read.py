"""LazyConfigs for lazyconfig_train_net.py, read and checked."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Sequence

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.parallel import DistributedDataParallel

from gkd_d2.config.differences import flattened
from gkd_d2.config.lazy_spec import load_lazy, override_lazy
from gkd_d2.utils.text import did_you_mean, listed

# As in Detectron2's configs/common/train.py, with what this project adds, named after keys of yacs.
_TRAIN = {
    "output_dir": "./output",
    "init_checkpoint": "",
    "max_iter": 90000,
    "amp": {"enabled": False, "dtype": "float16"},  # SOLVER.AMP
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    "checkpointer": {"period": 5000, "max_to_keep": 100},
    # MODEL_EMA, as detrex has it.
    "model_ema": {"enabled": False, "decay": 0.999, "device": "", "use_ema_weights_for_eval_only": False},
    "eval_period": 5000,
    "log_period": 20,
    "device": "cuda",
    "seed": -1,  # SEED
    "cudnn_benchmark": False,  # CUDNN_BENCHMARK
    "float32_precision": "",  # FLOAT32_PRECISION, of Detectron2's HEAD
    "accumulate_steps": 1,  # SOLVER.ACCUMULATE_STEPS
    "clip_gradients": {"enabled": False, "clip_type": "value", "clip_value": 1.0, "norm_type": 2.0},  # SOLVER
    "vis_period": 0,  # GKD.VIS_PERIOD
    "watch": {"period": 20, "patience": 20, "max_ratio": 10.0},  # GKD.WATCH_*
    # GKD.BALANCE_*. start is the first iteration that is measured; -1: the first of the training with
    # init_from_teacher, else the one after the warm-up of the learning rate.
    "balance": {"start": -1, "iters": 64, "max": 5.0},
}
_LEAST = {
    "max_iter": 1,
    "checkpointer.period": 1,
    "checkpointer.max_to_keep": 1,
    "eval_period": 0,
    "log_period": 1,
    "accumulate_steps": 1,
    "vis_period": 0,
    "watch.period": 1,
    "watch.patience": 1,
    "balance.start": -1,
    "balance.iters": 1,
}
_ABOVE_0 = ("clip_gradients.clip_value", "clip_gradients.norm_type", "balance.max")
# What build_detection_train_loader takes, of which all has its effect here.
_TRAIN_LOADER = (
    "_target_",
    "aspect_ratio_grouping",
    "collate_fn",
    "dataset",
    "mapper",
    "num_workers",
    "sampler",
    "total_batch_size",
)


def read_lazy(config_file: str, overrides: Sequence[str], *, eval_only: bool) -> DictConfig:
    """The LazyConfig of a run, with all keys of ``train`` that lazyconfig_train_net.py knows.

    ``train.device`` "auto" becomes "cuda" where torch finds a GPU, else "cpu".

    Args:
        config_file: with ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train``.
        overrides: key=value.
        eval_only: whether the model is only evaluated, for which the optimizer is not needed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such LazyConfig, an override can't be applied, or a value of ``train`` is out of range or
            not of its type.
    """
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"there is no config file {config_file}")
    if not config_file.endswith(".py"):
        raise ValueError(
            f"{config_file} is no LazyConfig, a .py file: configs of yacs, .yaml, are for tools/train_net.py"
        )
    cfg = load_lazy(config_file)
    needed = ["dataloader.train", "optimizer", "lr_multiplier"]
    if eval_only:
        needed = ["dataloader.test", "dataloader.evaluator"]
    absent = [name for name in needed if OmegaConf.select(cfg, name) is None]
    if absent:
        raise ValueError(
            f"{config_file} has no {listed(absent)}: see configs/lazy for examples; Detectron2's "
            "configs/common has ready parts"
        )
    cfg.train = OmegaConf.merge(_TRAIN, cfg.get("train") or {})
    override_lazy(cfg, [f"+{text}" if _sets_ddp(text) or _sets_ratio(text) else text for text in overrides])
    _check_train(cfg.train)
    if cfg.train.device == "auto":
        cfg.train.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(cfg.train.device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"train.device is {cfg.train.device!r}, which torch does not know: give cuda, cuda:1, cpu or auto"
        ) from error
    return cfg


def _sets_ddp(override: str) -> bool:
    """Whether an override sets an option of DistributedDataParallel, which has more than a config lists."""
    start, _, name = override.partition("=")[0].rpartition(".")
    return start == "train.ddp" and name in inspect.signature(DistributedDataParallel).parameters


def _sets_ratio(override: str) -> bool:
    """Whether an override sets the ratio of a loss, whose names a config need not list."""
    return override.partition("=")[0].rpartition(".")[0] == "model.ratios"


def _check_train(train: DictConfig) -> None:
    """Check the values of ``train`` that are known: each is of the type of its default, and not out of range."""
    for key, default in flattened(_TRAIN):
        value = OmegaConf.select(train, key)
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            raise ValueError(
                f"train.{key} is {value!r}, but must be of the type {type(default).__name__}, as {default!r}"
            )
        if value < _LEAST.get(key, value):
            raise ValueError(f"train.{key} is {value}, but must be at least {_LEAST[key]}")
        if key in _ABOVE_0 and not value > 0:
            raise ValueError(f"train.{key} is {value}, but must be > 0")
    clip_type = train.clip_gradients.clip_type
    if clip_type not in ("value", "norm"):
        raise ValueError(f"train.clip_gradients.clip_type is {clip_type!r}, but must be 'value' or 'norm'")


def keys_without_effect(cfg: DictConfig) -> list[str]:
    """A sentence for each key of ``train``, and of the training loader, that has no meaning here."""
    known = {key for key, _ in flattened(_TRAIN)}
    found = []
    for key, value in cfg.train.items():
        names = [f"{key}.{name}" for name in value] if isinstance(value, DictConfig) and key in _TRAIN else [key]
        # DistributedDataParallel has more options than are listed.
        found += [f"train.{name}" for name in names if name not in known and key != "ddp"]
    loader = OmegaConf.select(cfg, "dataloader.train") or {}
    found += [f"dataloader.train.{name}" for name in loader if name not in _TRAIN_LOADER]
    possible = [f"train.{key}" for key in known]
    return [f"{key} has no effect here{did_you_mean(key, possible)}" for key in found]


def warn_of_keys_without_effect(cfg: DictConfig) -> None:
    """Log :func:`keys_without_effect`, which may be meant for another program."""
    for sentence in keys_without_effect(cfg):
        logging.getLogger(__name__).warning("%s", sentence)
