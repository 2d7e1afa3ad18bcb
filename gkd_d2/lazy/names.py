"""What the keys of yacs are called in a LazyConfig, for messages that name them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import sys
from collections.abc import Iterator

from gkd_d2.losses.options import LossOptions

# What is not here and no option of the method has no counterpart.
_NAMES = {
    "DATALOADER.ASPECT_RATIO_GROUPING": "dataloader.train.aspect_ratio_grouping",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": "dataloader.train.dataset.filter_empty",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "GKD.BALANCE": "model.balance",
    "GKD.BALANCE_ITERS": "train.balance.iters",
    "GKD.BALANCE_MAX": "train.balance.max",
    "GKD.FEATURES": "model.features",
    "GKD.FGD.ATTENTION_WEIGHT": "model.method.attention",
    "GKD.FGD.BACKGROUND_WEIGHT": "model.method.background",
    "GKD.FGD.FOREGROUND_WEIGHT": "model.method.foreground",
    "GKD.FGD.RELATION_WEIGHT": "model.method.relation",
    "GKD.FGD.TEMPERATURE": "model.method.temperature",
    "GKD.FGFI.LEVELS": "model.method.levels",
    "GKD.FGFI.THRESHOLD": "model.method.threshold",
    "GKD.FGFI.WEIGHT": "model.method.weight",
    "GKD.FITNET.WEIGHT": "model.method.weight",
    "GKD.LOSS_WEIGHTS.ATTENTION": "model.method.weights.attention",
    "GKD.LOSS_WEIGHTS.BOX": "model.method.weights.box",
    "GKD.LOSS_WEIGHTS.GRADIENT": "model.method.weights.gradient",
    "GKD.LOSS_WEIGHTS.IMAGE": "model.method.weights.image",
    "GKD.LOSS_WEIGHTS.RELATION": "model.method.relation",
    "GKD.METHOD": "model.method",
    "GKD.ONE_PASS": "model.one_pass",
    "GKD.PKD.WEIGHT": "model.method.weight",
    "GKD.RATIOS": "model.ratios",
    "GKD.STUDENT.INIT_FROM_TEACHER": "model.init_from_teacher",
    "GKD.TEACHER.CLASSES": "model.teacher_classes",
    "GKD.TEACHER.CONFIG_FILE": "model.teacher",
    "GKD.TEACHER.OPTS": "teacher_opts of distil",
    "GKD.TEACHER.FEATURES": "model.teacher_features",
    "GKD.TEACHER.ROI_BATCH_SIZE": "model.teacher.roi_heads.batch_size_per_image",
    "GKD.TEACHER.WEIGHTS": "model.teacher_weights",
    "GKD.VIS_PERIOD": "train.vis_period",
    "GKD.WARMUP_ITERS": "model.warmup_iters",
    "GKD.WATCH_MAX_RATIO": "train.watch.max_ratio",
    "GKD.WATCH_PATIENCE": "train.watch.patience",
    "GKD.WATCH_PERIOD": "train.watch.period",
    "INPUT.FORMAT": "image_format",
    "MODEL_EMA": "train.model_ema",
    "MODEL_EMA.DECAY": "train.model_ema.decay",
    "MODEL_EMA.DEVICE": "train.model_ema.device",
    "MODEL_EMA.ENABLED": "train.model_ema.enabled",
    "MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY": "train.model_ema.use_ema_weights_for_eval_only",
    "MODEL.BACKBONE.FREEZE_AT": "the backbone's freeze_at",
    "MODEL.DEVICE": "train.device",
    "MODEL.FPN.IN_FEATURES": "the backbone's out_features",
    "MODEL.FPN.NORM": "the pyramid's norm",
    "MODEL.KEYPOINT_ON": "dataloader.train.mapper.use_keypoint",
    "MODEL.MASK_ON": "dataloader.train.mapper.use_instance_mask",
    "MODEL.PIXEL_MEAN": "pixel_mean",
    "MODEL.PIXEL_STD": "pixel_std",
    "MODEL.RESNETS.NORM": "the backbone's norm",
    # Of gkd_d2.modeling.backbone.TimmFeatures.
    "MODEL.TIMM.FREEZE_AT": "the backbone's freeze_at",
    "MODEL.TIMM.NAME": "the backbone's name",
    "MODEL.TIMM.NORM": "the backbone's norm",
    "MODEL.TIMM.OUT_INDICES": "the backbone's out_indices",
    "MODEL.TIMM.PRETRAINED": "the backbone's pretrained",
    "MODEL.TIMM.WEIGHTS": "the backbone's weights",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "SOLVER.ACCUMULATE_STEPS": "train.accumulate_steps",
    "SOLVER.AMP": "train.amp",
    "SOLVER.AMP.DTYPE": "train.amp.dtype",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.CLIP_GRADIENTS": "train.clip_gradients",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SOLVER.MAX_ITER": "train.max_iter",
}
# Options of the method, such as GKD.MAP_REGION.
_OF_METHOD = {f"GKD.{field.name.upper()}" for field in dataclasses.fields(LossOptions)} | {"GKD.IMPLEMENTATION"}
# Not within a path.
_KEY = re.compile(r"(?<![\w./-])(?:[A-Z][A-Z_]*(?:\.[A-Z][A-Z0-9_]*)+|OUTPUT_DIR|SEED)(?![\w/-]|\.\w)")
# What is said of a run of yacs, and what instead.
_PHRASES = {
    ", as gkd_d2.config.read_config does by itself": "",
    "name that module in GKD.IMPORTS or by --import": "import that module in the config",
    "; tools/suggest_weights.py measures it over many batches": "",
    "DATASETS names ": "dataloader names ",
}
# Key and value as on the command line of tools/train_net.py.
_PAIR = re.compile(rf"`({_KEY.pattern}) ([^`]+)`")


def in_lazy_words(text: str) -> str:
    """A message with the names that a LazyConfig has for the keys of yacs in it."""
    for phrase, other in _PHRASES.items():
        text = text.replace(phrase, other)
    text = _PAIR.sub(lambda pair: f"`{lazy_name(pair[1])}={pair[2]}`", text)
    return _KEY.sub(lambda key: lazy_name(key[0]), text)


def lazy_name(key: str) -> str:
    """The name of a key of yacs in a LazyConfig; the key itself where it has no counterpart."""
    if key in _OF_METHOD:
        return f"model.method.{key.removeprefix('GKD.').lower()}"
    if key.startswith("GKD.RATIOS."):
        return f"model.ratios.{key.removeprefix('GKD.RATIOS.').lower()}"
    return _NAMES.get(key, key)


@contextlib.contextmanager
def speaking_lazily() -> Iterator[None]:
    """Have what this project logs, and the sentence that ends a process, name the keys of a LazyConfig.

    Raises:
        SystemExit: as in the statements of the ``with``.
    """
    make = logging.getLogRecordFactory()

    def translated(*args, **kwargs) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.name.startswith("gkd_d2."):
            record.msg, record.args = in_lazy_words(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(translated)
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.exit(in_lazy_words(end.code))
        raise
    finally:
        logging.setLogRecordFactory(make)
