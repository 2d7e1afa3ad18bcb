"""Which images of a dataset are drawn."""

import pytest
from detectron2.data import DatasetCatalog

from gkd_d2.analysis.dataset_images import choose_images, has_objects


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
