"""Pictures: what they show, where it lies, and that taking them leaves no trace in a training."""

import random
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage, TensorboardXWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import ARCHITECTURES, training_batch

from gkd_d2.losses import box_context_mask, gradient_map
from gkd_d2.visualize import LevelMaps, Picture, draw, render, write_page

TAG = "gkd/maps_and_detections"


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


def train(cfg, batch, steps, folder):
    """A short training; returns all that a picture could change, and the pictures."""
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    distiller = build_model(cfg).train()
    optimizer = build_optimizer(cfg, distiller)
    history = []
    with EventStorage() as storage:
        writer = TensorboardXWriter(str(folder))
        for _ in range(steps):
            losses = distiller(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append({name: value.item() for name, value in losses.items()})
            writer.write()
            storage.step()
        writer.close()
    networks = (distiller, distiller._teacher.model)
    left = {
        "losses": history,
        "modes": [module.training for network in networks for module in network.modules()],
        "normalizers": [getattr(model, "loss_normalizer", None) for model in (distiller.student, networks[1])],
        "draws": (random.random(), np.random.rand(), torch.rand(1).item()),
    }
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    images = events.Images(TAG) if TAG in events.Tags()["images"] else []
    return left, [network.state_dict() for network in networks], images


# Where the gradient maps have no part in the losses, gradients are computed for the picture alone.
@pytest.mark.parametrize(("kind", "gradient_weight"), [("faster", 0.5), ("retinanet", 0.5), ("retinanet", 0.0)])
def test_pictures_change_nothing_in_a_training(kind, gradient_weight, distiller_config, tmp_path):
    cfg = distiller_config(kind, channels=8)
    cfg.GKD.LOSS_WEIGHTS.GRADIENT = gradient_weight
    if not gradient_weight:
        cfg.GKD.WEIGHTING = "uniform"
    batch = training_batch()
    without, weights_without, images = train(cfg, batch, 3, tmp_path / "without")
    assert images == []
    cfg.GKD.VIS_PERIOD = 2
    with_pictures, weights, images = train(cfg, batch, 3, tmp_path / "with")
    assert with_pictures == without
    for network, reference in zip(weights, weights_without):
        assert all(torch.equal(value, reference[name]) for name, value in network.items())
    assert [image.step for image in images] == [0, 2]
    rows = 1 + (4 if kind == "faster" else 5)
    # A panel of a 90 x 120 image is 3 x 4 inches.
    assert (images[0].width, images[0].height) == (1746, 90 + 300 * rows + 28 * (rows - 1))


def test_an_iteration_in_parts_gives_one_picture(distiller_config):
    cfg = distiller_config("retinanet")
    cfg.GKD.VIS_PERIOD = 1
    distiller = build_model(cfg).train()
    with EventStorage() as storage:
        for _ in range(2):
            for part in training_batch():
                distiller([part])
            storage.step()
        assert [(name, step) for name, _, step in storage._vis_data] == [(TAG, 0), (TAG, 1)]


def test_a_negative_period_is_refused(distiller_config):
    cfg = distiller_config("retinanet")
    cfg.GKD.VIS_PERIOD = -1
    with pytest.raises(ValueError, match="GKD.VIS_PERIOD is -1"):
        build_model(cfg)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("half", [False, True])
def test_a_picture_holds_what_both_networks_make_of_the_first_image(kind, half, distiller_config):
    distiller = build_model(distiller_config(kind)).train()
    batch = training_batch(((90, 120), (96, 130)))
    # As in a training with resized images: detections must stay in pixels of the image that was seen.
    batch[0].update(height=900, width=1200)
    with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        seen = distiller.observe(batch, student_grad=True, teacher_grad=True)
        taken = distiller.picture(batch, seen)
    assert seen.student[0].dtype == (torch.bfloat16 if half else torch.float32)

    assert taken.image.shape == (90, 120, 3)
    blue = batch[0]["image"][0].numpy()
    assert np.array_equal(taken.image[:, :, 2], blue)
    assert taken.padded_size == (96, 160)
    assert [level.name for level in taken.levels] == distiller.student_features
    assert [level.stride for level in taken.levels] == [4, 8, 16, 32, 64, 128][kind == "retinanet" :][
        : len(taken.levels)
    ]
    for index, level in enumerate(taken.levels):
        for ours, feature, gradient in (
            (level.student, seen.student, seen.student_grad),
            (level.teacher, seen.teacher, seen.teacher_grad),
        ):
            assert torch.equal(ours, gradient_map(feature[index].detach(), gradient[index])[0])
        mask = box_context_mask(seen.boxes, (96, 160), tuple(level.teacher.shape))[0]
        assert torch.equal(level.mask, mask)
        assert mask.max() > 0
    assert torch.equal(taken.truth.gt_boxes.tensor, batch[0]["instances"].gt_boxes.tensor)

    for network, found in ((distiller.student, taken.student), (distiller._teacher.model, taken.teacher)):
        with torch.no_grad():
            (expected,) = network.eval()([{**batch[0], "height": 90, "width": 120}])
        assert torch.equal(found.pred_boxes.tensor, expected["instances"].pred_boxes.tensor)
        assert torch.equal(found.scores, expected["instances"].scores)
        assert len(found) == 0 or found.pred_boxes.tensor.max() <= 120


def test_differences_add_up_to_the_loss_of_an_aligned_student(distiller_config):
    cfg = distiller_config("retinanet", channels=8)
    cfg.GKD.LOSS_WEIGHTS.GRADIENT = 0.5
    distiller = build_model(cfg).train()
    batch = training_batch(((96, 128),))
    with EventStorage():
        taken = distiller.picture(batch, distiller.observe(batch, student_grad=True, teacher_grad=True))
        loss = distiller(batch)["loss_gkd_gradient"]
    total = sum((level.teacher - level.student).abs().mean() for level in taken.levels)
    assert 0.5 * total.item() == pytest.approx(loss.item(), rel=1e-3)


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


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_page_names_its_pictures_whatever_they_are_called(tmp_path):
    name = 'a "b" <c>&d#1%20.png'
    (tmp_path / name).write_bytes(b"")
    write_page(tmp_path / "index.html", "<Title>", {"config": "a<b.yaml"}, {name: "x < y", "plain.png": "two"})
    page = _Links()
    page.feed((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert [unquote(link) for link in page.links] == [name, name, "plain.png", "plain.png"]
    assert all(text in page.text for text in ("<Title>", "a<b.yaml", "x < y", "box context mask"))
