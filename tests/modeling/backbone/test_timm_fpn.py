"""Detectors on backbones of timm: built, normalised, checkpointed, distilled and exported."""

import logging

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import detection_utils
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from PIL import Image
from tiny import detector_config, train, training_batch

timm = pytest.importorskip("timm")

from gkd_d2.config import read_config, teacher_config  # noqa: E402
from gkd_d2.export import export_student  # noqa: E402
from gkd_d2.modeling.student import load_student  # noqa: E402
from gkd_d2.utils.registries import build_detector  # noqa: E402

# As timm has it for ImageNet, of RGB.
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
BUILDERS = {"faster": "build_timm_fpn_backbone", "retinanet": "build_retinanet_timm_fpn_backbone"}


def on_timm(cfg, kind, name="mobilenetv2_100", image_format="RGB"):
    """Give the student of a config a backbone of timm."""
    cfg.MODEL.BACKBONE.NAME = BUILDERS[kind]
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.NORM, cfg.MODEL.TIMM.FREEZE_AT = name, "BN", 0
    cfg.INPUT.FORMAT = image_format
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = (MEAN, STD) if image_format == "RGB" else (MEAN[::-1], STD[::-1])
    return cfg


@pytest.mark.parametrize("kind", BUILDERS)
def test_levels(kind):
    backbone = build_model(on_timm(detector_config(kind), kind)).backbone
    shapes = {name: (shape.stride, shape.channels) for name, shape in backbone.output_shape().items()}
    names = ("p2", "p3", "p4", "p5", "p6") if kind == "faster" else ("p3", "p4", "p5", "p6", "p7")
    assert shapes == {name: (2 ** int(name[1]), 16) for name in names}
    assert backbone.size_divisibility == 32
    backbone.eval()
    features = backbone(torch.randn(1, 3, 64, 96))
    # 64 pixels are one cell of p6, and its one cell is p7's.
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        name: (1, 16, max(64 >> int(name[1]), 1), -(-96 >> int(name[1]))) for name in names
    }
    if kind == "faster":
        assert torch.equal(features["p6"], features["p5"][:, :, ::2, ::2])
    else:
        expected = backbone.top_block(backbone.bottom_up(torch.randn(1, 3, 64, 96))["res5"])
        assert [value.shape for value in expected] == [features["p6"].shape, features["p7"].shape]


def test_retinanet_needs_res5():
    cfg = on_timm(detector_config("retinanet"), "retinanet")
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4"]
    with pytest.raises(ValueError, match="makes p6 and p7 of res5: add it"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.TIMM.NAME", "", "MODEL.TIMM.NAME is empty: name a model of timm"),
        ("MODEL.TIMM.NAME", "resnet81", "MODEL.TIMM.NAME is 'resnet81': timm .* no such model: did you mean resnet18"),
        ("MODEL.TIMM.NORM", "GN", "MODEL.TIMM.NORM is 'GN'"),
        ("INPUT.FORMAT", "L", "INPUT.FORMAT is 'L', with 3 values in .* set it to RGB or BGR"),
    ],
)
def test_wrong_settings_are_sentences(key, value, message):
    cfg = on_timm(detector_config("faster"), "faster")
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_a_model_that_detectron2s_backbone_does_not_read_is_refused():
    """A ResNet would be trained, and config.yaml would name the model."""
    cfg = detector_config("faster")
    cfg.MODEL.TIMM.NAME = "mobilenetv2_100"
    message = (
        "'mobilenetv2_100', but MODEL.BACKBONE.NAME is build_resnet_fpn_backbone, which .* build_timm_fpn_backbone"
    )
    with pytest.raises(ValueError, match=message):
        build_detector(cfg)


