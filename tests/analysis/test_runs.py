"""What is read from the folders of runs, and which runs belong together."""

import shutil

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from tiny import detector_config

from gkd_d2.analysis.runs import Run, find_baselines, find_runs, find_teacher, shared_dataset, training_differences


def config(kind="retinanet", *, datasets=("val",), **options):
    cfg = detector_config(kind, **options)
    cfg.DATASETS.TEST = datasets
    return cfg


def test_with_the_method_none_a_student_is_trained_alone(make_run, distiller_config):
    runs = []
    for method in ("gkd", "fgd", "none"):
        cfg = distiller_config("retinanet")
        cfg.GKD.METHOD = method
        runs.append(make_run(method, cfg, []))
    assert [run.distilled for run in runs] == [True, True, False]
    assert find_baselines(runs[1], runs) == [runs[2]]


def test_a_resumed_runs_later_rows_win(make_run):
    run = make_run(
        "run",
        config(),
        [
            {"iteration": 19, "total_loss": 5.0, "loss_cls": 3.0},
            {"iteration": 39, "total_loss": 4.0, "loss_cls": 2.0, "bbox/AP": 9.0},
            {"iteration": 40, "bbox/AP": 7.0, "bbox/AP50": 20.0, "bbox/AP-Car": 7.0},
            # Resumed from iteration 20.
            {"iteration": 39, "total_loss": 3.0, "loss_cls": 1.0},
            {"iteration": 40, "bbox/AP": 11.0, "bbox/AP50": 30.0, "kitti/AP_moderate": 8.0},
            {"iteration": 59, "total_loss": 2.5, "loss_cls": 0.5, "loss_box_reg": 2.0, "loss_bmfi_attention": 0.0},
        ],
    )
    assert run.curve("total_loss") == {19: 5.0, 39: 3.0, 59: 2.5}
    # What the resumed run did not write again stays.
    assert run.curve("bbox/AP") == {39: 9.0, 40: 11.0}
    assert run.metrics("val") == {"bbox/AP": 11.0, "bbox/AP50": 30.0, "bbox/AP-Car": 7.0, "kitti/AP_moderate": 8.0}
    assert run.iterations() == 60
    assert run.losses() == ["total_loss", "loss_box_reg", "loss_cls"]


def test_several_datasets_have_their_own_metrics(make_run):
    rows = [{"iteration": 9, "a/bbox/AP": 1.0, "b/bbox/AP": 2.0, "b/bbox/AP50": 3.0, "total_loss": 1.0}]
    run = make_run("both", config(datasets=("a", "b")), rows)
    assert run.metrics("a") == {"bbox/AP": 1.0}
    assert run.metrics("b") == {"bbox/AP": 2.0, "bbox/AP50": 3.0}
    single = make_run("single", config(datasets=("b",)), [{"iteration": 9, "bbox/AP": 5.0}])
    other = make_run("other", config(datasets=("c",)), [])
    assert shared_dataset([run, single]) == "b"
    with pytest.raises(ValueError, match="all evaluated on a, b: choose one of them by --dataset"):
        shared_dataset([run])
    with pytest.raises(ValueError, match="no dataset that all runs .*both: a, b; .*other: c"):
        shared_dataset([run, other])
    with pytest.raises(ValueError, match="single is evaluated on b, not on a"):
        single.metrics("a")


def test_what_a_folder_lacks_is_said_by_its_name(make_run, tmp_path):
    run = make_run("untested", config(), [{"iteration": 19, "total_loss": 5.0}])
    with pytest.raises(ValueError, match=r"untested was never evaluated: its metrics.json holds no bbox/AP"):
        run.metrics("val")
    (run.folder / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="untested holds no metrics.json: nothing was trained there"):
        Run("again", run.folder).metrics("val")
    (run.folder / "config.yaml").write_text("MODEL: {NO_SUCH_KEY: 1}\n")
    with pytest.raises(ValueError, match="untested.config.yaml: .*NO_SUCH_KEY"):
        _ = Run("again", run.folder).config
    with pytest.raises(FileNotFoundError, match="nowhere holds no config.yaml"):
        _ = Run("nowhere", tmp_path / "nowhere").config


def test_runs_are_called_by_what_distinguishes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "out/teachers/frcnn", tmp_path / "out/baselines/frcnn", tmp_path / "out/gkd"]
    assert [run.name for run in find_runs(folders)] == ["teachers/frcnn", "baselines/frcnn", "gkd"]
    assert [run.name for run in find_runs([folders[0].relative_to(tmp_path)])] == ["frcnn"]


