"""Which runs belong together."""

import shutil

import pytest

from gkd_d2.analysis.roles import find_baselines, find_roles, find_teacher, training_differences


def test_roles(runs):
    assert find_roles(runs) == {
        "teacher": "teacher",
        "alone": "student alone",
        "again": "student alone",
        "distilled": "student distilled",
        "other": "",
    }


def test_with_the_method_none_a_student_is_trained_alone(make_run, distiller_config):
    runs = []
    for method in ("gkd", "fgd", "none"):
        cfg = distiller_config("retinanet")
        cfg.GKD.METHOD = method
        runs.append(make_run(method, cfg, []))
    cfg.GKD.METHOD, cfg.GKD.METHODS = "gkd", ["gkd", "fgd"]
    runs.append(make_run("both", cfg, []))
    assert [run.distilled for run in runs] == [True, True, False, True]
    assert find_baselines(runs[1], runs) == find_baselines(runs[3], runs) == [runs[2]]


@pytest.fixture
def family(make_run, distiller_config, tmp_path, evaluated_config):
    """A student distilled, the same alone, another student, and the teacher."""
    distilled = distiller_config("retinanet", teacher_channels=16, teacher_width=16, channels=8)
    teacher = make_run("teacher", evaluated_config(channels=16, width=16), [])
    shutil.copy(tmp_path / "teacher.pth", teacher.folder / "model_final.pth")
    distilled.GKD.TEACHER.WEIGHTS = str(teacher.folder / "model_final.pth")
    distilled.MODEL.WEIGHTS = "backbone.pth"
    runs = {
        "distilled": make_run("distilled", distilled, []),
        "alone": make_run("alone", evaluated_config(channels=8), []),
        "wider": make_run("wider", evaluated_config(channels=8, width=24), []),
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


def test_a_student_as_large_as_its_teacher_is_no_baseline_of_itself(
    make_run, distiller_config, tmp_path, evaluated_config
):
    cfg = distiller_config("retinanet", teacher_channels=8, teacher_width=8, channels=8, width=8)
    teacher = make_run("teacher", evaluated_config(channels=8, width=8), [])
    alone = make_run("alone", evaluated_config(channels=8, width=8), [])
    cfg.GKD.TEACHER.WEIGHTS = str(teacher.folder / "model_final.pth")
    distilled = make_run("distilled", cfg, [])
    assert find_teacher(distilled, [alone, teacher, distilled]) == teacher
    assert find_baselines(distilled, [alone, teacher, distilled]) == [alone]


def test_differences_that_may_explain_a_gain(family, make_run, evaluated_config):
    runs, _ = family
    cfg = evaluated_config(channels=8)
    cfg.SOLVER.MAX_ITER = 7
    cfg.OUTPUT_DIR = "elsewhere"
    cfg.MODEL.DEVICE = "cuda"
    other = make_run("other", cfg, [])
    different = training_differences(runs["distilled"], other)
    assert different.pop("SOLVER.MAX_ITER") == (40000, 7)
    assert different.pop("MODEL.WEIGHTS") == ("backbone.pth", "")
    assert different.pop("DATASETS.TEST") == ((), ("val",))
    assert different == {}
