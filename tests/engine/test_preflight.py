"""What a run lacks is said before anything is built, all of it at once."""

import re
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from tiny import detector_config

from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.engine.run import YacsRun


@pytest.fixture
def ready(toy_scenes, tmp_path):
    """The config of a run that can start."""
    cfg = detector_config("retinanet")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_kitti_train",), ("toy_kitti_val",)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    torch.save({"model": {}}, tmp_path / "weights.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    return cfg


def problems(cfg, *, eval_only=False, resume=False, writes=False):
    with pytest.raises(PreflightError) as error:
        check_inputs(YacsRun(cfg), eval_only=eval_only, resume=resume, writes=writes)
    return str(error.value)


def test_a_run_that_can_start(ready):
    check_inputs(YacsRun(ready), eval_only=False, resume=False)
    check_inputs(YacsRun(ready), eval_only=True, resume=False)


@pytest.mark.parametrize("eval_only", [False, True])
@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("weights.pth", "OUTPUT_DIR is 'weights.pth', but weights.pth is a file: name a folder that can be written to"),
        ("weights.pth/below", "OUTPUT_DIR is 'weights.pth/below', but weights.pth is a file"),
        ("/proc/run", "OUTPUT_DIR is '/proc/run', but no file can be written to /proc"),
        ("", "OUTPUT_DIR is empty"),
    ],
)
def test_a_folder_that_can_not_be_written_to(ready, tmp_path, monkeypatch, eval_only, folder, message):
    monkeypatch.chdir(tmp_path)
    ready.OUTPUT_DIR = folder
    assert f"\n- {message}" in problems(ready, eval_only=eval_only, writes=True)
    # Of a tool that writes nothing there it is not asked.
    check_inputs(YacsRun(ready), eval_only=eval_only, resume=False)


def test_a_run_that_is_refused_leaves_no_folder(ready, tmp_path):
    ready.OUTPUT_DIR = str(tmp_path / "new" / "output")
    check_inputs(YacsRun(ready), eval_only=False, resume=False, writes=True)
    ready.MODEL.WEIGHTS = "none.pth"
    problems(ready, writes=True)
    assert not (tmp_path / "new").exists()


