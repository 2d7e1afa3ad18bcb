"""Pictures: what they show, and where it lies."""

import dataclasses

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from gkd_d2.visualize.draw import draw, draw_importances, render
from gkd_d2.visualize.picture import LevelImportances, LevelMaps, Picture, Place, PlacedMap


def objects(size, boxes=(), classes=(), scores=None):
    """Instances of ground truth, or of detections where there are scores."""
    prefix = "gt" if scores is None else "pred"
    instances = Instances(size)
    instances.set(f"{prefix}_boxes", Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
    instances.set(f"{prefix}_classes", torch.tensor(classes, dtype=torch.int64))
    if scores is not None:
        instances.scores = torch.tensor(scores)
    return instances


def picture(levels, *, size=(40, 56), padded_size=(64, 64), value=0, truth=None, teacher=None, student=None):
    """A picture of one colour."""
    return Picture(
        image=np.full((*size, 3), value, dtype=np.uint8),
        padded_size=padded_size,
        levels=levels,
        truth=truth or objects(size),
        teacher=teacher or objects(size, scores=[]),
        student=student or objects(size, scores=[]),
    )


def maps(teacher, student=None, mask=None, *, name="p3", stride=8):
    zero = torch.zeros_like(teacher)
    return LevelMaps(name, stride, teacher, zero if student is None else student, zero if mask is None else mask)


def cell(row, column):
    """8 x 8 cells, one of them 1."""
    values = torch.zeros(8, 8)
    values[row, column] = 1
    return values


def pixel_reader(figure, panel):
    """Colour, 0 to 255, at a point of the image that a panel shows."""
    pixels = render(figure)

    def read(x, y):
        column, row = figure.axes[panel].transData.transform((x, y))
        return pixels[int(len(pixels) - row), int(column)].astype(int)

    return read


@pytest.mark.parametrize("panel", [4, 6])
def test_a_cell_covers_its_pixels_and_padding_is_cut_off(panel):
    """Cell (2, 3) at stride 8 is the pixels 24 to 32 across and 16 to 24 down, in a map and the difference."""
    figure = draw(picture([maps(cell(2, 3))]))
    read = pixel_reader(figure, panel)
    inside = [(24.3, 16.3), (31.7, 16.3), (24.3, 23.7), (31.7, 23.7)]
    outside = [(23.7, 20), (32.3, 20), (28, 15.7), (28, 24.3)]
    assert min(read(*point).sum() for point in inside) > 200
    assert max(read(*point).sum() for point in outside) < 20
    axes = figure.axes[panel]
    assert axes.get_xlim() == (0, 56) and axes.get_ylim() == (40, 0)


def test_differences_are_red_where_the_teacher_leads_and_blue_where_the_student_does():
    figure = draw(picture([maps(cell(1, 1), cell(3, 4))]))
    read = pixel_reader(figure, 6)
    red, _, blue = read(12, 12)
    assert red > 200 > 100 > blue
    red, _, blue = read(36, 28)
    assert blue > 200 > 100 > red


@pytest.mark.parametrize(
    ("size", "panel"), [((100, 400), (400, 100)), ((300, 300), (300, 300)), ((500, 100), (60, 300))]
)
def test_panels_keep_the_aspect_of_the_image(size, panel):
    figure = draw(picture([maps(cell(0, 0))], size=size, padded_size=(512, 512)))
    render(figure)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 3 + 4
    for axes in shown:
        extent = axes.get_window_extent()
        assert (extent.width, extent.height) == pytest.approx(panel, abs=0.5)
        assert 0 <= extent.x0 and extent.x1 <= figure.bbox.width


@pytest.mark.parametrize("count", [1, 5])
def test_a_row_a_level(count):
    levels = [
        maps(torch.full((4, 6), 0.75), torch.full((4, 6), 0.25), name=f"p{3 + i}", stride=8 * 2**i)
        for i in range(count)
    ]
    figure = draw(picture(levels))
    assert len(figure.axes) == 4 * (1 + count)
    for index in range(count):
        row = figure.axes[4 * (1 + index) :][:4]
        assert row[0].texts[0].get_text() == f"p{3 + index}\nstride {8 * 2**index}\n4 × 6"
        assert [axes.get_title() for axes in row] == [
            "teacher's map",
            "student's map",
            "difference (mean absolute 0.500)",
            "box context mask",
        ]


def test_objects_are_drawn_from_the_score_on():
    size = (40, 56)
    shown = picture(
        [maps(cell(0, 0))],
        truth=objects(size, [[1, 2, 11, 22]], [1]),
        teacher=objects(size, [[3, 20, 13, 30], [0, 0, 9, 9]], [0, 2], [0.8, 0.2]),
        student=objects(size, [[5, 6, 7, 8]], [0], [0.3]),
    )
    figure = draw(shown, class_names=["Car", "Pedestrian", "Cyclist"], score=0.3, title="street")
    truth, teacher, student = figure.axes[:3]
    assert [axes.get_title() for axes in (truth, teacher, student)] == [
        "ground truth: 1",
        "teacher: 1 of score ≥ 0.3",
        "student: 1 of score ≥ 0.3",
    ]
    (box,) = teacher.patches
    assert box.get_bbox().extents.tolist() == [3, 20, 13, 30]
    (text,) = teacher.texts
    assert text.get_text() == "0.80"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Car", "Pedestrian"]
    assert figure.texts[0].get_text() == "street"
    # The ground truth again, over every map.
    for axes in figure.axes[4:8]:
        (box,) = axes.patches
        assert box.get_bbox().extents.tolist() == [1, 2, 11, 22]
    legend = draw(shown).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["class 0", "class 1"]


def test_an_image_without_objects_and_maps_that_are_not_finite():
    """What is nowhere weighted, and what has no value, leaves the image as it is: grey 200, darkened to 150."""
    broken = cell(2, 3)
    broken[2, 3] = float("nan")
    figure = draw(picture([maps(broken)], value=200))
    assert figure.axes[4].get_title() == "teacher's map"
    assert figure.axes[5].get_title() == "student's map (0 everywhere)"
    assert pixel_reader(figure, 4)(28, 20).tolist() == [150, 150, 150]
    assert pixel_reader(figure, 7)(28, 20).tolist() == [150, 150, 150]
    assert figure.legends == []


def test_masks_share_one_scale():
    """A weight looks alike at every level."""
    fine, coarse = torch.zeros(8, 8), torch.full((4, 4), 0.25)
    fine[:4], fine[4:] = 0.001, 0.25
    figure = draw(picture([maps(fine, mask=fine), maps(coarse, mask=coarse, name="p4", stride=16)], size=(64, 64)))
    light, heavy, other = (
        pixel_reader(figure, panel)(x, y).tolist() for panel, x, y in ((7, 10, 10), (7, 10, 50), (11, 10, 10))
    )
    assert heavy == other
    assert sum(light) < sum(heavy)


def test_an_importance_of_its_own_is_a_fifth_column():
    level = dataclasses.replace(maps(cell(0, 0)), importance=1e-6 * cell(2, 3) + 5e-7 * cell(4, 5))
    figure = draw(picture([level]))
    assert len([axes for axes in figure.axes if axes.images]) == 3 + 5
    assert figure.axes[9].get_title() == "importance"
    read = pixel_reader(figure, 9)
    # In proportion to the largest value.
    assert read(28, 20).sum() > read(44, 36).sum() > read(4, 4).sum()


def test_importances_have_a_column_each():
    placed = {
        "channel": PlacedMap(0.25 * cell(2, 3), Place(0.125, False)),
        "norm": PlacedMap(4 * cell(1, 1), Place(0.789, True)),
        "student": PlacedMap(torch.zeros(8, 8), None),
        "element": PlacedMap(cell(1, 1), Place(1.0, True)),
    }
    figure = draw_importances(picture([LevelImportances("p3", 8, 0.25, placed)]))
    row = figure.axes[5:10]
    assert [axes.get_title() for axes in row] == [
        "channel: 12% inside, peak outside",
        "element: 100% inside, peak inside",
        "norm: 79% inside, peak inside",
        "student (0 everywhere)",
        "score: none at this level",
    ]
    assert [len(axes.images) for axes in row] == [2, 2, 2, 2, 1]
    assert row[0].texts[0].get_text() == "p3\nstride 8\n8 × 8\nboxes: 25%"
    # Each in proportion to its own largest value.
    assert pixel_reader(figure, 5)(28, 20).tolist() == pixel_reader(figure, 7)(12, 12).tolist()
