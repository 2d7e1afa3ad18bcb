"""A model of timm gives a pyramid the features that timm itself computes."""

import argparse
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

timm = pytest.importorskip("timm")

from gkd_d2.modeling.backbone import TimmFeatures  # noqa: E402
from gkd_d2.utils.checkpoint import CheckpointError  # noqa: E402

FEATURES = ("res2", "res3", "res4", "res5")
# Families that timm takes apart in different ways, with their channels; MambaOut computes in N,H,W,C, HRNet's features
# come out of branches.
CHANNELS = {
    "mobilenetv2_100": (24, 32, 96, 320),
    "tf_efficientnet_lite0": (24, 40, 112, 320),
    "mobilenetv3_small_050": (8, 16, 24, 288),
    "resnet18": (64, 128, 256, 512),
    "regnetx_002": (24, 56, 152, 368),
    "convnext_atto": (40, 80, 160, 320),
    "mambaout_femto": (48, 96, 192, 288),
}


def plain(name, seed=0):
    """The whole classifier, with running statistics that are not those of a new one."""
    torch.manual_seed(seed)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """A function that saves a random model of timm and returns it with the file."""

    def save(name, form=lambda state: state, file="weights.pth"):
        model = plain(name)
        torch.save(form(model.state_dict()), tmp_path / file)
        return model, str(tmp_path / file)

    return save


@pytest.mark.parametrize(
    ("name", "norm"),
    [*((name, "FrozenBN") for name in CHANNELS), *itertools.product(("mobilenetv2_100", "resnet18"), ("BN", "SyncBN"))],
)
def test_features_are_those_of_the_plain_model(name, norm, saved):
    """Of the file's weights, by timm's own forward_intermediates of the whole classifier."""
    model, path = saved(name)
    features = TimmFeatures(name, FEATURES, weights=path, norm=norm, freeze_at=2).eval().double()
    shapes = features.output_shape()
    assert [(shapes[feature].stride, shapes[feature].channels) for feature in FEATURES] == list(
        zip((4, 8, 16, 32), CHANNELS[name])
    )
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        found = features(image)
        intermediates = model.double().forward_intermediates(image, intermediates_only=True, output_fmt="NCHW")
    # The last of each height, for MobileNetV3 has one more of stride 4.
    expected = {value.shape[2]: value for value in intermediates}
    assert list(found) == list(FEATURES)
    for feature in FEATURES:
        stride = shapes[feature].stride
        assert found[feature].shape == (2, shapes[feature].channels, 64 // stride, 96 // stride)
        torch.testing.assert_close(found[feature], expected[64 // stride], rtol=1e-8, atol=1e-8)


def test_a_model_that_sees_bgr_is_given_rgb(saved):
    _, path = saved("mobilenetv2_100")
    rgb, bgr = (TimmFeatures("mobilenetv2_100", FEATURES, weights=path, image_format=f).eval() for f in ("RGB", "BGR"))
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(rgb(image)["res3"], bgr(image.flip(1))["res3"])
    assert not torch.equal(rgb(image)["res3"], bgr(image)["res3"])


@pytest.mark.parametrize(
    "form",
    [
        # As timm's own training script has it.
        lambda state: {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1, img_size=[224, 224])},
        lambda state: {"model": state},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {name: value for name, value in state.items() if not name.startswith("classifier")},
        # Moving averages come before the weights themselves, as timm has it.
        lambda state: {"state_dict": {name: 2 * value for name, value in state.items()}, "state_dict_ema": state},
    ],
)
def test_forms_of_files(form, saved):
    model, path = saved("mobilenetv2_100", form)
    features = TimmFeatures("mobilenetv2_100", FEATURES, weights=path)
    expected = model.state_dict()
    # Other files with such objects stay refused.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    # All that the network has is in the file; what is not used is the last convolution and the classifier.
    for name, value in features.network.state_dict().items():
        assert torch.equal(value, expected[name]), name
    # The copy that timm loads from stays nowhere.
    assert not [m for m in features.modules() if "state_dict" in (getattr(m, "pretrained_cfg", None) or {})]


def test_safetensors(saved, tmp_path):
    from safetensors.torch import save_file

    model, _ = saved("convnext_atto")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    features = TimmFeatures("convnext_atto", FEATURES, weights=str(tmp_path / "model.safetensors"))
    # timm names the stages of a network of features otherwise.
    assert torch.equal(
        features.network.state_dict()["stages_1.blocks.0.conv_dw.weight"],
        model.state_dict()["stages.1.blocks.0.conv_dw.weight"],
    )


def edited(**changes):
    def form(state):
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del state[name]
            else:
                state[name] = value
        return state

    return form


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            edited(conv_stem__weight=None, blocks__2__0__bn1__running_mean=None),
            "leaves 2 tensors of the network unset (conv_stem.weight, blocks.2.0.bn1.running_mean); the file has",
        ),
        (edited(conv_stem__weight=torch.zeros(32, 3, 5, 5)), "size mismatch for conv_stem.weight"),
        (
            edited(conv_stem__weight=torch.full((32, 3, 3, 3), math.inf)),
            "numbers that are infinite or NaN, in conv_stem",
        ),
        (lambda state: {"epoch": 3}, "it holds epoch"),
        (lambda state: [1, 2], "it holds a list"),
        (lambda state: timm.create_model("convnext_atto").state_dict(), "unset (conv_stem.weight, bn1.weight, "),
        (lambda state: timm.create_model("resnet18").state_dict(), "size mismatch for bn1.weight"),
        (lambda state: print, "could run any code and are not read"),
    ],
)
def test_files_that_do_not_fit(form, message, saved):
    _, path = saved("mobilenetv2_100", form)
    with pytest.raises(CheckpointError) as error:
        TimmFeatures("mobilenetv2_100", FEATURES, weights=path)
    assert message in str(error.value)
    assert f"MODEL.TIMM.WEIGHTS is {path}" in str(error.value) or f"MODEL.TIMM.WEIGHTS: {path}" in str(error.value)


