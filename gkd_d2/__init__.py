"""Gradient-guided knowledge distillation for object detectors, as a Detectron2 project.

A student detector learns from the ground truth and from the features of a frozen teacher. The gradient of each
network's own detection loss says which features matter; the student imitates those, at several grains inside and
around the ground-truth boxes. Importing the package registers the meta-architecture ``GKDDistiller`` and the datasets.

To distil the detector of a Detectron2 config, name its teacher and build the model as always:

>>> from detectron2.config import get_cfg
>>> from detectron2.modeling import build_model
>>> from gkd_d2 import add_gkd_config
>>> cfg = get_cfg()
>>> add_gkd_config(cfg)
>>> cfg.merge_from_file("student.yaml")
>>> cfg.GKD.STUDENT.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
>>> cfg.MODEL.META_ARCHITECTURE = "GKDDistiller"
>>> cfg.GKD.TEACHER.CONFIG_FILE = "teacher.yaml"
>>> cfg.GKD.TEACHER.WEIGHTS = "teacher.pth"
>>> model = build_model(cfg)

In training the model returns the student's losses and those of ``cfg.GKD.METHOD``; otherwise it is the student.
``Trainer`` of ``gkd_d2.engine.trainer`` trains it, and so does ``tools/train_net.py`` where these keys stand in a
config file. For a LazyConfig there are ``gkd_d2.lazy.distil`` and tools/lazyconfig_train_net.py: docs/lazy.md.

The four losses of the method gkd by themselves, for features of one level or several and their gradients. Weights and
options that are not given are a config's defaults, by which the attention loss is off:

>>> import torch
>>> from gkd_d2 import LossWeights, distillation_losses
>>> student = torch.rand(2, 8, 32, 32, requires_grad=True)
>>> teacher, student_grad, teacher_grad = torch.rand(3, 2, 8, 32, 32)
>>> boxes = [torch.tensor([[10.0, 20.0, 90.0, 80.0]]), torch.zeros(0, 4)]  # of each image, xyxy in pixels
>>> weights = LossWeights(attention=5e-4)
>>> losses = distillation_losses(
...     [student], [teacher], [student_grad], [teacher_grad], boxes, (128, 128), weights=weights
... )
>>> list(losses)
['loss_gkd_gradient', 'loss_bmfi_box', 'loss_bmfi_attention', 'loss_bmfi_image']
>>> sum(losses.values()).backward()

Where to go next: ``python -m gkd_d2.config_docs`` lists the config's keys, ``python -m gkd_d2.collect_env`` says what
is installed; ``register_split`` adds meta-architectures other than GeneralizedRCNN, RetinaNet and FCOS,
``METHOD_REGISTRY`` methods of distillation beside those of this project; a ``Listener`` is told what both
networks make of each batch. In the source folder README.md leads through a training, docs/method.md has the formulas
and docs/datasets.md the data.
"""

import logging
import warnings

try:
    import detectron2

    with warnings.catch_warnings():
        # Detectron2 and fvcore script functions when they are imported, and torch warns of each.
        warnings.filterwarnings("ignore", "`torch.jit.script` is", FutureWarning)
        import detectron2.modeling  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ModuleNotFoundError(
        "gkd_d2 needs Detectron2, which is not installed here: run tools/install_detectron2.py of gkd_d2's source "
        "folder with this Python, or follow Detectron2's own installation guide.",
        name="detectron2",
    ) from None

from gkd_d2.config import add_gkd_config
from gkd_d2.data.datasets import builtin as _registered_datasets  # noqa: F401
from gkd_d2.losses import LossWeights, distillation_losses
from gkd_d2.methods import METHOD_REGISTRY, Level, LevelwiseMethod, Method, Term
from gkd_d2.modeling import backbone as _registered_backbones  # noqa: F401
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.observation import Listener, Observation
from gkd_d2.modeling.split import SplitDetector, register_split

# What Detectron2's setup_logger prints and writes to log.txt holds this package's messages too.
logging.getLogger("gkd_d2").parent = logging.getLogger("detectron2")

__all__ = [
    "METHOD_REGISTRY",
    "GKDDistiller",
    "Level",
    "LevelwiseMethod",
    "Listener",
    "LossWeights",
    "Method",
    "Observation",
    "SplitDetector",
    "Term",
    "add_gkd_config",
    "distillation_losses",
    "register_split",
]
__version__ = "0.1.0"