def test_missing_data_is_said_once_with_its_place(ready, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    text = problems(ready)
    assert "toy_kitti_train, toy_kitti_val" in text
    assert text.count(str(tmp_path / "elsewhere" / "toy_kitti")) == 1
    assert "tools/make_toy_kitti.py" in text


def test_unknown_and_empty_datasets(ready):
    ready.DATASETS.TRAIN = ("no_such_set",)
    assert "'no_such_set' is not registered" in problems(ready)
    check_inputs(YacsRun(ready), eval_only=True, resume=False)
    ready.DATASETS.TRAIN = ()
    assert "DATASETS.TRAIN is empty" in problems(ready)
    ready.DATASETS.TEST = ()
    assert "DATASETS.TEST is empty" in problems(ready, eval_only=True)


def test_missing_coco_files(ready, tmp_path):
    DatasetCatalog.register("preflight_coco", list)
    MetadataCatalog.get("preflight_coco").set(json_file=str(tmp_path / "x.json"), image_root=str(tmp_path))
    ready.DATASETS.TRAIN = ("preflight_coco",)
    text = problems(ready)
    assert f"json_file {tmp_path / 'x.json'} does not exist" in text
    assert "image_root" not in text


def test_missing_coco_traffic_says_what_to_run(ready, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    ready.DATASETS.TRAIN, ready.DATASETS.TEST = ("coco_traffic_train",), ("coco_traffic9_val",)
    text = problems(ready)
    assert f"no images of COCO 2017 at {tmp_path}/coco/train2017" in text
    for split in ("train", "val"):
        (tmp_path / "coco" / f"{split}2017").mkdir(parents=True)
    text = problems(ready)
    assert f"{tmp_path}/coco_traffic/annotations/instances_train.json" in text
    assert "`python tools/prepare_coco_traffic.py`" in text
    assert "`python tools/prepare_coco_traffic.py --classes nine`" in text
    assert text.count("\n- ") == 2


def test_missing_testing_images(ready, toy_scenes):
    ready.DATASETS.TEST = ("kitti_test",)
    assert f"{toy_scenes}/kitti/testing/image_2 holds no .png, .jpg or .jpeg file" in problems(ready)


def test_missing_weights(ready, tmp_path):
    ready.MODEL.WEIGHTS = str(tmp_path / "none.pth")
    text = problems(ready)
    assert "none.pth: there is no such file" in text
    # All that a training from scratch needs.
    for key in ("MODEL.WEIGHTS to ''", "MODEL.BACKBONE.FREEZE_AT to 0", "MODEL.RESNETS.NORM and MODEL.FPN.NORM to BN"):
        assert key in text
    # A run that resumes does not read them.
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "last_checkpoint").write_text("model.pth")
    check_inputs(YacsRun(ready), eval_only=False, resume=True)
    ready.MODEL.WEIGHTS = ""
    check_inputs(YacsRun(ready), eval_only=False, resume=False)
    assert "MODEL.WEIGHTS is empty: an evaluation needs" in problems(ready, eval_only=True)
    ready.MODEL.WEIGHTS = "none.pth"
    assert "from scratch" not in problems(ready, eval_only=True)


def test_weights_that_can_not_be_fetched(ready, capsys):
    # A port that nothing listens on.
    ready.MODEL.WEIGHTS = "http://127.0.0.1:9/R-50.pkl"
    text = problems(ready)
    assert "it can't be fetched (" in text
    assert "Set MODEL.WEIGHTS to a file" in text
    assert capsys.readouterr().err == ""


def test_missing_teacher(ready, distiller_config, tmp_path):
    cfg = distiller_config("retinanet")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ready.DATASETS.TRAIN, ready.DATASETS.TEST
    check_inputs(YacsRun(cfg), eval_only=False, resume=False)
    (tmp_path / "teacher.pth").unlink()
    text = problems(cfg)
    assert "teacher.pth: there is no such file" in text
    assert f"--config-file {tmp_path / 'teacher.yaml'}" in text
    cfg.GKD.TEACHER.CONFIG_FILE = "nowhere.yaml"
    assert "'nowhere.yaml', which is no file" in problems(cfg)


def test_unknown_method(ready, distiller_config):
    cfg = distiller_config("retinanet")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ready.DATASETS.TRAIN, ready.DATASETS.TEST
    cfg.GKD.METHOD = "fkd"
    assert "\n- GKD.METHOD is 'fkd', which is not registered: did you mean " in problems(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("BALANCE", "calibrat", "GKD.BALANCE is 'calibrat', but must be one of calibrate, fixed"),
        ("BALANCE_ITERS", 0, "GKD.BALANCE_ITERS is 0, but must be >= 1"),
        ("BALANCE_MAX", 0.0, "GKD.BALANCE_MAX is 0.0, but must be > 0"),
        ("BALANCE_MAX", float("nan"), "GKD.BALANCE_MAX is nan, but must be > 0"),
        ("RATIOS.BOX", -0.1, "GKD.RATIOS.BOX is -0.1, but must be a finite number >= 0"),
        ("RATIOS.BOX", float("inf"), "GKD.RATIOS.BOX is inf, but must be a finite number >= 0"),
        ("RATIOS.box", "much", "GKD.RATIOS.BOX is 'much', but must be a finite number >= 0"),
        ("RATIOS.BOX", True, "GKD.RATIOS.BOX is True, but must be a finite number >= 0"),
        ("RATIOS.BOX", None, "GKD.RATIOS.BOX is None, but must be a finite number >= 0"),
        ("RATIOS.BOY", 0.1, "GKD.RATIOS.BOY is set, but no loss has this name"),
    ],
)
def test_options_of_the_calibration(key, value, message, ready, distiller_config):
    cfg = distiller_config("retinanet")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ready.DATASETS.TRAIN, ready.DATASETS.TEST
    cfg.GKD.BALANCE = "calibrate"
    node, _, name = key.rpartition(".")
    (cfg.GKD[node] if node else cfg.GKD)[name] = value
    assert f"\n- {message}" in problems(cfg)


def test_calibrated_weights_without_a_cap(ready, distiller_config):
    cfg = distiller_config("retinanet")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ready.DATASETS.TRAIN, ready.DATASETS.TEST
    cfg.GKD.BALANCE, cfg.GKD.BALANCE_MAX = "calibrate", float("inf")
    check_inputs(YacsRun(cfg), eval_only=False, resume=False)


def test_an_unknown_evaluator(ready):
    DatasetCatalog.register("preflight_lvis", list)
    MetadataCatalog.get("preflight_lvis").evaluator_type = "lvis"
    ready.DATASETS.TEST = ("toy_kitti_val", "preflight_lvis")
    for eval_only in (False, True):
        text = problems(ready, eval_only=eval_only)
        assert "- the dataset preflight_lvis has the evaluator_type 'lvis'" in text
        assert text.count("\n- ") == 1


def test_detectors_without_test_time_augmentation(ready, distiller_config):
    ready.TEST.AUG.ENABLED = True
    for eval_only in (False, True):
        text = problems(ready, eval_only=eval_only)
        assert (
            "TEST.AUG.ENABLED is True" in text and "a GeneralizedRCNN, which RetinaNet is not: set it to False" in text
        )
    for kind, fits in (("retinanet", False), ("faster", True)):
        cfg = distiller_config(kind)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.TEST.AUG.ENABLED = ready.DATASETS.TRAIN, (), True
        if fits:
            check_inputs(YacsRun(cfg), eval_only=False, resume=False)
            cfg.MODEL.KEYPOINT_ON = True
        assert "TEST.AUG.ENABLED is True" in problems(cfg)