def test_damaged_files(saved, tmp_path):
    _, path = saved("mobilenetv2_100")
    content = (tmp_path / "weights.pth").read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for text, damaged in (("it ends too early", content[:-500]), ("CRC-32", flipped), ("it is empty", b"")):
        (tmp_path / "weights.pth").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"^MODEL.TIMM.WEIGHTS is .*weights.pth, which is damaged: .*{text}"):
            TimmFeatures("mobilenetv2_100", FEATURES, weights=path)
    with pytest.raises(CheckpointError, match="^MODEL.TIMM.WEIGHTS is none.pth: there is no such file in the working"):
        TimmFeatures("mobilenetv2_100", FEATURES, weights="none.pth")


@pytest.mark.parametrize("name", ["mobilenetv2_100", "tf_efficientnet_lite2"])
def test_weights_of_imagenet(name, timm_weights):
    """All of the network has the file's, and computes something else by them."""
    path = timm_weights / f"{name}.pth"
    loaded, other = (
        TimmFeatures(name, FEATURES, weights=weights, norm="BN", freeze_at=0).eval() for weights in (str(path), "")
    )
    state = torch.load(path, weights_only=True)
    own = {key: value for key, value in loaded.network.state_dict().items() if "num_batches" not in key}
    assert len(own) > 250
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    image = F.interpolate(torch.randn(1, 3, 4, 4), size=(64, 64), mode="bilinear")
    with torch.no_grad():
        assert not torch.allclose(loaded(image)["res5"], other(image)["res5"], rtol=0.1)
    assert loaded.starts_with_weights
    assert not other.starts_with_weights


def norms(module):
    return [m for m in module.modules() if "running_mean" in dict(m.named_buffers(recurse=False))]


