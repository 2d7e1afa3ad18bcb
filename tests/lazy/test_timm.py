"""Backbones of timm in LazyConfigs."""

import logging
from pathlib import Path

import pytest
import torch
from lazy_configs import write_distilled, write_plain

timm = pytest.importorskip("timm")

from gkd_d2.lazy.names import speaking_lazily  # noqa: E402
from gkd_d2.lazy.trainer import LazyTrainer  # noqa: E402

NAME = "mobilenetv3_small_050"
# As timm has it for ImageNet, of RGB.
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
RGB = [f"pixel_mean={MEAN}", f"pixel_std={STD}", "input_format=RGB"]
BGR = [f"pixel_mean={MEAN[::-1]}", f"pixel_std={STD[::-1]}", "input_format=BGR"]


def on_timm(path, detector="model"):
    """Put a detector of a file on a network of timm, that starts with the weights in weights.pth."""
    weights = path.with_name("weights.pth")
    if not weights.is_file():
        torch.save(timm.create_model(NAME).state_dict(), weights)
    path.write_text(
        f"""{path.read_text()}
from gkd_d2.modeling.backbone import TimmFeatures
{detector}.backbone.bottom_up = L(TimmFeatures)(
    name="{NAME}", out_features=["res3", "res4", "res5"], weights="{weights}", norm="BN",
)
{detector}.backbone.top_block.in_channels = 288
"""
    )
    return path


@pytest.fixture
def build(read):
    """A function that builds the trainer of a plain detector or of a student, with changes to its model."""

    def make(path, changes, detector="model"):
        order = changes[-1].partition("=")[2]
        overrides = [f"{detector}.{change}" for change in changes]
        cfg = read(path, *overrides, f"dataloader.train.mapper.image_format={order}")
        Path(cfg.train.output_dir).mkdir(exist_ok=True)
        return LazyTrainer(cfg)

    return make


@pytest.mark.parametrize("distilled", [False, True])
def test_weights_need_their_images(distilled, build, tmp_path, caplog):
    detector = "model.student" if distilled else "model"
    path = on_timm((write_distilled if distilled else write_plain)(tmp_path), detector)

    def made(*changes):
        with caplog.at_level(logging.WARNING, logger="gkd_d2.modeling.backbone"), speaking_lazily():
            caplog.clear()
            build(path, changes, detector)
        return caplog.text

    bgr = "backbone.bottom_up.image_format=BGR"
    assert "normalised" not in made(*RGB) and "normalised" not in made(bgr, *BGR)
    with pytest.raises(ValueError, match=f"images are BGR, .* {NAME}, takes them for RGB: .* image_format='BGR'"):
        made(*BGR)
    with pytest.raises(ValueError, match="images are RGB, .* takes them for BGR"):
        made(bgr, *RGB)
    # A mean of BGR for RGB.
    assert "normalised as for the weights" in made(*BGR[:2], RGB[2])
    with pytest.raises(ValueError, match=r"are Detectron2's defaults: .* with \[103.53, 116.28, 123.675\] and "):
        made(bgr, BGR[0], "pixel_std=[1.0, 1.0, 1.0]", BGR[2])
    # Without weights any order and values may do.
    assert not made("backbone.bottom_up.weights=''", BGR[0], "pixel_std=[1.0, 1.0, 1.0]", BGR[2])