def test_device(ready, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ready.MODEL.DEVICE = "cuda"
    assert "put `MODEL.DEVICE cpu` at the end of the command line, after all options" in problems(ready)
    ready.MODEL.DEVICE = "meta"
    assert "- MODEL.DEVICE is meta, which is neither a CPU nor a GPU of CUDA: to run" in problems(ready)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ready.MODEL.DEVICE = "cuda:2"
    assert re.search("- MODEL.DEVICE is cuda:2, but torch .* finds 2 GPUs, numbered from 0: to run", problems(ready))
    ready.MODEL.DEVICE = "cpu"
    ready.SOLVER.AMP.ENABLED = True
    assert "set SOLVER.AMP.DTYPE to bfloat16" in problems(ready)
    ready.SOLVER.AMP.DTYPE = "half"
    assert "SOLVER.AMP.DTYPE is 'half'" in problems(ready)


def test_an_average_that_can_not_be_kept(ready):
    ready.MODEL_EMA.ENABLED, ready.MODEL_EMA.DECAY, ready.MODEL_EMA.DEVICE = True, 1.0, "gpu"
    text = problems(ready)
    assert "\n- MODEL_EMA.DECAY is 1.0, but must be at least 0 and below 1" in text
    assert "\n- MODEL_EMA.DEVICE is 'gpu', which torch does not know" in text


def test_everything_at_once(ready, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    ready.MODEL.WEIGHTS = str(tmp_path / "none.pth")
    ready.SOLVER.AMP.ENABLED = True
    assert problems(ready).count("\n- ") == 3


def on_timm(cfg):
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.WEIGHTS = "build_retinanet_timm_fpn_backbone", ""
    cfg.MODEL.TIMM.NAME = "mobilenetv2_050"
    return cfg


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("TIMM.NAME", "mobilenetv2_05", "MODEL.TIMM.NAME is 'mobilenetv2_05': timm"),
        (
            "TIMM.NAME",
            "vit_tiny_patch16_224",
            "MODEL.TIMM.NAME is 'vit_tiny_patch16_224', which takes images of",
        ),
        ("TIMM.NORM", "LN", "MODEL.TIMM.NORM is 'LN': set it to FrozenBN or BN or SyncBN"),
        (
            "TIMM.OUT_INDICES",
            [1, 2, 3],
            "MODEL.TIMM.OUT_INDICES is [1, 2, 3], of strides 4, 8, 16, but MODEL.FPN.IN_FEATURES",
        ),
        ("TIMM.FREEZE_AT", 9, "MODEL.TIMM.FREEZE_AT is 9, but"),
        ("TIMM.WEIGHTS", "none.pth", "MODEL.TIMM.WEIGHTS is none.pth: there is no such file in the working folder"),
        ("FPN.IN_FEATURES", ["res3", "res5"], "MODEL.FPN.IN_FEATURES is ['res3', 'res5'], but in a pyramid each"),
        ("FPN.IN_FEATURES", ["res5", "res4"], "MODEL.FPN.IN_FEATURES is ['res5', 'res4'], but in a pyramid each"),
        ("FPN.IN_FEATURES", ["res5", "res5"], "MODEL.FPN.IN_FEATURES is ['res5', 'res5'], but in a pyramid each"),
    ],
)
def test_a_backbone_of_timm_that_can_not_be_built(ready, key, value, message):
    pytest.importorskip("timm")
    cfg = on_timm(ready)
    check_inputs(YacsRun(cfg), eval_only=False, resume=False)
    cfg.merge_from_list([f"MODEL.{key}", value])
    found = [line for line in problems(cfg).splitlines() if line.startswith("- ")]
    assert len(found) == 1
    assert found[0].startswith(f"- {message}")


def test_weights_of_a_backbone_are_needed_at_the_start_alone(ready, tmp_path):
    pytest.importorskip("timm")
    cfg = on_timm(ready)
    cfg.MODEL.TIMM.WEIGHTS = "none.pth"
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    check_inputs(YacsRun(cfg), eval_only=True, resume=False)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    torch.save({"model": {}}, tmp_path / "output" / "model_0000001.pth")
    check_inputs(YacsRun(cfg), eval_only=False, resume=True)
    assert "MODEL.TIMM.WEIGHTS is none.pth" in problems(cfg)


def test_timm_that_is_not_installed(ready, monkeypatch):
    cfg = on_timm(ready)
    # As Python has it for a module that can't be found.
    monkeypatch.setitem(sys.modules, "timm", None)
    text = problems(cfg)
    assert "- MODEL.BACKBONE.NAME is build_retinanet_timm_fpn_backbone: backbones of timm need the package timm" in text
    assert "`pip install -e .[timm]`" in text


def test_advice_on_weights_names_the_keys_of_the_backbone(ready):
    ready.MODEL.WEIGHTS = "none.pth"
    assert "MODEL.RESNETS.NORM" in problems(ready)
    pytest.importorskip("timm")
    cfg = on_timm(ready)
    cfg.MODEL.WEIGHTS = "none.pth"
    text = problems(cfg)
    assert "set MODEL.WEIGHTS to '', MODEL.TIMM.FREEZE_AT to 0" in text and "MODEL.RESNETS" not in text
    cfg.MODEL.TIMM.WEIGHTS = "none.pth"
    assert (
        "to start with the backbone's weights alone, those of MODEL.TIMM.WEIGHTS, set MODEL.WEIGHTS to ''"
        in problems(cfg)
    )
