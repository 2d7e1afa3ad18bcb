"""KITTI's data and schedule, as in configs/Base-RetinaNet-KITTI.yaml and configs/Base-FRCNN-KITTI.yaml."""

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

# It registers the datasets, too.
from gkd_d2.evaluation import build_evaluator

# KITTI's own resolution; batches are padded to 384 x 1248.
resize = dict(short_edge_length=375, max_size=1242)

dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="kitti_train"),
        mapper=L(DatasetMapper)(
            is_train=True,
            augmentations=[L(T.ResizeShortestEdge)(**resize), L(T.RandomFlip)(horizontal=True)],
            image_format="BGR",
        ),
        # 4 GPUs x 4 images.
        total_batch_size=16,
        num_workers=4,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="kitti_val", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(**resize)],
            image_format="${...train.mapper.image_format}",
        ),
        num_workers=4,
    ),
    # COCO's average precision, KITTI's own and VOC's.
    evaluator=L(build_evaluator)(
        dataset_name="${..test.dataset.names}",
        folder="${train.output_dir}/inference/kitti_val",
        kitti_results=False,
        voc_strict=False,
    ),
)

# An epoch of 5,984 images (8:2 split of KITTI's 7,481) is 374 iterations: 12 epochs, steps at 8 and 11.
train = model_zoo.get_config("common/train.py").train
train.max_iter = 4488
train.eval_period = 374
train.checkpointer.period = 1122
train.seed = 1

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[2992, 4114], num_updates=4488),
    warmup_length=500 / 4488,
    warmup_factor=0.001,
)

# 24 epochs, steps at 16 and 22, for teachers.
teacher_max_iter = 8976
teacher_lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[5984, 8228], num_updates=8976),
    warmup_length=500 / 8976,
    warmup_factor=0.001,
)

optimizer = model_zoo.get_config("common/optim.py").SGD
# The authors' limit, there on the norm of all gradients together, here on that of each parameter's.
train.clip_gradients = dict(enabled=True, clip_type="norm", clip_value=35.0)