def test_damaged_lines_are_left_out_with_one_warning(make_run, caplog):
    run = make_run("damaged", config(), [])
    whole = [b'{"iteration": 19, "total_loss": 5.0}', b'{"iteration": 39, "bbox/AP": 7.0}']
    # Cut by a full disk; ended by a resume; filled with zeros by a power cut; not of this file.
    bad = [b'{"iteration": 25, "total_l', b'{"iteration": 2{"iteration": 9}', bytes(40), b"\xff", b"[1]", b'{"a": 1}']
    bad += [b"[" * 100_000, b'{"iteration": 39, "bbox/AP": [1]}', b'{"iteration": 39, "bbox/AP": null}']
    (run.folder / "metrics.json").write_bytes(b"\n".join([whole[0], *bad, whole[1]]))
    assert run.history == {19: {"total_loss": 5.0}, 39: {"bbox/AP": 7.0}}
    assert run.metrics("val") == {"bbox/AP": 7.0}
    (message,) = caplog.messages
    path = run.folder / "metrics.json"
    assert message == f"{path}: left out 9 damaged lines, number 2, 3, 4, 5, 6, 7, 8, 9, ..."


@pytest.mark.parametrize("content", ['[{"image_id": 1, "sc', "[1]", '{"a": 1}', "3"])
def test_damaged_detections_are_named(make_run, content):
    run = make_run("cut", config(), [])
    path = run.folder / "inference" / "val" / "coco_instances_results.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"coco_instances_results.json is cut or damaged .*: evaluate the run again"):
        run.detections("val", 0.5)


@pytest.fixture
def family(make_run, distiller_config, tmp_path):
    """A student distilled, the same alone, another student, and the teacher."""
    distilled = distiller_config("retinanet", teacher_channels=16, teacher_width=16, channels=8)
    teacher = make_run("teacher", config(channels=16, width=16), [])
    shutil.copy(tmp_path / "teacher.pth", teacher.folder / "model_final.pth")
    distilled.GKD.TEACHER.WEIGHTS = str(teacher.folder / "model_final.pth")
    distilled.MODEL.WEIGHTS = "backbone.pth"
    runs = {
        "distilled": make_run("distilled", distilled, []),
        "alone": make_run("alone", config(channels=8), []),
        "wider": make_run("wider", config(channels=8, width=24), []),
        "teacher": teacher,
    }
    return runs, distilled


def test_the_baseline_has_the_students_model(family):
    runs, _ = family
    assert find_baselines(runs["distilled"], list(runs.values())) == [runs["alone"]]
    assert find_baselines(runs["distilled"], [runs["distilled"], runs["wider"], runs["teacher"]]) == []


def test_the_teacher_is_found_by_weights_then_config_then_size(family, make_run):
    runs, cfg = family
    assert find_teacher(runs["distilled"], list(runs.values())) == runs["teacher"]
    # Weights moved: the config file tells.
    cfg.GKD.TEACHER.WEIGHTS = "moved/model_final.pth"
    moved = make_run("moved", cfg, [])
    assert find_teacher(moved, [runs["wider"], runs["teacher"], runs["alone"], moved]) == runs["teacher"]
    # That is gone too: the largest.
    cfg.GKD.TEACHER.CONFIG_FILE = "gone.yaml"
    lost = make_run("lost", cfg, [])
    assert runs["wider"].parameters > runs["teacher"].parameters > runs["alone"].parameters
    assert find_teacher(lost, [runs["teacher"], runs["wider"], runs["alone"], lost]) == runs["wider"]
    assert find_teacher(lost, [runs["alone"], lost]) is None


def test_a_student_as_large_as_its_teacher_is_no_baseline_of_itself(make_run, distiller_config, tmp_path):
    cfg = distiller_config("retinanet", teacher_channels=8, teacher_width=8, channels=8, width=8)
    teacher = make_run("teacher", config(channels=8, width=8), [])
    alone = make_run("alone", config(channels=8, width=8), [])
    cfg.GKD.TEACHER.WEIGHTS = str(teacher.folder / "model_final.pth")
    distilled = make_run("distilled", cfg, [])
    assert find_teacher(distilled, [alone, teacher, distilled]) == teacher
    assert find_baselines(distilled, [alone, teacher, distilled]) == [alone]


def test_differences_that_may_explain_a_gain(family, make_run):
    runs, _ = family
    cfg = config(channels=8)
    cfg.SOLVER.MAX_ITER = 7
    cfg.OUTPUT_DIR = "elsewhere"
    cfg.MODEL.DEVICE = "cuda"
    other = make_run("other", cfg, [])
    different = training_differences(runs["distilled"], other)
    assert different.pop("SOLVER.MAX_ITER") == (40000, 7)
    assert different.pop("MODEL.WEIGHTS") == ("backbone.pth", "")
    assert different.pop("DATASETS.TEST") == ((), ("val",))
    assert different == {}


def test_network_has_the_weights_of_the_last_checkpoint(family):
    run = family[0]["alone"]
    assert not run.has_checkpoint
    torch.manual_seed(5)
    model = build_model(config(channels=8))
    DetectionCheckpointer(model, str(run.folder)).save("model_0000004")
    assert run.has_checkpoint
    assert torch.equal(run.network.head.cls_score.weight, model.head.cls_score.weight)
    assert not run.network.training
    assert run.parameters == sum(parameter.numel() for parameter in model.parameters())
