"""The align convolution and the gradient it gives the detection loss at the aligned feature."""

import pytest
import torch

from gkd_d2.losses import gradient_map
from gkd_d2.modeling.align import AlignConv


@pytest.mark.parametrize("teacher_channels", [8, 12, 20])
def test_aligned_gradient_obeys_the_chain_rule_and_keeps_the_map(teacher_channels):
    conv = AlignConv(8, teacher_channels).double()
    feature, gradient = torch.randn(2, 2, 8, 5, 7, dtype=torch.float64)
    aligned = conv.align_gradient(gradient)
    assert aligned.shape == (2, teacher_channels, 1, 1)
    pulled_back = torch.einsum("ts,nthw->nshw", conv.weight[:, :, 0, 0], aligned)
    torch.testing.assert_close(pulled_back, gradient.mean(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(gradient_map(conv(feature), aligned), gradient_map(feature, gradient))


def test_fewer_teacher_channels_give_least_squares():
    conv = AlignConv(8, 3).double()
    gradient = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    aligned = conv.align_gradient(gradient)[:, :, 0, 0]
    weight = conv.weight[:, :, 0, 0]
    residual = aligned @ weight - gradient.mean(dim=(2, 3))
    torch.testing.assert_close(residual @ weight.t(), torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    conv = AlignConv(8, 16)
    gradient = torch.randn(2, 8, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aligned = conv.align_gradient(gradient.to(dtype))
    assert aligned.dtype == dtype
    torch.testing.assert_close(aligned.float(), conv.align_gradient(gradient), rtol=0.02, atol=0.01)
