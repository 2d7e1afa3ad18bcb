"""Which images of a dataset are drawn, and how they are seen."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from PIL import Image
from torchvision.ops import StochasticDepth

from gkd_d2.analysis.dataset_images import choose_images, has_objects, observe_images


@pytest.fixture
def scenes(request):
    """The name of a dataset of four images: without objects, with a crowd only, and two with an object."""
    objects = ([], [{"iscrowd": 1}], [{"iscrowd": 0}], [{}])
    records = [
        {"file_name": f"folder/image{number}.png", "image_id": 10 + number, "annotations": annotations}
        for number, annotations in enumerate(objects)
    ]
    name = f"scenes_{request.node.name}"
    DatasetCatalog.register(name, lambda: records)
    yield name
    DatasetCatalog.remove(name)


def numbers(records):
    return [record["image_id"] - 10 for record in records]


def test_the_first_images_with_objects_are_chosen(scenes):
    assert numbers(choose_images(scenes, None, 1)) == [2]
    assert numbers(choose_images(scenes, [], 9)) == [2, 3]


def test_images_are_named_by_id_or_file_in_any_order(scenes):
    assert numbers(choose_images(scenes, ["image3.png", "11", "image0"], 1)) == [3, 1, 0]
    with pytest.raises(ValueError, match=r"has no image 'image9' among its 4: name one by its id \(10, 11, 12, "):
        choose_images(scenes, ["11", "image9"], 1)


def test_a_crowd_is_no_object(scenes):
    assert list(map(has_objects, DatasetCatalog.get(scenes))) == [False, False, True, True]


def test_without_an_object_an_image_must_be_named(scenes):
    del DatasetCatalog.get(scenes)[2:]
    with pytest.raises(ValueError, match="no object in the 2 images of dataset scenes_.*: name an image by --image"):
        choose_images(scenes, None, 1)


def test_images_are_seen_as_in_evaluation(distiller_config, tmp_path):
    """By the student, too, whose backbone would leave out its stem in each second training step."""
    pixels = torch.randint(0, 255, (64, 96, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    box = {"bbox": [8, 8, 50, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": str(tmp_path / "image.png"), "image_id": 0, "height": 64, "width": 96, "annotations": [box]}
    cfg = distiller_config("retinanet")
    cfg.INPUT.MIN_SIZE_TEST = 64
    distiller = build_model(cfg)
    student = distiller.student
    bottom_up = student.backbone.bottom_up
    bottom_up.stem = torch.nn.Sequential(bottom_up.stem, StochasticDepth(0.5, "batch"))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    seen = [next(observe_images(distiller, cfg, [record], seed)) for seed in range(5)]
    # With its running statistics and no step left out.
    image = {"image": pixels.flip(2).permute(2, 0, 1).float()}
    with torch.no_grad():
        expected = student.eval().backbone(student.preprocess_image([image]).tensor)
    for one in seen:
        assert one.losses["loss_cls"] > 0
        assert all(gradient.abs().sum() > 0 for gradient in one.student_grad)
        for level, feature in zip(distiller.student_features, one.student):
            torch.testing.assert_close(feature, expected[level])
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
