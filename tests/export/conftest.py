"""A student to export, and a picture."""

import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from tiny import calm, detector_config


@pytest.fixture
def retinanet(tmp_path):
    """The config of a tiny RetinaNet that detects something, and a checkpoint of it."""
    cfg = detector_config("retinanet")
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    path = tmp_path / "model_final.pth"
    torch.save({"model": calm(build_model(cfg)).state_dict()}, path)
    return cfg, path


@pytest.fixture
def picture(tmp_path):
    """A file of 200 x 60 pixels, blue on the left, red on the right."""
    image = Image.new("RGB", (200, 60), "red")
    image.paste("blue", (0, 0, 100, 60))
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"
