"""LazyConfigs for lazyconfig_train_net.py, read and checked."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
from omegaconf import DictConfig, OmegaConf

from gkd_d2.config.lazy_spec import load_lazy, override_lazy
from gkd_d2.utils.text import did_you_mean, listed

# As in Detectron2's configs/common/train.py, and below what this project adds. They are the keys of yacs named beside
# them.
_TRAIN = {
    "output_dir": "./output",
    "init_checkpoint": "",
    "max_iter": 90000,
    "amp": {"enabled": False, "dtype": "float16"},  # SOLVER.AMP
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    "checkpointer": {"period": 5000, "max_to_keep": 100},
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
}


def read_lazy(config_file: str, overrides: Sequence[str], *, eval_only: bool) -> DictConfig:
    """The LazyConfig of a run, with all keys of ``train`` that lazyconfig_train_net.py knows.

    ``train.device`` "auto" becomes "cuda" where torch finds a GPU, else "cpu".

    Args:
        config_file: with ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train``.
        overrides: key=value.
        eval_only: whether the model is only evaluated, for which the optimizer is not needed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such LazyConfig, or an override can't be applied.
    """
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"there is no config file {config_file}")
    if not config_file.endswith(".py"):
        raise ValueError(f"{config_file} is no LazyConfig, .py: configs in YAML are for tools/train_net.py")
    cfg = load_lazy(config_file)
    needed = ["dataloader.test"] if eval_only else ["dataloader.train", "optimizer", "lr_multiplier"]
    absent = [name for name in needed if OmegaConf.select(cfg, name) is None]
    if absent:
        raise ValueError(
            f"{config_file} has no {listed(absent)}: see configs/lazy for examples; Detectron2's "
            "configs/common has ready parts"
        )
    cfg.train = OmegaConf.merge(_TRAIN, cfg.get("train") or {})
    override_lazy(cfg, overrides)
    if cfg.train.device == "auto":
        cfg.train.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(cfg.train.device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"train.device is {cfg.train.device!r}, which torch does not know: give cuda, cuda:1, cpu or auto"
        ) from error
    return cfg


def unknown_train_keys(cfg: DictConfig) -> list[str]:
    """A sentence for each key of ``train`` that has no meaning here."""
    found = []
    for key in cfg.train:
        if key not in _TRAIN:
            found.append(f"train.{key} has no effect here{did_you_mean(str(key), _TRAIN)}")
        elif isinstance(_TRAIN[key], dict):
            known = _TRAIN[key]
            # DistributedDataParallel has more options.
            found += [
                f"train.{key}.{name} has no effect here{did_you_mean(str(name), known)}"
                for name in cfg.train[key]
                if name not in known and key != "ddp"
            ]
    return found


def warn_of_unknown_keys(cfg: DictConfig) -> None:
    """Log :func:`unknown_train_keys`, which may be meant for another program."""
    for sentence in unknown_train_keys(cfg):
        logging.getLogger(__name__).warning("%s", sentence)