def step(features):
    """Train by one step; the names of the tensors that it changes."""
    features.train()
    before = {name: value.clone() for name, value in features.state_dict().items()}
    trained = {name: p for name, p in features.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    sum(value.square().sum() for value in features(torch.randn(2, 3, 64, 64)).values()).backward()
    # Where they are 0 or tiny an update would not show.
    assert all(p.grad is not None for p in trained.values())
    with torch.no_grad():
        for p in trained.values():
            p += p.grad.sign() + 1
    assert all(p.grad is None for name, p in features.named_parameters() if name not in trained)
    return {name for name, value in features.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(
    ("name", "freeze_at", "frozen"),
    [
        ("mobilenetv2_100", 0, ()),
        ("mobilenetv2_100", 1, ("conv_stem", "bn1", "blocks.0")),
        ("mobilenetv2_100", 2, ("conv_stem", "bn1", "blocks.0", "blocks.1")),
        ("mobilenetv2_100", 3, ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2")),
        ("resnet18", 1, ("conv1", "bn1")),
        ("resnet18", 2, ("conv1", "bn1", "layer1")),
        ("regnetx_002", 3, ("stem", "s1", "s2")),
        ("convnext_atto", 2, ("stem_0", "stem_1", "stages_0")),
    ],
)
def test_what_is_frozen_stays_and_the_rest_is_trained(name, freeze_at, frozen):
    features = TimmFeatures(name, FEATURES, norm="BN", freeze_at=freeze_at)
    early = tuple(f"network.{part}." for part in frozen)
    for parameter, value in features.named_parameters():
        assert value.requires_grad != parameter.startswith(early), parameter
    changed = step(features)
    assert not [name for name in changed if name.startswith(early)]
    statistics = {name for name in features.state_dict() if name.endswith(("running_mean", "running_var"))}
    assert {name for name in statistics if not name.startswith(early)} <= changed
    assert bool(statistics) == (name != "convnext_atto")


def test_norms():
    frozen, synchronised = (
        TimmFeatures("mobilenetv2_100", FEATURES, norm=norm, freeze_at=1) for norm in ("FrozenBN", "SyncBN")
    )
    assert not [p for m in norms(frozen) for p in m.parameters(recurse=False)]
    changed = step(frozen)
    assert changed and not [name for name in changed if ".bn" in name]
    kinds = [isinstance(m, nn.SyncBatchNorm) for m in norms(synchronised)]
    # The stem and the first block are frozen.
    assert not any(kinds[:3])
    assert all(kinds[3:])


def test_norms_of_other_kinds_stay():
    layers = [
        sum(isinstance(m, nn.LayerNorm) and m.weight.requires_grad for m in features.modules())
        for features in (TimmFeatures("convnext_atto", FEATURES, norm=norm, freeze_at=0) for norm in ("FrozenBN", "BN"))
    ]
    assert layers[0] == layers[1] > 0


def test_what_no_feature_needs_is_not_trained():
    """DistributedDataParallel would wait for its gradients; EfficientNets keep all their blocks."""
    features = TimmFeatures("mobilenetv2_100", ["res2", "res3"], freeze_at=0)
    trained = {name.split(".")[2] for name, p in features.named_parameters() if p.requires_grad and ".blocks." in name}
    assert trained == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mobilenetv2_10",
            {},
            "MODEL.TIMM.NAME is 'mobilenetv2_10': timm .* has no such model: did you mean mobilenetv2_1",
        ),
        ("no_such_thing_at_all", {}, r"has no such model; timm.list_models\(\) lists its models"),
        ("mobilenetv2_100.x", {}, "mobilenetv2_100 has no weights of this tag: choose mobilenetv2_100 or .*ra_in1k"),
        ("vit_tiny_patch16_224", {}, "which takes images of 224 x 224 pixels alone"),
        ("inception_v3", {}, "can't take an image of 64 x 64 pixels, but a detector's may have any size"),
        ("convmixer_768_32", {}, "of which timm gives no features .*: features_only not implemented for ConvMixer"),
        ("mobilenetv2_100", {"norm": "GN"}, "MODEL.TIMM.NORM is 'GN': set it to FrozenBN or BN or SyncBN"),
        (
            "mobilenetv2_100",
            {"freeze_at": 6},
            "MODEL.TIMM.FREEZE_AT is 6, but .* set it to 0 .* or 1 or 2 or 3 or 4 or 5",
        ),
        (
            "convnext_atto",
            {"freeze_at": 1},
            "MODEL.TIMM.FREEZE_AT is 1, but convnext_atto has no feature of that stride",
        ),
        ("mobilenetv2_100", {"pretrained": True, "weights": "x.pth"}, "MODEL.TIMM.PRETRAINED and .* are both set"),
        (
            "mobilenetv2_100",
            {"out_indices": [1, 2, 3, 5]},
            r"OUT_INDICES names 5, but mobilenetv2_100 has .* 0 \(2\), 1",
        ),
        ("mobilenetv2_100", {"out_indices": [0, 1, 2, 3]}, "of strides 2, 4, 8, 16, but MODEL.FPN.IN_FEATURES names"),
        ("mobilenetv2_100", {"out_indices": [1, 2, 3, 3]}, "of strides 4, 8, 16, 16, but"),
        # Which must not pass for RGB.
        ("mobilenetv2_100", {"image_format": "bgr"}, "^INPUT.FORMAT is 'bgr': set it to RGB or BGR$"),
    ],
)
def test_what_can_not_be_built_is_a_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        TimmFeatures(name, FEATURES, **options)


def test_features_that_the_model_lacks_are_named():
    with pytest.raises(ValueError, match=r"IN_FEATURES names res6, of stride 64, but resnet18 has the features"):
        TimmFeatures("resnet18", ["res5", "res6"])
    with pytest.raises(ValueError, match=r"IN_FEATURES is \['p3'\], but the features of a timm backbone are named"):
        TimmFeatures("resnet18", ["p3"])


def test_two_features_of_one_stride():
    with pytest.raises(ValueError, match="name one of stride 8 by MODEL.TIMM.OUT_INDICES"):
        TimmFeatures("csatv2", FEATURES[1:], freeze_at=0)
    features = TimmFeatures("csatv2", FEATURES[1:], out_indices=[1, 2, 3], freeze_at=3)
    assert [shape.stride for shape in features.output_shape().values()] == [8, 16, 32]


def test_indices_from_the_end():
    features = TimmFeatures("mobilenetv2_100", ["res4", "res5"], out_indices=[-1, -2])
    assert {name: shape.stride for name, shape in features.output_shape().items()} == {"res4": 16, "res5": 32}


def test_weights_that_can_not_be_fetched(tmp_path):
    """As on a machine without a network."""
    code = """
from gkd_d2.modeling.backbone import TimmFeatures
try:
    TimmFeatures("mobilenetv2_100", ["res3"], pretrained=True)
except ValueError as error:
    print(error)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.startswith("MODEL.TIMM.PRETRAINED is True, but timm can't get the weights of mobilenetv2_100: ")
    assert "Set MODEL.TIMM.WEIGHTS to a file that holds them" in done.stdout