def test_a_config_without_the_keys():
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME = "cpu", BUILDERS["retinanet"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    with pytest.raises(ValueError, match=r"there is no MODEL.TIMM: call gkd_d2.add_gkd_config\(cfg\)"):
        build_model(cfg)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(1)
    torch.save(timm.create_model("mobilenetv2_100").state_dict(), tmp_path / "mobilenet.pth")
    return str(tmp_path / "mobilenet.pth")


def test_weights_need_images_that_are_normalised_for_them(weights, caplog):
    cfg = on_timm(detector_config("retinanet"), "retinanet")
    cfg.MODEL.TIMM.WEIGHTS = weights
    stock = get_cfg().MODEL
    with caplog.at_level(logging.WARNING):
        build_model(cfg)
        assert not caplog.records
        cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
        build_model(cfg)
    assert "MODEL.PIXEL_STD [1.0, 1.0, 1.0], but timm's weights of mobilenetv2_100 were trained with " in caplog.text
    assert "[123.675, 116.28, 103.53] and [58.395, 57.12, 57.375] (RGB)" in caplog.text
    cfg.MODEL.PIXEL_MEAN = stock.PIXEL_MEAN
    with pytest.raises(ValueError, match="MODEL.PIXEL_STD are Detectron2's defaults: .* Set them to these, as gkd_d2"):
        build_model(cfg)
    # Without weights any values may do.
    cfg.MODEL.TIMM.WEIGHTS = ""
    build_model(cfg)


@pytest.mark.parametrize(
    ("name", "image_format", "mean", "std"),
    [
        ("mobilenetv2_100", "RGB", MEAN, STD),
        ("mobilenetv2_100", "BGR", MEAN[::-1], STD[::-1]),
        ("tf_efficientnet_lite0", "BGR", [127.5] * 3, [127.5] * 3),
    ],
)
def test_a_config_that_is_read_has_timms_normalisation(name, image_format, mean, std, tmp_path):
    cfg = detector_config("retinanet")
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TIMM.NAME = BUILDERS["retinanet"], name
    cfg.INPUT.FORMAT = image_format
    cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
    (tmp_path / "config.yaml").write_text(cfg.dump())
    read = read_config(str(tmp_path / "config.yaml"), [])
    assert read.MODEL.PIXEL_MEAN == pytest.approx(mean, abs=1e-3)
    assert read.MODEL.PIXEL_STD == pytest.approx(std, abs=1e-3)
    # What is set is kept.
    read = read_config(str(tmp_path / "config.yaml"), ["MODEL.PIXEL_STD", "[2.0, 2.0, 2.0]"])
    assert (read.MODEL.PIXEL_MEAN, read.MODEL.PIXEL_STD) == ([103.53, 116.28, 123.675], [2.0] * 3)


def test_a_resnets_images_stay_as_they_are(tmp_path):
    cfg = detector_config("retinanet")
    cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert read_config(str(tmp_path / "config.yaml"), []).MODEL.PIXEL_STD == [1.0, 1.0, 1.0]


def test_a_teacher_needs_no_weights_but_its_checkpoint(distiller_config):
    """Neither what its config once started with, nor a network to fetch it by."""

    def change(cfg):
        on_timm(cfg, "retinanet")

    cfg = distiller_config("retinanet", change=change)
    cfg.GKD.TEACHER.OPTS = ["MODEL.TIMM.WEIGHTS", "gone.pth"]
    assert teacher_config(cfg).MODEL.TIMM.WEIGHTS == ""
    cfg.GKD.TEACHER.OPTS = ["MODEL.TIMM.PRETRAINED", "True"]
    model = build_model(cfg)
    state = torch.load(cfg.GKD.TEACHER.WEIGHTS)["model"]
    assert all(torch.equal(value, state[name]) for name, value in model.teacher.state_dict().items())


@pytest.mark.parametrize("kind", BUILDERS)
def test_each_network_sees_the_picture_as_if_it_were_alone(kind, distiller_config, tmp_path):
    """A student on timm's RGB, under a teacher on Detectron2's BGR that divides by nothing: all from one file."""

    def of_detectron2(cfg):
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]

    cfg = on_timm(distiller_config(kind, change=of_detectron2), kind)
    model = build_model(cfg).train()
    torch.manual_seed(0)
    Image.fromarray(torch.randint(0, 256, (96, 128, 3), dtype=torch.uint8).numpy()).save(tmp_path / "picture.png")
    batch = training_batch(((96, 128),))
    pixels = detection_utils.read_image(str(tmp_path / "picture.png"), cfg.INPUT.FORMAT)
    batch[0]["image"] = torch.as_tensor(pixels.transpose(2, 0, 1).copy())
    seen = {}
    for name, network in (("student", model.student), ("teacher", model.teacher)):
        network.backbone.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0]))
    of_timm = {}
    model.student.backbone.bottom_up.network.register_forward_pre_hook(lambda _, args: of_timm.update(image=args[0]))
    with EventStorage():
        losses = model(batch)
    assert all(value.isfinite() for value in losses.values())
    # By Pillow and arithmetic alone.
    with Image.open(tmp_path / "picture.png") as picture:
        rgb = torch.as_tensor(np.array(picture)).permute(2, 0, 1).double()
    column = torch.tensor([[MEAN], [STD]], dtype=torch.float64).reshape(2, 3, 1, 1)
    student = (rgb - column[0]) / column[1]
    teacher = rgb.flip(0) - column[0].flip(0)
    torch.testing.assert_close(seen["student"][0].double(), student, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen["teacher"][0].double(), teacher, rtol=0, atol=1e-5)
    assert torch.equal(of_timm["image"], seen["student"])


