"""Backbones of timm in LazyConfigs."""

import logging
from pathlib import Path

import pytest
import torch
from lazy_configs import write_distilled, write_plain, write_teacher
from tiny import calm

timm = pytest.importorskip("timm")

from gkd_d2.config import teacher_spec  # noqa: E402
from gkd_d2.config.lazy_spec import load_lazy_spec  # noqa: E402
from gkd_d2.lazy.distil import build_from_yaml  # noqa: E402
from gkd_d2.lazy.names import speaking_lazily  # noqa: E402
from gkd_d2.lazy.trainer import LazyTrainer  # noqa: E402

NAME = "mobilenetv3_small_050"
# As timm has it for ImageNet, of RGB.
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
RGB = [f"pixel_mean={MEAN}", f"pixel_std={STD}", "input_format=RGB"]
BGR = [f"pixel_mean={MEAN[::-1]}", f"pixel_std={STD[::-1]}", "input_format=BGR"]


def on_timm(path, detector="model"):
    """Put a detector of a file on a network of timm, that starts with the weights in weights.pth."""
    weights = path.with_name("weights.pth")
    if not weights.is_file():
        torch.save(timm.create_model(NAME).state_dict(), weights)
    path.write_text(
        f"""{path.read_text()}
from gkd_d2.modeling.backbone import TimmFeatures
{detector}.backbone.bottom_up = L(TimmFeatures)(
    name="{NAME}", out_features=["res3", "res4", "res5"], weights="{weights}", norm="BN",
)
{detector}.backbone.top_block.in_channels = 288
"""
    )
    return path


@pytest.fixture
def build(read):
    """A function that builds the trainer of a plain detector or of a student, with changes to its model."""

    def make(path, changes, detector="model"):
        order = changes[-1].partition("=")[2]
        overrides = [f"{detector}.{change}" for change in changes]
        cfg = read(path, *overrides, f"dataloader.train.mapper.image_format={order}")
        Path(cfg.train.output_dir).mkdir(exist_ok=True)
        return LazyTrainer(cfg)

    return make


@pytest.mark.parametrize("distilled", [False, True])
def test_weights_need_their_images(distilled, build, tmp_path, caplog):
    detector = "model.student" if distilled else "model"
    path = on_timm((write_distilled if distilled else write_plain)(tmp_path), detector)

    def made(*changes):
        with caplog.at_level(logging.WARNING, logger="gkd_d2.modeling.backbone"), speaking_lazily():
            caplog.clear()
            build(path, changes, detector)
        return caplog.text

    bgr = "backbone.bottom_up.image_format=BGR"
    assert "normalised" not in made(*RGB) and "normalised" not in made(bgr, *BGR)
    with pytest.raises(ValueError, match=f"images are BGR, .* {NAME}, takes them for RGB: .* image_format='BGR'"):
        made(*BGR)
    with pytest.raises(ValueError, match="images are RGB, .* takes them for BGR"):
        made(bgr, *RGB)
    # A mean of BGR for RGB.
    assert "normalised as for the weights" in made(*BGR[:2], RGB[2])
    with pytest.raises(ValueError, match=r"are Detectron2's defaults: .* with \[103.53, 116.28, 123.675\] and "):
        made(bgr, BGR[0], "pixel_std=[1.0, 1.0, 1.0]", BGR[2])
    # Without weights any order and values may do.
    assert not made("backbone.bottom_up.weights=''", BGR[0], "pixel_std=[1.0, 1.0, 1.0]", BGR[2])


def test_only_a_start_needs_the_weights(run_here, toy_data, tmp_path):
    """Neither a teacher nor a resume nor an evaluation does."""
    path = on_timm(write_distilled(tmp_path), "model.student")
    teacher = on_timm(tmp_path / "teacher.py")
    model = load_lazy_spec(str(teacher)).build()
    torch.save({"model": calm(model).state_dict()}, tmp_path / "teacher.pth")
    teacher.write_text(teacher.read_text().replace("weights.pth", "gone.pth"))

    def run(*arguments, iterations=1):
        order = ("dataloader.train.mapper.image_format=RGB", *(f"model.student.{change}" for change in RGB))
        length = (f"train.max_iter={iterations}", "train.eval_period=0")
        return run_here("lazyconfig_train_net.py", "--config-file", path, *arguments, *order, *length)

    status, printed = run()
    assert status == 0, printed[-3000:]
    state = torch.load(tmp_path / "distilled" / "model_final.pth")["model"]
    start = torch.load(tmp_path / "weights.pth")
    # Frozen.
    assert torch.equal(state["backbone.bottom_up.network.conv_stem.weight"], start["conv_stem.weight"])

    (tmp_path / "weights.pth").unlink()
    status, printed = run("--resume", iterations=2)
    assert status == 0, printed[-3000:]
    assert "the resumed run differs from the one before: train.max_iter was 1 and is 2" in printed
    assert "random weights" not in printed
    resumed = torch.load(tmp_path / "distilled" / "model_final.pth")
    assert resumed["iteration"] == 1
    assert torch.equal(resumed["model"]["backbone.bottom_up.network.conv_stem.weight"], start["conv_stem.weight"])
    status, printed = run("--eval-only", f"train.init_checkpoint={tmp_path / 'distilled' / 'model_final.pth'}")
    assert status == 0, printed[-3000:]
    assert "Task: bbox" in printed
    # A training from the start does.
    status, printed = run()
    assert status == 1 and f"the backbone's weights is {tmp_path}/weights.pth: there is no such file" in printed


def test_a_teacher_needs_no_weights_but_its_checkpoint(distiller_config, tmp_path):
    """Of a student in YAML; and a teacher in YAML of one in ``.py``."""
    cfg = distiller_config("retinanet")
    teacher = on_timm(write_teacher(tmp_path, name="lazy"))
    (tmp_path / "weights.pth").unlink()
    cfg.GKD.TEACHER.CONFIG_FILE = str(teacher)
    assert teacher_spec(cfg).build().backbone.bottom_up.name == NAME
    options = ["MODEL.BACKBONE.NAME", "build_retinanet_timm_fpn_backbone", "MODEL.TIMM.NAME", NAME]
    built = build_from_yaml(str(tmp_path / "teacher.yaml"), [*options, "MODEL.TIMM.WEIGHTS", "gone.pth"])
    assert built.backbone.bottom_up.name == NAME
