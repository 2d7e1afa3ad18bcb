"""The keys that this project adds to those of Detectron2."""

from __future__ import annotations

from detectron2.config import CfgNode

# MODEL.META_ARCHITECTURE of a config of this project.
DISTILLER = "GKDDistiller"
# GKD.METHOD of a config that does not set it.
DEFAULT_METHOD = "gkd"


def add_gkd_config(cfg: CfgNode) -> None:
    """Add the nodes GKD, MODEL.TIMM and MODEL_EMA, and two keys of SOLVER, with their defaults to a Detectron2 config.

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
    # The teacher's own training config: one of yacs, .yaml, or a LazyConfig, .py. A relative path is looked for in the
    # working folder, then in the folder of the config file that sets this key, which may be a _BASE_ of --config-file,
    # and then in Detectron2's model zoo, as new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py.
    cfg.GKD.TEACHER.CONFIG_FILE = ""
    # Changes to it: pairs KEY, VALUE for a .yaml, such as ["MODEL.ROI_HEADS.NUM_CLASSES", "3"], and "key=value" for a
    # .py, such as ["model.roi_heads.num_classes=3"].
    cfg.GKD.TEACHER.OPTS = []
    # The teacher's checkpoint; it must set every parameter of the teacher. A relative path is looked for in the same
    # two folders.
    cfg.GKD.TEACHER.WEIGHTS = ""
    # Names of all of the teacher's classes, in its order, where they are not the student's. The student's classes are
    # looked up among them by the names of its training sets, in any case, so that a teacher of COCO's 80 can teach a
    # student of three: docs/datasets.md. Empty: both have the same classes in the same order.
    cfg.GKD.TEACHER.CLASSES = []
    # Names of the teacher's levels, one for each of GKD.FEATURES, where they differ from the student's.
    cfg.GKD.TEACHER.FEATURES = []
    # Proposals an image that a teacher with ROI heads samples for its gradients; 0: as many as its own config says.
    # Fewer are cheaper and make its gradient maps noisier: docs/benchmarks.md.
    cfg.GKD.TEACHER.ROI_BATCH_SIZE = 0
    # Of crosskd and logits with two-stage detectors: number of the teacher's best proposals an image on which what the
    # box heads predict is compared; at 0 only what the RPNs predict is.
    cfg.GKD.TEACHER.PROPOSALS = 128

    # Levels to distil. Empty: those that the heads of both networks use, without max-pooled copies of others.
    cfg.GKD.FEATURES = []

    # What the student imitates: gkd (gradient maps and BMFI), fitnet (all cells alike), fgfi (cells near objects), fgd
    # (foreground and background by the teacher's attention, and relations), pkd (correlation of channels),
    # crosskd (what the teacher's heads predict from the student's features), logits (what the heads of both predict),
    # none (nothing: the student is trained alone), or a method of your own, see docs/own_method.md.
    cfg.GKD.METHOD = DEFAULT_METHOD
    # Several methods at once, such as ["gkd", "fitnet"], in place of GKD.METHOD. The student learns by the losses of
    # all of them, each with its own options and weights or ratios: docs/loss_weights.md. Empty: GKD.METHOD alone.
    # On the command line: GKD.METHODS "['gkd','fitnet']".
    cfg.GKD.METHODS = []
    # Options of a method of your own: whatever keys it reads.
    cfg.GKD.METHOD_OPTIONS = CfgNode(new_allowed=True)

    # How the weights of the losses are given: fixed, by each method's own keys of weights, or calibrate. Then
    # GKD.RATIOS says how hard each loss pulls, and its weight is measured once, in the first iterations with
    # GKD.STUDENT.INIT_FROM_TEACHER, and in the first after SOLVER.WARMUP_ITERS without: docs/loss_weights.md.
    cfg.GKD.BALANCE = "fixed"
    # Under calibrate: how large the gradient of each loss at the student's features is to be beside that of the
    # detection losses, by the name of the loss, such as BOX; at 0.0 the loss is off. A loss that is not named has the
    # ratio that its method gives it.
    cfg.GKD.RATIOS = CfgNode(new_allowed=True)
    # Under calibrate: number of iterations that are measured, over which the weights ramp up.
    cfg.GKD.BALANCE_ITERS = 64
    # Under calibrate: the most that the ratios of all losses together may be afterwards. Where the watch finds more, it
    # warns once, and all weights are smaller until it measures again.
    cfg.GKD.BALANCE_MAX = 5.0

    # Of gkd: weights of its losses; at 0.0 a loss is not computed. The defaults come from studies of toy scenes, see
    # docs/results.md; that of the maps was set anew for GKD.MAP_REGION boxes. tools/suggest_weights.py measures each
    # loss's gradient relative to the detection loss with your detector and data.
    cfg.GKD.LOSS_WEIGHTS = CfgNode()
    cfg.GKD.LOSS_WEIGHTS.GRADIENT = 2e-3
    cfg.GKD.LOSS_WEIGHTS.BOX = 1e-2
    cfg.GKD.LOSS_WEIGHTS.ATTENTION = 0.0
    cfg.GKD.LOSS_WEIGHTS.IMAGE = 1e-3
    # Of gkd: weight of the relation loss, which is that of fgd: imitation of all cells, to each of which a block that
    # trains with the student adds what the whole image holds. It is a sum over cells, unlike the loss of the image. The
    # authors' code has 5e-6 for one-stage and 5e-7 for two-stage detectors; at 0.0 there are no such blocks.
    cfg.GKD.LOSS_WEIGHTS.RELATION = 0.0
    # Of gkd: temperature of the attention softmax, > 0.
    cfg.GKD.TEMPERATURE = 0.5
    # Of gkd: what weighs channels and cells in the imitation: gradient, attention, attention_gradient (attention times
    # gradient, as the authors have it) or uniform.
    cfg.GKD.WEIGHTING = "gradient"
    # Of gkd: what makes the gradient maps non-negative: abs or relu.
    cfg.GKD.RECTIFIER = "abs"
    # Of gkd: where the gradient maps are compared: boxes (in and around the objects, as the authors do) or image (all
    # cells alike). The two need different weights: see "Defaults" in docs/results.md.
    cfg.GKD.MAP_REGION = "boxes"
    # Of gkd: how the importance of a cell is computed from gradients, for the maps and for the weightings by gradients:
    # channel (the paper's map: the mean gradient of each channel), element (the gradient of each element), norm (the
    # norm of the teacher's gradient at the cell) or student (that of the student's). norm and student weight the
    # imitation; the maps are then those of element. The extension supports channel alone.
    cfg.GKD.IMPORTANCE = "channel"
    # Of gkd: the part of a cell's weight in the imitation that is the same for all cells, 0 to 1. Only the reference
    # implementation supports it, and the cap.
    cfg.GKD.IMPORTANCE_FLOOR = 0.0
    # Of gkd: the most that a cell may weigh in the imitation, in multiples of the mean weight, at least 1, before the
    # floor is applied; 0: no limit.
    cfg.GKD.IMPORTANCE_CAP = 0.0
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
    # Of fgd: weights of its four losses, alpha, beta, gamma and lambda of the paper. The values are those of the public
    # code for Faster R-CNN; for RetinaNet it has 1e-3, 5e-4, 5e-4 and 5e-6.
    cfg.GKD.FGD.FOREGROUND_WEIGHT = 5e-5
    cfg.GKD.FGD.BACKGROUND_WEIGHT = 2.5e-5
    cfg.GKD.FGD.ATTENTION_WEIGHT = 5e-5
    cfg.GKD.FGD.RELATION_WEIGHT = 5e-7
    # Of fgd: temperature of the attention softmax, > 0, as in the public code.
    cfg.GKD.FGD.TEMPERATURE = 0.5

    cfg.GKD.PKD = CfgNode()
    # Of pkd: weight of its loss. MMRazor's configs have 6 for Faster R-CNN and 10 for RetinaNet.
    cfg.GKD.PKD.WEIGHT = 6.0

    cfg.GKD.CROSSKD = CfgNode()
    # Of crosskd: weights of its losses of classes and of boxes. The public code for RetinaNet has 1 and 1.
    cfg.GKD.CROSSKD.CLASS_WEIGHT = 1.0
    cfg.GKD.CROSSKD.BOX_WEIGHT = 1.0

    cfg.GKD.LOGITS = CfgNode()
    # Of logits: weights of its losses of classes and of boxes.
    cfg.GKD.LOGITS.CLASS_WEIGHT = 1.0
    cfg.GKD.LOGITS.BOX_WEIGHT = 1.0
    # Of logits: temperature of the class probabilities, > 0.
    cfg.GKD.LOGITS.TEMPERATURE = 1.0

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
    # For kitti/mAP50_voc: count detections on Van, Person_sitting and DontCare as false positives, as the authors' code
    # does, rather than ignore them. Numbers to compare with the paper's need it: docs/datasets.md.
    cfg.GKD.KITTI_VOC_STRICT = False

    cfg.MODEL.TIMM = CfgNode()
    # Of MODEL.BACKBONE.NAME build_timm_fpn_backbone (for R-CNNs) and build_retinanet_timm_fpn_backbone: the model of
    # timm under the feature pyramid, any that gives features of images of any size, with or without the tag of its
    # weights, such as mobilenetv2_100 or mobilenetv2_100.ra_in1k. MODEL.FPN.IN_FEATURES names its features by their
    # strides: res2 (4), res3 (8), res4 (16), res5 (32). MODEL.PIXEL_MEAN and PIXEL_STD become those of timm where they
    # are Detectron2's defaults, and the model is given RGB also where INPUT.FORMAT is BGR. Needs
    # `pip install -e .[timm]`.
    cfg.MODEL.TIMM.NAME = ""
    # Places of these features among those of the model; empty: by their strides.
    cfg.MODEL.TIMM.OUT_INDICES = []
    # Start a training with timm's own weights, which are fetched unless they are in its cache.
    cfg.MODEL.TIMM.PRETRAINED = False
    # Or with those of a file, with timm's names, with or without a classifier; a relative path is looked for in the
    # working folder. It must set all of the network. Both keys are for the start of a training alone: a teacher, an
    # evaluation, a resume and an export have whole checkpoints. What MODEL.WEIGHTS holds is loaded after them and takes
    # their place: where it names a whole detector's, set neither key.
    cfg.MODEL.TIMM.WEIGHTS = ""
    # What the model's BatchNorms become: FrozenBN, BN or SyncBN. Norms of other kinds, as ConvNeXt's, stay.
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    # All that makes the feature of stride 2 to the power of this is frozen, its BatchNorms too; 0: nothing is.
    # MODEL.BACKBONE.FREEZE_AT is for Detectron2's ResNets alone.
    cfg.MODEL.TIMM.FREEZE_AT = 2

    cfg.MODEL_EMA = CfgNode()
    # Keep an exponential moving average of the weights of the detector that is trained, a student or another: it is
    # evaluated after the raw weights, as bbox_EMA/AP and so on, and saved beside them as ema_state. Raw weights and
    # losses are as without it. The keys are those of d2go: docs/reliability.md.
    cfg.MODEL_EMA.ENABLED = False
    # The part of the average that stays at each of the optimizer's steps, at least 0 and below 1. It looks back over
    # about 1 / (1 - DECAY) steps, which should be few in proportion to those of the training.
    cfg.MODEL_EMA.DECAY = 0.999
    # Of the average: cpu spares the GPU's memory and costs a transfer at each step; empty: the device of the model.
    cfg.MODEL_EMA.DEVICE = ""
    # With --eval-only: evaluate the average alone, in place of the raw weights, instead of both. Its results then have
    # the names of the raw ones.
    cfg.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY = False

    # A batch of SOLVER.IMS_PER_BATCH images is computed in so many parts one after the other, to save memory; their
    # gradients are averaged, as those of so many GPUs would be. An iteration stays one batch and one step.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # Of autocast where SOLVER.AMP.ENABLED is set: float16 (on GPUs, with a gradient scaler) or bfloat16.
    cfg.SOLVER.AMP.DTYPE = "float16"
