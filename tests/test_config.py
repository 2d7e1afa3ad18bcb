"""The configs in the project and how a config becomes a student's and a teacher's."""

import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog

from gkd_d2.config import config_differences, detector_config, read_config, teacher_config

DETECTORS = {"frcnn": "GeneralizedRCNN", "retinanet": "RetinaNet"}


def read(path, *opts):
    return read_config(str(path), list(opts))


@pytest.mark.parametrize("name", DETECTORS)
def test_kitti_configs(project, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = read(project / "configs" / f"gkd_{name}_kitti.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "GKDDistiller"
    assert cfg.GKD.STUDENT.INIT_FROM_TEACHER
    student, teacher = detector_config(cfg), teacher_config(cfg)
    baseline = read(project / "configs" / "baselines" / f"{name}_kitti.yaml")
    assert student.MODEL.META_ARCHITECTURE == teacher.MODEL.META_ARCHITECTURE == DETECTORS[name]
    assert (student.MODEL.RESNETS.DEPTH, teacher.MODEL.RESNETS.DEPTH) == (50, 101)
    assert student.MODEL.WEIGHTS.endswith("ImageNetPretrained/MSRA/R-50.pkl")
    assert teacher.MODEL.WEIGHTS == cfg.GKD.TEACHER.WEIGHTS
    assert read(cfg.GKD.TEACHER.CONFIG_FILE).OUTPUT_DIR == os.path.dirname(cfg.GKD.TEACHER.WEIGHTS)
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.WARMUP_ITERS) == (16, 500)
    # Of RetinaNet as in Detectron2's own config, and with the authors' limit on gradients.
    assert solver.BASE_LR == (0.02 if name == "frcnn" else 0.01)
    assert solver.CLIP_GRADIENTS.ENABLED == (name == "retinanet")
    # floor(0.8 * 7481) images.
    epoch = 5984 / 16
    assert solver.MAX_ITER == pytest.approx(12 * epoch, abs=2)
    assert solver.STEPS == pytest.approx((8 * epoch, 11 * epoch), abs=2)
    assert read(cfg.GKD.TEACHER.CONFIG_FILE).SOLVER.MAX_ITER == pytest.approx(24 * epoch, abs=4)
    # Baseline and distilled student differ in nothing but the distillation.
    for key in ("SOLVER", "INPUT", "DATASETS", "SEED"):
        assert baseline[key] == cfg[key]
    model = cfg.MODEL.clone()
    model.META_ARCHITECTURE = baseline.MODEL.META_ARCHITECTURE
    assert model == baseline.MODEL


@pytest.mark.parametrize("name", DETECTORS)
def test_configs_with_the_settings_of_the_authors(project, name):
    """They differ from the project's own in nothing but the distillation."""
    ours, theirs = (read(project / "configs" / f"gkd_{name}_kitti{end}.yaml") for end in ("", "_authors"))
    weights = theirs.GKD.LOSS_WEIGHTS
    assert weights.GRADIENT == {"frcnn": 0.5, "retinanet": 0.1}[name]
    assert weights.BOX == weights.ATTENTION == weights.IMAGE == 0
    assert theirs.GKD.STUDENT.INIT_FROM_TEACHER
    assert set(config_differences(ours, theirs)) <= {
        "OUTPUT_DIR",
        "GKD.WEIGHTING",
        "GKD.RECTIFIER",
        *(f"GKD.LOSS_WEIGHTS.{term}" for term in weights),
    }


@pytest.mark.parametrize("name", DETECTORS)
def test_coco_traffic_configs(project, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = read(project / "configs" / f"gkd_{name}_coco_traffic.yaml")
    baseline = read(project / "configs" / "baselines" / f"{name}_coco_traffic.yaml")
    assert cfg.GKD.STUDENT.INIT_FROM_TEACHER
    student, teacher = detector_config(cfg), teacher_config(cfg)
    assert student.MODEL.META_ARCHITECTURE == teacher.MODEL.META_ARCHITECTURE == DETECTORS[name]
    assert (student.MODEL.RESNETS.DEPTH, teacher.MODEL.RESNETS.DEPTH) == (50, 101)
    assert read(cfg.GKD.TEACHER.CONFIG_FILE).OUTPUT_DIR == os.path.dirname(cfg.GKD.TEACHER.WEIGHTS)
    for config in (student, teacher):
        head = config.MODEL.ROI_HEADS if name == "frcnn" else config.MODEL.RETINANET
        assert head.NUM_CLASSES == 13 == len(MetadataCatalog.get(config.DATASETS.TRAIN[0]).thing_classes)
        assert config.DATASETS.TEST == ("coco_traffic_val",)
        assert (config.INPUT.MIN_SIZE_TRAIN, config.INPUT.MAX_SIZE_TRAIN) == ((800,), 1333)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02 if name == "frcnn" else 0.01)
    assert read(cfg.GKD.TEACHER.CONFIG_FILE).SOLVER.MAX_ITER == 2 * cfg.SOLVER.MAX_ITER
    for key in ("SOLVER", "INPUT", "DATASETS", "SEED"):
        assert baseline[key] == cfg[key]


@pytest.mark.parametrize("name", DETECTORS)
def test_toy_configs(project, name):
    cfg = read(project / "configs" / "toy" / f"gkd_{name}.yaml")
    baseline = read(project / "configs" / "toy" / "baselines" / f"{name}.yaml")
    teacher = teacher_config(cfg)
    assert teacher.MODEL.META_ARCHITECTURE == detector_config(cfg).MODEL.META_ARCHITECTURE == DETECTORS[name]
    assert cfg.SOLVER == baseline.SOLVER
    assert teacher.SOLVER.MAX_ITER > cfg.SOLVER.MAX_ITER


@pytest.mark.parametrize(("found", "device"), [(True, "cuda"), (False, "cpu")])
def test_toy_configs_take_a_gpu_where_there_is_one(project, found, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    toy = project / "configs" / "toy"
    for path in (*toy.glob("*.yaml"), *toy.glob("*/*.yaml"), *(project / "configs/studies/networks").glob("*.yaml")):
        cfg = read(path)
        assert cfg.MODEL.DEVICE == device, path
        assert read(path, "MODEL.DEVICE", "cpu").MODEL.DEVICE == "cpu"
        assert read(path, "MODEL.DEVICE", "cuda:1").MODEL.DEVICE == "cuda:1"
        if cfg.GKD.TEACHER.CONFIG_FILE:
            cfg.GKD.TEACHER.WEIGHTS = "teacher.pth"
            assert teacher_config(cfg).MODEL.DEVICE == device
    # The others ask for GPUs, and get an error without one.
    assert read(project / "configs" / "gkd_frcnn_kitti.yaml").MODEL.DEVICE == "cuda"
    assert read(project / "configs" / "gkd_frcnn_kitti.yaml", "MODEL.DEVICE", "auto").MODEL.DEVICE == device


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


PATHS = "GKD: {TEACHER: {CONFIG_FILE: teacher.yaml, WEIGHTS: teacher.pth}}"


def test_teacher_is_found_in_the_working_folder_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = write(tmp_path / "configs" / "student.yaml", PATHS)
    for name in ("teacher.yaml", "teacher.pth"):
        write(tmp_path / "configs" / name, "")
    beside = {"CONFIG_FILE": f"{tmp_path}/configs/teacher.yaml", "WEIGHTS": f"{tmp_path}/configs/teacher.pth"}
    for path in (student, "configs/student.yaml"):
        assert read(path).GKD.TEACHER.items() >= beside.items()
    write(tmp_path / "teacher.yaml", "")
    write(tmp_path / "teacher.pth", "")
    teacher = read(student).GKD.TEACHER
    assert (teacher.CONFIG_FILE, teacher.WEIGHTS) == ("teacher.yaml", "teacher.pth")


def test_teacher_paths_of_a_base_are_relative_to_its_folder(tmp_path, monkeypatch):
    """Each key to the file in the chain that sets it, and an argument's to --config-file."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(tmp_path / "shared" / "deep" / "base.yaml", PATHS)
    write(tmp_path / "shared" / "base.yaml", "_BASE_: deep/base.yaml\nGKD: {TEACHER: {WEIGHTS: other.pth}}")
    student = write(tmp_path / "mine" / "student.yaml", "_BASE_: ../shared/base.yaml")
    for name in ("shared/deep/teacher.yaml", "shared/other.pth", "mine/teacher.yaml", "mine/other.pth", "mine/my.pth"):
        write(tmp_path / name, "VERSION: 2")
    teacher = read(student).GKD.TEACHER
    assert os.path.samefile(teacher.CONFIG_FILE, tmp_path / "shared" / "deep" / "teacher.yaml")
    assert os.path.samefile(teacher.WEIGHTS, tmp_path / "shared" / "other.pth")
    teacher = read(student, "GKD.TEACHER.WEIGHTS", "my.pth").GKD.TEACHER
    assert os.path.samefile(teacher.CONFIG_FILE, tmp_path / "shared" / "deep" / "teacher.yaml")
    assert teacher.WEIGHTS == f"{tmp_path}/mine/my.pth"
    # With a key of its own the student's file decides.
    write(student, "_BASE_: ../shared/base.yaml\nGKD: {TEACHER: {CONFIG_FILE: teacher.yaml}}")
    assert read(student).GKD.TEACHER.CONFIG_FILE == f"{tmp_path}/mine/teacher.yaml"


def test_a_teacher_that_is_nowhere_is_looked_for_in_both_folders(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(tmp_path / "shared" / "base.yaml", PATHS)
    cfg = read(write(tmp_path / "student.yaml", "_BASE_: shared/base.yaml"))
    with pytest.raises(FileNotFoundError) as error:
        teacher_config(cfg)
    assert f"GKD.TEACHER.CONFIG_FILE is '{tmp_path}/shared/teacher.yaml', which is no file." in str(error.value)
    assert f"the working folder, {tmp_path}/elsewhere" in str(error.value)
    # It may be trained yet.
    assert cfg.GKD.TEACHER.WEIGHTS == "teacher.pth"


def test_a_teacher_of_a_base_is_not_looked_for_beside_other_files(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    base = write(tmp_path / "base" / "base.yaml", PATHS)
    student = write(tmp_path / "mine" / "student.yaml", "_BASE_: ../base/base.yaml")
    for name in ("teacher.yaml", "teacher.pth"):
        write(tmp_path / "mine" / name, "VERSION: 2")
    for pairs in ([], ["SEED", "1"]):
        teacher = read(student, *pairs).GKD.TEACHER
        assert teacher.WEIGHTS == "teacher.pth"
        assert teacher.CONFIG_FILE == f"{tmp_path}/base/teacher.yaml"
    # What a file sets itself, be it the same name, and what the arguments set, is.
    beside = f"{tmp_path}/mine/teacher.pth"
    assert read(student, "GKD.TEACHER.WEIGHTS", "teacher.pth").GKD.TEACHER.WEIGHTS == beside
    write(student, "_BASE_: ../base/base.yaml\nGKD: {TEACHER: {WEIGHTS: teacher.pth}}")
    assert read(student).GKD.TEACHER.WEIGHTS == beside
    write(base.with_name("teacher.pth"), "")
    write(student, "_BASE_: ../base/base.yaml")
    assert os.path.samefile(read(student).GKD.TEACHER.WEIGHTS, base.with_name("teacher.pth"))


def test_a_config_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no config file {tmp_path}/none.yaml"):
        read(tmp_path / "none.yaml")


def test_a_distilled_student_can_be_a_teacher(distiller_config, tmp_path):
    """Its config says GKDDistiller, its checkpoint is a plain student's."""
    cfg = distiller_config("retinanet")
    (tmp_path / "distilled.yaml").write_text(cfg.dump())
    cfg.GKD.TEACHER.CONFIG_FILE = str(tmp_path / "distilled.yaml")
    teacher = teacher_config(cfg)
    assert teacher.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert teacher.MODEL.WEIGHTS == cfg.GKD.TEACHER.WEIGHTS


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASE_LR"], "the config key SOLVER.BASE_LR has no value"),
        (["MODEL.WEIGHTS", "SOLVER.MAX_ITER", "3"], "the config key MODEL.WEIGHTS has no value"),
        (["SOLVER.BASELR", "1"], "there is no config key 'SOLVER.BASELR', did you mean SOLVER.BASE_LR?"),
        (["solver.base_lr", "1"], "there is no config key 'solver.base_lr', did you mean SOLVER.BASE_LR?"),
        (["BASE_LR", "1"], "there is no config key 'BASE_LR', did you mean SOLVER.BASE_LR?"),
        (["SOLVER.BASE_LR=1"], "there is no config key 'SOLVER.BASE_LR=1', did you mean SOLVER.BASE_LR?"),
        (["QQQQ", "1"], "there is no config key 'QQQQ'"),
        (["SOLVER.BASE_LR", "low"], "SOLVER.BASE_LR is 'low', but must be of the type float, such as 0.04"),
        (["SOLVER.STEPS", "30"], "SOLVER.STEPS is '30', but must be of the type tuple, such as (160,)"),
        (["SOLVER", "30"], "SOLVER is '30', but must be a group of keys"),
        (["SEED", "1", "--resume"], "the option --resume comes after KEY VALUE pairs"),
        (["SEED", "1", "--num-gpus", "2"], "the option --num-gpus comes after KEY VALUE pairs"),
    ],
)
def test_mistakes_in_pairs(project, opts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(project / "configs" / "toy" / "gkd_frcnn.yaml", *opts)


def test_pairs(project):
    cfg = read(project / "configs/toy/gkd_frcnn.yaml", "MODEL.WEIGHTS", "", "SEED", "-1", "SOLVER.STEPS", "(3, 4)")
    assert (cfg.MODEL.WEIGHTS, cfg.SEED, cfg.SOLVER.STEPS) == ("", -1, (3, 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER:\n  BASELR: 1\n", "mine.yaml: there is no config key 'SOLVER.BASELR', did you mean SOLVER.BASE_LR?"),
        (
            "SOLVER:\n  BASE_LR: low\n",
            "mine.yaml: SOLVER.BASE_LR is 'low', but must be of the type float, such as 0.001",
        ),
        # YAML ends the value at the comma.
        ("SOLVER: {STEPS: (8,)}\n", "mine.yaml: SOLVER.STEPS is '(8', but must be of the type tuple, such as (30000,)"),
        ("SOLVER: 3\n", "mine.yaml: SOLVER is 3, but must be a group of keys"),
        ("SOLVER: [\n", "mine.yaml: while parsing a flow node"),
        ("a: b: c\n", "mine.yaml: mapping values are not allowed here"),
        ("", "mine.yaml: it must hold config keys and their values in YAML"),
        ("SOLVER\n", "mine.yaml: it must hold config keys and their values in YAML"),
    ],
)
def test_mistakes_in_files(distiller_config, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path / "mine.yaml")
    # A teacher's file is read in the same way.
    cfg = distiller_config("retinanet")
    cfg.GKD.TEACHER.CONFIG_FILE = str(tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match=re.escape(message)):
        teacher_config(cfg)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"a": "_BASE_: none.yaml"}, FileNotFoundError, "a.yaml: its _BASE_ none.yaml does not exist"),
        (
            {"a": "_BASE_: sub/b.yaml", "sub/b": "_BASE_: none.yaml"},
            FileNotFoundError,
            "sub/b.yaml: its _BASE_ sub/none.yaml does not exist",
        ),
        ({"a": "_BASE_: ."}, OSError, "a.yaml: its _BASE_ . can't be read"),
        ({"a": "_BASE_: a.yaml"}, ValueError, "a.yaml: its _BASE_ a.yaml is based on it in turn"),
        (
            {"a": "_BASE_: sub/b.yaml", "sub/b": "_BASE_: ../a.yaml"},
            ValueError,
            "sub/b.yaml, the _BASE_ of a.yaml: its _BASE_ sub/../a.yaml is based on it in turn",
        ),
        (
            {"a": "_BASE_: b.yaml", "b": ""},
            ValueError,
            "b.yaml, the _BASE_ of a.yaml: it must hold config keys and their values in YAML",
        ),
        (
            {"a": "_BASE_: b.yaml", "b": "SOLVER"},
            ValueError,
            "b.yaml, the _BASE_ of a.yaml: it must hold config keys and their values in YAML",
        ),
        (
            {"a": "_BASE_: b.yaml", "b": "SOLVER: ["},
            ValueError,
            "b.yaml, the _BASE_ of a.yaml: while parsing a flow node",
        ),
        (
            {"a": "_BASE_: b.yaml\nSOLVER: {SEED: 1}", "b": "SOLVER: 1"},
            ValueError,
            "a.yaml: Cannot inherit key 'SOLVER' from base!",
        ),
        ({"a": "_BASE_: 3"}, ValueError, "a.yaml: it must hold config keys and their values in YAML"),
        ({"a": "VERSION: 3"}, ValueError, "a.yaml: VERSION is 3, but Detectron2's configs have versions up to 2"),
    ],
)
def test_mistakes_in_chains_of_files(files, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        write(tmp_path / f"{name}.yaml", text)
    with pytest.raises(error) as raised:
        read("a.yaml")
    assert str(raised.value).startswith(message)


def test_two_files_can_have_one_base(tmp_path):
    write(tmp_path / "base.yaml", "SEED: 3")
    for name in "ab":
        write(tmp_path / f"{name}.yaml", "_BASE_: base.yaml")
    assert read(write(tmp_path / "both.yaml", "_BASE_: [a.yaml, b.yaml]\nVERSION: 2")).SEED == 3


def test_each_file_is_read_once(tmp_path):
    from detectron2.config import CfgNode

    opened = []
    write(tmp_path / "base.yaml", "SEED: 3")
    path = write(tmp_path / "mine.yaml", "_BASE_: base.yaml")
    open_cfg = CfgNode._open_cfg
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CfgNode, "_open_cfg", lambda name: opened.append(name) or open_cfg(name))
        read(path)
    assert opened == [str(path), str(tmp_path / "base.yaml")]


