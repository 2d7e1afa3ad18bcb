"""What a student can imitate: one file a method, each registered under the name that GKD.METHOD or METHODS gives it.

docs/own_method.md shows how to add one.
"""

from gkd_d2.methods.build import build_method
from gkd_d2.methods.crosskd import CrossKD
from gkd_d2.methods.fgd import FGD
from gkd_d2.methods.fgfi import FGFI
from gkd_d2.methods.fitnet import FitNet
from gkd_d2.methods.gkd import GKD
from gkd_d2.methods.logits import Logits
from gkd_d2.methods.loss_weights import keys_without_effect, weights_as_yaml
from gkd_d2.methods.method import (
    BALANCES,
    CALIBRATE,
    METHOD_REGISTRY,
    Level,
    LevelwiseMethod,
    Method,
    Term,
    settle_weights,
)
from gkd_d2.methods.none import Nothing
from gkd_d2.methods.pkd import PKD
from gkd_d2.methods.predictions import BoxPredictions, Predictions, Responses
from gkd_d2.methods.several import Several

__all__ = [
    "BALANCES",
    "BoxPredictions",
    "CALIBRATE",
    "CrossKD",
    "FGD",
    "FGFI",
    "FitNet",
    "GKD",
    "Level",
    "LevelwiseMethod",
    "Logits",
    "METHOD_REGISTRY",
    "Method",
    "Nothing",
    "PKD",
    "Predictions",
    "Responses",
    "Several",
    "Term",
    "build_method",
    "keys_without_effect",
    "settle_weights",
    "weights_as_yaml",
]
