"""Modules of the user's own, and names that no module has registered."""

import sys

import pytest
import yaml
from detectron2.modeling import build_model
from tiny import detector_config

from gkd_d2.config import read_config, teacher_config
from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.engine.run import YacsRun
from gkd_d2.modeling.student import build_student
from gkd_d2.utils.registries import find_unregistered, not_registered
from gkd_d2.utils.user_modules import import_modules


def imported(*names):
    return [name for name in names if name in sys.modules]


def test_the_key_and_the_option_add_up(write_module, tmp_path):
    for name in ("user_one", "user_two", "user_package/part"):
        write_module(name)
    names = "user_one", "user_package.part", "user_two"
    (tmp_path / "base.yaml").write_text("GKD: {IMPORTS: [user_one, user_package.part]}")
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml")
    cfg = read_config("config.yaml", [], ["user_two", "user_one"])
    assert imported(*names) == [*names]
    # For the processes of the run and its config.yaml, which tools read later.
    assert cfg.GKD.IMPORTS == [*names]
    (tmp_path / "output.yaml").write_text(cfg.dump())
    assert read_config("output.yaml", []).GKD.IMPORTS == [*names]


def test_an_argument_replaces_the_key(write_module, tmp_path):
    write_module("user_three")
    (tmp_path / "config.yaml").write_text("GKD: {IMPORTS: [no_such_module]}")
    assert read_config("config.yaml", ["GKD.IMPORTS", "['user_three']"]).GKD.IMPORTS == ["user_three"]
    assert imported("user_three")


def test_a_module_can_add_keys_to_the_defaults(write_module, tmp_path, monkeypatch):
    from detectron2.config import CfgNode, defaults

    monkeypatch.setattr(defaults, "_C", defaults._C.clone())
    write_module("user_keys", "from detectron2.config.defaults import _C\n_C.MODEL.MINE = 1\n")
    (tmp_path / "config.yaml").write_text("{GKD: {IMPORTS: [user_keys]}, MODEL: {MINE: 2}}")
    cfg = read_config("config.yaml", [])
    assert isinstance(cfg, CfgNode) and cfg.MODEL.MINE == 2


def test_pythonpath_comes_before_the_working_folder(write_module, tmp_path, monkeypatch):
    write_module("user_four", "PLACE = 'working folder'")
    write_module("path/user_four", "PLACE = 'PYTHONPATH'")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "path"), *sys.path])
    import_modules(["user_four"], "--import")
    assert sys.modules["user_four"].PLACE == "PYTHONPATH"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such",
            r"GKD.IMPORTS names the module no_such, which is not found .*PYTHONPATH and in the working folder, /",
        ),
        ("no.such.one", "GKD.IMPORTS names the module no.such.one, which is not found"),
        ("user_flat.sub", "GKD.IMPORTS names the module user_flat.sub, which is not found"),
        ("user_flat.py", "GKD.IMPORTS names 'user_flat.py', which is not the name of a module"),
        ("mine/user_flat", "GKD.IMPORTS names 'mine/user_flat', which is not the name of a module"),
        (".user_flat", "GKD.IMPORTS names '.user_flat', which is not the name of a module"),
        (3, "GKD.IMPORTS names 3, which is not the name of a module"),
    ],
)
def test_a_module_that_is_not_found(name, message, write_module):
    write_module("user_flat")
    with pytest.raises(ValueError, match=message):
        import_modules([name], "GKD.IMPORTS")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import no_such_library",
            "user_bad, whose import fails: ModuleNotFoundError: No module named 'no_such_library'",
        ),
        ("raise ValueError('my own')", "user_bad, whose import fails: ValueError: my own"),
        ("def (", "user_bad, whose import fails: SyntaxError"),
    ],
)
def test_an_error_within_a_module_is_shown(text, message, write_module):
    """Of another kind than those that the tools show without their traceback."""
    write_module("user_bad", text)
    with pytest.raises(ImportError, match=message) as error:
        import_modules(["user_bad"], "--import")
    assert error.value.__cause__ is not None


@pytest.mark.parametrize("value", ["user_one", "{a: 1}", "3"])
def test_the_key_must_be_a_list(value, write_module, tmp_path):
    (tmp_path / "config.yaml").write_text(f"GKD: {{IMPORTS: {value}}}")
    with pytest.raises(ValueError, match="GKD.IMPORTS of config.yaml must be a list of modules, such as"):
        read_config("config.yaml", [])
    (tmp_path / "config.yaml").write_text("VERSION: 2")
    with pytest.raises(ValueError, match="GKD.IMPORTS of config.yaml must be a list of modules"):
        read_config("config.yaml", ["GKD.IMPORTS", "user_one"])


TWIN = """
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.backbone.fpn import build_retinanet_resnet_fpn_backbone


@META_ARCH_REGISTRY.register()
class UserNet(RetinaNet):
    pass


@BACKBONE_REGISTRY.register()
def build_user_backbone(cfg, input_shape):
    return build_retinanet_resnet_fpn_backbone(cfg, input_shape)
"""


