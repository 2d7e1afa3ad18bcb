"""Random batches: what is drawn, and that it is drawn by a seed."""

import torch

from gkd_d2.analysis.benchmark.inputs import FeatureSpec, random_boxes, random_features, random_images


def test_features_are_drawn_by_seed():
    spec = FeatureSpec("toy", batch=2, dtype=torch.float16, layout="channels_last")
    batch, same, other = (random_features(spec, seed, 3, 0.5) for seed in (0, 0, 1))
    assert [tuple(f.shape) for f in batch.student] == [(2, 64, 128 // s, 192 // s) for s in (4, 8, 16, 32)]
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in batch.teacher_grad)
    for name in ("student", "teacher", "student_grad", "teacher_grad", "boxes"):
        for mine, equal, differs in zip(getattr(batch, name), getattr(same, name), getattr(other, name)):
            assert torch.equal(mine, equal) and not torch.equal(mine, differs)
    assert not torch.equal(batch.student[0], batch.teacher[0])


def test_sides_of_boxes_are_16_pixels_to_half_the_image():
    x0, y0, x1, y1 = random_boxes(200, (128, 416), torch.Generator().manual_seed(0)).unbind(1)
    for sides, centres, length in ((x1 - x0, (x0 + x1) / 2, 416), (y1 - y0, (y0 + y1) / 2, 128)):
        assert 15.99 < sides.min() < 17 and 0.9 * length / 2 < sides.max() < length / 2 + 0.01
        assert 0 <= centres.min() < 0.05 * length and 0.95 * length < centres.max() <= length


def test_images_have_objects_within_them():
    batch = random_images(2, (64, 96), 40, num_classes=3)
    again = random_images(2, (64, 96), 40, num_classes=3)
    for x, y in zip(batch, again):
        assert x["image"].shape == (3, 64, 96) and x["image"].dtype == torch.uint8
        assert torch.equal(x["image"], y["image"])
        boxes = x["instances"].gt_boxes.tensor
        assert boxes.min() == 0 and boxes[:, 2].max() == 96 and boxes[:, 3].max() == 64
        assert set(x["instances"].gt_classes.tolist()) == {0, 1, 2}
    assert not torch.equal(batch[0]["image"], batch[1]["image"])
