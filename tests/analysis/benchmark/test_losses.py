"""The settings that the losses are timed with."""

from config_files import read
from detectron2.config import get_cfg

from gkd_d2 import add_gkd_config
from gkd_d2.analysis.benchmark.losses import SETTINGS
from gkd_d2.methods import build_method


def test_the_settings_are_those_of_configs(project):
    default = get_cfg()
    add_gkd_config(default)
    authors = read(project / "configs" / "gkd_retinanet_kitti_authors.yaml")
    for name, cfg in (("default", default), ("authors", authors)):
        method, setting = build_method(cfg), SETTINGS[name]
        assert (method.weights, method.options) == (setting.weights, setting.options)
    # What makes the difference of two passes.
    assert SETTINGS["default"].weights.attention == 0 and SETTINGS["all"].weights.attention > 0