def test_a_teacher_needs_modules_of_its_own(write_module, tmp_path, distiller_config):
    cfg = distiller_config("retinanet")
    keys = yaml.safe_load((tmp_path / "teacher.yaml").read_text())
    keys["GKD"]["IMPORTS"] = ["user_twin"]
    keys["MODEL"]["META_ARCHITECTURE"], keys["MODEL"]["BACKBONE"]["NAME"] = "UserNet", "build_user_backbone"
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(keys))
    with pytest.raises(ValueError, match=f"GKD.IMPORTS of {tmp_path}/teacher.yaml.*names the module user_twin"):
        teacher_config(cfg)
    write_module("user_twin", TWIN)
    assert type(build_model(cfg)._teacher.model).__name__ == "UserNet"


def test_a_script_that_merges_the_config_itself(write_module, distiller_config):
    """It has not called read_config."""
    write_module("user_twin", TWIN)
    cfg = distiller_config("retinanet")
    cfg.GKD.IMPORTS, cfg.GKD.STUDENT.META_ARCHITECTURE = ["user_twin"], "UserNet"
    assert type(build_model(cfg).student).__name__ == "UserNet"


def test_what_is_said_of_an_unknown_name():
    many = [f"set_{number}" for number in range(60)]
    assert not_registered("kitti_tran", [*many, "kitti_val", "kitti_train", "coco"]).startswith(
        "is not registered: did you mean kitti_train or kitti_val? If a module of your own registers it, "
    )
    # Capitals are a common mistake.
    assert "did you mean gkd?" in not_registered("GKD", ["gkd", "none"])
    assert not_registered("other", ["b", "a"]).startswith("is not registered; registered are a, b. ")
    assert not_registered("other", many).startswith("is not registered. If a module")


@pytest.mark.parametrize(
    ("kind", "key", "value", "near"),
    [
        ("retinanet", "MODEL.META_ARCHITECTURE", "RetinNet", "RetinaNet"),
        ("retinanet", "MODEL.BACKBONE.NAME", "build_retinanet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"),
        ("faster", "MODEL.ROI_HEADS.NAME", "StandardROIHead", "StandardROIHeads"),
        ("faster", "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvHead", "FastRCNNConvFCHead"),
        ("faster", "MODEL.PROPOSAL_GENERATOR.NAME", "RPNs", "RPN"),
        ("faster", "MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchors", "DefaultAnchorGenerator"),
    ],
)
def test_unknown_parts_of_a_detector(kind, key, value, near):
    cfg = detector_config(kind)
    assert find_unregistered(cfg) == []
    cfg.merge_from_list([key, value])
    (problem,) = find_unregistered(cfg)
    assert problem.startswith(f"{key} is '{value}', which is not registered: did you mean ") and near in problem
    with pytest.raises(ValueError, match=f"{key} is '{value}'.*{near}"):
        build_student(cfg)


def test_names_that_detectron2_does_not_look_up():
    cfg = detector_config("faster")
    cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.ROI_BOX_HEAD.NAME = "PrecomputedProposals", ""
    assert find_unregistered(cfg) == []
    # What a user's own meta-architecture makes of such keys is not known.
    cfg = detector_config("scorer")
    cfg.MODEL.BACKBONE.NAME = "anything"
    assert find_unregistered(cfg) == []


def test_unknown_names_come_before_anything_is_built(distiller_config, tmp_path):
    cfg = distiller_config("retinanet")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_kity_train",), ("toy_kity_val",)
    cfg.GKD.METHOD, cfg.GKD.STUDENT.META_ARCHITECTURE = "gdk", "RetinaNets"
    text = (tmp_path / "teacher.yaml").read_text()
    (tmp_path / "teacher.yaml").write_text(text.replace("META_ARCHITECTURE: RetinaNet", "META_ARCHITECTURE: RetinNet"))
    with pytest.raises(PreflightError) as error:
        check_inputs(YacsRun(cfg), eval_only=False, resume=False)
    lines = str(error.value).splitlines()[1:]
    starts = [
        "- DATASETS names toy_kity_train: dataset 'toy_kity_train' is not registered: did you mean toy_kitti_",
        "- DATASETS names toy_kity_val: dataset 'toy_kity_val' is not registered: did you mean toy_kitti_",
        "- GKD.STUDENT.META_ARCHITECTURE is 'RetinaNets', which is not registered: did you mean RetinaNet",
        "- GKD.METHOD is 'gdk', which is not registered: did you mean gkd",
        f"- MODEL.META_ARCHITECTURE of {tmp_path}/teacher.yaml is 'RetinNet', which is not registered: did you",
    ]
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts):
        assert line.startswith(start) and "GKD.IMPORTS or by --import" in line and len(line) < 300
