"""Batches that real data sets hold now and then: each must train every parameter by a finite gradient.

That no parameter is left without a gradient is also what DistributedDataParallel needs.
"""

import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from tiny import ARCHITECTURES, training_batch

from gkd_d2.data.mapper import FileNamingMapper

HEIGHT, WIDTH = 96, 112
GIANT = [-500.0, -400.0, 900.0, 800.0]
PIXELS = [[5.0, 5.0, 6.0, 6.0], [WIDTH - 1.0, HEIGHT - 1.0, WIDTH, HEIGHT]]
BATCHES = {
    "one image without boxes": [[[8, 20, 50, 70]], []],
    "no boxes at all": [[], []],
    "a giant box": [[GIANT], [[8, 20, 50, 70]]],
    "giant boxes only": [[GIANT], [GIANT, GIANT]],
    "boxes of a pixel": [PIXELS, PIXELS],
    "many equal boxes": [[[8, 20, 50, 70]] * 200, [[8, 20, 50, 70]]],
    "a single image": [[[8, 20, 50, 70]]],
}


def sample(boxes):
    instances = Instances((HEIGHT, WIDTH))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    return {**training_batch([(HEIGHT, WIDTH)])[0], "instances": instances}


def check(model, batch):
    """Train one step; returns the losses."""
    with EventStorage():
        losses = model.train()(batch)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values()), losses
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    stem = model.student.backbone.bottom_up.stem.conv1.weight
    assert stem.grad.abs().max() > 0
    return losses


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("boxes", BATCHES.values(), ids=BATCHES)
def test_every_parameter_gets_a_finite_gradient(kind, boxes, distiller_config):
    losses = check(build_model(distiller_config(kind, channels=8)), [sample(corners) for corners in boxes])
    for name in ("loss_bmfi_attention", "loss_bmfi_image"):
        assert losses[name] > 0, name
    for name in ("loss_gkd_gradient", "loss_bmfi_box"):
        assert (losses[name] > 0) == any(boxes), name


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_boxes_that_the_mapper_leaves_out(kind, distiller_config, tmp_path):
    """Crowds, and boxes without area, of which Detectron2's own losses would be infinite."""
    cfg = distiller_config(kind, channels=8)
    cfg.INPUT.MIN_SIZE_TRAIN = (HEIGHT,)
    mapper = FileNamingMapper(DatasetMapper(cfg, is_train=True))
    batch = []
    for index, (box, crowd) in enumerate((([8, 20, 50, 70], 1), ([7, 7, 7, 7], 0), ([8, 9, 40, 9], 0))):
        path = tmp_path / f"{index}.png"
        Image.effect_noise((WIDTH, HEIGHT), 60).convert("RGB").save(path)
        annotation = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": crowd}
        record = {"file_name": str(path), "image_id": index, "height": HEIGHT, "width": WIDTH}
        batch.append(mapper({**record, "annotations": [annotation]}))
    assert [len(x["instances"]) for x in batch] == [0, 0, 0]
    losses = check(build_model(cfg), batch)
    assert losses["loss_bmfi_box"] == losses["loss_gkd_gradient"] == 0


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_empty_batch_after_another_trains_on(kind, distiller_config):
    """The moving average of RetinaNet's positives, too, outlives a batch that has none."""
    cfg = distiller_config(kind)
    model = build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for boxes in ([[], []], [[[8, 20, 50, 70]], []], [[], []], [[GIANT], PIXELS]):
        optimizer.zero_grad()
        check(model, [sample(corners) for corners in boxes])
        optimizer.step()