def test_a_config_of_an_earlier_version_is_upgraded(tmp_path):
    cfg = read(write(tmp_path / "old.yaml", "MODEL: {WEIGHT: old.pkl}\nGKD: {METHOD: pkd}"))
    assert (cfg.VERSION, cfg.MODEL.WEIGHTS, cfg.GKD.METHOD) == (2, "old.pkl", "pkd")


def test_an_unknown_device_is_named(project):
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'gpu', which torch does not know: give cuda"):
        read(project / "configs" / "toy" / "gkd_frcnn.yaml", "MODEL.DEVICE", "gpu")


HOSTILE = '!!python/object/apply:os.mkdir ["hacked"]'


@pytest.mark.parametrize("value", [HOSTILE, "!!python/object/new:os.mkdir [hacked]", "!!python/tuple [1]", "!mine 3"])
def test_a_config_runs_no_code(value, distiller_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.yaml", f"SOLVER:\n  STEPS: {value}\n")
    write(tmp_path / "above.yaml", "_BASE_: mine.yaml\n")
    cfg = distiller_config("retinanet")
    cfg.GKD.TEACHER.CONFIG_FILE = "mine.yaml"
    end = f"mine.yaml{{}}: line 2: the tag {value.split()[0]} is not read, as such tags may run code: write the value "
    readers = {
        end.format(""): lambda: read("mine.yaml"),
        end.format(", the _BASE_ of above.yaml"): lambda: read("above.yaml"),
        "mine.yaml: line 2": lambda: teacher_config(cfg),
    }
    for message, reader in readers.items():
        with pytest.raises(ValueError) as error:
            reader()
        assert str(error.value).startswith(message)
    assert not (tmp_path / "hacked").exists()


def test_pairs_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"SOLVER.STEPS is '{re.escape(HOSTILE)}', but must be of the type tuple"):
        read(write(tmp_path / "mine.yaml", "SEED: 1"), "SOLVER.STEPS", HOSTILE)
    assert not (tmp_path / "hacked").exists()


