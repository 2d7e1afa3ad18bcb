"""The pictures that an export is checked on are what the predictor sees, and of different sizes."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from gkd_d2.export import ExportError, pictures_in, read_picture, sample_pictures
from gkd_d2.export.pictures import fit


def test_a_picture_is_what_the_predictor_sees(retinanet, picture):
    cfg, _ = retinanet
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 50, 120
    image = read_picture(cfg, picture)
    # 60 x 200 scaled by 120 / 200. Its left half is blue, the first channel of BGR.
    assert image.shape == (3, 36, 120)
    assert image.dtype == torch.float32
    assert image[:, 18, 10].tolist() == [255, 0, 0]


def test_samples_are_of_different_sizes(retinanet, picture):
    cfg, _ = retinanet
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 60, 200
    pictures = sample_pictures(cfg, [picture])
    # Scaled by 0.8 and by 0.64.
    assert [tuple(one.shape) for one in pictures] == [(3, 60, 200), (3, 48, 160), (3, 38, 128)]
    Image.new("RGB", (100, 100)).save(picture.with_name("other.png"))
    sizes = [one.shape[1:] for one in sample_pictures(cfg, [picture, picture.with_name("other.png")])]
    assert sizes == [(60, 200), (60, 60), (48, 160)]
    # More of one size are not made smaller and smaller.
    sizes = [one.shape[1:] for one in sample_pictures(cfg, [picture] * 9)]
    assert sizes == [(60, 200), (48, 160), (38, 128), *[(60, 200)] * 6]
    cfg.INPUT.MIN_SIZE_TEST = 40
    with pytest.raises(ExportError, match="too small to be compared on in 3 sizes: .* raise INPUT.MIN_SIZE_TEST"):
        sample_pictures(cfg, [picture])


def test_without_pictures_the_option_is_named(retinanet, picture, tmp_path, monkeypatch):
    cfg, _ = retinanet
    cfg.DATASETS.TEST = ("unheard_of",)
    with pytest.raises(ExportError, match="DATASETS.TEST names unheard_of, .* name pictures by --image"):
        sample_pictures(cfg)
    monkeypatch.setitem(DatasetCatalog.data, "without_images", list)
    cfg.DATASETS.TEST = ("without_images",)
    with pytest.raises(ExportError, match="DATASETS.TEST names without_images, which holds no image. .* name pictures"):
        sample_pictures(cfg)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ExportError, match="text.png is no picture that can be read"):
        sample_pictures(cfg, [picture, tmp_path / "text.png"])


def test_a_picture_that_is_cut_off_or_too_large_is_named(retinanet, picture, tmp_path, monkeypatch):
    cfg, _ = retinanet
    cut = tmp_path / "cut.png"
    Image.effect_noise((60, 60), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(OSError, match="cut.png can't be read: image file is truncated"):
        read_picture(cfg, cut)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ExportError, match=f"{picture.name} is no picture that can be read: Image size"):
        read_picture(cfg, picture)


def test_the_pictures_of_a_folder_by_name_up_to_a_limit(picture, tmp_path):
    (tmp_path / "a.txt").write_text("no picture")
    (tmp_path / "b").mkdir()
    for name in ("3.png", "1.png", "2.png", ".0.png"):
        Image.new("RGB", (60, 60)).save(tmp_path / name)
    assert [path.name for path in pictures_in(tmp_path, limit=2)] == ["1.png", "2.png"]
    assert [path.name for path in pictures_in(tmp_path, limit=100)] == ["1.png", "2.png", "3.png", "picture.png"]
    with pytest.raises(ExportError, match="b holds no picture"):
        pictures_in(tmp_path / "b", limit=2)
    with pytest.raises(ExportError, match="c is no folder"):
        pictures_in(tmp_path / "c", limit=2)


def test_a_picture_is_padded_and_made_smaller_to_fit():
    small = torch.full((3, 4, 6), 7.0)
    fitted, scales = fit(small, (8, 8), (1.0, 2.0, 3.0))
    assert scales == (1.0, 1.0)
    assert torch.equal(fitted[:, :4, :6], small)
    assert fitted[:, 4:].amin(dim=(1, 2)).tolist() == fitted[:, :, 6:].amax(dim=(1, 2)).tolist() == [1.0, 2.0, 3.0]
    # 20 x 41 to half of that: the width decides.
    fitted, scales = fit(torch.full((3, 20, 41), 7.0), (16, 20), (0.0, 0.0, 0.0))
    assert fitted.shape == (3, 16, 20)
    assert (fitted[0] == 7).sum(dim=0).max() == 10
    assert scales == (41 / 20, 20 / 10)
