"""Importances of cells, and whether they are the cells of objects."""

import re

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import ARCHITECTURES, Scorer, SplitScorer, training_batch

from gkd_d2 import register_split
from gkd_d2.analysis.importance_maps import cells_in_boxes, level_importances, placed_map, take_importance_picture
from gkd_d2.analysis.importance_report import ImportanceReport, report_text
from gkd_d2.losses import gradient_map
from gkd_d2.modeling.split import registry, split_detector
from gkd_d2.visualize.picture import Place


def test_a_box_has_the_cells_that_it_covers_in_part():
    """Cells of 8 pixels: 9 to 17 across is part of columns 1 and 2, 4 to 8.5 down of rows 0 and 1."""
    empty, broken = [20, 20, 20, 30], [0, 0, float("nan"), 9]
    boxes = torch.tensor([[9, 4, 17, 8.5], [28, 16, 50, 40], empty, broken])
    inside = cells_in_boxes(boxes, (24, 32), (3, 4))
    assert inside.tolist() == [
        [False, True, True, False],
        [False, True, True, False],
        # What reaches beyond the image is cut off.
        [False, False, False, True],
    ]
    assert not cells_in_boxes(boxes[:0], (24, 32), (3, 4)).any()
    # A corner ahead of the image must not count from its other end.
    assert cells_in_boxes(torch.tensor([[-9.0, -9, 8, 8]]), (24, 32), (3, 4)).nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("inside", "place"),
    [
        ([[0, 0, 0], [0, 1, 1]], Place(0.7, True)),
        ([[1, 1, 0], [0, 0, 1]], Place(0.4, False)),
        ([[0, 0, 0], [0, 0, 0]], Place(0.0, False)),
    ],
)
def test_share_and_peak_of_a_map(inside, place):
    values = torch.tensor([[2.0, 0.0, 0.0], [1.0, 5.0, 2.0]])
    found = placed_map(values, torch.tensor(inside, dtype=torch.bool))
    assert found.place == place and found.values is values


def test_a_map_that_is_0_everywhere_lies_nowhere():
    assert placed_map(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)).place is None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_picture_holds_every_importance_of_the_first_image(kind, distiller_config):
    cfg = distiller_config(kind, channels=8)
    cfg.GKD.RECTIFIER = "relu"
    distiller = build_model(cfg).train()
    networks = (distiller, distiller.teacher)
    batch = training_batch(((90, 120), (96, 130)))
    modes = [module.training for network in networks for module in network.modules()]
    with EventStorage():
        seen = distiller.observe(batch, student_grad=True, teacher_grad=True).detached()
        before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
        draws = torch.get_rng_state()
        taken = take_importance_picture(distiller, seen)
    assert torch.equal(torch.get_rng_state(), draws)
    assert [module.training for network in networks for module in network.modules()] == modes
    for network, state in zip(networks, before):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())

    teacher = split_detector(distiller.teacher)
    with torch.no_grad():
        scores = teacher.score_maps(teacher.features(batch)[1])
    for index, level in enumerate(taken.levels):
        assert (level.name, level.stride) == list(distiller.strides.items())[index]
        found = {name: placed.values for name, placed in level.maps.items()}
        assert list(found) == ["channel", "element", "norm", "student", "score"]
        feature, gradient = seen.teacher[index], seen.teacher_grad[index]
        assert torch.equal(found["channel"], gradient_map(feature, gradient, "relu")[0])
        assert torch.equal(found["element"], gradient_map(feature, gradient, "relu", "element")[0])
        for name, expected in (("norm", gradient), ("student", seen.student_grad[index])):
            norm = expected[0].norm(dim=0)
            torch.testing.assert_close(found[name] / found[name].max(), norm / norm.max())
        assert torch.equal(found["score"], scores[level.name][0])
        inside = cells_in_boxes(seen.boxes[0], (96, 160), tuple(found["norm"].shape))
        assert level.area == pytest.approx(inside.float().mean().item()) and inside.any()
        for placed in level.maps.values():
            if placed.place is None:
                assert not placed.values.any()
            else:
                assert placed.place.share == pytest.approx((placed.values[inside].sum() / placed.values.sum()).item())
    assert level.maps["norm"].place and taken.levels[0].maps["channel"].place
    assert taken.padded_size == (96, 160) and len(taken.truth) == 2


def test_a_split_that_scores_no_cells(distiller_config, monkeypatch):
    monkeypatch.setattr(registry, "_SPLITS", dict(registry._SPLITS))
    register_split(Scorer)(SplitScorer)
    distiller = build_model(distiller_config("scorer", channels=8)).train()
    with EventStorage():
        seen = distiller.observe(training_batch(), student_grad=True, teacher_grad=True).detached()
    levels = level_importances(distiller, seen)
    assert [list(level.maps) for level in levels] == [["channel", "element", "norm", "student"]] * 2
    report = ImportanceReport()
    report.add(levels)
    text = report_text(report.result())
    assert re.search(r"\| score +\| – +\| – +\|", text)
    assert (
        "No score at p3, p4: the teacher's heads score no cells there, or its split does not implement score_maps"
        in text
    )
