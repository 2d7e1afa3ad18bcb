"""The align convolution and the gradient it gives the detection loss at the aligned feature."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import training_batch

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


@pytest.mark.parametrize("teacher_channels", [8, 12, 20])
def test_aligned_gradients_of_cells_obey_it_cell_by_cell(teacher_channels):
    conv = AlignConv(8, teacher_channels).double()
    feature, gradient = torch.randn(2, 2, 8, 5, 7, dtype=torch.float64)
    aligned = conv.align_gradient(gradient, of_cells=True)
    torch.testing.assert_close(torch.einsum("ts,nthw->nshw", conv.weight[:, :, 0, 0], aligned), gradient)
    torch.testing.assert_close(aligned.mean(dim=(2, 3), keepdim=True), conv.align_gradient(gradient))
    maps = [gradient_map(*pair, importance="element") for pair in ((conv(feature), aligned), (feature, gradient))]
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize("of_cells", [False, True])
def test_fewer_teacher_channels_give_least_squares(of_cells):
    conv = AlignConv(8, 3).double()
    gradient = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    aligned = conv.align_gradient(gradient, of_cells=of_cells)
    weight = conv.weight[:, :, 0, 0]
    wanted = gradient if of_cells else gradient.mean(dim=(2, 3), keepdim=True)
    residual = torch.einsum("ts,nthw->nshw", weight, aligned) - wanted
    assert aligned.shape == (2, 3, *wanted.shape[2:])
    torch.testing.assert_close(torch.einsum("ts,nshw->nthw", weight, residual), torch.zeros_like(aligned))


@pytest.mark.parametrize(("importance", "cells"), [("channel", False), ("element", True)])
def test_gradients_of_cells_are_solved_for_where_they_enter_a_loss(importance, cells, distiller_config):
    cfg = distiller_config("retinanet", channels=8)
    cfg.GKD.IMPORTANCE = importance
    distiller = build_model(cfg).train()
    seen = {}
    # Before the losses are computed of them.
    distiller.method.register_forward_pre_hook(lambda _, args: seen.update({level.name: level for level in args[0]}))
    with EventStorage():
        distiller(training_batch())
    for level in seen.values():
        assert level.student_grad.shape == (level.student.shape if cells else (*level.student.shape[:2], 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    conv = AlignConv(8, 16)
    gradient = torch.randn(2, 8, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aligned = conv.align_gradient(gradient.to(dtype))
    assert aligned.dtype == dtype
    torch.testing.assert_close(aligned.float(), conv.align_gradient(gradient), rtol=0.02, atol=0.01)
