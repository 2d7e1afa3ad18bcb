"""Operations against counts of the tests' own."""

import pytest
import torch
from detectron2.modeling import build_model
from tiny import calm, detector_config, needs_exporter
from torch import nn

from gkd_d2.analysis.cost import gflops, random_image


def test_random_image_is_always_the_same():
    image = random_image((20, 30))
    assert image.shape == (3, 20, 30)
    assert torch.equal(image, random_image((20, 30)))
    assert 0 <= image.min() < 5 < 250 < image.max() <= 255


def test_operations_of_one_convolution_by_hand():
    """64 x 96 pixels: 3 x 3 x 3 x 8 multiply-adds at every second row and column."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)

        def forward(self, batched_inputs):
            (x,) = batched_inputs
            found = type("Found", (), {"get_fields": lambda _: {"scores": self.conv(x["image"][None])}})
            return [{"instances": found()}]

    assert gflops(Detector().eval(), random_image((64, 96))) == 3 * 3 * 3 * 8 * 32 * 48 / 1e9


@needs_exporter
@pytest.mark.parametrize("kind", ["mask", "retinanet"])
def test_operations_are_those_of_detectron2s_own_analysis(kind):
    from detectron2.utils.analysis import FlopCountAnalysis

    model = calm(build_model(detector_config(kind))).eval()
    image = random_image((96, 128))
    expected = FlopCountAnalysis(model, [{"image": image}]).unsupported_ops_warnings(False).total()
    assert gflops(model, image) == expected / 1e9