def test_in_bgr_timm_is_given_the_same(distiller_config):
    """The order of INPUT.FORMAT is the user's choice; the network's is not."""
    models = {}
    for image_format in ("RGB", "BGR"):
        cfg = on_timm(detector_config("retinanet"), "retinanet", image_format=image_format)
        torch.manual_seed(2)
        models[image_format] = build_model(cfg).eval()
    batch = training_batch()
    with torch.no_grad():
        one = models["RGB"].backbone(models["RGB"].preprocess_image(batch).tensor)
        swapped = [{**x, "image": x["image"].flip(0)} for x in batch]
        other = models["BGR"].backbone(models["BGR"].preprocess_image(swapped).tensor)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value)


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_student_learns_under_a_resnet(kind, distiller_config):
    cfg = on_timm(distiller_config(kind), kind)
    cfg.SOLVER.BASE_LR = 2e-4
    model = build_model(cfg)
    before = {name: value.clone() for name, value in model.student.state_dict().items()}
    torch.manual_seed(3)
    history = train(model, cfg, training_batch(((96, 128), (96, 128))), 4)
    assert all(history[-1][name] > 0 for name in ("loss_gkd_gradient", "loss_bmfi_box", "loss_bmfi_image"))
    changed = {name for name, value in model.student.state_dict().items() if not torch.equal(value, before[name])}
    assert "backbone.bottom_up.network.conv_stem.weight" in changed
    assert "backbone.bottom_up.network.blocks.6.0.bn3.running_mean" in changed


def test_a_step_in_bfloat16(distiller_config):
    cfg = on_timm(distiller_config("retinanet"), "retinanet")
    model = build_model(cfg).train()
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(training_batch(((96, 128), (96, 128))))
    sum(losses.values()).backward()
    stem = model.student.backbone.bottom_up.network.conv_stem.weight
    assert stem.grad.dtype == torch.float32
    assert stem.grad.isfinite().all() and stem.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_a_checkpoint_is_the_whole_detector(norm, tmp_path, weights):
    cfg = on_timm(detector_config("retinanet"), "retinanet")
    cfg.MODEL.TIMM.WEIGHTS, cfg.MODEL.TIMM.NORM = weights, norm
    model = build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "mobilenet.pth").unlink()
    again = load_student(cfg, tmp_path / "model_final.pth")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.backbone(image)["p3"], model.backbone(image)["p3"])


def test_an_export_holds_the_student(tmp_path):
    cfg = on_timm(detector_config("retinanet"), "retinanet")
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    written = export_student(cfg, tmp_path / "model_final.pth", tmp_path / "out")
    state = torch.load(written["checkpoint"])["model"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