def test_python_code_is_no_config(tmp_path):
    write(tmp_path / "lazy.py", "model = 3")
    with pytest.raises(ValueError, match="lazy.py: it is Python code, as of Detectron2's LazyConfig: name a config in"):
        read(tmp_path / "lazy.py")


@pytest.mark.parametrize("sizes", ["32, 64, 128, 256, 512 ", "8,16.5,32"])
def test_the_scales_of_detectron2s_retinanet_are_read(sizes, tmp_path):
    """Its Base-RetinaNet.yaml, and configs of many projects, have Python compute them."""
    text = Path(model_zoo.get_config_file("Base-RetinaNet.yaml")).read_text()
    assert "!!python/object/apply:eval" in text
    path = tmp_path / "base.yaml"
    path.write_text(text.replace("32, 64, 128, 256, 512 ", sizes))
    (tmp_path / "mine.yaml").write_text("_BASE_: base.yaml\n")
    expected = get_cfg()
    expected.merge_from_file(str(path), allow_unsafe=True)
    cfg = read(tmp_path / "mine.yaml")
    assert cfg.MODEL.ANCHOR_GENERATOR.dump() == expected.MODEL.ANCHOR_GENERATOR.dump()
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == yaml.safe_load(f"[{sizes}]")[0]


def test_no_other_expression_is_computed(tmp_path):
    text = Path(model_zoo.get_config_file("Base-RetinaNet.yaml")).read_text()
    for expression in ("for x in [32, __import__('os').mkdir('hacked')", "for x in open('hacked', 'w'"):
        path = tmp_path / "mine.yaml"
        path.write_text(re.sub(r"for x in \[32[^\]]*", expression, text))
        assert "hacked" in path.read_text()
        with pytest.raises(ValueError, match="line 8: the tag !!python/object/apply:eval is not read"):
            read(path)


