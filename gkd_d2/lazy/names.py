"""What the keys of yacs are called in a LazyConfig, for messages that name them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from gkd_d2.losses.options import LossOptions

# What is neither here nor among the options of a method has no counterpart.
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
    "GKD.METHOD": "model.method",
    "GKD.METHODS": "model.method",
    "GKD.ONE_PASS": "model.one_pass",
    "GKD.RATIOS": "model.ratios",
    "GKD.STUDENT.INIT_FROM_TEACHER": "model.init_from_teacher",
    "GKD.TEACHER.CLASSES": "model.teacher_classes",
    "GKD.TEACHER.CONFIG_FILE": "model.teacher",
    "GKD.TEACHER.OPTS": "teacher_opts of distil",
    "GKD.TEACHER.FEATURES": "model.teacher_features",
    "GKD.TEACHER.PROPOSALS": "model.proposals",
    "GKD.TEACHER.ROI_BATCH_SIZE": "model.teacher.roi_heads.batch_size_per_image",
    "GKD.TEACHER.WEIGHTS": "model.teacher_weights",
    "GKD.VIS_PERIOD": "train.vis_period",
    "GKD.WARMUP_ITERS": "model.warmup_iters",
    "GKD.WATCH_MAX_RATIO": "train.watch.max_ratio",
    "GKD.WATCH_PATIENCE": "train.watch.patience",
    "GKD.WATCH_PERIOD": "train.watch.period",
    "INPUT.FORMAT": "image_format",
    "MODEL.ANCHOR_GENERATOR": "the anchor_generator",
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
    "MODEL.ROI_HEADS.IN_FEATURES": "roi_heads.box_in_features",
    "MODEL.RPN.IN_FEATURES": "proposal_generator.in_features",
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
# Of each method, below its own place.
_OF_METHODS = {
    "crosskd": {
        "GKD.CROSSKD.BOX_WEIGHT": "box_weight",
        "GKD.CROSSKD.CLASS_WEIGHT": "class_weight",
    },
    "fgd": {
        "GKD.FGD.ATTENTION_WEIGHT": "attention",
        "GKD.FGD.BACKGROUND_WEIGHT": "background",
        "GKD.FGD.FOREGROUND_WEIGHT": "foreground",
        "GKD.FGD.RELATION_WEIGHT": "relation",
        "GKD.FGD.TEMPERATURE": "temperature",
    },
    "fgfi": {
        "GKD.FGFI.LEVELS": "levels",
        "GKD.FGFI.THRESHOLD": "threshold",
        "GKD.FGFI.WEIGHT": "weight",
    },
    "fitnet": {
        "GKD.FITNET.WEIGHT": "weight",
    },
    "gkd": {
        "GKD.LOSS_WEIGHTS.ATTENTION": "weights.attention",
        "GKD.LOSS_WEIGHTS.BOX": "weights.box",
        "GKD.LOSS_WEIGHTS.GRADIENT": "weights.gradient",
        "GKD.LOSS_WEIGHTS.IMAGE": "weights.image",
        "GKD.LOSS_WEIGHTS.RELATION": "relation",
        # As GKD.MAP_REGION.
        **{f"GKD.{field.name.upper()}": field.name for field in dataclasses.fields(LossOptions)},
        "GKD.IMPLEMENTATION": "implementation",
    },
    "logits": {
        "GKD.LOGITS.BOX_WEIGHT": "box_weight",
        "GKD.LOGITS.CLASS_WEIGHT": "class_weight",
        "GKD.LOGITS.TEMPERATURE": "temperature",
    },
    "pkd": {
        "GKD.PKD.WEIGHT": "weight",
    },
}
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


def in_lazy_words(text: str, places: Mapping[str, str] = MappingProxyType({})) -> str:
    """A message with the names that a LazyConfig has for the keys of yacs in it.

    Args:
        text: the message.
        places: see :func:`lazy_name`.
    """
    for phrase, other in _PHRASES.items():
        text = text.replace(phrase, other)
    text = _PAIR.sub(lambda pair: f"`{lazy_name(pair[1], places)}={pair[2]}`", text)
    return _KEY.sub(lambda key: lazy_name(key[0], places), text)


def lazy_name(key: str, places: Mapping[str, str] = MappingProxyType({})) -> str:
    """The name of a key of yacs in a LazyConfig; the key itself where it has no counterpart.

    Args:
        key: as GKD.FITNET.WEIGHT.
        places: name of a method -> where it stands, from :func:`gkd_d2.lazy.methods.places_of_methods`; "model.method"
            for a method that is not named.
    """
    for method, names in _OF_METHODS.items():
        if key in names:
            return f"{places.get(method, 'model.method')}.{names[key]}"
    if key.startswith("GKD.RATIOS."):
        return f"model.ratios.{key.removeprefix('GKD.RATIOS.').lower()}"
    return _NAMES.get(key, key)


@contextlib.contextmanager
def speaking_lazily(places: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Have what this project logs, and the sentence that ends a process, name the keys of a LazyConfig.

    Args:
        places: see :func:`lazy_name`.

    Raises:
        SystemExit: as in the statements of the ``with``.
    """
    make = logging.getLogRecordFactory()

    def translated(*args, **kwargs) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.name.startswith("gkd_d2."):
            record.msg, record.args = in_lazy_words(record.getMessage(), places), ()
        return record

    logging.setLogRecordFactory(translated)
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.exit(in_lazy_words(end.code, places))
        raise
    finally:
        logging.setLogRecordFactory(make)
