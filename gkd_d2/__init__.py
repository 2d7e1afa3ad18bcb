"""Gradient-guided knowledge distillation for object detectors, as a Detectron2 project.

Importing the package registers the meta-architecture ``GKDDistiller`` and the datasets. To use it in a Detectron2
program: ``from gkd_d2 import add_gkd_config``, call it on the config before merging a file, and build the model as
always.
"""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ModuleNotFoundError(
        "gkd_d2 needs Detectron2, which is not installed here: run tools/install_detectron2.py of gkd_d2's source "
        "folder with this Python, or follow Detectron2's own installation guide.",
        name="detectron2",
    ) from None

from gkd_d2.config import add_gkd_config
from gkd_d2.data import builtin as _registered_datasets  # noqa: F401
from gkd_d2.detector import SplitDetector, register_split
from gkd_d2.distiller import GKDDistiller
from gkd_d2.losses import LossWeights, distillation_losses

__all__ = [
    "GKDDistiller",
    "LossWeights",
    "SplitDetector",
    "add_gkd_config",
    "distillation_losses",
    "register_split",
]
__version__ = "0.1.0"
