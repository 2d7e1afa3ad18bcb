"""The weights that the losses are timed with."""

from detectron2.config import get_cfg

from gkd_d2 import LossWeights, add_gkd_config
from gkd_d2.analysis.benchmark.losses import WEIGHTS


def test_the_default_weights_are_a_config_s():
    cfg = get_cfg()
    add_gkd_config(cfg)
    # The relation loss is none of those that the extension computes.
    relation = cfg.GKD.LOSS_WEIGHTS.pop("RELATION")
    weights = LossWeights(**{name.lower(): value for name, value in cfg.GKD.LOSS_WEIGHTS.items()})
    assert relation == 0
    assert WEIGHTS["default"] == weights
    # What makes the difference of two passes.
    assert weights.attention == 0 and WEIGHTS["all"].attention > 0