def test_a_dumped_config_has_no_tags(project, tmp_path):
    """Its tuples and texts are read again as they were."""
    cfg = read(project / "configs" / "toy" / "gkd_frcnn.yaml", "MODEL.WEIGHTS", "!!python/none")
    path = write(tmp_path / "dumped.yaml", cfg.dump())
    assert "!!python/tuple" not in path.read_text()
    assert config_differences(read(path), cfg) == {}


@pytest.mark.parametrize(
    "text",
    ["SEED: " + "[" * 3000 + "]" * 3000, "MODEL: &model {BACKBONE: *model}", "_BASE_: mine.yaml\nMODEL: &a {A: *a}"],
    ids=["deep", "itself", "its base"],
)
def test_values_without_end_are_refused(text, tmp_path):
    path = write(tmp_path / "above.yaml", text)
    write(tmp_path / "mine.yaml", "MODEL: &model {BACKBONE: *model}")
    with pytest.raises(ValueError, match="yaml: it holds values within values without end, or too deep"):
        read(path)


def test_scales_beyond_all_numbers_are_refused(tmp_path):
    text = Path(model_zoo.get_config_file("Base-RetinaNet.yaml")).read_text()
    path = write(tmp_path / "mine.yaml", text.replace("32, 64, 128, 256, 512 ", "9" * 400))
    with pytest.raises(ValueError, match="mine.yaml: int too large to convert to float"):
        read(path)
